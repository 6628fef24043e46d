"""The doors of doors.py that need separate processes: environments, and two commands at once."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator

import datasets
from hashvision.errors import UserError
from places import REPO

if typing.TYPE_CHECKING:
    import doors


Case = tuple[str, Callable[[], typing.Any]]


def environments(world: doors.World, generator: random.Random) -> Iterator[Case]:
    """Commands with faulty environments, working folders and outputs."""
    nowhere, file = str(world.folder / "nowhere"), _posts(world)
    demo = f"--config={REPO / 'configs' / 'demo.py'}"
    variables: list[dict[str, str | None]] = [
        {name: value}
        for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR")
        for value in (None, "", nowhere, str(file), "/dev/null", "relative")
    ]
    variables += [
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"TZ": "Nowhere/Atall"},
        {"COLUMNS": "1"},
        {"COLUMNS": "x"},
        {"PYTHONOPTIMIZE": "2"},
        {"USER": None, "LOGNAME": None},
    ]
    cases: list[tuple[str, dict[str, typing.Any]]] = [
        (", ".join(f"{name}={value}" for name, value in each.items()), {"env": _environment(each)})
        for each in variables
    ]
    for name in ("x", "tpu,x", "cuda"):  # for `train`, which asks JAX for devices
        cases.append((f"JAX_PLATFORMS={name}", {"env": _environment({"JAX_PLATFORMS": name})}))
    cases += [
        ("a full stdout", {"stdout": "/dev/full"}),
        ("a folder that is gone", {"cwd": world.folder / "gone"}),
        ("24 files at once", {"files": 24}),
    ]

    def call(what: str, given: dict[str, typing.Any]) -> None:
        scratch = _scratch(world)
        commands = {
            "draw": ["draw", f"--output={scratch / 'drawné'}", "--posts=20"],
            "prepare": _prepare(file, scratch / "seté"),
            "audit": ["audit", f"--removals={_removals(world)}", f"--dataset={world.dataset}"],
            "config": ["config", demo],
            "train": ["train", demo, f"--workdir={scratch / 'run'}", f"--config.dataset={nowhere}"],
        }
        if "cwd" in given:
            given["cwd"].mkdir(exist_ok=True)
        with open(given.get("stdout", "/dev/null"), "w") as write:
            process = _start(commands[what], **{**given, "stdout": write})
            if "cwd" in given:
                given["cwd"].rmdir()
            _judge(process, what)

    while True:
        generator.shuffle(cases)
        for described, given in cases:
            what = generator.choice(("draw", "prepare", "audit", "config"))
            what = "train" if described.startswith("JAX") else what
            yield f"{what}, {described}", lambda what=what, given=given: call(what, given)


def two_at_once(world: doors.World, generator: random.Random) -> Iterator[Case]:
    """Two commands on one folder, the first sometimes killed; the output is complete or absent."""
    posts, removals = _posts(world), _removals(world)

    def call(first: str, second: str, wait: float, killed: bool) -> None:
        scratch = _scratch(world)
        output = scratch / "set"
        commands = {
            "prepare": _prepare(posts, output),
            "draw": ["draw", f"--output={output}", "--posts=20"],
            "audit": ["audit", f"--removals={removals}", f"--dataset={output}", "--verify"],
        }
        one = _start(commands[first])
        time.sleep(wait)
        other = _start(commands[second])
        if killed:
            time.sleep(wait)
            one.send_signal(signal.SIGKILL)
        refusals = []
        for process, what in ((one, first), (other, second)):
            try:
                _judge(process, what, killed=killed and process is one)
            except UserError as refusal:
                refusals.append(refusal)
        # A later command finds the folder as one of the two left it, and no stale lock.
        done = output.is_dir() and "draw" not in (first, second)
        if done:
            _judge(_start(commands["audit"]), "audit")
        elif first == second == "prepare":
            _judge(_start(commands["prepare"]), "prepare")
        left = [path.name for path in scratch.iterdir() if ".preparing-" in path.name]
        if done and not killed and left:
            raise AssertionError(f"{left} is left over")
        if refusals:
            raise refusals[0]

    pairs = [pair for pair in itertools.product(("prepare", "draw", "audit"), repeat=2)
             if pair != ("audit", "audit")]  # fmt: skip
    while True:
        first, second = generator.choice(pairs)
        wait, killed = generator.choice([0, 0.5, 2, 4]), generator.random() < 0.3
        name = f"{first} and {second}" + (", the first killed" if killed else "")
        yield name, lambda given=(first, second, wait, killed): call(*given)


def _prepare(posts: pathlib.Path, output: pathlib.Path) -> list[str]:
    given = ["--minimum_count=1", "--short_side=32", f"--posts={posts}", f"--output={output}"]
    return ["prepare", *given]


def _environment(changes: dict[str, str | None]) -> dict[str, str]:
    """This process's environment with changes; None removes a variable."""
    changed = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu", **changes}
    return {name: value for name, value in changed.items() if value is not None}


def _start(
    command: list[str], *, files: int | None = None, **options: typing.Any
) -> subprocess.Popen[str]:
    """Starts a hashvision command; `files` limits the number of open files."""
    limit = ["bash", "-c", f'ulimit -n {files}; exec "$@"', "--"] if files else []
    options = {"env": _environment({}), "stdout": subprocess.PIPE, **options}
    return subprocess.Popen(
        [*limit, sys.executable, "-m", "hashvision", *command],
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        **options,
    )


def _judge(process: subprocess.Popen[str], what: str, killed: bool = False) -> None:
    """Waits for a command; raises UserError with its refusal, and AssertionError for a fault."""
    try:
        _, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise AssertionError("it hangs") from None
    code = process.returncode
    fine = {0, 2} | ({1} if what == "audit" else set()) | ({-signal.SIGKILL} if killed else set())
    if code not in fine or "Traceback" in err:
        raise AssertionError(f"exit code {code}: {err[-600:]}")
    if code == 2:
        *_, sentence = err.strip().split("hashvision: ")
        raise UserError(sentence)


def _scratch(world: doors.World) -> pathlib.Path:
    """An empty folder that everyone may write to."""
    shutil.rmtree(world.scratch, ignore_errors=True)
    world.scratch.mkdir()
    world.scratch.chmod(0o777)
    return world.scratch


def _posts(world: doors.World) -> pathlib.Path:
    """A dump of four posts, each with a tag that is not ASCII."""
    posts = world.folder / "a few" / "posts.jsonl"
    if not posts.exists():
        posts.parent.mkdir()
        for parent in (posts.parent, *posts.parent.parents):
            if parent.stat().st_uid == os.geteuid() and parent.is_relative_to(world.folder):
                parent.chmod(0o755)
        lines = []
        for number in range(4):
            photo = datasets.jpeg(number)
            (posts.parent / f"{number}.jpg").write_bytes(photo)
            post = {"id": str(number), "image": f"{number}.jpg", "owner": "u"}
            lines.append(json.dumps({**post, "text": "#año #dog", "visibility": "public"}))
        posts.write_text("\n".join(lines) + "\n")
    return posts


def _removals(world: doors.World) -> pathlib.Path:
    """A removal list that matches nothing."""
    path = world.folder / "removals.csv"
    path.write_text("kind,value,reason,received_at\nid,nobody,asked,2020-01-01\n")
    return path
