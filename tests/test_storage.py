"""Files that are whole after a power cut, and what goes wrong named; buckets are in test_gs.py."""

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
    """What is put on the disk, and renamed, in order; names without the random part."""
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


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_it_counts(done, tmp_path):
    storage.write(str(tmp_path / "place" / "config.json"), "{}")
    assert done == [("sync", "config"), ("rename", "config"), ("sync", "place")]


def test_a_shard_is_on_the_disk_before_it_has_its_name(done, tmp_path):
    rows = [datasets.record(0, datasets.jpeg(0), (0,))]
    folder.write_shard(str(tmp_path), 0, 1, rows, np.ones(1, np.int64), NO_KEY)
    shard = done.index(("rename", "posts-train"))
    assert done[shard - 1 : shard + 2] == [
        ("sync", "posts-train"),
        ("rename", "posts-train"),
        ("sync", tmp_path.name),
    ]


def test_a_folder_that_knows_no_sync_is_passed_over_and_a_disk_that_fails_is_not(
    tmp_path, monkeypatch
):
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


def test_a_write_that_fails_names_its_file(tmp_path):
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        with storage.add_path_to_errors("/dev/full"), storage.open("/dev/full", "wb") as file:
            file.write(b"x")


def test_urls_of_local_files_and_empty_paths_are_no_paths():
    cases = [("file:///a/b", "give its path, /a/b"), ("file://", ","), ("", "empty")]
    cases += [(url, "incomplete URL") for url in ("gs://", "://", "gs:///", "://bucket")]
    for path, words in cases:
        with pytest.raises(UserError, match=words):
            storage.absolute(path)
