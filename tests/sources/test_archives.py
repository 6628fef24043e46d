"""Tests of reading photos from tars in place, including malicious tars."""

import io
import os
import pathlib
import tarfile

import pytest

import hostile
from hashvision import storage
from hashvision.sources import archives, files, posts
from hashvision.sources.posts import Post
from hashvision.sources.reasons import Dropped

PHOTOS = {"abc.jpg": b"first", "deep/é 2.jpg": b"second" * 300, "0.jpg": b""}


def tar_of(members: dict[str, bytes], form: int = tarfile.GNU_FORMAT, **fields) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in members.items():
            hostile.member(tar, name, content, **fields)
    return buffer.getvalue()


def read(folder: object, path: str) -> bytes | str:
    """Reads the photo of a post that names the path; returns its bytes or the reason to drop it."""
    try:
        return posts.read_photo(Post("p", path, "", "u", "public", ""), str(folder))
    except Dropped as dropped:
        return dropped.reason


@pytest.mark.parametrize(
    "form",
    [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT],
    ids=["ustar", "gnu", "pax"],
)
def test_members_are_read_by_their_names(tmp_path: pathlib.Path, form: int):
    (tmp_path / "shards").mkdir()
    long = "n" * 120 + "/" + "m" * 90 + ".jpg"
    members = {**PHOTOS, "./dot/./x.jpg": b"dot", long: b"long"}
    (tmp_path / "shards" / "0001.tar").write_bytes(tar_of(members, form))
    for name, content in members.items():
        assert read(tmp_path, f"shards/0001.tar/{name}") == content
    assert read(tmp_path, "./shards//0001.tar/dot//x.jpg") == b"dot"
    assert read(tmp_path, "shards/0001.tar/absent.jpg") == "missing_file"
    assert read(tmp_path, "shards/0001.tar/deep") == "missing_file"
    assert read(tmp_path, "shards/0002.tar/abc.jpg") == "missing_file"
    assert read(tmp_path, "shards/0001.tar/../0001.tar/abc.jpg") == "path_outside"
    # The names include one of more than 200 characters and one that is not ASCII.
    assert len(long) > 200 and not os.path.exists(tmp_path / "shards" / "abc.jpg")


def test_a_folder_may_have_the_name_of_a_tar(tmp_path: pathlib.Path):
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "x.tar" / "y.TAR").write_bytes(tar_of(PHOTOS))
    assert read(tmp_path, "x.tar/y.TAR/abc.jpg") == b"first"


def test_only_regular_files_count_and_the_last_with_a_name_wins(tmp_path: pathlib.Path):
    (tmp_path / "out.jpg").write_bytes(b"out")
    folder = tmp_path / "images"
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as tar:
        hostile.member(tar, "twice.jpg", b"first")
        hostile.member(tar, "./twice.jpg", b"last")
        hostile.member(tar, "covered.jpg", b"first")
        for kind, name in (
            (tarfile.SYMTYPE, "covered.jpg"),
            (tarfile.SYMTYPE, "link.jpg"),
            (tarfile.LNKTYPE, "hard.jpg"),
        ):
            hostile.member(tar, name, type=kind, linkname=str(tmp_path / "out.jpg"))
        for kind, name in (
            (tarfile.DIRTYPE, "folder"),
            (tarfile.FIFOTYPE, "pipe"),
            (tarfile.CHRTYPE, "device"),
            (tarfile.GNUTYPE_SPARSE, "sparse"),
        ):
            hostile.member(tar, name, type=kind)
        for name in ("/abs.jpg", "../up.jpg", "a/../../up.jpg"):
            hostile.member(tar, name, b"up")
        hostile.member(tar, "last.jpg", b"end")
    assert read(folder, "x.tar/twice.jpg") == b"last"
    assert read(folder, "x.tar/last.jpg") == b"end"
    names = ["covered.jpg", "link.jpg", "hard.jpg", "folder", "pipe", "device", "sparse", "abs.jpg"]
    for name in (*names, "up.jpg", "a/up.jpg"):
        assert read(folder, f"x.tar/{name}") == "missing_file", name


def test_a_damaged_tar_is_read_up_to_the_damage(tmp_path: pathlib.Path):
    whole = tar_of({"a.jpg": b"a" * 600, "b.jpg": b"b" * 600})
    for length in range(0, 2 * 1536 + 1, 128):
        (tmp_path / "x.tar").write_bytes(whole[:length])
        os.utime(tmp_path / "x.tar", ns=(length, length))
        found = [read(tmp_path, f"x.tar/{name}.jpg") for name in "abc"]
        assert found[0] == (b"a" * 600 if length >= 512 + 600 else "broken_archive"), length
        assert found[1] == (b"b" * 600 if length >= 1536 + 512 + 600 else "broken_archive"), length
        assert found[2] in ("broken_archive", "missing_file")
    (tmp_path / "x.tar").write_bytes(whole[:1536] + b"garbage!" * 200)
    assert read(tmp_path, "x.tar/a.jpg") == b"a" * 600
    assert read(tmp_path, "x.tar/b.jpg") == "broken_archive"


@pytest.mark.slow
@pytest.mark.parametrize("kind", hostile.HARMFUL_TARS)
def test_malicious_tars_are_dropped(tmp_path: pathlib.Path, kind: str):
    (tmp_path / "x.tar").write_bytes(hostile.HARMFUL_TARS[kind])
    assert read(tmp_path, "x.tar/x.jpg") in ("broken_archive", "too_large")
    assert read(tmp_path, "x.tar/y.jpg") == "broken_archive"


class Watched(io.BytesIO):
    """A file that records the largest read."""

    most = 0

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None and size >= 0
        self.most = max(self.most, size)
        return super().read(size)


@pytest.mark.parametrize("kind", hostile.HARMFUL_TARS)
def test_a_header_cannot_request_a_large_read(kind: str):
    file = Watched(hostile.HARMFUL_TARS[kind])
    assert not archives._find_members(file, {})
    assert file.most <= archives.LONGEST_HEADER


def test_limits_on_member_size_and_header_bytes(tmp_path: pathlib.Path, monkeypatch):
    with open(tmp_path / "large.tar", "wb") as file:
        file.write(hostile.header(size=2**40))
        file.truncate(2**40 + 2**20)
    assert read(tmp_path, "large.tar/x.jpg") == "too_large"
    monkeypatch.setattr(archives, "HEADER_BYTES", 5 * 512)
    (tmp_path / "x.tar").write_bytes(tar_of({f"{n}.jpg": b"" for n in range(50)}))
    assert read(tmp_path, "x.tar/2.jpg") == b""
    assert read(tmp_path, "x.tar/40.jpg") == "broken_archive"


def test_compressed_tars_and_links_are_refused(tmp_path: pathlib.Path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("x.tar.gz", "x.tgz", "x.tar.zst"):
        (folder / name).write_bytes(b"")
        assert read(folder, f"{name}/abc.jpg") == "broken_archive"
    (tmp_path / "out.tar").write_bytes(tar_of(PHOTOS))
    (folder / "link.tar").symlink_to("../out.tar")
    assert read(folder, "link.tar/abc.jpg") == "path_outside"
    os.mkfifo(folder / "pipe.tar")
    assert read(folder, "pipe.tar/abc.jpg") == "missing_file"


def test_a_tar_is_indexed_once_and_again_after_a_change(tmp_path: pathlib.Path, monkeypatch):
    walks = []
    walk = archives._find_members
    monkeypatch.setattr(archives, "_find_members", lambda *given: walks.append(1) or walk(*given))
    (tmp_path / "x.tar").write_bytes(tar_of(PHOTOS))
    for _ in range(3):
        assert read(tmp_path, "x.tar/abc.jpg") == b"first"
    assert len(walks) == 1
    (tmp_path / "x.tar").write_bytes(tar_of({"longer.jpg": b"", "abc.jpg": b"other"}))
    os.utime(tmp_path / "x.tar", ns=(0, 0))
    assert read(tmp_path, "x.tar/abc.jpg") == b"other"
    assert len(walks) == 2


def test_only_paths_inside_the_folder_are_requested_from_remote_storage(
    tmp_path: pathlib.Path, monkeypatch
):
    opened = []

    def open_remote(path):  # elsewhere://a/b is the local file /a/b
        opened.append(path)
        return open(path.removeprefix("elsewhere:/"), "rb")

    monkeypatch.setattr(storage, "open", open_remote)
    folder = f"elsewhere:/{tmp_path / 'images'}/"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "in.jpg").write_bytes(b"in")
    (tmp_path / "images" / "x.tar").write_bytes(tar_of(PHOTOS))
    assert read(folder, "in.jpg") == read(folder, ".//in.jpg") == b"in"
    assert read(folder, "x.tar/abc.jpg") == b"first"
    assert read(folder, "x.tar/deep/é 2.jpg") == b"second" * 300
    assert read(folder, "x.tar/absent.jpg") == "missing_file"
    for path in ("absent.jpg", "absent.tar/x.jpg"):
        assert read(folder, path) == "missing_file"
    assert read(folder, "x.tar.gz/x.jpg") == "broken_archive"
    for path in ("../out.jpg", "a/../../out.jpg", "/etc/passwd", "elsewhere://etc/passwd"):
        assert read(folder, path) == "path_outside"
    assert all(path.startswith(folder) and ".." not in path for path in opened)
    assert files.locate(folder, "x.tar/./a//b") == (f"{folder}x.tar", "a/b")
