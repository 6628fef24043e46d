"""Tests of the first steps of the graph, called as Beam calls them."""

import base64
import hashlib
import json
import os
import pathlib
import pickle

import pytest
from apache_beam import pvalue

import datasets
from hashvision.data import removals
from hashvision.prepare import reading
from hashvision.prepare.reading import Chunk


def write(path: pathlib.Path, posts: list[dict]) -> list[int]:
    """Writes a dump; returns where its lines start."""
    lines = [json.dumps({"visibility": "public", **post}).encode() + b"\n" for post in posts]
    path.write_bytes(b"".join(lines))
    return [sum(map(len, lines[:number])) for number in range(len(lines))]


def chunks_and_states(path: pathlib.Path, *cuts: int):
    found = []
    for start, end in zip((0, *cuts), (*cuts, path.stat().st_size), strict=True):
        found += reading.ReadLines().process((str(path), start, end))
    return (
        [each for each in found if isinstance(each, Chunk)],
        [each.value for each in found if isinstance(each, pvalue.TaggedOutput)],
    )


def test_chunks_and_states_are_small_whatever_the_lines_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LINES", 3)
    path = tmp_path / "posts.jsonl"
    bulk = base64.b64encode(bytes(100_000)).decode()
    write(path, [{"id": f"p{number}", "image_bytes": bulk} for number in range(8)])
    with path.open("ab") as file:
        file.write(b"\n{}\n" + b"x" * 1000 + b"\n  \n")
    chunks, states = chunks_and_states(path, 350_000, 350_001)
    assert sum(chunk.lines for chunk in chunks) == 10 and len(states) == 8
    assert max(len(pickle.dumps(each)) for each in (*chunks, *states)) < 500
    # Each line is read again, once.
    step = reading.ReadPosts(
        "",
        staging=str(tmp_path),
        short_side=64,
        removed=removals.NOTHING,
        keep_copies=False,
    )
    step.start_bundle()
    read = [
        each.value
        for chunk in chunks
        for each in step.process((chunk.start, {"chunk": [chunk], "superseded": []}))
        if isinstance(each, pvalue.TaggedOutput)
    ]
    reasons = sorted(reason for reason, _ in read)
    assert reasons == ["broken_line"] * 2 + ["unknown_format"] * 8


@pytest.fixture
def read(tmp_path):
    """Runs ReadPosts on posts; returns what is kept, what no post may show, and what is dropped."""

    def read(posts, listed=(), superseded=(), **options):
        path = tmp_path / "posts.jsonl"
        offsets = write(path, posts)
        names = removals.names([removals.Removal(*each, "", "") for each in listed])
        options = {"keep_copies": False, **options}
        step = reading.ReadPosts(
            str(tmp_path), staging=str(tmp_path), short_side=64, removed=names, **options
        )
        step.start_bundle()
        (chunk,), _ = chunks_and_states(path)
        lines = [(offsets[number], reason) for number, reason in superseded]
        found = list(step.process((chunk.start, {"chunk": [chunk], "superseded": lines})))
        step.finish_bundle()
        tagged = [(each.tag, each.value) for each in found if isinstance(each, pvalue.TaggedOutput)]
        photos = [each for each in found if isinstance(each, reading.Photo)]
        prints = [value[0] for tag, value in tagged if tag == "fingerprints"]
        assert prints == photos
        barred = [offsets.index(value[0]) for tag, value in tagged if tag == "removed"]
        gone = [value for tag, value in tagged if tag == "dropped"]
        dropped = [(reason, posts[offsets.index(offset)]["id"]) for reason, offset in gone]
        return [photo.id for photo in photos], barred, dropped

    return read


def test_a_private_photo_is_not_opened_unless_the_list_names_its_post(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.tar")  # to open it would not return
    for visibility in ("private", "friends", "", "PUBLIC", None):
        post = {"id": "p", "image": "pipe.tar", "owner": "u", "visibility": visibility}
        assert read([post]) == ([], [], [("private", "p")])
    (tmp_path / "a.jpg").write_bytes(datasets.jpeg(0))
    posts = [{"id": "p", "image": "a.jpg", "owner": "u"}]
    assert read(posts, superseded=[(0, "private")]) == ([], [], [("private", "p")])
    sha256 = hashlib.sha256(datasets.jpeg(0)).hexdigest()
    assert read(posts, [("sha256", sha256)], [(0, "private")]) == ([], [], [("private", "p")])
    for listed in (("id", "p"), ("owner", "u")):
        assert read(posts, [listed], [(0, "private")]) == ([], [0], [("private", "p")])


def test_photos_that_no_post_may_show(tmp_path, read):
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(datasets.jpeg(number))
    (tmp_path / "broken.jpg").write_bytes(b"none")
    owners = ["u0", "u1", "u2", ["u3"], "u4", "u5"]
    posts = [
        {"id": f"p{number}", "image": f"{number}.jpg", "owner": owner}
        for number, owner in enumerate(owners)
    ]
    posts += [{"id": "gone", "image": "gone.jpg"}, {"id": "broken", "image": "broken.jpg"}]
    listed = [("id", name) for name in ("p0", "gone", "broken", "p3")]
    listed += [("owner", "u1"), ("owner", "u5")]
    listed += [
        ("sha256", hashlib.sha256(datasets.jpeg(number)).hexdigest()) for number in (2, 4, 5)
    ]
    gone = [("removed", name) for name in ("p0", "p1", "p2", "p3", "p4", "p5", "gone", "broken")]
    earlier = [(4, "duplicate_id")]
    assert read(posts, listed, earlier) == ([], [0, 1, 2, 3, 4, 5], gone)
    # With keep_copies, others may show an owner's photos, but not photos listed by post or file.
    assert read(posts, listed, earlier, keep_copies=True) == ([], [0, 2, 3, 4, 5], gone)
    kept = ["p0", "p1", "p2", "p4", "p5"]
    reasons = [("broken_owner", "p3"), ("missing_file", "gone"), ("unknown_format", "broken")]
    assert read(posts) == (kept, [], reasons)
    kept.remove("p4")
    reasons.insert(1, ("duplicate_id", "p4"))
    assert read(posts, superseded=earlier) == (kept, [], reasons)
