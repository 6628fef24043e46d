import collections
import itertools

import datasets
import numpy as np
import pytest
from PIL import Image

from hashvision.data import crops, dataset, sampling, stream
from hashvision.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return dataset.load(str(datasets.write(tmp_path_factory.mktemp("data") / "set")))


def make(source, host=0, hosts=1, seed=3, method="square_root", lanes=8):
    return stream.Stream(
        source, batch_size=16, lanes=lanes, seed=seed, method=method, host=host, hosts=hosts
    )


CROPS = (crops.Crops(1, 24, 0.3),)


def take(source, start, count, **options):
    batches = make(source, **options).batches(CROPS, 2, start, threads=2)
    return list(itertools.islice(batches, count))


@pytest.mark.slow
def test_same_batches_on_one_two_and_four_hosts(source):
    whole = take(source, 0, 3)
    for hosts in (2, 4):
        parts = [take(source, 0, 3, host=host, hosts=hosts) for host in range(hosts)]
        for step in range(3):
            for name in ("crops0", "labels", "key"):
                joined = np.concatenate([part[step][name] for part in parts])
                np.testing.assert_array_equal(joined, whole[step][name])


def test_a_step_does_not_depend_on_where_the_stream_began(source):
    whole = take(source, 0, 12)
    later = take(source, 9, 3)
    for expected, got in zip(whole[9:], later, strict=True):
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])


def test_every_record_comes_as_often_as_its_draw_says(source):
    lane = make(source, lanes=1)._lanes[0]
    ids = source.index["id"]
    threshold = sampling.default_threshold(source.class_counts, len(ids))
    factors = sampling.repeat_factors(source.index["rarest"], len(ids), threshold, "square_root")
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
    size = len(source.index)
    first, second = natural.items(0, size).record, natural.items(size, size).record
    assert sorted(first) == sorted(second) == list(range(size))
    assert (first != second).mean() > 0.9
    other = make(source, method="natural", lanes=1, seed=4)._lanes[0].items(0, size).record
    assert (first != other).mean() > 0.9


def test_items_are_the_same_however_they_are_cut(source):
    lane = make(source, lanes=1)._lanes[0]
    whole = lane.items(0, 200)
    rng, start = np.random.default_rng(0), 0
    while start < 200:
        count = min(int(rng.integers(1, 40)), 200 - start)
        part = make(source, lanes=1)._lanes[0].items(start, count)
        for expected, got in zip(whole, part, strict=True):
            np.testing.assert_array_equal(got, expected[start : start + count])
        start += count


def test_keys_belong_to_seed_epoch_record_and_copy(source):
    photos = make(source, lanes=1)
    items = photos._lanes[0].items(0, 400)
    keys = {tuple(key) for key in photos.keys(items)}
    assert len(keys) == 400


def test_labels_are_those_of_the_record(source):
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
        assert chi2 < 50  # 19 degrees of freedom: 0.01% lie above
    a, b = stream.draws(0, 0, ids, 0), stream.draws(0, 1, ids, 0)
    assert abs(np.corrcoef(a.astype(float), b.astype(float))[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("options", "words"),
    [({"lanes": 5}, "data.lanes"), ({"hosts": 3}, "hosts"), ({"lanes": 128}, "data.lanes")],
)
def test_numbers_that_do_not_divide_are_named(source, options, words):
    with pytest.raises(UserError, match=words):
        make(source, **options)


def test_more_lanes_than_records(tmp_path):
    small = dataset.load(str(datasets.write(tmp_path / "set", size=6)))
    with pytest.raises(UserError, match="fewer than data.lanes"):
        make(small)


def test_crops_stay_inside_and_cover_the_ranges():
    import tensorflow as tf

    shares, ratios = [], []
    for seed in range(300):
        box = crops.crop_box(
            tf.constant(90), tf.constant(140), CROPS[0], tf.constant([seed, 7], tf.int32)
        )
        top, left, height, width = box.numpy()
        assert top >= 0 and left >= 0 and top + height <= 90 and left + width <= 140
        shares.append(height * width / (90 * 140))
        ratios.append(width / height)
    assert 0.28 < min(shares) < 0.35 and max(shares) > 0.8  # the ratio allows 0.857
    assert 0.7 < min(ratios) < 0.85 and 1.2 < max(ratios) < 1.4


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 400), (400, 3)])
def test_crops_of_extreme_photos(height, width):
    import tensorflow as tf

    image = tf.constant(datasets.jpeg(0, height, width))
    sizes = (crops.Crops(2, 16, 0.5), crops.Crops(3, 8, 0.1, 0.3))
    pixels = crops.random_resized_crops(image, sizes, tf.constant([1, 2]))
    assert [x.shape for x in pixels] == [(2, 16, 16, 3), (3, 8, 8, 3)]
    assert all(x.dtype == tf.uint8 for x in pixels)


def plain_crop(pixels, box, side):
    """The crop as Pillow cuts and resizes it."""
    top, left, height, width = (int(x) for x in box)
    part = Image.fromarray(pixels).crop((left, top, left + width, top + height))
    return np.asarray(part.resize((side, side), Image.Resampling.BILINEAR))


def test_all_crops_of_a_photo_are_those_of_their_boxes():
    import tensorflow as tf

    image = tf.constant(datasets.jpeg(3, 90, 120))
    sizes = (crops.Crops(2, 32, 0.3), crops.Crops(3, 16, 0.05, 0.2))
    found = crops.random_resized_crops(image, sizes, tf.constant([5, 6]))
    again = crops.random_resized_crops(image, sizes, tf.constant([5, 6]))
    pixels = tf.io.decode_jpeg(image).numpy()
    number = 0
    for size, group, same in zip(sizes, found, again, strict=True):
        np.testing.assert_array_equal(group, same)
        for crop in group.numpy():
            seed = tf.constant([5, 6])
            seed = tf.random.fold_in(seed, number) if number else seed
            box = crops.crop_box(tf.constant(90), tf.constant(120), size, seed)
            wanted = plain_crop(pixels, box, size.size).astype(int)
            assert np.abs(crop - wanted).mean() < 1.5  # the two resize alike but not to the bit
            number += 1
    assert len({crop.tobytes() for group in found for crop in group.numpy()}) == 5


@pytest.mark.parametrize("size", [(96, 96), (60, 70), (50, 96), (1, 1), (97, 60), (200, 150)])
def test_resizing_is_antialiased_bilinear_whether_or_not_it_shrinks(size):
    import tensorflow as tf

    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    expected = tf.image.resize(pixels, [96, 96], "bilinear", antialias=True).numpy()
    found = crops._resize(tf.constant(pixels), 96).numpy()
    assert np.abs(found - expected).max() < 0.501  # rounded


def test_more_crops_leave_the_first_where_it_was():
    import tensorflow as tf

    image = tf.constant(datasets.jpeg(3, 90, 120))
    alone = crops.random_resized_crops(image, (crops.Crops(1, 64),), tf.constant([5, 6]))
    more = crops.random_resized_crops(image, (crops.Crops(4, 64),), tf.constant([5, 6]))
    difference = np.abs(alone[0][0].numpy().astype(int) - more[0][0].numpy())
    assert difference.mean() < 1  # a part decoded alone differs at its rim


@pytest.mark.parametrize(("height", "ratio"), [(50, 1), (80, 2), (150, 4), (1100, 8)])
def test_large_photos_are_decoded_smaller(height, ratio, monkeypatch):
    """The decoder's own reduction gives the crop of the whole photo, within its coarser grid."""
    import tensorflow as tf

    image = tf.constant(datasets.jpeg(1, height, height))
    sizes = (crops.Crops(2, 32, 0.9, 1.0), crops.Crops(1, 16, 0.9, 1.0))
    asked = []
    decode = tf.io.decode_jpeg

    def spy(contents, channels, ratio):
        pixels = decode(contents, channels=channels, ratio=ratio)
        asked.append((ratio, pixels.shape))
        return pixels

    monkeypatch.setattr(tf.io, "decode_jpeg", spy)
    found = crops.random_resized_crops(image, sizes, tf.constant([1, 2]))
    assert [each[0] for each in asked] == [ratio]  # decoded once, and no larger than needed
    pixels, number = decode(image).numpy(), 0
    for size, group in zip(sizes, found, strict=True):
        for crop in group.numpy():
            seed = tf.constant([1, 2])
            seed = tf.random.fold_in(seed, number) if number else seed
            box = crops.crop_box(tf.constant(height), tf.constant(height), size, seed)
            wanted = plain_crop(pixels, box, size.size).astype(int)
            assert np.abs(crop - wanted).mean() < 8  # an unrelated crop: about 70
            number += 1
