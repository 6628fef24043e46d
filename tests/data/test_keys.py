"""Tests of dataset keys and their hashes."""

import os
import stat
import threading

import pytest

from hashvision.data import keys, records
from hashvision.errors import UserError


def test_a_key_is_made_once_and_readable_by_this_user_only(tmp_path):
    path = tmp_path / "new" / "set.key"
    key = keys.make(str(path))
    assert keys.make(str(path)) == key and len(key.secret) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.make(str(tmp_path / "other.key")) != key
    assert os.listdir(path.parent) == ["set.key"]


def test_concurrent_makers_of_a_key_get_the_same(tmp_path):
    path, found = str(tmp_path / "set.key"), []
    ready = threading.Barrier(8)

    def make():
        ready.wait()
        found.append(keys.make(path))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len({*found}) == 1


def test_a_key_is_made_on_a_disk_without_hard_links(tmp_path, monkeypatch):
    def none(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    key = keys.make(str(tmp_path / "set.key"))
    assert keys.read(str(tmp_path / "set.key")) == key
    assert os.listdir(tmp_path) == ["set.key"]


def test_hashes_differ_by_key_and_kind_and_do_not_reveal_the_key():
    one, other = keys.Key(bytes(32)), keys.Key(b"\1" * 32)
    hashes = [key.hash(kind, "anna") for key in (one, other) for kind in ("id", "owner")]
    assert len({*hashes, records.id_hash("anna")}) == 5
    assert one.hash("id", "anna") == one.hash("id", "anna") and 0 <= hashes[0] < 2**64
    assert one.hash("sha256", bytes(32)) != other.hash("sha256", bytes(32))
    assert one.id != other.id and len(one.id) == 16
    assert "00" not in repr(one) and "secret" not in repr(one)


def test_without_a_key_hashes_are_those_of_version_1():
    assert keys.NO_KEY.hash("owner", "anna") == records.id_hash("anna")
    assert keys.NO_KEY.hash("sha256", b"\1" + bytes(31)) == 1
    assert keys.NO_KEY.id is None


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set.key cannot be read .Not a directory"):
        keys.make(str(tmp_path / "file" / "set.key"))
