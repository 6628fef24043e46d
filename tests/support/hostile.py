"""Writes a dump with malicious and broken posts of every kind, for tests/sources/test_fuzz.py."""

import base64
import io
import json
import os
import pathlib
import random
import tarfile
import typing

import hostile_photos as photos

SEED = 20260101
UNREADABLE = ("undecodable", "unknown_format", "too_large")
CANARY = photos.encode(photos.quarters("CMYK").resize((31, 17)), "JPEG")


class Case(typing.NamedTuple):
    """One post of the dump."""

    kind: str
    id: str
    line: bytes
    outcomes: tuple[str, ...]  # correct outcomes: "kept" or reasons to drop it
    quarters: bool  # whether the photo, if kept, shows QUARTERS


class Dump:
    """A dump under construction: posts, photos, tars and links, and a canary outside its folder."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder / "dump"
        self.outside = folder / "outside"
        self.cases: list[Case] = []
        self.generator = random.Random(SEED)
        self.members: dict[str, bytes] = {}  # of good.tar
        (self.folder / "photos").mkdir(parents=True)
        self.outside.mkdir()
        (self.outside / "canary.jpg").write_bytes(CANARY)

    def add(
        self,
        kind: str,
        outcomes: str | tuple[str, ...],
        line: bytes | None = None,
        quarters: bool = False,
        **fields: typing.Any,
    ) -> None:
        """Adds a post with these fields, or with this exact line."""
        post_id = f"p{len(self.cases)}"
        if line is None:
            whole = {"id": post_id, "text": "#dog", "owner": "u", "visibility": "public", **fields}
            post_id = str(whole["id"])
            line = json.dumps(whole, ensure_ascii=self.generator.random() < 0.5).encode(
                "utf-8", "surrogatepass"
            )
        outcomes = (outcomes,) if isinstance(outcomes, str) else outcomes
        self.cases.append(Case(kind, post_id, line, outcomes, quarters))

    def photo(self, kind: str, outcomes: str | tuple[str, ...], encoded: bytes, **more) -> None:
        """Adds a post with this photo as a file, in a tar, or in the line itself."""
        self.add(kind, outcomes, **{**self.placed(encoded), **more})

    def placed(self, encoded: bytes) -> dict[str, str]:
        """Stores the bytes and returns the fields that refer to them."""
        name = f"{len(self.cases)}.jpg"
        match self.generator.randrange(6):
            case 0:
                return {"image_bytes": base64.b64encode(encoded).decode()}
            case 1:
                self.members[name] = encoded
                return {"image": f"photos/good.tar/{name}"}
            case _:
                (self.folder / "photos" / name).write_bytes(encoded)
                return {"image": f"photos/{name}"}


def write(folder: pathlib.Path) -> Dump:
    """Writes the dump, which is the same for the same versions of the encoders."""
    dump = Dump(folder)
    valid = photos.valid(dump.generator)
    add_photos(dump, valid)
    add_broken_photos(dump, valid)
    good = valid["jpeg"]
    add_lines(dump, good)
    add_texts(dump, good)
    add_paths(dump, good)
    add_tars(dump, good)
    tar = dump.folder / "photos" / "good.tar"
    with tarfile.open(tar, "w") as opened:
        for name, content in dump.members.items():
            member(opened, name, content)
    dump.generator.shuffle(dump.cases)
    (dump.folder / "posts.jsonl").write_bytes(b"\n".join(case.line for case in dump.cases))
    return dump


def member(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields: typing.Any) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for field, value in fields.items():
        setattr(entry, field, value)
    tar.addfile(entry, io.BytesIO(content))


def header(**fields) -> bytes:
    entry = tarfile.TarInfo("x.jpg")
    for field, value in fields.items():
        setattr(entry, field, value)
    return entry.tobuf(tarfile.GNU_FORMAT)


HARMFUL_TARS = {
    "garbage": b"garbage!" * 500,
    "empty": b"",
    "gzip named .tar": b"\x1f\x8b\x08" + bytes(1000),
    "negative size": header(size=-1024) * 3,
    "negative size of a name": header(type=tarfile.GNUTYPE_LONGNAME, size=-1024) * 3,
    "endless name": header(type=tarfile.GNUTYPE_LONGNAME, size=2**40) + bytes(2**17),
    "endless pax": header(type=tarfile.XHDTYPE, size=2**40) + bytes(2**17),
    "name of a name": header(type=tarfile.GNUTYPE_LONGNAME, size=0) * 50_000,
    "pax of a pax": header(type=tarfile.XGLTYPE, size=0) * 50_000,
    "broken pax": header(type=tarfile.XHDTYPE, size=512) + b"99999999999 a=".ljust(512, b"\0"),
    "size past all files": header(size=2**70),
}


def add_photos(dump: Dump, valid: dict[str, bytes]) -> None:
    for _ in range(3):
        for name, encoded in valid.items():
            dump.photo(f"valid {name.split()[0].rstrip(',')}", "kept", encoded, quarters=True)
    for encoded in photos.odd(dump.generator).values():
        dump.photo("valid, of other colours", "kept", encoded)
    dump.photo("private", "private", valid["jpeg"], visibility="private")
    for visibility in ("friends", "", None, "Public", True, ["public"], "public "):
        dump.add("private", "private", visibility=visibility, image="photos/pipe")


def add_broken_photos(dump: Dump, valid: dict[str, bytes]) -> None:
    generator = dump.generator
    names = [name for name in valid if "EXIF" not in name and "behind" not in name]
    for number in range(1100):
        name = names[number % len(names)]
        wrong = photos.mutated(generator, valid[name])
        dump.photo(f"{name.split()[0]} with a fault", ("kept", *UNREADABLE), wrong)
    # These formats need every part of the file, and the last part is pixels.
    for name in ("jpeg", "jpeg CMYK", "png", "gif", "webp", "webp lossless", "bmp"):
        for _ in range(25):
            length = generator.randrange(20, int(0.9 * len(valid[name])))
            dump.photo(f"{name.split()[0]} cut short", "undecodable", valid[name][:length])
    for encoded in photos.bombs().values():
        dump.photo("bomb", ("too_large", "undecodable"), encoded)
    for content in photos.FOREIGN.values():
        dump.photo("no image", "unknown_format", content)
        dump.photo("no image", "unknown_format", content + generator.randbytes(50))
    for _ in range(40):
        noise = generator.randbytes(generator.randrange(1, 3000))
        dump.photo("random bytes", UNREADABLE, noise)
        start = generator.choice(
            [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0"]
        )
        dump.photo("random bytes after a signature", UNREADABLE, start + noise)
    for _ in range(6):
        dump.photo("zero bytes", "undecodable", b"")


def add_lines(dump: Dump, good: bytes) -> None:
    generator = dump.generator
    whole = json.dumps({"id": "x", "visibility": "public", "text": "é"}).encode()
    broken = [
        *(whole[: generator.randrange(1, len(whole) - 1)] for _ in range(20)),
        *(b"\xff" + generator.randbytes(30).replace(b"\n", b"") for _ in range(20)),
        *(b'{"id": "%s"}' % piece for piece in (b"\xe9", b"\xed\xa0\x80", b"\xc0\x80", b"\xf8")),
        *(b'{"id": %s}' % value for value in (b"NaN", b"-Infinity", b"1e999", b"true", b"{}", b"")),
        *(b'{"id": "%s"}' % name for name in (b"", b" ", b"a\\u0000b", b"\\n", b"\\ud800", b"\0")),
        *(piece * 200_000 for piece in (b"[", b'{"a":', b"[{")),
        *(b"%s" % value for value in (b"3", b"null", b"[]", b'"x"', b"{}", b"{} {}", b"\0\0")),
        b'{"id": "%s"}' % (b"x" * 10**6),
        b'{"id": %s}' % (b"9" * 10_000),
        b'{"id": "x", "id": "y", "visibility": "public"}',
        b'{"id": "twice", "visibility": "public", "more": [{"a": 1, "a": 2}]}',
        b'{"id": "x", "more": [%s0]}' % (b"0," * 1_100_000),
        whole.decode().encode("utf-16").replace(b"\n", b""),
        whole + b"\0",
        b"\xff\xfe\0\0",
    ]
    for line in broken:
        dump.add("broken line", "broken_line", line)
    dump.add("private", "private", b'{"id": "x", "visibility": "private", "visibility": "public"}')
    names = [
        b'"\\u0000"',
        b'"a\\rb"',
        b'"\\ud800"',
        b'"%s"' % (b"x" * 10**6),
        b"[1]",
        b"{}",
        b"true",
    ]
    for number, name in enumerate([*names, b"1.5", b"NaN", b"1e999", b"1e300"]):
        fields = b'{"id": "nobody\'s %d", "visibility": "public", "owner": %s}' % (number, name)
        dump.add("broken owner", "broken_owner", fields)
    for number in range(20):  # unusual but valid JSON
        fields = {
            "id": f"odd {number}",
            "visibility": "public",
            "text": "\ud800 \x00 \u202e #dog\u2066 \U0001f415",
            "owner": 10**number,
            "created_at": -1e300,
            "more": [{"deep": [None] * 50}, float("nan")],
            **dump.placed(good),
        }
        line = json.dumps(fields).encode()
        line = (b"\xef\xbb\xbf" if number % 2 else b" \t") + line + (b"\r" if number % 3 else b"  ")
        dump.add("odd line", "kept", line)
        dump.cases[-1] = dump.cases[-1]._replace(id=f"odd {number}", quarters=True)
    for name in ("\u202eevil", "💃" * 500, "../../etc", "<script>", "%00", "'; --", "x" * 1000):
        dump.photo("odd id", "kept", good, id=name, owner=name, quarters=True)
    for number in range(20):
        twice = f"twice {number // 2}"
        dump.photo("id twice", ("kept", "duplicate_id"), good, id=twice, quarters=True)
    for garbage in ("*", "====", "A", "AAAA=A", "é", "AA AA", "-_-_", "\0", "data:image/jpeg,"):
        dump.add("base64 garbage", "undecodable", image_bytes=garbage)


def add_texts(dump: Dump, good: bytes) -> None:
    for text in ("x" * 10**7, "#dog " * 2_000_000, "é\U0001f415" * 1_000_000):
        dump.photo("caption of 10 MB", "overlong_text", good, text=text)
    for join in (" #", "#", "\n\uff03", "##", ",#") * 3:
        tags = join + join.join(f"tag{n}" for n in range(5000))
        dump.photo("5,000 tags", "overlong_text", good, text=tags)
    signs = ["#" * 99_999, "a." * 49_999, "www." * 24_000, "@" * 99_999, "\u0301" * 99_999]
    signs += ["#\u0301" * 49_999, "\u200d" * 99_999, "#a\u200d" * 199, "\ufdfa" * 99_999]
    signs += ["http://#" * 9999, "a-" * 49_999, "#" + "a" * 99_998, "_#" * 49_999]
    for text in signs:
        dump.photo("text to be slow with", "kept", good, text=text, quarters=True)


def add_paths(dump: Dump, good: bytes) -> None:
    folder, outside = dump.folder / "photos", dump.outside
    (folder / "in.jpg").write_bytes(good)
    (folder / "line\nend %2e.jpg").write_bytes(good)
    (folder / "link.jpg").symlink_to("in.jpg")
    (folder / "round").symlink_to("../photos")
    (folder / "out.jpg").symlink_to(outside / "canary.jpg")
    (folder / "hop.jpg").symlink_to("out.jpg")
    (folder / "up").symlink_to("../..")
    (folder / "over").symlink_to("../../outside")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "passwd").symlink_to("/etc/passwd")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nothing")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe")
    canary = str(outside / "canary.jpg")
    beyond = ["../outside/canary.jpg", "photos/../../outside/canary.jpg", "photos/..", "..", canary]
    beyond += ["..\\outside\\canary.jpg", "photos\\..\\..\\outside\\canary.jpg", "/etc/passwd"]
    beyond += ["//etc/passwd", "/dev/zero", "\\\\host\\share\\x.jpg", "C:\\x.jpg", "c:x.jpg", "\\x"]
    beyond += [f"file://{canary}", "http://127.0.0.1/x.jpg", "gs://bucket/x.jpg", "s3://x/y", "://"]
    beyond += [f"photos/{name}" for name in ("out.jpg", "hop.jpg", "zero", "passwd")]
    beyond += ["photos/up/outside/canary.jpg", "photos/over/canary.jpg", "photos/round/out.jpg"]
    beyond += ["photos/good.tar/../in.jpg", "photos/round/over/canary.jpg"]
    missing = ["", ".", "./", "absent.jpg", "photos", "photos/folder.jpg", "photos/pipe", "photos/"]
    missing += ["photos/loop", "photos/loop/x", "photos/dangling", "photos/in.jpg/x", "a\0b", "x\0"]
    missing += [
        "%2e%2e/outside/canary.jpg",
        "photos/%2e%2e",
        "x" * 300,
        "x/" * 2000,
        "~/x",
        "~root",
    ]
    missing += [
        "file:in.jpg",
        "photos/in.jpg ",
        "photos/IN.JPG",
        "$HOME",
        "photos/*.jpg",
        "-",
        "|id",
    ]
    present = ["photos/in.jpg", "./photos//in.jpg", "photos/link.jpg", "photos/round/round/in.jpg"]
    present += ["photos/line\nend %2e.jpg"]
    for _ in range(3):
        for kind, paths, outcome in (
            ("path that leads outside", beyond, "path_outside"),
            ("path to no file", [*missing, None, 7, {}], "missing_file"),
            ("odd path to a photo", present, "kept"),
        ):
            for path in paths:
                dump.add(kind, outcome, image=path, quarters=outcome == "kept")
    dump.add("path to the dump itself", UNREADABLE, image="posts.jsonl")


def add_tars(dump: Dump, good: bytes) -> None:
    folder, generator = dump.folder / "photos", dump.generator
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.jpg", "./b.jpg", "é/" + "long" * 40 + ".jpg", "last.jpg"):
            member(tar, name, good)
        for name in ("../up.jpg", "/abs.jpg"):
            member(tar, name, good)
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)):
            member(tar, name, type=kind, linkname=str(dump.outside / "canary.jpg"))
        for name, kind in (("device", tarfile.CHRTYPE), ("sparse", tarfile.GNUTYPE_SPARSE)):
            member(tar, name, type=kind)
    whole = buffer.getvalue()
    (folder / "x.tar").write_bytes(whole)
    (folder / "x.tar.gz").write_bytes(whole)
    (folder / "out.tar").symlink_to(dump.outside / "canary.tar")
    (dump.outside / "canary.tar").write_bytes(whole)
    for name in ("a.jpg", "b.jpg", "./b.jpg", "é/" + "long" * 40 + ".jpg", "last.jpg"):
        dump.add("photo in a tar", "kept", image=f"photos/x.tar/{name}", quarters=True)
    for name in ("up.jpg", "abs.jpg", "link.jpg", "hard.jpg", "device", "sparse", "é", "c.jpg"):
        dump.add("no photo in a tar", "missing_file", image=f"photos/x.tar/{name}")
    dump.add("no photo in a tar", "path_outside", image="photos/out.tar/a.jpg")
    dump.add("no photo in a tar", "broken_archive", image="photos/x.tar.gz/a.jpg")
    (folder / "garbage.tar").write_bytes(generator.randbytes(5000))
    dump.add("no photo in a tar", "broken_archive", image="photos/garbage.tar/a.jpg")
    for kind, content in HARMFUL_TARS.items():
        (folder / f"{kind}.tar").write_bytes(content)
        for name in ("x.jpg", "y.jpg"):
            outcomes = ("broken_archive", "too_large")
            dump.add("tar made to harm", outcomes, image=f"photos/{kind}.tar/{name}")
    for number in range(200):
        broken = bytearray(whole)
        if number % 2:
            del broken[generator.randrange(len(whole)) :]
        else:
            for _ in range(generator.randrange(1, 30)):
                broken[generator.randrange(len(whole))] = generator.randrange(256)
        (folder / f"broken{number}.tar").write_bytes(broken)
        outcomes = ("kept", "missing_file", "broken_archive", *UNREADABLE)
        name = generator.choice(["a.jpg", "last.jpg"])
        dump.add("tar with a fault", outcomes, image=f"photos/broken{number}.tar/{name}")
