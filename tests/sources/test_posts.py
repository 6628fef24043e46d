"""Tests of reading dumps and of the checks before a photo is opened."""

import base64
import io
import json
import os
import pathlib

import pytest

from hashvision.sources import posts
from hashvision.sources.posts import Post
from hashvision.sources.reasons import Dropped


def reason_of(call, *arguments) -> str:
    with pytest.raises(Dropped) as caught:
        call(*arguments)
    return caught.value.reason


def test_parse_reads_every_field():
    fields = {
        "id": "p1",
        "image": "a/b.jpg",
        "text": "x #y",
        "owner": "u1",
        "visibility": "public",
        "created_at": "2020",
        "lang": "en",
    }
    line = json.dumps(fields).encode()
    assert posts.parse(line) == Post("p1", "a/b.jpg", "x #y", "u1", "public", "2020")
    assert posts.parse(b"\xef\xbb\xbf" + line).id == "p1"


def test_parse_decodes_photo_bytes():
    encoded = base64.b64encode(b"photo").decode()
    assert posts.parse(json.dumps({"id": 7, "image_bytes": encoded}).encode()).image == b"photo"
    assert posts.parse(b'{"id": 7, "image_bytes": "*"}').image == b""


@pytest.mark.parametrize(
    "line",
    [
        b'{"id": "x", "image": ',
        b"\xff\xfe{}",
        b'{"id": "\xe9"}',
        b"[]",
        b"3",
        b"null",
        b"{}",
        b'{"id": ""}',
        b'{"id": null}',
        b'{"id": ["x"]}',
        b'{"id": true}',
        b'{"id": NaN}',
        b'{"id": 1e999}',
        b'{"id": 1.5}',
        b'{"id": " "}',
        b'{"id": "a\\u0000b"}',
        b'{"id": "a\\nb"}',
        b'{"id": "\\ud800x"}',
        b'{"id": "' + b"x" * 1001 + b'"}',
        b'{"id": "x", "id": "y"}',
        b'{"id": "x", "more": [' + b"[]," * 600_000 + b"[]]}",
        b'{"id": "x"}\0',
        '{"id": "x"}'.encode("utf-16"),
        b"[" * 100_000,
        b'{"id": ' + b"9" * 10_000 + b"}",
    ],
)
def test_broken_lines_are_dropped(line: bytes):
    assert reason_of(posts.parse, line) == "broken_line"


def fault_of(line: bytes) -> str:
    """Why a post is dropped before its photo is opened; "" if it is not."""
    try:
        posts.check(posts.parse(line))
    except Dropped as why:
        return why.reason
    return ""


@pytest.mark.parametrize(
    "owner",
    [
        b'["u1"]',
        b'{"id": "u1"}',
        b"true",
        b"1.5",
        b"NaN",
        b"1e999",
        b"1e16",
        b'"a\\nb"',
        b'"\\u0000"',
        b'"\\ud800"',
        b'"' + b"x" * 1001 + b'"',
        b'"u1", "owner": "u2"',
    ],
)
def test_an_owner_that_a_list_cannot_name_drops_the_post(owner: bytes):
    fields = b'{"id": "x", "visibility": "%s", "owner": ' + owner + b"}"
    reason = "broken_line" if b"u2" in owner else "broken_owner"
    assert fault_of(fields % b"public") == reason
    assert fault_of(fields % b"private") == "private"


@pytest.mark.parametrize(
    "owner", [b"", b', "owner": null', b', "owner": ""', b', "owner": " \\u0085"']
)
def test_an_owner_is_optional(owner: bytes):
    line = b'{"id": "x", "visibility": "public"' + owner + b"}"
    assert fault_of(line) == "" and posts.parse(line).owner == ""


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (b"12345", "12345"),
        (b"12345.0", "12345"),
        (b'"12345.0"', "12345"),
        (b'" 12345 "', "12345"),
        (b"-0.0", "0"),
        ('"Jose\u0301"'.encode(), "Jos\u00e9"),
        ('"Jos\u00e9"'.encode(), "Jos\u00e9"),
    ],
)
def test_ids_and_owners_have_canonical_form(written: bytes, name: str):
    post = posts.parse(b'{"id": ' + written + b', "owner": ' + written + b"}")
    assert (post.id, post.owner) == (name, name)


def test_a_key_with_two_values_has_none():
    def twice(fields: bytes) -> str:
        return fault_of(b'{"id": "x", ' + fields + b"}")

    public = b'"visibility": "public"'
    assert twice(b'"visibility": "private", ' + public) == "private"
    assert twice(public + b', "visibility": "private"') == "private"
    assert twice(public + b", " + public) == "broken_line"
    assert twice(public + b', "more": {"a": 1, "a": 1}') == "broken_line"
    assert twice(public + b', "more": {"a": NaN, "a": 1, "a": [2]}') == "broken_line"
    assert twice(public + b', "more": [{"a": 1}, {"a": 2}]') == ""


def test_fields_of_wrong_type_count_as_absent():
    post = posts.parse(b'{"id": 5, "image": 3, "text": {}, "visibility": null}')
    assert post == Post("5", None, "", "", "", "")
    post = posts.parse(b'{"id": "x", "text": "\\ud800x", "created_at": 1.5, "more": NaN}\r\n')
    assert (post.text, post.created_at) == ("\ufffdx", "1.5")  # a lone surrogate is replaced


def test_overlong_texts_are_dropped_and_not_truncated():
    def checked(text: str) -> str:
        return reason_of(posts.check, posts.parse(json.dumps({**fields, "text": text}).encode()))

    fields = {"id": "x", "visibility": "public"}
    assert checked("x" * 100_001) == checked("x" * 10_000_000) == "overlong_text"
    assert checked(" ".join(f"#tag{n}" for n in range(5000))) == "overlong_text"
    assert checked("#" + "#".join(f"tag{n}" for n in range(201))) == "overlong_text"
    for text in ("x" * 100_000, " ".join(f"#tag{n}" for n in range(200)), "#" * 5000):
        posts.check(posts.parse(json.dumps({**fields, "text": text}).encode()))
    fields["visibility"] = "private"
    assert checked("x" * 100_001) == "private"


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_ranges_give_every_line_once(ending: bytes):
    lines = [b"a" * n for n in (1, 5, 0, 3, 12, 0, 0, 7)] + [b"  ", b"last"]
    content = ending.join(lines)
    whole = list(posts.read_lines(io.BytesIO(content), 0, len(content)))
    assert [line.strip() for _, line in whole if line] == [line for line in lines if line.strip()]
    for offset, line in whole:
        assert line and content[offset:].startswith(line)
    for size in range(1, len(content) + 1):
        tiled = []
        for start in range(0, len(content), size):
            end = min(start + size, len(content))
            tiled += posts.read_lines(io.BytesIO(content), start, end)
        assert tiled == whole


def test_overlong_lines_are_reported_and_skipped():
    content = b"short\n" + b"x" * 100 + b"\nnext\n" + b"y" * 20
    read = list(posts.read_lines(io.BytesIO(content), 0, len(content), longest=20))
    assert read == [(0, b"short\n"), (6, None), (107, b"next\n"), (112, None)]


def post(image) -> Post:
    return Post("p", image, "", "u", "public", "")


def test_a_pipe_does_not_block(tmp_path: pathlib.Path):
    os.mkfifo(tmp_path / "pipe")
    assert reason_of(posts.read_photo, post("pipe"), str(tmp_path)) == "missing_file"


@pytest.fixture
def images(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with a photo and links of all kinds, next to files that no post may read."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    (folder / "in.jpg").write_bytes(b"in")
    (folder / "deep" / "line\nend%2e.jpg").write_bytes(b"odd")
    (tmp_path / "images-2").mkdir()
    for outside in ("out.jpg", "images-2/out.jpg"):
        (tmp_path / outside).write_bytes(b"out")
    (folder / "link.jpg").symlink_to("in.jpg")
    (folder / "deep" / "link").symlink_to("..")
    (folder / "out.jpg").symlink_to(tmp_path / "out.jpg")
    (folder / "hop.jpg").symlink_to("out.jpg")
    (folder / "up").symlink_to("..")
    (folder / "beside").symlink_to("../images-2")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nothing")
    os.mkfifo(folder / "pipe")
    return folder


def test_files_below_the_folder_are_read(images: pathlib.Path):
    for path in ("in.jpg", "./in.jpg", "deep//link/in.jpg", "link.jpg", "deep/link/link.jpg"):
        assert posts.read_photo(post(path), str(images)) == b"in"
        assert posts.read_photo(post(path), f"{images}/") == b"in"
    assert posts.read_photo(post("deep/line\nend%2e.jpg"), str(images)) == b"odd"
    linked = images.parent / "linked"
    linked.symlink_to(images)
    assert posts.read_photo(post("in.jpg"), str(linked)) == b"in"
    assert posts.read_photo(post(str(images / "in.jpg")[1:]), "/") == b"in"


def test_paths_that_lead_outside_are_refused(images: pathlib.Path):
    bad = ["../out.jpg", "deep/../in.jpg", "..\\out.jpg", "deep\\..\\in.jpg", "..", "deep/.."]
    bad += [str(images / "in.jpg"), "//host/in.jpg", "\\\\host\\in.jpg", "C:\\in.jpg", "c:in.jpg"]
    bad += ["file:///etc/passwd", "gs://bucket/x", "http://host/x.jpg"]
    bad += ["out.jpg", "hop.jpg", "up/out.jpg", "beside/out.jpg", "zero", "deep/link/up/out.jpg"]
    for path in bad:
        assert reason_of(posts.read_photo, post(path), str(images)) == "path_outside", path


def test_paths_to_no_regular_file_are_missing(images: pathlib.Path):
    bad = ["", "absent.jpg", ".", "deep", "a\0b", "in.jpg/x", "x" * 5000, "a/" * 600, None]
    for path in [*bad, "loop", "loop/x", "dangling", "pipe", "%2e%2e/out.jpg", "file:in.jpg"]:
        assert reason_of(posts.read_photo, post(path), str(images)) == "missing_file", path


def test_large_files_are_not_read_to_their_end(images: pathlib.Path, monkeypatch):
    with open(images / "large.jpg", "wb") as file:
        file.truncate(2**40)  # a sparse file
    assert reason_of(posts.read_photo, post("large.jpg"), str(images)) == "too_large"
