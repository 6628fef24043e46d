"""Tests that the stream gives the same items however it is split or resumed."""

import collections
import itertools

import numpy as np
import pytest

import datasets
from hashvision.data import dataset, reader, sampling, stream
from hashvision.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return dataset.load(str(datasets.write(tmp_path_factory.mktemp("data") / "set")))


def make(source, host=0, hosts=1, seed=3, method="square_root", lanes=8):
    return stream.Stream(
        source, batch_size=16, lanes=lanes, seed=seed, method=method, host=host, hosts=hosts
    )


SIDE = 48  # photos are 56 by 40


def take(source, start, count, **options):
    batches = reader.BatchReader(make(source, **options), SIDE, 2, threads=2).batches(start)
    return [batch for _, batch in itertools.islice(batches, count)]


@pytest.mark.slow
def test_same_batches_on_one_two_and_four_hosts(source):
    whole = take(source, 0, 3)
    for hosts in (2, 4):
        parts = [take(source, 0, 3, host=host, hosts=hosts) for host in range(hosts)]
        for step in range(3):
            for name in ("photos", "shape", "labels", "key"):
                joined = np.concatenate([part[step][name] for part in parts])
                np.testing.assert_array_equal(joined, whole[step][name])


def test_a_step_does_not_depend_on_the_first_step(source):
    whole = take(source, 0, 12)
    later = take(source, 9, 3)
    for expected, got in zip(whole[9:], later, strict=True):
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])


def test_every_record_occurs_as_often_as_its_draw_says(source):
    lane = make(source, lanes=1)._lanes[0]
    rows = source.rows(0, len(source))
    ids = rows["id"]
    threshold = sampling.default_threshold(source.class_counts, len(ids))
    factors = sampling.repeat_factors(rows["rarest"], len(ids), threshold, "square_root")
    start, lengths = 0, []
    for epoch in range(20):
        bits = stream.draws(3, epoch, ids, stream._REPEAT)
        wanted = [
            int(f) + (int(b) / 2**64 < f - int(f)) for f, b in zip(factors, bits, strict=True)
        ]
        items = lane.items(start, sum(wanted))
        assert set(items.epoch) == {epoch}
        seen = collections.Counter(items.record.tolist())
        assert [seen[record] for record in range(len(ids))] == wanted
        assert len({*zip(items.record, items.copy, strict=True)}) == len(items.record)
        start += len(items.record)
        lengths.append(len(items.record))
    assert len(set(lengths)) > 1  # the draws differ from epoch to epoch
    assert np.mean(lengths) == pytest.approx(factors.sum(), rel=0.03)


def test_orders_differ_between_epochs_and_seeds(source):
    natural = make(source, method="natural", lanes=1)._lanes[0]
    size = len(source)
    first, second = natural.items(0, size).record, natural.items(size, size).record
    assert sorted(first) == sorted(second) == list(range(size))
    assert (first != second).mean() > 0.9
    other = make(source, method="natural", lanes=1, seed=4)._lanes[0].items(0, size).record
    assert (first != other).mean() > 0.9


def test_items_do_not_depend_on_how_they_are_requested(source):
    lane = make(source, lanes=1)._lanes[0]
    whole = lane.items(0, 200)
    rng, start = np.random.default_rng(0), 0
    while start < 200:
        count = min(int(rng.integers(1, 40)), 200 - start)
        part = make(source, lanes=1)._lanes[0].items(start, count)
        for expected, got in zip(whole, part, strict=True):
            np.testing.assert_array_equal(got, expected[start : start + count])
        start += count


def test_every_item_has_its_own_key(source):
    photos = make(source, lanes=1)
    items = photos._lanes[0].items(0, 400)
    keys = {tuple(key) for key in photos.keys(items)}
    assert len(keys) == 400


def test_labels_belong_to_the_record(source):
    import tensorflow as tf

    from hashvision.data import records

    serialized = [
        bytes(raw)
        for shard in source.shards
        for raw in tf.data.TFRecordDataset(shard).as_numpy_iterator()
    ]
    photos = make(source)
    batch = take(source, 5, 1)[0]
    for record, labels in zip(photos.items(5).record, batch["labels"], strict=True):
        wanted = records.parse(tf.constant(serialized[record]))["labels"].numpy()
        assert [label for label in labels if label >= 0] == wanted.tolist()


def test_draws_are_uniform_and_unrelated():
    ids = np.arange(20_000, dtype=np.uint64)
    for epoch, purpose in itertools.product((0, 1), (0, 1)):
        uniform = (stream.draws(0, epoch, ids, purpose) >> np.uint64(11)) * 2.0**-53
        counts = np.histogram(uniform, 20, (0, 1))[0]
        chi2 = ((counts - 1000) ** 2 / 1000).sum()
        assert chi2 < 50  # 19 degrees of freedom; 0.01% are above
    a, b = stream.draws(0, 0, ids, 0), stream.draws(0, 1, ids, 0)
    assert abs(np.corrcoef(a.astype(float), b.astype(float))[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("options", "words"),
    [({"lanes": 5}, "data.lanes"), ({"hosts": 3}, "hosts"), ({"lanes": 128}, "data.lanes")],
)
def test_invalid_numbers_of_lanes_and_hosts_are_named(source, options, words):
    with pytest.raises(UserError, match=words):
        make(source, **options)


def test_more_lanes_than_records_are_refused(tmp_path):
    small = dataset.load(str(datasets.write(tmp_path / "set", size=6)))
    with pytest.raises(UserError, match="fewer than data.lanes"):
        make(small)


def test_equal_upper_bits_are_sorted_by_index():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 20, 1000, np.uint64) << np.uint64(40)
    lower = keys | rng.integers(0, 500, 1000, np.uint64)  # the lower bits are ignored
    expected = np.argsort(keys, kind="stable")
    np.testing.assert_array_equal(stream._argsort(lower), expected)
