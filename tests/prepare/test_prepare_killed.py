"""Tests of `prepare` runs that are killed at various moments and repeated."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from datasets import jpeg
from hashvision.prepare import folder
from runs import REPO


def contents(path):
    return {each.name: each.read_bytes() for each in sorted(path.iterdir())}


def start(place, output):
    return subprocess.Popen(
        [sys.executable, "-m", "hashvision", "prepare", f"--posts={place / 'posts.jsonl'}"]
        + [f"--output={place / output}", "--minimum_count=2", f"--key={place / 'key'}"],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    )


def found(folder, pattern):
    """Files in a folder whose contents change meanwhile."""
    try:
        return list(folder.glob(pattern))
    except FileNotFoundError:
        return []


@pytest.mark.slow
def test_a_killed_run_repeated_makes_the_same_bytes(tmp_path):
    lines = []
    for number in range(300):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
        post = {"id": f"p{number}", "image": f"{number}.jpg", "visibility": "public"}
        lines.append(json.dumps({**post, "text": "#dog" if number % 2 else "#tree"}))
    (tmp_path / "posts.jsonl").write_text("\n".join(lines))
    whole = start(tmp_path, "whole")
    assert whole.communicate()[0] and whole.returncode == 0
    wanted = contents(tmp_path / "whole")
    # Kill the run when such a file appears: its folder, spool files, shards, the vocabulary.
    for sign in ("", "/spool/*", "/index-*", "/vocabulary.json"):
        running = start(tmp_path, "killed")
        while running.poll() is None and not found(tmp_path, f"killed.preparing-*{sign}"):
            time.sleep(0.001)
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
        if sign != "/vocabulary.json":  # the run may end first
            assert list(tmp_path.glob("killed.preparing-*")) and not (tmp_path / "killed").exists()
        if (tmp_path / "killed").exists():
            assert contents(tmp_path / "killed") == wanted
    running = start(tmp_path, "killed")
    assert running.communicate()[0] and running.returncode == 0
    assert contents(tmp_path / "killed") == wanted
    assert not list(tmp_path.glob("killed.preparing-*"))


def test_a_dataset_moved_away_by_a_killed_run_comes_back(tmp_path):
    output = tmp_path / "set"
    former = tmp_path / "set.preparing-abcdef01-former"
    former.mkdir()
    manifest = {"hashvision": "0.1.0", "options": {}, "shards": []}
    (former / "manifest.json").write_text(json.dumps(manifest))
    with folder.make_staging(str(output)):
        assert (output / "manifest.json").exists() and not former.exists()
