"""Tests that files on disk survive power cuts, and that storage errors name the file."""

import errno
import os

import numpy as np
import pytest

import datasets
from hashvision import storage
from hashvision.data.keys import NO_KEY
from hashvision.errors import UserError
from hashvision.prepare import folder


@pytest.fixture
def done(monkeypatch):
    """Records syncs and renames in order, with names up to the first dot."""
    events, fsync, replace = [], os.fsync, os.replace

    def named(path):
        return os.path.basename(path).split(".", 1)[0]

    def sync(file):
        fsync(file)
        events.append(("sync", named(os.readlink(f"/proc/self/fd/{file}"))))

    def rename(path, target):
        replace(path, target)
        events.append(("rename", named(target)))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    return events


def test_write_syncs_the_file_then_renames_it_then_syncs_the_folder(done, tmp_path):
    storage.write(str(tmp_path / "place" / "config.json"), "{}")
    assert done == [("sync", "config"), ("rename", "config"), ("sync", "place")]


def test_write_shard_syncs_the_file_before_renaming_it(done, tmp_path):
    rows = [datasets.record(0, datasets.jpeg(0), (0,))]
    folder.write_shard(str(tmp_path), 0, 1, rows, np.ones(1, np.int64), NO_KEY)
    shard = done.index(("rename", "posts-train"))
    assert done[shard - 1 : shard + 2] == [
        ("sync", "posts-train"),
        ("rename", "posts-train"),
        ("sync", tmp_path.name),
    ]


def test_sync_ignores_unsupported_folders_but_not_disk_errors(tmp_path, monkeypatch):
    def fail(number):
        def fsync(_):
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", fail(errno.EINVAL))
    storage.write(str(tmp_path / "a"), "b")
    monkeypatch.setattr(os, "fsync", fail(errno.EIO))
    with pytest.raises(OSError, match="/c.*partial"):
        storage.write(str(tmp_path / "c"), "d")
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_write_names_its_file(tmp_path):
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        with storage.add_path_to_errors("/dev/full"), storage.open("/dev/full", "wb") as file:
            file.write(b"x")


def test_file_urls_incomplete_urls_and_empty_paths_are_refused():
    cases = [("file:///a/b", "give its path, /a/b"), ("file://", ","), ("", "empty")]
    cases += [(url, "incomplete URL") for url in ("gs://", "://", "gs:///", "://bucket")]
    for path, words in cases:
        with pytest.raises(UserError, match=words):
            storage.absolute(path)
