import numpy as np
import tensorflow as tf

from hashvision.data import records


def test_index_offsets_are_where_the_records_begin(tmp_path):
    counts = np.array([5, 2, 9])
    rows = [
        records.Record(f"id{i}é", f"owner{i}", b"\xff\xd8" * (i * 100 + 1), labels, bytes([i] * 32))
        for i, labels in enumerate([(0,), (0, 1), (2,), (0, 2)])
    ]
    index = records.write_shard(tmp_path / "shard", rows, counts)
    assert index.dtype == records.INDEX_DTYPE and records.INDEX_DTYPE.itemsize == 36
    assert index["rarest"].tolist() == [5, 2, 9, 5]
    for row, offset, name in zip(rows, index["offset"], index["id"], strict=True):
        # The plain reading of the format: u64 length, u32 CRC, then the bytes.
        raw = (tmp_path / "shard").read_bytes()[offset:]
        length = int.from_bytes(raw[:8], "little")
        parsed = records.parse(tf.constant(raw[12 : 12 + length]))
        assert parsed["id"].numpy().decode() == row.id
        assert parsed["owner"].numpy().decode() == row.owner
        assert parsed["image"].numpy() == row.image
        assert tuple(parsed["labels"].numpy()) == row.labels
        assert name == records.id_hash(row.id)
    assert index["owner"].tolist() == [records.id_hash(row.owner) for row in rows]
    assert index["photo"].tolist() == [i * 0x0101010101010101 for i in range(4)]


def test_unpaired_surrogates_in_an_id_do_not_stop_a_run():
    record = records.Record("bad\ud800", "u", b"", (0,), b"")
    assert records.id_hash(record.id) != records.id_hash("bad")
    assert records.parse(tf.constant(records.serialize(record)))["id"].numpy() == b"bad?"
