"""Tests of a run's notes on its starts, of its lock, and of the cache of compiled programs."""

import json
import os
import stat

import jax
import pytest

import datasets
from hashvision.config import recipes
from hashvision.data import removals
from hashvision.errors import UserError
from hashvision.training import compilation, loop, run
from runs import REPO


@pytest.fixture
def workdir(tmp_path):
    folder = datasets.write(tmp_path / "set")
    manifest = json.loads((folder / "manifest.json").read_text())
    content = {"dataset": str(folder), "manifest": manifest}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "dataset.json").write_text(json.dumps(content))
    return str(tmp_path / "run")


def test_starts_are_appended_and_a_restart_replaces_later_ones(workdir):
    path = os.path.join(workdir, "removed.jsonl")
    noted = []
    for step in (0, 10, 20, 10, 15):
        run.note_start(workdir, step, removals.NOTHING)
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
        assert lines[:-1] == noted and json.loads(lines[-1])["step"] == step
        noted = lines
    assert [start["step"] for start in run.starts(workdir)] == [0, 10, 15]


def times(folder):
    return {name: os.stat(os.path.join(folder, name)).st_mtime_ns for name in os.listdir(folder)}


def test_a_second_run_is_refused_and_writes_nothing(workdir):
    config = recipes.load(str(REPO / "configs" / "demo.py"), ["--config.dataset=nowhere"])
    with run.lock(workdir):
        before = times(workdir)
        with pytest.raises(
            UserError, match=f"{workdir} is in use by process {os.getpid()} .*workdir"
        ):
            loop.train(config, workdir)
        after = times(workdir)
    assert after == before and os.listdir(workdir) == ["dataset.json"]


# Compiled programs


@pytest.fixture
def use_cache(monkeypatch, capsys):
    """Calls compilation.use_cache; returns the folder it chose, or None, and what it printed."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def ask():
        jax.config.update("jax_compilation_cache_dir", None)
        compilation.use_cache()
        return jax.config.jax_compilation_cache_dir, capsys.readouterr().out

    return ask


def test_compiled_programs_are_cached_in_the_users_cache_folder(use_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".cache" / "hashvision" / "compiled"
    old = os.umask(0)
    try:
        assert use_cache() == (str(folder), "")
    finally:
        os.umask(old)
    for path in (folder, folder.parent, folder.parent.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert use_cache() == (str(folder), "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert use_cache() == (str(tmp_path / "xdg" / "hashvision" / "compiled"), "")


def test_no_folder_that_others_may_write_to_is_used(use_cache, tmp_path, monkeypatch):
    def is_refused(why):
        folder, said = use_cache()
        assert folder is None and said.count("\n") == 1 and why in said

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parent, folder = tmp_path / "hashvision", tmp_path / "hashvision" / "compiled"
    for path in (parent, folder):
        folder.mkdir(0o700, parents=True, exist_ok=True)
        path.chmod(0o770)
        is_refused(f"others may write to {path})")
        path.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 54321)
        is_refused(f"{parent} belongs to another user)")
    folder.rmdir()
    (tmp_path / "planted").mkdir()
    os.symlink(tmp_path / "planted", folder)
    is_refused(f"{folder} is not a folder)")
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    is_refused("File exists)")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    is_refused("this user has no home folder)")


def test_a_folder_that_the_user_has_chosen_is_kept(use_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert (
        use_cache() == (None, "") and not (tmp_path / "xdg").exists()
    )  # JAX reads the variable itself
