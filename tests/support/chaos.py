"""Checks that a run with many random faults ends like an undisturbed one.

python tests/support/chaos.py [--kills=20] [--seed=0] [--steps=200] [--folder=DIR]

Processes, one per host, train a tiny network. At random moments one host or all of them are killed
(SIGKILL) or stopped (SIGTERM), or find the disk full, the newest checkpoint damaged or a shard
damaged. After each fault the run resumes on 2 or 4 hosts. At the end, every step of every attempt
must have been shown the same records with the same crops as in an undisturbed run, and the
parameters must be equal up to rounding (other numbers of hosts sum in another order).
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import typing

import runs

FAULTS = (
    "sigkill one",
    "sigkill all",
    "sigterm",
    "disk full",
    "damaged checkpoint",
    "damaged shard",
)
PATIENCE = 240  # seconds to wait for a step or an end
AGAIN = 75


class Attempt:
    """One start of the run on some hosts, up to its end or the next fault."""

    def __init__(self, place, run, hosts, *overrides, full=False):
        seen = place / f"{run}-seen"
        seen.mkdir(exist_ok=True)
        environment = {"CHAOS_SEEN": str(seen)}
        self.processes = runs.start_hosts(
            place,
            run,
            hosts,
            "--config.data.broken=0",
            "--config.hosts.lost=6",
            *overrides,
            program=[str(runs.REPO / "tests" / "support" / "chaos_train.py")],
            environment=environment,
            largest_file=20 if full else None,
        )
        self.ended: list[typing.Any] = [None] * hosts
        self._threads = [threading.Thread(target=self._wait, args=(n,)) for n in range(hosts)]
        for thread in self._threads:
            thread.start()

    def _wait(self, number):
        self.ended[number] = runs.finish(self.processes[number])

    def running(self):
        return any(thread.is_alive() for thread in self._threads)

    def wait(self):
        """(exit code, stdout, stderr) of each host."""
        for thread in self._threads:
            thread.join(PATIENCE)
        ended = [host for host in self.ended if host is not None]
        assert len(ended) == len(self.ended), "a host did not end"
        return ended


def step_of(place, run):
    """The last step in the run's metrics.jsonl."""
    path = place / run / "metrics.jsonl"
    if not path.exists():
        return 0
    lines = path.read_text().splitlines()
    try:
        return max((json.loads(line)["step"] for line in lines[-2:]), default=0)
    except ValueError:
        return 0


def until(place, run, attempt, step):
    """Waits until the run reaches a step; returns False if the attempt ends before."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if not attempt.running():
            return False
        if step_of(place, run) >= step:
            return True
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def damage_checkpoint(path, rng):
    """Truncates, changes or deletes one of the files that hold arrays; returns which."""
    file = rng.choice(sorted(path.glob("default/d/*")))
    raw = bytearray(file.read_bytes())
    kind = rng.choice(("cut", "changed", "gone"))
    if kind == "gone":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(raw[: rng.randrange(len(raw))])
    else:
        for _ in range(8):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        file.write_bytes(raw)
    return kind


def chaos(place, run, *, faults, steps, seed):
    """Runs to the last step with that many faults; returns a line for each of them."""
    rng, happened = random.Random(seed), []
    rounds = [rng.sample(FAULTS, len(FAULTS)) for _ in range(-(-faults // len(FAULTS)))]
    kinds = sum(rounds, [])[:faults]
    if kinds[0] == "damaged checkpoint":
        kinds.append(kinds.pop(0))  # there is no checkpoint yet
    overrides = (f"--config.steps={steps}",)
    for number, kind in enumerate(kinds):
        hosts = rng.choice((2, 2, 2, 4))
        reached = step_of(place, run)
        target = reached + rng.randint(1, max(1, 2 * (steps - reached) // (faults - number + 2)))
        newest = runs.newest_checkpoint(place, run)
        if kind == "damaged checkpoint" and newest:
            kind += f" ({damage_checkpoint(newest, rng)})"
        repair = None
        attempt = Attempt(place, run, hosts, *overrides, full=kind == "disk full")
        reached_target = until(place, run, attempt, target)
        wanted = {AGAIN}
        victim = rng.randrange(hosts)
        if kind == "sigkill one":
            runs.kill_host(attempt.processes[victim])
            wanted |= {-signal.SIGKILL}
        elif kind == "sigkill all":
            for process in attempt.processes:
                runs.kill_host(process)
            wanted = {-signal.SIGKILL}
        elif kind == "sigterm" or kind.startswith("damaged checkpoint"):
            attempt.processes[victim].send_signal(signal.SIGTERM)
        elif kind == "disk full":
            wanted |= {2}
        elif kind == "damaged shard":
            shard = rng.choice(sorted((place / "dataset").glob("*.tfrecord-*")))
            sound = shard.read_bytes()
            middle = len(sound) // 2
            shard.write_bytes(sound[:1000] + bytes(middle) + sound[1000 + middle :])
            repair = functools.partial(shard.write_bytes, sound)
            wanted |= {2}
        ended = attempt.wait()
        if repair:
            repair()
        codes = [code for code, _, _ in ended]
        printed = [line for _, out, err in ended for line in (out + err).splitlines()]
        messages = [
            line
            for line in printed
            if line.startswith(("hashvision: ", "The checkpoint", "Stopped"))
        ]
        happened.append(
            f"{number + 1:3}. {kind}, {hosts} hosts, from step {reached} to {step_of(place, run)}:"
            f" exit codes {codes}"
        )
        print(happened[-1], *[f"       {line[:150]}" for line in messages], sep="\n", flush=True)
        if reached_target and not set(codes) <= wanted:
            raise AssertionError(f"exit codes {codes} after {kind}: {ended}")
        if kind.startswith("damaged checkpoint (") and "is damaged" not in " ".join(messages):
            raise AssertionError(f"no message names the damaged checkpoint: {ended}")
    attempt = Attempt(place, run, 2, *overrides)
    ended = attempt.wait()
    if [code for code, _, _ in ended] != [0, 0]:
        raise AssertionError(f"the last attempt: {ended}")
    return happened


def batches(place, run):
    """The batches shown: {(step, hosts): {host: its part of the batch in each attempt}}."""
    sessions = collections.defaultdict(dict)
    for path in sorted((place / f"{run}-seen").glob("*.jsonl")):
        host, hosts = (int(part) for part in path.name.split("-")[:3:2])
        for line in path.read_text().splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                continue  # cut short by a kill
            part = tuple(zip(found["keys"], found["ids"], strict=True))
            sessions[found["step"], hosts].setdefault(host, set()).add(part)
    return sessions


def compare(place, one, other, steps):
    """Asserts that both runs were shown the same batches; returns how many parts were compared."""
    whole = {}
    for (step, hosts), parts in batches(place, one).items():
        if len(parts) == hosts:
            whole[step] = _whole_batch(parts, hosts)
    compared, trained = 0, set()
    for (step, hosts), parts in batches(place, other).items():
        if step not in whole:
            continue  # a batch read ahead after the last step
        rows = whole[step]
        size = len(rows) // hosts
        for host, seen in parts.items():
            assert seen == {rows[host * size : (host + 1) * size]}, f"step {step} differs"
            compared += 1
        if len(parts) == hosts:
            trained.add(step)
    assert trained >= set(range(steps)), "some step was never shown on all hosts"
    return compared


def _whole_batch(parts, hosts):
    """The batch of a step, joined from the parts of its hosts."""
    for host in range(hosts):
        assert len(parts[host]) == 1, "one host was shown two batches for one step"
    return sum((next(iter(parts[host])) for host in range(hosts)), ())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder")
    arguments = parser.parse_args(argv)
    folder = pathlib.Path(arguments.folder or tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    place = runs.make(folder)
    started = time.monotonic()
    print("An undisturbed run on one host:", flush=True)
    ended = Attempt(place, "whole", 1, f"--config.steps={arguments.steps}").wait()
    assert [code for code, _, _ in ended] == [0], ended
    print(f"The same run with {arguments.kills} faults:", flush=True)
    chaos(place, "harmed", faults=arguments.kills, steps=arguments.steps, seed=arguments.seed)
    compared = compare(place, "whole", "harmed", arguments.steps)
    one = runs.arrays(place, "whole", arguments.steps)
    other = runs.arrays(place, "harmed", arguments.steps)
    print(f"All {compared:,} parts of batches hold the same records and crops.")
    worst = runs.difference(one, other)
    print(f"Final state: largest difference {worst:.2g} of an array's largest entry.")
    assert worst < 1e-3
    print(f"Survived, in {time.monotonic() - started:.0f} s.")
    if not arguments.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
