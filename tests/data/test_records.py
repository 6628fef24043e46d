"""Tests of writing and parsing shards, indexes and lists of copies."""

import numpy as np
import tensorflow as tf

from hashvision.data import keys, records

KEY = keys.Key(bytes(range(32)))


def test_index_offsets_are_where_the_records_begin(tmp_path):
    counts = np.array([5, 2, 9])
    rows = [
        records.Record(f"id{i}é", f"owner{i}", b"\xff\xd8" * (i * 100 + 1), labels, bytes([i] * 32))
        for i, labels in enumerate([(0,), (0, 1), (2,), (0, 2)])
    ]
    index, copies = records.write_shard(tmp_path / "shard", rows, counts, KEY)
    assert index.dtype == records.INDEX_DTYPE and records.INDEX_DTYPE.itemsize == 36
    assert copies.dtype == records.COPIES_DTYPE and copies.shape == (0,)
    assert index["rarest"].tolist() == [5, 2, 9, 5]
    for row, offset, name in zip(rows, index["offset"], index["id"], strict=True):
        # Parse the format by hand: u64 length, u32 CRC, then the bytes.
        raw = (tmp_path / "shard").read_bytes()[offset:]
        length = int.from_bytes(raw[:8], "little")
        parsed = records.parse(tf.constant(raw[12 : 12 + length]))
        assert parsed["id"].numpy().decode() == row.id
        assert parsed["owner"].numpy().decode() == row.owner
        assert parsed["image"].numpy() == row.image
        assert tuple(parsed["labels"].numpy()) == row.labels
        assert name == KEY.hash("id", row.id)
    assert index["owner"].tolist() == [KEY.hash("owner", row.owner) for row in rows]
    assert index["photo"].tolist() == [KEY.hash("sha256", bytes([i] * 32)) for i in range(4)]


def test_an_index_without_a_key_equals_version_1(tmp_path):
    row = records.Record("id", "owner", b"", (), bytes([7] * 32))
    index, _ = records.write_shard(tmp_path / "shard", [row], np.array([]), keys.NO_KEY)
    assert index[["id", "owner"]].tolist() == [(records.id_hash("id"), records.id_hash("owner"))]
    assert index["photo"].tolist() == [0x0707070707070707]


def test_copies_are_listed_with_the_record_that_shows_them(tmp_path):
    def copy(number):
        return records.Copy(f"c{number}", f"u{number}", bytes([number] * 32))

    whole = records.Record("id", "owner", b"", (), bytes(32))
    rows = [whole, whole._replace(copies=(copy(1), copy(2))), whole._replace(copies=(copy(3),))]
    _, copies = records.write_shard(tmp_path / "shard", rows, np.array([]), KEY)
    assert copies["record"].tolist() == [1, 1, 2] and records.COPIES_DTYPE.itemsize == 32
    found = {(int(row["record"]), int(row["id"])) for row in copies}
    assert found == {(n, KEY.hash("id", name)) for n, name in ((1, "c1"), (1, "c2"), (2, "c3"))}
    assert copies["owner"][2] == KEY.hash("owner", "u3")
    assert copies["photo"][2] == KEY.hash("sha256", bytes([3] * 32))
    # Their order does not depend on the order in which they were found.
    rows[1] = whole._replace(copies=(copy(2), copy(1)))
    again = records.write_shard(tmp_path / "shard", rows, np.array([]), KEY)[1]
    np.testing.assert_array_equal(copies, again)


def test_unpaired_surrogates_in_an_id_do_not_stop_a_run():
    record = records.Record("bad\ud800", "u", b"", (0,), b"")
    assert records.id_hash(record.id) != records.id_hash("bad")
    assert KEY.hash("id", record.id) != KEY.hash("id", "bad")
    assert records.parse(tf.constant(records.serialize(record)))["id"].numpy() == b"bad?"
