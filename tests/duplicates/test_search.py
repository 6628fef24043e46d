"""Tests of fingerprints, of their comparison, and of the join that finds duplicates and leaks."""

import io
import json
import pathlib
import random
import shutil
from collections.abc import Sequence

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from PIL import Image, ImageDraw

import datasets
import edits
from hashvision.duplicates import alignment, search
from hashvision.duplicates.alignment import DUPLICATE, similarity
from hashvision.duplicates.fingerprints import (
    BITS,
    KEYS,
    SPECTRUM,
    THUMBNAIL,
    Fingerprint,
    fingerprint,
)
from hashvision.duplicates.search import DuplicatePair, FindDuplicates
from hashvision.errors import UserError
from hashvision.sources.reasons import Dropped
from hashvision.synthetic import draw

PHOTOS = 100


def photo(seed: int, height: int = 112, width: int = 128) -> bytes:
    """A picture with the spectrum of photos: detail at every scale, less of the finer."""
    rng = np.random.default_rng(seed)
    levels = np.full((height, width, 3), rng.uniform(90, 150))
    for cells, strength in ((3, 60), (6, 45), (12, 35), (24, 22), (48, 12)):
        layer = Image.fromarray(rng.normal(0, strength, (cells, cells)).astype(np.float32))
        layer = np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC))
        levels += layer[..., None] * rng.uniform(0.6, 1.2, 3)
    return edits.encode(Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)), 88)


def encode_grey(levels: np.ndarray) -> bytes:
    return edits.encode(Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)))


def alike(one: bytes, other: bytes) -> bool:
    return similarity(fingerprint(one), fingerprint(other)) >= DUPLICATE


@pytest.fixture(scope="module")
def photos() -> list[tuple[bytes, Fingerprint]]:
    return [(encoded, fingerprint(encoded)) for encoded in map(photo, range(PHOTOS))]


@pytest.fixture(scope="module")
def drawings() -> list[tuple[bytes, Fingerprint]]:
    planned = (draw.plan_post(3, number) for number in range(2 * PHOTOS))
    originals = [post for post in planned if post.source == post.number][:PHOTOS]
    encoded = [draw.draw_post(3, post, 96) for post in originals]
    return [(image, fingerprint(image)) for image in encoded]


def recall(kind: str, originals: list[tuple[bytes, Fingerprint]]) -> float:
    rng = np.random.default_rng(0)
    copies = (edits.EDITS[kind](edits.decode(image), rng) for image, _ in originals)
    found = [
        similarity(fingerprint(copy), print_) >= DUPLICATE
        for copy, (_, print_) in zip(copies, originals, strict=True)
    ]
    return float(np.mean(found))


def false_pairs(prints: list[Fingerprint]) -> list[tuple[int, int]]:
    return [
        (i, j)
        for i, one in enumerate(prints)
        for j, other in enumerate(prints[:i])
        if similarity(one, other) >= DUPLICATE
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", edits.EDITS)
def test_copies_are_found_whatever_the_edit(kind: str, photos):
    assert recall(kind, photos) >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("kind", edits.EDITS)
def test_copies_of_drawings_are_found(kind: str, drawings):
    # Flat saturated colours are clipped to other shapes when brightened; the rest are found.
    assert recall(kind, drawings) >= (0.75 if "brightened" in kind else 0.9)


@pytest.mark.parametrize("kind", ["compressed", "scaled", "mirrored", "cropped", "framed", "grey"])
def test_copies_of_smooth_pictures_are_found(kind: str):
    smooth = [datasets.jpeg(seed, 96, 96) for seed in range(60)]
    assert recall(kind, [(image, fingerprint(image)) for image in smooth]) >= 0.9


def test_different_photos_are_not_alike(photos):
    assert not false_pairs([print_ for _, print_ in photos])


@pytest.mark.slow
def test_different_drawings_are_not_alike(drawings):
    assert not false_pairs([print_ for _, print_ in drawings])


def test_two_edits_of_one_photo_are_alike(photos):
    rng = np.random.default_rng(1)
    found = []
    for image, _ in photos[:60]:
        one = edits.EDITS["mirrored, cropped, compressed"](edits.decode(image), rng)
        other = edits.EDITS["cropped, brightened, framed"](edits.decode(image), rng)
        found.append(alike(one, other))
    assert np.mean(found) >= 0.95


def gradient(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:96j, 0:1:128j]
    low, high = rng.uniform(0, 90), rng.uniform(120, 255)
    slope = x * rng.uniform(-0.5, 0.5) + y
    return encode_grey(low + (high - low) * slope + rng.normal(0, 1.5, x.shape))


def night_sky(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    levels = 12 + rng.normal(0, 3, (96, 128))
    levels[rng.integers(0, 96, 40), rng.integers(0, 128, 40)] = rng.uniform(90, 255, 40)
    return encode_grey(levels)


def horizon(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    levels = np.full((96, 128), rng.uniform(170, 240))
    levels[int(rng.integers(35, 65)) :] = rng.uniform(30, 110)
    return encode_grey(levels + rng.normal(0, 3, levels.shape))


def text_page(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    page = Image.new("RGB", (128, 128), "white")
    draw = ImageDraw.Draw(page)
    for line in range(9):
        word = "".join(rng.choice(list("abcdefghiklmnoprstuw    "), 20))
        draw.text((6, 5 + 13 * line), word, "black")
    return edits.encode(page)


@pytest.mark.parametrize("draw", [gradient, night_sky, horizon, text_page])
def test_pictures_with_little_content_are_not_alike(draw):
    assert not false_pairs([fingerprint(draw(seed)) for seed in range(50)])


def test_different_words_on_one_template_are_seldom_alike(photos):
    rng = np.random.default_rng(2)
    found = []
    for image, _ in photos[:50]:
        one, other = (edits.with_words(edits.decode(image), rng) for _ in range(2))
        found.append(alike(one, other))
    assert np.mean(found) <= 0.2


def test_photos_with_a_moved_subject_are_seldom_alike(photos):
    rng = np.random.default_rng(3)
    found = []
    for number, (image, _) in enumerate(photos):
        moved, other = edits.decode(image), edits.decode(photos[number - 1][0])
        x, y = (int(rng.integers(0, side - 30)) for side in moved.size)
        moved.paste(other.crop((x, y, x + 30, y + 30)), (x, y))
        found.append(alike(edits.encode(moved), image))
    assert np.mean(found) <= 0.1


def test_a_fingerprint_is_small_and_a_pure_function_of_the_file(photos):
    image, print_ = photos[0]
    assert fingerprint(image) == print_
    assert sum(map(len, print_)) <= 16 + THUMBNAIL**2 + (8 + SPECTRUM) * KEYS
    keys, boxes, spectra = print_.rectangles
    assert len(keys) == len(boxes) == len(spectra) > 0
    assert (np.diff(keys.astype(np.int64)) > 0).all()
    assert print_.pixels.shape == (THUMBNAIL, THUMBNAIL)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (9, 9), (33, 40), (640, 480)])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_flat_photos_of_any_size_match_their_own_bytes_alone(size, level):
    one = edits.encode(Image.new("RGB", size, (level,) * 3))
    other = edits.encode(Image.new("RGB", size, (level,) * 3), 50)
    assert not fingerprint(one).keys
    assert alike(one, one) and not alike(one, other)


def test_a_frame_within_a_frame_is_removed(photos):
    image = edits.decode(photos[0][0])
    framed = Image.new("RGB", (image.width + 24, image.height + 24), "black")
    framed.paste("white", (6, 6, image.width + 18, image.height + 18))
    framed.paste(image, (12, 12))
    assert alike(edits.encode(framed), photos[0][0])


Row = tuple[tuple[int, ...], str, Fingerprint]


def order_of(numbers: tuple[int, ...]) -> bytes:
    return b"".join(number.to_bytes(8, "big") for number in numbers).ljust(search.ORDER, b"\0")


def find(
    folder: pathlib.Path,
    posts: list[Row],
    evaluation: Sequence[Row] = (),
    removed: Sequence[Fingerprint] = (),
) -> list[DuplicatePair]:
    """Runs the join on bundles in any order; returns its pairs, sorted."""
    path = folder / "matches.json"

    def write(matches):
        path.write_text(json.dumps([[list(match[0]), *match[1:]] for match in matches]))

    barred = [(order_of((number,)), "", each) for number, each in enumerate(removed)]
    posts = [(order_of(order), *rest) for order, *rest in posts]
    evaluation = [(order_of(order), *rest) for order, *rest in evaluation]

    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        once = pipeline | beam.Create([0])
        matches = {
            "posts": once | "Posts" >> beam.FlatMap(lambda _: posts) | beam.Reshuffle(),
            "evaluation": once | "Evaluation" >> beam.FlatMap(lambda _: list(evaluation)),
            "removed": once | "Removed" >> beam.FlatMap(lambda _: barred),
        } | FindDuplicates(str(folder / "spool"), parts=3)
        _ = matches | beam.combiners.ToList() | beam.Map(write)
    found = [
        DuplicatePair(bytes(order), *rest, tuple(also))
        for order, *rest, also in json.loads(path.read_text())
    ]
    shutil.rmtree(folder / "spool")
    return sorted(found)


def test_the_first_copy_is_kept_and_leaks_are_dropped(tmp_path, photos):
    rng = np.random.default_rng(4)
    image, print_ = photos[0]
    mirrored = fingerprint(edits.EDITS["mirrored"](edits.decode(image), rng))
    leak, other = photos[1][1], photos[2][1]
    leaked = fingerprint(edits.EDITS["cropped"](edits.decode(photos[1][0]), rng))
    high = 2**64 - 2  # as hashes of ids are
    posts = [
        ((high, 7), "later", print_),
        ((5, 1), "first", mirrored),
        ((5, 2), "leaked", leaked),
        ((high, 9), "last", print_),
        ((9, 0), "other", other),
    ]
    evaluation = [((0,), "eval/a.jpg", photos[3][1]), ((1,), "eval/b.jpg", leak)]
    found = find(tmp_path, posts, evaluation)
    assert [match[:4] for match in found] == [
        (order_of((5, 2)), "leaked", "leak", "eval/b.jpg"),
        (order_of((high, 7)), "later", "duplicate", "first"),
        (order_of((high, 9)), "last", "duplicate", "first"),
    ]
    assert all(DUPLICATE <= match.similarity <= 1 for match in found)
    for seed in range(2):
        random.Random(seed).shuffle(posts)
        random.Random(seed).shuffle(evaluation)
        assert find(tmp_path, posts, evaluation) == found


def test_a_removed_photo_takes_precedence_and_is_not_named(tmp_path, photos):
    rng = np.random.default_rng(7)
    image, print_ = photos[0]
    mirrored = fingerprint(edits.EDITS["mirrored"](edits.decode(image), rng))
    compressed = fingerprint(edits.EDITS["compressed"](edits.decode(image), rng))
    posts = [((1,), "first", mirrored), ((2,), "second", print_), ((3,), "other", photos[1][1])]
    evaluation = [((0,), "eval/a.jpg", print_), ((1,), "eval/b.jpg", mirrored)]
    found = find(tmp_path, posts, evaluation, [photos[2][1], compressed, compressed, print_])
    assert [(match.name, match.kind, match.partner, match.also) for match in found] == [
        ("first", "removed", "", ()),
        ("second", "removed", "", ("first",)),
    ]


def test_a_pair_names_other_earlier_posts(tmp_path, photos):
    """Two parts of a photo, which share too little to be alike, and then the whole photo."""
    image = edits.decode(photos[4][0])
    left = image.crop((0, 0, 84, image.height))
    right = image.crop((image.width - 84, 0, image.width, image.height))
    parts = [fingerprint(edits.encode(each)) for each in (left, right)]
    assert similarity(*parts) < DUPLICATE
    rows = [((1,), "left", parts[0]), ((2,), "right", parts[1]), ((3,), "whole", photos[4][1])]
    (match,) = find(tmp_path, [*rows, ((4,), "another", photos[5][1])])
    assert match[1:4] == ("whole", "duplicate", "left") and match.also == ("right",)
    (match,) = find(tmp_path, rows, [((0,), "eval/a.jpg", photos[4][1])])[-1:]
    assert match[1:4] == ("whole", "leak", "eval/a.jpg") and match.also == ("left", "right")


def test_a_leak_names_the_evaluation_photo_it_resembles_most(tmp_path, photos):
    rng = np.random.default_rng(5)
    cropped = fingerprint(edits.EDITS["cropped"](edits.decode(photos[0][0]), rng))
    evaluation = [((1,), "a", cropped), ((2,), "b", photos[0][1])]
    (match,) = find(tmp_path, [((1,), "post", photos[0][1])], evaluation)
    assert match == DuplicatePair(order_of((1,)), "post", "leak", "b", 1.0)


def test_the_first_post_of_a_chain_is_kept(tmp_path, photos):
    """The ends of a chain of crops share too little to be alike, but neighbours share enough."""
    image = edits.decode(photos[4][0])
    left = image.crop((0, 0, 96, image.height))
    right = image.crop((image.width - 96, 0, image.width, image.height))
    narrow_left, narrow_right = left.crop((0, 0, 66, 112)), right.crop((30, 0, 96, 112))
    prints = [fingerprint(edits.encode(each)) for each in (narrow_left, left, image, right)]
    prints.append(fingerprint(edits.encode(narrow_right)))
    names = ("a", "b", "c", "d", "e")
    rows = [((n,), name, each) for n, (name, each) in enumerate(zip(names, prints, strict=True))]
    assert similarity(prints[0], prints[4]) < DUPLICATE
    found = find(tmp_path, rows)
    assert {match.name for match in found} == {"b", "c", "d", "e"}
    assert all(match.partner < match.name for match in found)


def test_flat_photos_are_found_by_their_bytes(tmp_path):
    black, dark = (fingerprint(edits.encode(Image.new("L", (40, 40), level))) for level in (0, 1))
    rows = [((n,), str(n), black if n % 2 else dark) for n in range(60)]
    found = find(tmp_path, rows)
    assert [match.order for match in found] == [order_of((n,)) for n in range(2, 60)]
    assert all(match.partner == str(int(match.name) % 2) for match in found)


def test_rectangles_agree_if_they_look_alike_and_the_photos_overlap():
    box = np.array([[50, 60, 150, 200]], np.uint8)
    spectrum = np.random.default_rng(0).integers(-100, 100, (1, BITS)).astype(np.int8)
    other = np.abs(np.random.default_rng(1).integers(-100, 100, (1, BITS))).astype(np.int8)
    same_signs = np.where(spectrum > 0, other, -other)
    mirrored = np.array([[205, 60, 105, 200]], np.uint8)
    for laid in (box, box + np.uint8(20), mirrored):
        assert alignment.agree(box, spectrum, laid, spectrum)
        assert not alignment.agree(box, spectrum, laid, same_signs)
    # If it is twice as high the other photo is half of the one; twice as wide too, a quarter.
    assert alignment.agree(box, spectrum, np.array([[50, 0, 150, 255]], np.uint8), spectrum)
    assert not alignment.agree(box, spectrum, np.array([[0, 0, 200, 255]], np.uint8), spectrum)
    corners = np.array([[[0, 0, 100, 140]], [[155, 115, 255, 255]]], np.uint8)
    assert not alignment.agree(corners[0], spectrum, corners[1], spectrum)


def test_overlap_equals_that_of_aligned_photos():
    """Compared with counting the points of a grid, for boxes of all kinds, also mirrored."""
    rng = np.random.default_rng(2)
    sides = rng.integers(60, 255, (2, 400, 2))
    start = rng.integers(0, 256 - sides)
    boxes, others = np.concatenate((start, start + sides), axis=2).astype(np.uint8)
    others[::2] = others[::2][:, [2, 1, 0, 3]]
    grid = (np.arange(200) + 0.5) / 200
    overlaps = []
    for (left, top, right, bottom), other in zip(boxes / 255, others / 255, strict=True):
        x = other[0] + (grid - left) * (other[2] - other[0]) / (right - left)
        y = other[1] + (grid - top) * (other[3] - other[1]) / (bottom - top)
        area = abs((other[2] - other[0]) / (right - left) * (other[3] - other[1]) / (bottom - top))
        seen = np.mean((x > 0) & (x < 1)) * np.mean((y > 0) & (y < 1))
        overlaps.append(min(seen, seen * area))  # a share of the one photo, and of the other
    spectra = np.ones((len(boxes), BITS), np.int8)
    found = alignment.agree(boxes, spectra, others, spectra)
    clear = np.abs(np.array(overlaps) - 0.4) > 0.02
    assert 50 < found[clear].sum() < clear.sum() - 50
    np.testing.assert_array_equal(found[clear], np.array(overlaps)[clear] > 0.4)


def test_evaluation_photos_are_all_files_below_the_folders(tmp_path, photos):
    """Names do not matter: `evaluate` reads the files that a labels.jsonl names."""
    names = ["a/x/1.JPG", "a/2.tiff", "a/3", "a/4.gif", "a/5.txt", "b/6.jpe", "c/7.webp", "7.bmp"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(photos[0][0])
    (tmp_path / "a" / "0.png").write_bytes(b"no photo")
    lines = [{"image": name} for name in ("3", "../7.bmp", str(tmp_path / "c/7.webp"), 3)]
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "a" / "labels.jsonl").write_text(f"{text}\n[]\nbroken\n")
    sets = [str(tmp_path / "a" / "labels.jsonl"), str(tmp_path / "b")]
    found = list(search.evaluation_photos(sets))
    assert all(pathlib.Path(path).is_file() for _, path in found)
    within = ["0.png", "2.tiff", "3", "4.gif", "5.txt", "labels.jsonl", "x/1.JPG"]
    expected = [*(f"a/{name}" for name in within), "7.bmp", "c/7.webp", "b/6.jpe"]
    assert [name for name, _ in found] == expected


@pytest.mark.parametrize(("name", "why"), [("d", "exist"), ("e", "no photo"), ("f", "dataset")])
def test_evaluation_sets_without_photos_are_named(tmp_path, name: str, why: str):
    for made in ("e/1.jpg", "f/manifest.json", "f/duplicates.png"):
        (tmp_path / made).parent.mkdir(exist_ok=True)
        (tmp_path / made).write_bytes(b"{}")
    with pytest.raises(UserError, match=f"{tmp_path / name} .*{why}"):
        list(search.evaluation_photos([str(tmp_path / name)]))


def test_evaluation_files_of_any_kind_and_size_get_fingerprints(tmp_path, photos):
    image = edits.decode(photos[0][0])
    image.resize((900, 700)).convert("P").save(tmp_path / "a.png")
    print_ = search.fingerprint_file(str(tmp_path / "a.png"), 128)
    assert similarity(print_, photos[0][1]) >= DUPLICATE
    (tmp_path / "b.jpg").write_bytes(photos[0][0])
    assert search.fingerprint_file(str(tmp_path / "b.jpg"), 128) == photos[0][1]
    (tmp_path / "c.jpg").write_bytes(b"none")
    with pytest.raises(Dropped):
        search.fingerprint_file(str(tmp_path / "c.jpg"), 128)


def test_contact_sheet_shows_all_pairs(tmp_path):
    red, blue = (edits.encode(Image.new("RGB", (40, 20), name)) for name in ("red", "blue"))
    path = str(tmp_path / "sheet.png")
    search.write_contact_sheet(path, [(red, blue, "p1 is p2, duplicate 0.98")] * 5, columns=2)
    sheet = np.asarray(Image.open(path).convert("RGB"))
    reds = (sheet[..., 0] > 200) & (sheet[..., 2] < 60)
    blues = (sheet[..., 2] > 200) & (sheet[..., 0] < 60)
    assert reds.sum() == pytest.approx(5 * 112 * 56, rel=0.02)
    assert blues.sum() == pytest.approx(5 * 112 * 56, rel=0.02)
    search.write_contact_sheet(path, [])


@pytest.mark.realdata
@pytest.mark.slow
def test_real_photos(shared_data):
    folder = shared_data / "transfer" / "flickr8k_multilabel" / "images"
    paths = sorted(folder.iterdir())[::3]
    originals = [(path.read_bytes(), fingerprint(path.read_bytes())) for path in paths]
    assert len(false_pairs([print_ for _, print_ in originals])) == 0
    chosen = originals[:150]
    recalls = {kind: recall(kind, chosen) for kind in edits.EDITS}
    print(recalls)
    assert min(recalls.values()) >= 0.9
    assert float(np.mean(list(recalls.values()))) >= 0.98
    # Copies match their originals and no other photo.
    rng = np.random.default_rng(6)
    kinds = list(edits.EDITS.values())
    for number, (image, _) in enumerate(chosen[:60]):
        copy = fingerprint(kinds[number % len(kinds)](edits.decode(image), rng))
        matched = [
            n for n, (_, each) in enumerate(originals) if similarity(copy, each) >= DUPLICATE
        ]
        assert set(matched) <= {number}


def test_contact_sheet_takes_pictures_of_any_shape(tmp_path):
    shapes = [edits.encode(Image.new("L", size)) for size in ((1, 300), (300, 1), (5, 5))]
    path = tmp_path / "sheet.png"
    search.write_contact_sheet(str(path), [(shapes[0], shapes[1], "x" * 500 + "\nyé")])
    assert Image.open(io.BytesIO(path.read_bytes())).format == "PNG"
