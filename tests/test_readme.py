"""Runs the README's commands as printed, in a copy of the repository with few posts."""

import importlib.util
import lzma
import os
import re
import shutil
import subprocess
import sys

import pytest

from hashvision.synthetic import draw
from places import REPO

README = (REPO / "README.md").read_text()
WORDNET = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE LexicalResource SYSTEM "http://globalwordnet.github.io/schemas/WN-LMF-1.1.dtd">
<LexicalResource xmlns:dc="https://globalwordnet.github.io/schemas/dc/">
<Lexicon id="small" label="Small" language="en" email="a@b.c" license="none" version="1">
<LexicalEntry id="w0"><Lemma writtenForm="dog" partOfSpeech="n"/><Sense id="s0" synset="n0"/>
</LexicalEntry><Synset id="n0" ili="in" partOfSpeech="n" lexfile="noun.animal"/>
</Lexicon></LexicalResource>
"""
COMMANDS = [
    line
    for block in re.findall(r"^```\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if re.match(r"(bash|git|pip|python) ", line)
]


def runs_here(command):
    """Whether a command works without Google's cloud and without the network."""
    return not re.search(r"gs://|^git clone|^pip install", command)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the repository with this environment, few posts, few steps and a small network."""
    place = tmp_path_factory.mktemp("clone") / "hashvision"
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, check=True, capture_output=True)
    for name in tracked.stdout.decode().splitlines():
        if (REPO / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, place / name)
    (place / ".venv" / "bin").mkdir(parents=True)
    (place / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (place / ".venv" / "bin" / "python").chmod(0o755)
    shutil.copy(REPO / "requirements.txt", place / ".venv")
    recipe = place / "configs" / "demo.py"
    few = """    config.steps, config.data.crops = 4, ((1, 32, 0.2, 1.0),)
    config.model.unroll = 1
    return config"""
    recipe.write_text(recipe.read_text().replace("    return config", few))
    networks = place / "hashvision" / "models" / "regnet.py"
    demo = re.compile(r'"regnety_200mf": RegNetParameters\(.*?\)')
    small, found = demo.subn(
        '"regnety_200mf": RegNetParameters(2, 8, 8.0, 2.0, 8)', networks.read_text()
    )
    assert found == 1
    networks.write_text(small)
    draw.write(str(place / "runs" / "drawn" / "posts"), 120, 3)
    for name in ("posts.jsonl", "images"):
        (place / name).symlink_to(place / "runs" / "drawn" / "posts" / name)
    (place / "flowers").symlink_to(place / "runs" / "drawn" / "posts" / "transfer")
    with lzma.open(place / "oewn-2025.xml.xz", "wt") as file:
        file.write(WORDNET)
    (place / "removals.csv").write_text("kind,value,reason,received_at\nowner,nobody,,\n")
    return place


def test_the_commands_of_the_readme_are_found():
    assert len(COMMANDS) > 8 and sum(map(runs_here, COMMANDS)) > 5


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if runs_here(c)])
def test_a_command_runs_as_it_is_printed(place, command):
    if " plan " in command and importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU's compiler, is not installed")
    environment = {
        **os.environ,
        "PATH": f"{place / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout and "Traceback" not in done.stderr


def test_the_readme_names_every_command_recipe_script_and_room():
    usage = subprocess.run(
        [sys.executable, "-m", "hashvision", "--help"],
        cwd=REPO,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    listed = re.findall(r"^    ([a-z]+) ", usage, re.MULTILINE)
    assert set(listed) == set(re.findall(r"^\| `([a-z]+)` \|", README, re.MULTILINE))
    for path in (REPO / "configs").glob("*.py"):
        assert re.search(rf"[`/]{path.stem}[:.`]", README)
    for path in (REPO / "launch").glob("*.sh"):
        if path.name not in ("setup.sh", "worker.sh"):  # other scripts use them
            assert path.name in README
    drawn = re.findall(r"^  ([a-z]+(?:/|\.py)) ", README, re.MULTILINE)
    rooms = [path for path in (REPO / "hashvision").iterdir() if path.name[0] != "_"]
    assert sorted(drawn) == sorted(path.name + "/" * path.is_dir() for path in rooms)
