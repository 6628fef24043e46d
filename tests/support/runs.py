"""Starts training runs as processes, waits for them, and reads what they write; for tests."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

import datasets
from full_disk import NOTHING_COMPILED
from hashvision.commands.main import main
from places import REPO

TINY = """
import base
from hashvision.models import regnet

regnet.PARAMETERS["tiny"] = regnet.RegNetParameters(2, 8, 8.0, 2.0, 8)


def get_config():
    config = base.get_config()
    config.batch_size = 16
    config.steps = 24
    config.data.photo_size = 56
    config.data.crops = ((1, 24, 0.3, 1.0),)
    config.model.name = "tiny"
    config.model.dtype = "float32"
    config.optimizer.learning_rate = 0.2
    config.optimizer.average = 0.9
    config.log_every = 1
    config.checkpoint.every = 5
    return config
"""

TINY_SWAV = """
import tiny


def get_config():
    config = tiny.get_config()
    config.data.sampling = "natural"
    config.data.crops = ((2, 24, 0.3, 1.0), (2, 12, 0.1, 0.3))
    config.objective.name = "swav"
    config.swav.prototypes = 12
    config.swav.head = (16, 8)
    config.swav.queue = 32
    config.swav.queue_start = 4
    config.swav.frozen_steps = 2
    # Low, so that the rounding of other numbers of hosts changes losses by about 1e-6 only.
    config.optimizer.learning_rate = 0.02
    return config
"""

WITH_TINY = """
import sys

import tiny
from hashvision.commands.main import main

sys.exit(main())
"""


def make(folder):
    """Writes a dataset and recipes of tiny networks, with a copy of base.py, into a folder."""
    datasets.write(folder / "dataset")
    (folder / "base.py").write_text((REPO / "configs" / "base.py").read_text())
    (folder / "tiny.py").write_text(TINY)
    (folder / "tiny_swav.py").write_text(TINY_SWAV)
    (folder / "with_tiny.py").write_text(WITH_TINY)
    return folder


PROGRAM = ("-m", "hashvision")


def start(
    place,
    run,
    *overrides,
    command="train",
    dataset="dataset",
    config="tiny",
    environment=(),
    program=PROGRAM,
    largest_file=None,
    **options,
):
    """Starts `train`, or another command with its flags; `options` go to Popen.

    If `largest_file` is given, no file may grow beyond that many kB, as on a full disk.
    """
    if command != "train":  # reads no recipe, which would add the tiny network
        program = (place / "with_tiny.py",)
    limit = ["bash", "-c", f'ulimit -f {largest_file}; exec "$@"', "--"] if largest_file else []
    words = [*limit, sys.executable, *program, command, f"--workdir={place / run}"]
    if command == "train":
        words += [f"--config={place / config}.py", f"--config.dataset={place / dataset}"]
    words += overrides
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": str(REPO),
        **(NOTHING_COMPILED if largest_file else {}),
        **dict(environment),
    }
    return subprocess.Popen(
        words,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=place,
        **options,
    )


def start_hosts(place, run, hosts, *overrides, only=None, environment=(), **options):
    """Starts a run of several hosts, each a process in its own process group."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for host in range(hosts) if only is None else only:
        variables = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(hosts),
            "JAX_PROCESS_ID": str(host),
            **dict(environment),
        }
        started.append(
            start(place, run, *overrides, environment=variables, process_group=0, **options)
        )
    return started


def kill_host(process):
    """Kills a host's training and watching processes with SIGKILL, as a power cut does."""
    os.killpg(process.pid, signal.SIGKILL)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def all_finish(processes):
    """(exit code, stdout, stderr) of each."""
    with_output = [None] * len(processes)

    def wait(number):
        with_output[number] = finish(processes[number])

    threads = [threading.Thread(target=wait, args=(n,)) for n in range(len(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return with_output


def until(process, path, step):
    """Waits until metrics.jsonl has a line of `step` or later; fails if the process ends first."""
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and any(
            json.loads(line)["step"] >= step for line in path.read_text().splitlines()[:-1]
        ):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[1]}")


def curve(place, run):
    lines = [json.loads(line) for line in (place / run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["learning_rate"]) for line in lines if "loss" in line}


def arrays(place, run, step=24):
    path = place / run / "checkpoints" / str(step) / "default"
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.metadata(path).item_metadata.tree
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), found
        )
        return jax.tree.map(np.asarray, checkpointer.restore(path, shapes))


def same(place, one, other):
    assert curve(place, one) == curve(place, other)
    a, b = arrays(place, one), arrays(place, other)
    assert len(jax.tree.leaves(a)) > 20
    jax.tree.map(np.testing.assert_array_equal, a, b)


def newest_checkpoint(place, run):
    """The folder of the newest complete checkpoint, or None."""
    found = [path for path in (place / run).glob("checkpoints/*") if path.name.isdigit()]
    return max(found, key=lambda path: int(path.name), default=None)


def difference(one, other):
    """The largest difference of two trees of arrays, relative to each array's largest entry."""
    shares = [
        float(np.max(np.abs(a.astype(float) - b)) / max(np.max(np.abs(a)), 1e-12))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        if a.size
    ]
    return max(shares)


def train_here(place, run, *overrides, dataset="dataset", config="tiny"):
    """Runs `train` in this process, on its 8 devices: (exit code, stdout, stderr).

    It imports nothing again, but can be neither killed nor compared bit by bit with a run on one
    device.
    """
    words = ["train", f"--workdir={place / run}", f"--config={place / config}.py"]
    words += [f"--config.dataset={place / dataset}", *overrides]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            code = main(words)
    return code, out.getvalue(), err.getvalue()


def refused(place, run, *overrides, **options):
    """The one sentence of a `train` that must fail with exit code 2."""
    code, _, err = train_here(place, run, *overrides, **options)
    assert code == 2 and "Traceback" not in err, err
    lines = [line for line in err.splitlines() if line.startswith("hashvision: ")]
    assert len(lines) == 1
    return lines[0]


def killed(place, run, config):
    """Starts a run and kills it at step 17 with SIGKILL."""
    process = start(place, run, config=config)
    until(process, place / run / "metrics.jsonl", 17)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL


def killed_and_restarted(place, run, config):
    """Kills a run at step 17 with SIGKILL, then resumes it to its end."""
    killed(place, run, config)
    code, out, err = finish(start(place, run, config=config))
    assert code == 0, err
    assert "steps 15 to 24" in out or "steps 10 to 24" in out or "steps 20 to 24" in out
