"""Tests of the drawn posts: the same bytes every time, the documented rates, useless colours."""

import hashlib
import io
import json
import lzma
import re
import unicodedata
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from hashvision.errors import UserError
from hashvision.synthetic import captions, draw, objects

PER_CLASS = 20


def plain(tag: str) -> str:
    """A tag without case, accents and underscores."""
    letters = unicodedata.normalize("NFKD", tag).lower().replace("_", "")
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


KIND_OF = {
    plain(form.replace(" ", "")): kind
    for kind, words in captions.WORDS.items()
    for lemma in words.lemmas
    for form in (lemma, captions._plural(lemma))
}


def tagged_kinds(tags: str) -> list[str]:
    """The kinds that a post's tags name, with repetitions."""
    names = (plain(tag) for tag in re.findall(r"[#＃](\w+)", tags))
    return [KIND_OF[name] for name in names if name in KIND_OF]


def hashes(folder: Path) -> dict[str, str]:
    """Each file below a folder and the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_posts(folder: Path) -> tuple[list[dict], int]:
    """The posts of a dump and the number of lines that are not JSON."""
    posts, broken = [], 0
    for line in (folder / "posts.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            posts.append(json.loads(line))
        except json.JSONDecodeError:
            broken += 1
    return posts, broken


@pytest.fixture(scope="module")
def dump(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "posts"
    draw.write(folder, posts=60, test_per_class=PER_CLASS, size=64)
    return folder


@pytest.fixture(scope="module")
def planned() -> list[draw.DrawnPost]:
    return [draw.plan_post(0, number) for number in range(3000)]


def test_same_arguments_give_same_bytes(tmp_path):
    small = {"posts": 20, "test_per_class": 1, "size": 32}
    draw.write(tmp_path / "one", **small, seed=3)
    draw.write(tmp_path / "two", **small, seed=3)
    draw.write(tmp_path / "other", **small, seed=4)
    one = hashes(tmp_path / "one")
    assert one == hashes(tmp_path / "two")
    other = hashes(tmp_path / "other")
    for name in ("posts.jsonl", "transfer/test/owl/000.jpg", "multilabel/images/m0000.jpg"):
        assert one[name] != other[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other", "two"]


def test_many_posts_are_drawn_on_all_cores_to_the_same_bytes(tmp_path, monkeypatch):
    small = {"posts": 20, "test_per_class": 1, "size": 32}
    draw.write(tmp_path / "alone", **small)
    monkeypatch.setattr(draw, "MANY", 20)
    monkeypatch.setattr(draw, "map", None, raising=False)  # must not be called
    draw.write(tmp_path / "pool", **small)
    assert hashes(tmp_path / "alone") == hashes(tmp_path / "pool")


@pytest.mark.slow
def test_a_post_does_not_depend_on_the_number_of_posts(dump, tmp_path):
    draw.write(tmp_path / "fewer", posts=20, test_per_class=1, size=64)
    fewer, more = read_posts(tmp_path / "fewer")[0], read_posts(dump)[0]
    assert fewer == more[:20]
    small, large = hashes(tmp_path / "fewer"), hashes(dump)
    images = [post["image"] for post in fewer]
    differing = [name for name in images if small.get(name) != large.get(name)]
    assert len(differing) <= 6  # three broken posts in each dump


@pytest.mark.slow
def test_posts_have_the_form_of_a_dump_with_each_kind_of_broken_file(dump):
    posts, broken = read_posts(dump)
    assert broken == 1
    assert len(posts) == 60
    assert len({post["id"] for post in posts}) == 60
    failures = Counter()
    for post in posts:
        assert list(post) == "id image text owner visibility created_at lang".split()
        assert post["visibility"] in ("public", "private")
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:00Z", post["created_at"])
        path = dump / post["image"]
        if not path.exists():
            failures["missing", post["visibility"]] += 1
        elif not path.stat().st_size:
            failures["empty", post["visibility"]] += 1
        else:
            try:
                with Image.open(path) as image:
                    image.load()
                    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
            except OSError:
                failures["cut", post["visibility"]] += 1
    assert failures == {(way, "public"): 1 for way in ("missing", "empty", "cut")}


def test_tags_have_the_documented_error_rates(planned):
    objects = tagged = tags = true = nothing = 0
    for post in planned:
        named = tagged_kinds(post.tags)
        objects += len(post.kinds)
        tagged += len(set(post.kinds) & set(named))
        tags += len(named)
        true += sum(kind in post.kinds for kind in named)
        nothing += not named
    assert true / tags == pytest.approx(1 - captions.WRONG, abs=0.01)
    expected = (1 - captions.UNTAGGED) * (1 - captions.WRONG)
    assert tagged / objects == pytest.approx(expected, abs=0.02)
    assert nothing / len(planned) == pytest.approx(0.08, abs=0.02)


def test_kinds_owners_and_spam_have_long_tails(planned):
    kinds = Counter(kind for post in planned for kind in post.kinds)
    assert set(kinds) == set(draw.KINDS)
    most, *_, least = (count for _, count in kinds.most_common())
    assert 6 <= most / least <= 11
    owners = Counter(post.owner for post in planned)
    assert len(owners) > 200
    assert sum(count for _, count in owners.most_common(20)) > 0.2 * len(planned)
    typed = Counter(tag for post in planned for tag in re.findall(r"#(\w+)", post.tags))
    spam = sorted((typed[tag] for tag in captions.SPAM), reverse=True)
    assert spam[0] > 10 * max(1, spam[-1])
    several = Counter(len(post.kinds) for post in planned)
    for count, rate in enumerate(draw.OBJECT_COUNTS, 1):
        assert several[count] / len(planned) == pytest.approx(rate, abs=0.03)


def test_private_posts_and_reposts(planned):
    private = sum(post.private for post in planned) / len(planned)
    assert private == pytest.approx(draw.PRIVATE, abs=0.015)
    reposts = [post for post in planned if post.source != post.number]
    assert len(reposts) / len(planned) == pytest.approx(draw.REPOSTED, abs=0.015)
    same = 0
    for post in reposts[:12]:
        source = planned[post.source]
        assert source.source == source.number < post.number
        assert post.kinds == source.kinds
        assert post.owner != source.owner
        photo, original = (draw.draw_post(0, p, 48) for p in (post, source))
        same += photo == original
        pixels, truth = (
            np.asarray(Image.open(io.BytesIO(data)), float) for data in (photo, original)
        )
        assert np.abs(pixels - truth).mean() < 12
    assert 0 < same < 12


def test_captions_name_all_kinds_and_tags_have_all_spellings(planned):
    for post in planned[:300]:
        for kind in post.kinds:
            assert any(phrase in post.caption.lower() for phrase in captions.WORDS[kind].phrases)
    text = "\n".join(post.tags for post in planned)
    for spelling in (
        "#dog", "#Dog", "#DOG", "#dogs", "#dóg", "#canisfamiliaris", "#CanisFamiliaris",
        "#canis_familiaris", "#sailing_boats?", "#butterflies", "＃\\w", "\\w#\\w", "#\\w+📸",
        "❤️#\\w",
    ):  # fmt: skip
        assert re.search(spelling, text), spelling


def test_clean_sets_are_balanced_and_named(dump):
    for split in ("train", "test"):
        tree = dump / "transfer" / split
        counts = {place.name: len(list(place.glob("*.jpg"))) for place in tree.iterdir()}
        assert counts == dict.fromkeys(draw.KINDS, PER_CLASS)
    lines = (dump / "multilabel/labels.jsonl").read_text().splitlines()
    assert len(lines) == 60 // draw.POSTS_PER_CLEAN_SCENE
    for line in map(json.loads, lines):
        assert 1 <= len(set(line["labels"])) == len(line["labels"]) <= 3
        assert set(line["labels"]) <= set(draw.KINDS)
        with Image.open(dump / "multilabel" / line["image"]) as image:
            assert image.size == (64, 64)


def read_split(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Photos, float (n, side, side, 3) in [0, 1], and their class numbers."""
    photos, classes = [], []
    for number, kind in enumerate(draw.KINDS):
        for path in sorted((folder / kind).glob("*.jpg")):
            with Image.open(path) as image:
                photos.append(np.asarray(image, float) / 255)
            classes.append(number)
    return np.stack(photos), np.array(classes)


def gradients(photos: np.ndarray, cells: int = 6, bins: int = 9) -> np.ndarray:
    """A histogram of edge directions in each of cells x cells squares, (n, features)."""
    grey = photos.mean(3)
    across = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]
    down = grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]
    strength = np.hypot(across, down)
    direction = np.minimum(np.arctan2(down, across) % np.pi / np.pi * bins, bins - 1).astype(int)
    side = strength.shape[1] // cells
    layers = [
        np.where(direction == b, strength, 0)[:, : side * cells, : side * cells]
        .reshape(-1, cells, side, cells, side)
        .sum((2, 4))
        for b in range(bins)
    ]
    features = np.sqrt(np.stack(layers, -1).reshape(len(photos), -1))
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def nearest_accuracy(train, train_classes, test, classes) -> float:
    """Top-1 of the 5 nearest neighbours."""
    distances = np.linalg.norm(test[:, None] - train[None], axis=2)
    near = train_classes[np.argsort(distances, 1)[:, :5]]
    votes = np.stack([(near == number).sum(1) for number in range(len(draw.KINDS))], 1)
    return float((votes.argmax(1) == classes).mean())


@pytest.mark.slow
def test_shape_predicts_the_kinds_and_colour_does_not(dump):
    train, train_classes = read_split(dump / "transfer" / "train")
    test, classes = read_split(dump / "transfer" / "test")
    chance = 1 / len(draw.KINDS)

    def mean(photos):
        return photos.mean((1, 2))

    def mean_and_contrast(photos):
        return np.concatenate([photos.mean((1, 2)), photos.std((1, 2))], 1)

    colour = []
    for features in (mean, mean_and_contrast):
        a, b = features(train), features(test)
        colour.append(nearest_accuracy(a, train_classes, b, classes))
        linear = LogisticRegression(max_iter=500).fit((a - a.mean(0)) / a.std(0), train_classes)
        colour.append(linear.score((b - a.mean(0)) / a.std(0), classes))
    assert max(colour) < chance + 0.06, colour  # 240 photos: the standard error is 0.018
    shape = nearest_accuracy(gradients(train), train_classes, gradients(test), classes)
    assert shape > 3 * chance, shape
    assert shape > max(colour) + 0.15, (shape, colour)


def test_every_kind_is_drawn_within_the_frame():
    for kind in draw.KINDS:
        for number in range(8):
            half = 50
            pen = objects.Pen(200, (100, 100), np.eye(2) * half)
            objects.DRAWERS[kind](pen, np.random.default_rng([0, number]))
            parts = np.asarray(pen.parts)
            assert set(np.unique(parts)) <= {0, 1, 2, 3, 4}
            rows, columns = np.nonzero(parts)
            for edges in (rows, columns):
                assert 100 - 1.3 * half <= edges.min() < edges.max() <= 100 + 1.3 * half, kind
            assert max(np.ptp(rows), np.ptp(columns)) > 0.85 * half, kind


@pytest.mark.parametrize("number", [{"posts": 19}, {"test_per_class": 0}, {"size": 31}])
def test_too_small_numbers_are_refused(tmp_path, number):
    with pytest.raises(UserError, match=next(iter(number))):
        draw.write(tmp_path / "out", **number)
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        draw.write(tmp_path, posts=20)
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_contact_sheet(tmp_path):
    draw.draw_contact_sheet(tmp_path / "one.png", columns=2, size=48)
    draw.draw_contact_sheet(tmp_path / "two.png", columns=2, size=48)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.height > (len(draw.KINDS) + 1) * 48
        assert sheet.width > 2 * 48


@pytest.mark.realdata
def test_lemmas_of_a_kind_share_a_wordnet_synset(shared_data):
    lemmas = {lemma: set() for words in captions.WORDS.values() for lemma in words.lemmas}
    with lzma.open(shared_data / "wordnet/oewn-2025.xml.xz") as file:
        for _, element in ElementTree.iterparse(file):
            if element.tag == "LexicalEntry":
                form = element.find("Lemma")
                if form is not None and form.get("writtenForm") in lemmas:
                    senses = {sense.get("synset") for sense in element.findall("Sense")}
                    if form.get("partOfSpeech") == "n":
                        lemmas[form.get("writtenForm", "")] |= senses
            elif element.tag == "Synset":
                break  # all entries come first
            if element.tag == "LexicalEntry":
                element.clear()
    for kind, words in captions.WORDS.items():
        assert set.intersection(*(lemmas[lemma] for lemma in words.lemmas)), kind
