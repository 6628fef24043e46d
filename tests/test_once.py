"""Copies, leaks, removed posts and ids that come twice, in the whole run of prepare."""

import csv
import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from hashvision.data import dataset, records
from hashvision.errors import UserError
from hashvision.prepare import pipeline

SIZE = 96
PHOTOS = 24


def scene(seed):
    """A picture with as much in it as a photo has: blurred noise of several scales."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((SIZE, SIZE, 3))
    for cells in (4, 8, 16, 32):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        pixels += np.asarray(noise.resize((SIZE, SIZE), Image.Resampling.BICUBIC), float)
    return Image.fromarray((pixels / 4).astype(np.uint8))


def encoded(image, quality=90):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("once")
    lines = []

    def add(post_id, photo, created_at="2020-01-01", owner="u0"):
        (folder / f"{len(lines)}.jpg").write_bytes(photo)
        fields = {"id": post_id, "image": f"{len(lines)}.jpg", "text": "#dog", "owner": owner}
        lines.append({**fields, "visibility": "public", "created_at": created_at})

    for number in range(PHOTOS):
        add(f"p{number}", encoded(scene(number)), owner=f"u{number}")
    # Of one photo the oldest is kept, wherever it stands in the dump.
    add("older", encoded(ImageOps.mirror(scene(0)), 60), created_at="2019-01-01")
    add("younger", encoded(scene(1).resize((64, 64))), created_at="2021-01-01")
    add("undated", encoded(scene(2)), created_at="")
    add("leak", encoded(ImageEnhance.Brightness(scene(100)).enhance(1.2)))
    add("p3", encoded(scene(101)))  # an id again, with another photo
    (folder / "posts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    taken_down = hashlib.sha256(encoded(scene(6))).hexdigest()
    (folder / "removals.csv").write_text(
        "kind,value,reason,received_at\n"
        f"id,p4,deleted,2020\nowner,u5,left,2020\nsha256,{taken_down},court,2020\nid,gone,,\n"
    )
    (folder / "test" / "dogs").mkdir(parents=True)
    (folder / "test" / "dogs" / "1.PNG").write_bytes(b"")  # does not decode: passed over
    latin_1 = folder / "test" / "dogs" / "2\udce9.png"
    scene(100).crop((4, 4, SIZE, SIZE)).save(latin_1)
    options = {
        "removals": str(folder / "removals.csv"),
        "evaluation_sets": [str(folder / "test")],
        "minimum_count": 1,
    }
    manifest = pipeline.prepare(str(folder / "posts.jsonl"), str(folder / "set"), **options)
    return folder, manifest, options


def ids(folder):
    source = dataset.load(str(folder))
    return set(source.rows(0, len(source))["id"].tolist())


def test_each_is_left_out_under_its_reason(made):
    folder, manifest, _ = made
    dropped = {
        reason: entry["examples"]
        for reason, entry in manifest["posts"]["dropped"].items()
        if entry["count"]
    }
    assert dropped == {
        "removed": ["p4", "p5", "p6"],
        "duplicate_id": ["p3"],
        "evaluation_photo": ["leak"],
        "duplicate_photo": ["p0", "undated", "younger"],
    }
    kept = {f"p{number}" for number in range(PHOTOS)} - {"p0", "p4", "p5", "p6"} | {"older"}
    assert ids(folder / "set") == {records.id_hash(name) for name in kept}
    assert manifest["options"]["removals"] == {"file": "removals.csv", "lines": 4}
    assert manifest["options"]["evaluation_sets"] == ["test"]


def test_the_report_names_each_pair_and_shows_it(made):
    folder, _, _ = made
    (file,) = (folder / "set").glob("duplicates-*.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert {(row["post"], row["kind"], row["of"]) for row in rows} == {
        ("p0", "duplicate_photo", "older"),
        ("younger", "duplicate_photo", "p1"),
        ("undated", "duplicate_photo", "p2"),
        ("leak", "evaluation_photo", r"test/dogs/2\udce9.png"),
    }
    assert all(0.95 <= float(row["similarity"]) <= 1 for row in rows)
    with Image.open(folder / "set" / "duplicates.png") as sheet:
        assert np.asarray(sheet.convert("RGB")).std() > 10
    assert not (folder / "set" / "spool").exists()


def test_duplicates_are_kept_where_asked_but_no_leak(made, tmp_path):
    folder, _, options = made
    manifest = pipeline.prepare(
        str(folder / "posts.jsonl"), str(tmp_path / "set"), keep_duplicates=True, **options
    )
    dropped = manifest["posts"]["dropped"]
    assert dropped["duplicate_photo"]["count"] == 0
    assert dropped["evaluation_photo"]["count"] == 1


def test_lists_that_are_not_there_are_named_before_anything_is_done(made, tmp_path):
    folder, _, _ = made
    for options in ({"removals": "none.csv"}, {"evaluation_sets": ["none"]}):
        with pytest.raises(UserError, match="none"):
            pipeline.prepare(str(folder / "posts.jsonl"), str(tmp_path / "set"), **options)
    assert not list(tmp_path.iterdir())
