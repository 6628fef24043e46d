"""A run that is harmed again and again must end as one that nothing happened to.

python tests/support/chaos.py [--kills=20] [--seed=0] [--steps=200] [--folder=DIR]

Two processes train a tiny network. At drawn moments a host, or all, are killed (SIGKILL), told to
stop (SIGTERM), find the disk full, the newest checkpoint damaged or a shard damaged; in between the
run goes on with 1, 2 or 4 hosts. At the end every step of every attempt must have been shown the
same records with the same crops as in a run that was left alone, and the parameters must be the
same (to rounding, as other numbers of hosts add up in another order).
"""

import argparse
import collections
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

import runs

HARMS = (
    "sigkill one",
    "sigkill all",
    "sigterm",
    "disk full",
    "damaged checkpoint",
    "damaged shard",
)
PATIENCE = 240  # seconds for anything
AGAIN = 75


class Attempt:
    """One start of the run, on some hosts, to its end or to the harm done to it."""

    def __init__(self, place, run, hosts, *overrides, full=False):
        seen = place / f"{run}-seen"
        seen.mkdir(exist_ok=True)
        witness = {"CHAOS_SEEN": str(seen)}
        self.processes = runs.start_hosts(
            place,
            run,
            hosts,
            "--config.data.broken=0",
            "--config.hosts.lost=6",
            *overrides,
            program=[str(runs.REPO / "tests" / "support" / "chaos_train.py")],
            environment=witness,
            largest_file=20 if full else None,
        )
        self.ended = [None] * hosts
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
        return self.ended


def step_of(place, run):
    """The last step that the run has told of."""
    path = place / run / "metrics.jsonl"
    if not path.exists():
        return 0
    lines = path.read_text().splitlines()
    try:
        return max((json.loads(line)["step"] for line in lines[-2:]), default=0)
    except ValueError:
        return 0


def until(place, run, attempt, step):
    """Waits for a step, or for the attempt to end before it; whether it goes on."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if not attempt.running():
            return False
        if step_of(place, run) >= step:
            return True
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def harm_checkpoint(path, rng):
    """Truncates, changes or takes away one of the files that hold arrays."""
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


def chaos(place, run, harms, steps, seed):
    """Runs to the last step, harmed in between; returns what happened, a line each."""
    rng, happened = random.Random(seed), []
    rounds = [rng.sample(HARMS, len(HARMS)) for _ in range(-(-harms // len(HARMS)))]
    kinds = sum(rounds, [])[:harms]
    if kinds[0] == "damaged checkpoint":
        kinds.append(kinds.pop(0))  # there is none yet
    overrides = (f"--config.steps={steps}",)
    for number, kind in enumerate(kinds):
        hosts = rng.choice((2, 2, 2, 4))
        reached = step_of(place, run)
        target = reached + rng.randint(1, max(1, 2 * (steps - reached) // (harms - number + 2)))
        newest = runs.newest_checkpoint(place, run)
        if kind == "damaged checkpoint" and newest:
            kind += f" ({harm_checkpoint(newest, rng)})"
        attempt = Attempt(place, run, hosts, *overrides, full=kind == "disk full")
        goes_on = until(place, run, attempt, target)
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
            wanted |= {2}
        ended = attempt.wait()
        if kind == "damaged shard":
            shard.write_bytes(sound)
        codes = [code for code, _, _ in ended]
        said = [line for _, out, err in ended for line in (out + err).splitlines()]
        told = [
            line for line in said if line.startswith(("hashvision: ", "The checkpoint", "Stopped"))
        ]
        happened.append(
            f"{number + 1:3}. {kind}, {hosts} hosts, from step {reached} to {step_of(place, run)}:"
            f" exit codes {codes}"
        )
        print(happened[-1], *[f"       {line[:150]}" for line in told], sep="\n", flush=True)
        if goes_on and not set(codes) <= wanted:
            raise AssertionError(f"exit codes {codes} after {kind}: {ended}")
        if kind.startswith("damaged checkpoint (") and "is damaged" not in " ".join(told):
            raise AssertionError(f"nothing was said of a damaged checkpoint: {ended}")
    attempt = Attempt(place, run, 2, *overrides)
    ended = attempt.wait()
    if [code for code, _, _ in ended] != [0, 0]:
        raise AssertionError(f"the last attempt: {ended}")
    return happened


def batches(place, run):
    """What was shown: {(step, hosts): {host: its parts of the batch, of all attempts}}."""
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
    """Asserts that both runs were shown the same; returns how many parts were compared."""
    whole = {}
    for (step, hosts), parts in batches(place, one).items():
        if len(parts) == hosts:
            (rows,) = {sum(rows, ()) for rows in _products(parts, hosts)}
            whole[step] = rows
    compared, trained = 0, set()
    for (step, hosts), parts in batches(place, other).items():
        if step not in whole:
            continue  # read ahead of the last step
        rows = whole[step]
        size = len(rows) // hosts
        for host, seen in parts.items():
            assert seen == {rows[host * size : (host + 1) * size]}, f"step {step} differs"
            compared += 1
        if len(parts) == hosts:
            trained.add(step)
    assert trained >= set(range(steps)), "some step was never shown whole"
    return compared


def _products(parts, hosts):
    for host in range(hosts):
        assert len(parts[host]) == 1, "one host was shown two batches for one step"
    yield tuple(next(iter(parts[host])) for host in range(hosts))


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
    print("A run that nothing happens to, on 2 hosts:", flush=True)
    ended = Attempt(place, "whole", 2, f"--config.steps={arguments.steps}").wait()
    assert [code for code, _, _ in ended] == [0, 0], ended
    print(f"The same, harmed {arguments.kills} times:", flush=True)
    chaos(place, "harmed", arguments.kills, arguments.steps, arguments.seed)
    compared = compare(place, "whole", "harmed", arguments.steps)
    one = runs.arrays(place, "whole", arguments.steps)
    other = runs.arrays(place, "harmed", arguments.steps)
    print(f"{compared:,} parts of batches were shown, the same records and crops in each.")
    worst = runs.difference(one, other)
    print(f"Final state: largest difference {worst:.2g} of an array's largest entry.")
    assert worst < 1e-3
    print(f"Survived, in {time.monotonic() - started:.0f} s.")
    if not arguments.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
