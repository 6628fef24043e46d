"""Fuzzes `prepare` with over 2,000 posts of every kind, the same each time; none may be lost."""

import collections
import io
import json
import pathlib
import subprocess
import sys
import time
import typing
import zlib

import numpy as np
import pytest
from PIL import Image

import hostile
import hostile_photos
from hashvision.data import dataset, records
from hashvision.sources import jpegs, pictures, posts
from hashvision.sources.reasons import REASONS, Dropped

# Pillow warns about many of these files; only the outcomes matter.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

SHORT_SIDE = 48
MEGABYTES = 650  # memory limit per photo
# Reasons that depend on other posts, so `outcome` does not know them.
LATER = {"duplicate_id", "removed_copy", "duplicate_photo", "no_tag"}


class Fuzzed(typing.NamedTuple):
    """The dump, and the outcome of each post: ("kept", photo) or (reason, None)."""

    dump: hostile.Dump
    outcomes: list[tuple[str, bytes | None]]
    seconds: list[float]  # of CPU time per post


def outcome(line: bytes, images: str) -> tuple[str, bytes | None]:
    try:
        post = posts.parse(line)
        posts.check(post)
        return "kept", pictures.normalize_photo(posts.read_photo(post, images), SHORT_SIDE)
    except Dropped as dropped:
        return dropped.reason, None


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Fuzzed:
    dump = hostile.write(tmp_path_factory.mktemp("fuzz"))
    outcomes, seconds = [], []
    for case in dump.cases:
        before = time.process_time()
        outcomes.append(outcome(case.line, str(dump.folder)))
        seconds.append(time.process_time() - before)
    return Fuzzed(dump, outcomes, seconds)


def table(fuzzed: Fuzzed) -> str:
    """Formats the outcomes as a table with one row per kind."""
    counts = collections.defaultdict(collections.Counter)
    for case, (got, _) in zip(fuzzed.dump.cases, fuzzed.outcomes, strict=True):
        counts[case.kind][got] += 1
    lines = ["| kind | tried | kept | dropped |", "|---|---|---|---|"]
    total = sum(counts.values(), collections.Counter())
    for kind, count in [*sorted(counts.items()), ("all", total)]:
        dropped = ", ".join(f"{count[reason]} {reason}" for reason in REASONS if count[reason])
        lines.append(f"| {kind} | {count.total()} | {count['kept']} | {dropped} |")
    return "\n".join(lines)


@pytest.mark.slow
def test_each_post_has_an_expected_outcome(fuzzed: Fuzzed):
    print("\n" + table(fuzzed))
    assert len(fuzzed.dump.cases) >= 2000
    wrong = [
        (case.kind, got, case.outcomes, case.line[:200])
        for case, (got, _) in zip(fuzzed.dump.cases, fuzzed.outcomes, strict=True)
        if got not in case.outcomes
    ]
    assert not wrong
    # Some photos with a fault still decode, but keeping all or none of them would be an error.
    faulty = [
        got
        for case, (got, _) in zip(fuzzed.dump.cases, fuzzed.outcomes, strict=True)
        if case.kind.endswith("with a fault")
    ]
    assert 0.1 < faulty.count("kept") / len(faulty) < 0.9


@pytest.mark.slow
def test_no_post_takes_more_than_5_seconds(fuzzed: Fuzzed):
    slowest = int(np.argmax(fuzzed.seconds))
    assert fuzzed.seconds[slowest] < 5, fuzzed.dump.cases[slowest].kind


@pytest.mark.slow
def test_every_kept_photo_is_a_plain_upright_jpeg(fuzzed: Fuzzed):
    import tensorflow as tf

    white = hostile_photos.QUARTERS.astype(int)
    for case, (_, photo) in zip(fuzzed.dump.cases, fuzzed.outcomes, strict=True):
        if photo is None:
            continue
        # A fault may move metadata into the tables of the picture.
        assert b"secret" not in photo or case.kind.endswith("with a fault"), case.kind
        stripped = jpegs.strip(photo)
        assert (stripped.encoded, stripped.exif, stripped.plain) == (photo, b"", True), case.kind
        with Image.open(io.BytesIO(photo)) as image:
            assert image.format == "JPEG" and min(image.size) <= SHORT_SIDE, case.kind
            pixels = np.asarray(image.convert("RGB"))
        # As training will decode it.
        assert tf.io.decode_jpeg(photo, channels=3).shape == pixels.shape, case.kind
        if case.quarters:
            assert pixels.shape == (48, 64, 3), case.kind
            seen = pixels[12:48:24, 16:64:32].astype(int)
            np.testing.assert_allclose(seen, white, atol=15, err_msg=case.kind)


# Runs `prepare` on the dump of argv[1] and prints the files opened and processes started.
PREPARE = """
import json, os, resource, sys, warnings
warnings.simplefilter("ignore")
resource.setrlimit(resource.RLIMIT_CPU, (300, 300))
import PIL.Image, tensorflow
import hashvision.prepare.pipeline as pipeline
opened, started = set(), set()
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        opened.add(os.path.realpath(arguments[0]))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        started.add(event)
    elif event in ("socket.getaddrinfo", "urllib.Request"):
        started.add(event)
sys.addaudithook(watch)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dump, output, short_side = sys.argv[1:]
manifest = pipeline.prepare(dump, output, short_side=int(short_side), keep_untagged=True)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({
    "manifest": manifest, "opened": sorted(opened), "started": sorted(started),
    "megabytes": (after - before) // 1024,
}))
"""


@pytest.mark.slow
def test_a_whole_run_gives_the_same_outcomes(fuzzed: Fuzzed, tmp_path: pathlib.Path):
    dump, output = fuzzed.dump, tmp_path / "dataset"
    code = [sys.executable, "-c", PREPARE, str(dump.folder / "posts.jsonl"), str(output)]
    done = subprocess.run([*code, str(SHORT_SIDE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    counted = told["manifest"]["posts"]
    dropped = {reason: entry["count"] for reason, entry in counted["dropped"].items()}
    assert counted["read"] == len(dump.cases) == counted["kept"] + sum(dropped.values())
    alone = collections.Counter(got for got, _ in fuzzed.outcomes)
    later = sum(count for reason, count in dropped.items() if reason in LATER)
    assert counted["kept"] + later == alone["kept"]
    for reason, count in dropped.items():
        assert reason in LATER or count == alone[reason], reason
    # Each record has the photo of its post.
    expected = collections.defaultdict(set)
    for case, (_, photo) in zip(dump.cases, fuzzed.outcomes, strict=True):
        expected[case.id].add(photo)
    read = list(read_records(output))
    assert len(read) == counted["kept"]
    for record in read:
        assert record["image"] in expected[record["id"].decode()], record["id"]
    # `prepare` opened no file outside the dump's folder, ran no program and used no network.
    foreign = [path for path in told["opened"] if path.startswith((str(dump.outside), "/dev/zero"))]
    assert (
        str(dump.folder / "photos" / "in.jpg") in told["opened"]
    )  # proves that the audit hook works
    assert not foreign and "/etc/passwd" not in told["opened"] and not told["started"]
    print(f"the whole run: {counted['kept']} kept, {dropped}, {told['megabytes']} MB")
    assert told["megabytes"] < 2 * MEGABYTES  # photos of two workers, and Beam


def read_records(folder: pathlib.Path) -> typing.Iterator[dict[str, typing.Any]]:
    import tensorflow as tf

    assert len(dataset.load(str(folder)))
    shards = sorted(str(path) for path in folder.glob("*.tfrecord-*"))
    yield from tf.data.TFRecordDataset(shards).map(records.parse).as_numpy_iterator()


# Prints the outcome of each file of argv, and how many megabytes the process has grown so far.
MEASURE = """
import resource, sys, warnings
warnings.simplefilter("ignore")
from hashvision.sources import pictures
from hashvision.sources.reasons import Dropped
import PIL.TiffImagePlugin, PIL.PngImagePlugin, PIL.WebPImagePlugin, PIL.BmpImagePlugin
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        encoded = file.read()
    try:
        pictures.normalize_photo(encoded, 256)
        got = "kept"
    except Dropped as dropped:
        got = dropped.reason
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
    print(got, grown // 1024, path)
"""


def measure(paths: list[pathlib.Path]) -> list[tuple[str, int]]:
    code = [sys.executable, "-c", MEASURE, *map(str, paths)]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return [(got, int(grown)) for got, grown, _ in lines]


def zeros(length: int) -> bytes:
    """Compresses `length` zeros without holding them in memory."""
    deflate = zlib.compressobj(1)
    pieces = [deflate.compress(bytes(2**20)) for _ in range(length // 2**20)]
    return b"".join([*pieces, deflate.compress(bytes(length % 2**20)), deflate.flush()])


def test_decompression_bombs_take_little_memory(tmp_path: pathlib.Path):
    paths = []
    for number, encoded in enumerate(hostile_photos.bombs().values()):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(encoded)
    exif = hostile_photos.overlapping(2000, 1_000_000)
    paths.append(tmp_path / "exif")
    paths[-1].write_bytes(
        hostile_photos.segments(hostile_photos.encode(hostile_photos.quarters(), "JPEG"), exif)
    )
    measured = measure(paths)
    assert [got for got, _ in measured[:-1]].count("kept") == 0 and measured[-1][0] == "kept"
    assert max(grown for _, grown in measured) < 150, measured


@pytest.mark.slow
def test_the_largest_photos_take_bounded_memory(tmp_path: pathlib.Path):
    side = 8191
    rows = (b"IDAT", zeros(side * (side + 1)))
    clear = (b"tRNS", b"\0")
    palette = hostile_photos.png(side, side, (b"PLTE", bytes(768)), clear, rows, mode=3)
    rows = (b"IDAT", zeros(side * (4 * side + 1)))
    made = {
        "palette": palette,
        "alpha": hostile_photos.png(side, side, rows, mode=6),
        "webp": bytes.fromhex(hostile_photos.SOLID_WEBP),
    }
    for name, encoded in made.items():
        (tmp_path / name).write_bytes(encoded)
    measured = measure([tmp_path / name for name in made])
    assert [got for got, _ in measured] == ["kept"] * 3
    assert max(grown for _, grown in measured) < MEGABYTES, measured
