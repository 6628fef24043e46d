"""Tests that the reader finds, reports and excludes broken records, up to the allowed share."""

import itertools
import json
import os

import numpy as np
import pytest

import datasets
from hashvision.data import dataset, reader, records, removals, stream
from hashvision.errors import UserError

SIZE, LANES = 64, 4


@pytest.fixture
def folder(tmp_path):
    return datasets.write(tmp_path / "set", size=SIZE)


def open_stream(folder, host=0, hosts=1, removed=(), **options):
    source = dataset.load(str(folder))
    options["removed"] = source.names(removals.RemovalList(list(removed)))
    return stream.Stream(
        source,
        batch_size=16,
        lanes=LANES,
        seed=3,
        method="natural",
        host=host,
        hosts=hosts,
        **options,
    )


def take(folder, workdir, count, start=0, share=1.0, **options):
    """Returns the first batches, and the reader."""
    faults = reader.Faults(str(workdir), options.get("host", 0), share)
    source = reader.BatchReader(open_stream(folder, **options), 48, 2, faults, threads=2)
    return list(itertools.islice(source.batches(start), count)), source


def flip(folder, record, where=100):
    """Flips a bit of a record's bytes; returns the shard's name."""
    source = dataset.load(str(folder))
    shard = int(source.shard_of(np.array([record]))[0])
    offset = int(source.rows(record, record + 1)["offset"][0]) + where
    with open(source.shards[shard], "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 16]))
    return os.path.basename(source.shards[shard])


def test_a_bit_flip_is_reported_and_excluded(folder, tmp_path, capsys):
    whole, _ = take(folder, tmp_path, 12)
    name = flip(folder, 41)
    found, source = take(folder, tmp_path, 12)
    assert f"Excluded 1 record of {name}" in capsys.readouterr().out
    (fault,) = map(json.loads, (tmp_path / "broken-00000.jsonl").read_text().splitlines())
    assert (fault["record"], fault["records"], fault["shard"]) == (41, 1, name)
    assert "orrupt" in fault["cause"]
    lane = range(32, 48)  # records of the same lane
    changed = 0
    for (before, seen), (after, got) in zip(whole, found, strict=True):
        other = before.record != 41
        changed += (~other).sum()
        np.testing.assert_array_equal(after.record[other], before.record[other])
        assert set(after.record[~other]) <= set(lane) - {41}
        for key in seen:
            np.testing.assert_array_equal(got[key][other], seen[key][other])
            # A substitute has its own photo and its own crops.
        assert (got["photos"][~other].reshape(-1, 48 * 48 * 3).std(axis=1) > 5).all()
    assert changed == 3  # once per epoch


@pytest.mark.slow
def test_faults_are_known_after_a_restart_on_other_hosts(folder, tmp_path):
    flip(folder, 41)
    flip(folder, 7)
    whole, _ = take(folder, tmp_path, 12)
    parts = [take(folder, tmp_path, 6, start=6, host=host, hosts=2)[0] for host in (0, 1)]
    for step in range(6):
        joined = np.concatenate([part[step][1]["photos"] for part in parts])
        np.testing.assert_array_equal(joined, whole[6 + step][1]["photos"])
    assert len((tmp_path / "broken-00000.jsonl").read_text().splitlines()) == 2  # no new lines
    assert not (tmp_path / "broken-00001.jsonl").exists()


def test_a_line_cut_off_by_a_kill_does_not_damage_the_next(tmp_path):
    path = tmp_path / "broken-00000.jsonl"
    path.write_text('{"step": 1, "rec')
    faults = reader.Faults(str(tmp_path))
    faults.add(reader.Fault(3, 5, 1, "shard", 0, "cut"))
    assert [fault.record for fault in reader.Faults(str(tmp_path)).unresolved] == [5]


@pytest.mark.slow
def test_the_order_of_finding_faults_does_not_matter(folder, tmp_path):
    (tmp_path / "other").mkdir()
    for record in (40, 41, 42, 44, 46):
        flip(folder, record)
    whole, _ = take(folder, tmp_path, 12)
    later, _ = take(folder, tmp_path / "other", 4, start=8)
    for (before, seen), (after, got) in zip(whole[8:], later, strict=True):
        np.testing.assert_array_equal(after.record, before.record)
        np.testing.assert_array_equal(got["photos"], seen["photos"])


def test_a_truncated_shard_loses_the_records_beyond_its_end(folder, tmp_path, capsys):
    source = dataset.load(str(folder))
    cut = int(source.rows(50, 51)["offset"][0]) + 10
    os.truncate(source.shards[1], cut)
    found, _ = take(folder, tmp_path, 8)
    shown = np.concatenate([items.record for items, _ in found])
    assert set(shown) <= set(range(50)) and 49 in shown and 50 not in shown
    out = capsys.readouterr().out
    assert "Excluded 14 records of " in out and f"has {cut:,} bytes" in out


@pytest.mark.parametrize("moment", ["before", "while"])
def test_a_missing_shard_ends_a_run_above_the_allowed_share(folder, tmp_path, moment):
    gone = folder / records.shard_name(1, 2)
    faults = reader.Faults(str(tmp_path), 0, 0.4)
    source = reader.BatchReader(open_stream(folder), 48, 2, faults, threads=2)
    batches = source.batches(0)
    if moment == "while":
        next(batches)
    gone.unlink()
    with pytest.raises(UserError, match=f"32 of this host's 64 .*{gone.name}"):
        for _ in range(10):
            next(batches)


def test_a_photo_that_does_not_decode_is_excluded(tmp_path):
    def photo(number):
        return datasets.jpeg(number)[:200] if number == 9 else datasets.jpeg(number)

    folder = datasets.write(tmp_path / "other", size=SIZE, photo=photo)
    found, source = take(folder, tmp_path, 8)
    assert 9 not in np.concatenate([items.record for items, _ in found])


def test_too_many_broken_records_are_reported_with_the_remedy(folder, tmp_path):
    name = flip(folder, 9)
    for _ in range(2):  # when the fault is found, and when it is already known
        with pytest.raises(UserError, match="1 of this host's 64 .*data.broken=0.01.*") as said:
            take(folder, tmp_path, 8, share=0.01)
        assert name in str(said.value)
    assert len(take(folder, tmp_path, 8, share=0.02)[0]) == 8


@pytest.mark.slow
def test_a_fixed_record_is_included_again(folder, tmp_path, capsys):
    whole, _ = take(folder, tmp_path, 8)
    for _ in range(2):
        flip(folder, 9)  # the second flip restores it
        found, _ = take(folder, tmp_path, 8)
    assert "can be read again" in capsys.readouterr().out
    for (before, seen), (after, got) in zip(whole, found, strict=True):
        np.testing.assert_array_equal(after.record, before.record)
        np.testing.assert_array_equal(got["photos"], seen["photos"])
    take(folder, tmp_path, 1)
    assert "can be read again" not in capsys.readouterr().out  # reported only once


def test_removed_photos_are_excluded_and_no_other_moves(folder, tmp_path):
    listed = [
        removals.Removal("id", "p5", "", ""),
        removals.Removal("owner", "u3", "", ""),
        removals.Removal("sha256", datasets.record(20, datasets.jpeg(20), ()).sha256.hex(), "", ""),
    ]
    gone = {5, 20, *range(3, SIZE, 5)}
    before = open_stream(folder)
    after = open_stream(folder, removed=listed)
    assert after.epoch_length == before.epoch_length
    for step in range(20):
        was, now = before.items(step), after.items(step)
        kept = ~np.isin(was.record, list(gone))
        np.testing.assert_array_equal(now.record[kept], was.record[kept])
        np.testing.assert_array_equal(after.keys(now)[kept], before.keys(was)[kept])
        assert not set(now.record.tolist()) & gone
    keys = [tuple(key) for step in range(20) for key in after.keys(after.items(step)).tolist()]
    assert len(set(keys)) == len(keys)


def test_a_lane_without_records_left_is_named(folder):
    listed = [removals.Removal("id", f"p{n}", "", "") for n in range(16)]
    with pytest.raises(UserError, match="All records 0 to 15,.* are removed or broken"):
        open_stream(folder, removed=listed)
