"""Tests of copies, leaks, removed posts and repeated ids in whole runs of `prepare`."""

import csv
import hashlib
import json
import re
import unicodedata

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from dumps import SIZE, dropped, encoded, prepare, scene
from hashvision.data import dataset, records, removals
from hashvision.errors import UserError
from hashvision.prepare import pipeline

PHOTOS = 30

pytestmark = pytest.mark.slow


def edited(seed):
    return encoded(ImageOps.mirror(scene(seed)), 60)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("once")
    lines = []

    def add(post_id, photo, created_at: object = "2020-01-01", owner: object = "u0", **fields):
        (folder / f"{len(lines)}.jpg").write_bytes(photo)
        post = {"id": post_id, "image": f"{len(lines)}.jpg", "text": "#dog", "owner": owner}
        lines.append({**post, "visibility": "public", "created_at": created_at, **fields})

    for number in range(PHOTOS):
        add(f"p{number}", encoded(scene(number)), owner=f"u{number}")
    # The oldest post of a photo is kept, wherever it is in the dump.
    add("older", edited(0), created_at="2019-01-01", text="#cat and #dog")
    add("younger", encoded(scene(1).resize((64, 64))), created_at="2020-01-01T01:00:00+00:30")
    add("undated", encoded(scene(2)), created_at="")
    # It inherits the tags of the others.
    add("untagged", edited(7), created_at=1546300800, text="no tag")  # 2019
    add("leak", encoded(ImageEnhance.Brightness(scene(100)).enhance(1.2)))
    # Posts that show a removed photo are dropped, too: older or younger, edited or not.
    for number in (4, 5, 6):
        add(f"again{number}", edited(number), created_at=f"20{number + 16}")
        add(f"same{number}", encoded(scene(number)), owner="u8")
    # A repeated id, with another photo: the latest state counts, and private wins.
    add("p3", encoded(scene(101)))
    add("p9", encoded(scene(109)), visibility="private")
    add("p10", encoded(scene(110)), created_at="2019")
    # A private post on the list, and a public one that shows its photo.
    add("secret", encoded(scene(102)), owner="u9", visibility="private")
    add("shown", edited(102))
    # Owners on the list, in other spellings, or in forms that cannot be read.
    add("float", encoded(scene(103)), owner=12345.0)
    add("text", encoded(scene(104)), owner="12345.0")
    add("int", encoded(scene(105)), owner=12345)
    add("decomposed", encoded(scene(106)), owner=unicodedata.normalize("NFD", "José"))
    for number, owner in enumerate((["12345"], {"id": 12345}, True, 12345.5)):
        add(f"nobody{number}", encoded(scene(120 + number)), owner=owner)
    add("nobody", encoded(scene(130)), owner=None)
    (folder / "posts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    taken_down = hashlib.sha256(encoded(scene(6))).hexdigest()
    (folder / "removals.csv").write_text(
        "kind,value,reason,received_at\n"
        f"id,p4,deleted,2020\nowner,u5,left,2020\nsha256,{taken_down},court,2020\nid,gone,,\n"
        "id,secret,,\nowner,12345,,\nowner,José,,\n"
    )
    (folder / "test" / "dogs").mkdir(parents=True)
    (folder / "test" / "dogs" / "1.PNG").write_bytes(b"")  # does not decode, and is passed over
    latin_1 = folder / "test" / "dogs" / "2\udce9.png"
    scene(100).crop((4, 4, SIZE, SIZE)).save(latin_1)
    options = {
        "removals": str(folder / "removals.csv"),
        "evaluation_sets": [str(folder / "test")],
        "minimum_count": 1,
    }
    return folder, *prepare(folder / "posts.jsonl", folder / "set", **options), options


KEPT = {f"p{number}" for number in range(PHOTOS)} - {"p0", "p4", "p5", "p6", "p7", "p9"}
KEPT |= {"older", "untagged", "nobody"}


def ids(folder):
    source = dataset.load(str(folder))
    return set(source.rows(0, len(source))["id"].tolist()), source.key()


def test_each_dropped_post_has_its_reason(made):
    folder, manifest, written, _ = made
    assert dropped(manifest) == {
        "private": 3,  # p9 twice, secret
        "removed": 8,  # p4, p5, p6, same6, which has its bytes, and four of owners on the list
        "broken_owner": 4,
        "duplicate_id": 2,  # p3 as it was, p10 as it was
        "removed_copy": 6,
        "evaluation_photo": 1,
        "duplicate_photo": 4,  # p0, younger, undated, p7
    }
    assert written.keys() == KEPT
    found, key = ids(folder / "set")
    assert found == {key.hash("id", name) for name in KEPT}
    assert written["p3"].sha256 == hashlib.sha256(encoded(scene(101))).digest()
    assert written["p10"].sha256 == hashlib.sha256(encoded(scene(10))).digest()
    assert manifest["options"]["removals"] == {
        "file": "removals.csv",
        "lines": 7,
        "unmatched": 1,
    }
    assert manifest["options"]["evaluation_sets"] == ["test"]


def test_no_removed_or_private_post_is_named(made):
    folder, manifest, *_ = made
    dropped = manifest["posts"]["dropped"]
    assert not [why for why in ("private", "removed", "removed_copy") if dropped[why]["examples"]]
    assert dropped["broken_owner"]["examples"][0].startswith("byte ")
    gone = ("p4", "p5", "p6", "p9", "secret", "shown", "again4", "same5", "float", "12345", "José")
    for path in [*(folder / "set").glob("*.json"), *(folder / "set").glob("*.csv")]:
        cells = re.split(r'["\s,]+', path.read_text())
        assert not {*gone} & {*cells}, path


def test_a_removal_list_finds_copies_in_a_prepared_dataset(made, tmp_path):
    folder, *_ = made
    source = dataset.load(str(folder / "set"))
    lines = [removals.Removal("id", "p0", "", ""), removals.Removal("owner", "u7", "", "")]
    hits = source.find_removed(0, len(source), source.names(removals.RemovalList(lines)))
    rows, key = source.rows(0, len(source)), source.key()
    assert hits["copy"].all()
    named = {*rows["id"][hits["record"]].tolist()}
    assert named == {key.hash("id", "older"), key.hash("id", "untagged")}
    source.verify()


def test_a_kept_post_lists_its_copies_and_inherits_their_tags(made):
    folder, _, written, _ = made
    copies = {name: [copy.id for copy in row.copies] for name, row in written.items() if row.copies}
    assert copies == {"older": ["p0"], "untagged": ["p7"], "p1": ["younger"], "p2": ["undated"]}
    digest = hashlib.sha256(encoded(scene(7))).digest()
    assert written["untagged"].copies == (records.Copy("p7", "u7", digest),)
    classes = json.loads((folder / "set" / "vocabulary.json").read_text())["classes"]
    assert [(each["name"], each["count"]) for each in classes] == [("dog", len(KEPT)), ("cat", 1)]
    assert written["older"].labels == (0, 1) and written["untagged"].labels == (0,)


def test_the_report_names_each_pair_and_shows_it(made):
    folder, *_ = made
    (file,) = (folder / "set").glob("duplicates-*.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert {(row["post"], row["kind"], row["of"]) for row in rows} == {
        ("p0", "duplicate_photo", "older"),
        ("younger", "duplicate_photo", "p1"),
        ("undated", "duplicate_photo", "p2"),
        ("p7", "duplicate_photo", "untagged"),
        ("leak", "evaluation_photo", r"test/dogs/2\udce9.png"),
    }
    assert all(0.95 <= float(row["similarity"]) <= 1 for row in rows)
    with Image.open(folder / "set" / "duplicates.png") as sheet:
        assert np.asarray(sheet.convert("RGB")).std() > 10
        assert 2 * 112 < sheet.height < 3 * 112  # five pairs, four in a row: nothing removed
    assert not (folder / "set" / "spool").exists()


def test_keep_copies_of_removed_keeps_the_copies_of_others(made, tmp_path, capsys):
    folder, _, before, options = made
    options = {**options, "keep_copies_of_removed": True}
    manifest, written = prepare(folder / "posts.jsonl", tmp_path / "set", **options)
    said = "prepare: 1 of the 7 removals match nothing in posts.jsonl: id gone."
    assert said in capsys.readouterr().out.splitlines()
    assert written.keys() == {*before, "same5"}
    assert [copy.id for copy in written["same5"].copies] == ["again5"]
    assert manifest["options"]["keep_copies_of_removed"] is True
    reasons = dropped(manifest)
    assert (reasons["removed"], reasons["removed_copy"], reasons["duplicate_photo"]) == (8, 4, 5)


def test_keep_duplicates_still_drops_leaks_and_removed_photos(made, tmp_path):
    folder, _, _, options = made
    options = {**options, "keep_duplicates": True}
    manifest, written = prepare(folder / "posts.jsonl", tmp_path / "set", **options)
    # Each has only its own tags.
    assert written.keys() == KEPT - {"untagged"} | {"p0", "p7", "younger", "undated"}
    reasons = dropped(manifest)
    assert "duplicate_photo" not in reasons and reasons["no_tag"] == 1
    assert (reasons["removed_copy"], reasons["evaluation_photo"]) == (6, 1)
    copies = {name: [copy.id for copy in row.copies] for name, row in written.items() if row.copies}
    pairs = {"older": "p0", "p1": "younger", "p2": "undated"}
    both = {one: [other] for pair in pairs.items() for one, other in (pair, pair[::-1])}
    assert copies == {**both, "p7": ["untagged"]}
    (file,) = (tmp_path / "set").glob("duplicates-*.csv")
    assert file.read_text().count("\n") == 2 and "evaluation_photo" in file.read_text()


def test_missing_lists_are_named_before_any_work(made, tmp_path):
    folder, *_ = made
    for options in ({"removals": "none.csv"}, {"evaluation_sets": ["none"]}):
        with pytest.raises(UserError, match="none"):
            pipeline.prepare(str(folder / "posts.jsonl"), str(tmp_path / "set"), **options)
    assert not list(tmp_path.iterdir())
