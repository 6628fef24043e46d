"""Tests of every command on paths in a bucket, with the real client libraries."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest

import datasets
import fake_gcs
from hashvision import storage
from hashvision.commands import main as program
from hashvision.data import dataset, keys, reader, stream
from hashvision.models import regnet
from hashvision.prepare import folder
from hashvision.training import metrics, pulse, run
from runs import REPO, TINY

PHOTOS = 72


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    """Serves the bucket, and points this process and its children to it."""
    with fake_gcs.serve(tmp_path_factory.mktemp("cloud")) as (bucket, environment):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            yield bucket


def started(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "hashvision", *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": str(REPO),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out


def one_sentence(capsys, *arguments):
    """Runs a command that must fail with exit code 2, and returns its error sentence."""
    assert program.main(list(arguments)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line[:10] == "hashvision"]
    return line


# The storage module


def test_storage_works_the_same_on_a_disk_and_in_a_bucket(cloud, tmp_path):
    for place in (str(tmp_path), "gs://bucket/layer"):
        storage.write(f"{place}/a/b.txt", "ein\nzwei\n")
        with storage.open(f"{place}/c", "wb") as file:
            file.write(bytes(range(256)) * 8192)
        assert storage.read(f"{place}/a/b.txt") == b"ein\nzwei\n"
        with storage.open(f"{place}/a/b.txt", "r") as file:
            assert list(file) == ["ein\n", "zwei\n"]
        with storage.open(f"{place}/c") as file:
            assert file.seek(1_000_003) == 1_000_003 and file.read(3) == bytes([67, 68, 69])
            assert file.seek(-2, os.SEEK_END) == 2**21 - 2 and file.read() == bytes([254, 255])
            assert file.seek(5) == 5 and file.read(1) == bytes([5]) and file.read(0) == b""
        assert storage.size(f"{place}/c") == 2**21
        assert storage.names(place) == ["a", "c"] and storage.names(place, "c*") == ["c"]
        assert list(storage.walk(place)) == [(place, ["a"], ["c"]), (f"{place}/a", [], ["b.txt"])]
        assert storage.is_folder(f"{place}/a") and storage.is_file(f"{place}/c")
        assert not storage.is_file(f"{place}/a") and not storage.exists(f"{place}/d")
        storage.move(f"{place}/a", f"{place}/d")
        storage.move(f"{place}/c", f"{place}/d/b.txt")
        assert storage.size(f"{place}/d/b.txt") == 2**21 and storage.names(place) == ["d"]
        storage.remove_folder(f"{place}/d")
        storage.remove_folder(f"{place}/d")
        assert storage.names(f"{place}/d") == [] and not storage.exists(f"{place}/d")
        for ask in (storage.read, storage.size, storage.remove):
            with pytest.raises(FileNotFoundError, match="d/b.txt"):
                ask(f"{place}/d/b.txt")


def test_a_key_is_made_next_to_the_dataset(cloud):
    path = keys.beside("gs://bucket/keyed/")
    assert path == "gs://bucket/keyed.key"
    assert keys.make(path) == keys.make(path) == keys.read(path)
    assert cloud["keyed.key"].decode().strip() == keys.read(path).secret.hex()


def test_forbidden_and_unsupported_paths_raise_os_errors(cloud):
    for ask in (storage.read, storage.size, storage.exists, storage.remove):
        with pytest.raises(PermissionError, match="gs://forbidden/x"):
            ask("gs://forbidden/x")
    with pytest.raises(OSError, match="scheme 'xy' not implemented"):
        storage.read("xy://bucket/x")


def test_errors_are_one_sentence(cloud, capsys, tmp_path):
    (tmp_path / "base.py").write_text((REPO / "configs" / "base.py").read_text())
    config = f"--config={tmp_path / 'base.py'}"
    for words, *arguments in (
        ("gs://bucket/none/vocabulary.json is missing", "train", config, "--workdir=gs://bucket/r")
        + ("--config.dataset=gs://bucket/none",),
        ("gs://forbidden/x/vocabulary.json cannot be reached (Permission denied)", "train", config)
        + ("--workdir=gs://bucket/r", "--config.dataset=gs://forbidden/x"),
        ("gs://bucket/none.csv cannot be read (No such file", "audit", "--dataset=gs://bucket/x")
        + ("--removals=gs://bucket/none.csv",),
        ("posts file gs://bucket/none.jsonl cannot be read", "prepare", "--output=gs://bucket/x")
        + ("--posts=gs://bucket/none.jsonl",),
        ("gs://bucket/none/config.json is missing", "evaluate", "--workdir=gs://bucket/none")
        + ("--dataset=gs://bucket/none", "--protocol=knn"),
    ):
        assert words in one_sentence(capsys, *arguments)


@pytest.mark.slow
def test_single_records_are_read_and_faults_are_stored_in_the_bucket(cloud, tmp_path):
    local = datasets.write(tmp_path / "set", size=64, shards=4)
    cloud.upload(local, "set")
    source = dataset.load("gs://bucket/set")
    np.testing.assert_array_equal(source.rows(9, 51), dataset.load(str(local)).rows(9, 51))

    def batches():
        photos = stream.Stream(source, batch_size=16, lanes=2, seed=3, method="natural")
        faults = reader.Faults("gs://bucket/faults", 0, 1.0)
        found = reader.BatchReader(photos, 48, 2, faults, threads=2).batches()
        return [np.unique(items.record).tolist() for items, _ in itertools.islice(found, 4)]

    assert sorted(itertools.chain(*batches())) == list(range(64))
    name = os.path.basename(source.shards[1])
    shard = bytearray(cloud[f"set/{name}"])
    shard[int(source.rows(20, 21)["offset"][0]) + 100] ^= 16
    cloud.put(f"set/{name}", shard)
    del cloud.objects[f"set/{os.path.basename(source.shards[3])}"]
    for _ in range(2):
        assert not {20, *range(48, 64)} & {*itertools.chain(*batches())}
        lines = map(json.loads, cloud["faults/broken-00000.jsonl"].splitlines())
        found = {(line["record"], line["records"], line["cause"][:12]) for line in lines}
        assert found == {(20, 1, "corrupted re"), (48, 16, "No such file")}


def test_metrics_are_uploaded_on_flush_and_continue_after_a_resume(cloud):
    writer = metrics.MetricsWriter("gs://bucket/told", 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0 / step})
        if step == 2:
            writer.flush()
    assert len(cloud["told/metrics.jsonl"].splitlines()) == 2
    writer.close()
    writer = metrics.MetricsWriter("gs://bucket/told", 2)
    writer.write(3, {"loss": 0.5})
    writer.close()
    lines = [json.loads(line) for line in cloud["told/metrics.jsonl"].splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 0.5)]


def test_a_checkpoint_counts_once_its_last_file_exists(cloud):
    for name in ("5/default/d/x", "5/commit_success.txt", "10/default/d/x", "tmp/x"):
        cloud.put(f"half/checkpoints/{name}", b"")
    assert run.checkpoints("gs://bucket/half") == [5]


def test_hosts_notice_a_lost_host(cloud):
    places = (pulse.Place("localhost:1", 2, host) for host in (0, 1))
    one, other = (pulse.start(place, "gs://bucket/heard") for place in places)
    one.beat(None)
    other.beat(None)
    assert one.lost(9, 9) is None and other.known().keys() == {0, 1}
    other.beat(2)
    assert "host 1 of 2" in one.lost(9, 9)[0]
    one.end(0)
    assert [*cloud.below("heard")] == ["hosts.json"]


def test_a_replacement_killed_midway_leaves_no_dataset_that_opens(cloud, monkeypatch):
    names = ("duplicates.png", "manifest.json", "vocabulary.json")
    manifest = '{"hashvision": "0.1.0", "options": {}, "shards": []}'

    def replace(text):
        with folder.make_staging("gs://bucket/out") as staging:
            for name in names:
                storage.write(f"{staging}/{name}", manifest if name == folder.MANIFEST else text)
            folder.replace(staging, "gs://bucket/out")

    def whole(text):
        return {name: manifest.encode() if name == folder.MANIFEST else text for name in names}

    replace("first")
    assert cloud.below("out") == whole(b"first")
    move, moved = storage.move, []

    def stop_at_second(path, target):
        moved.append(path)
        if len(moved) > 1:
            raise KeyboardInterrupt
        move(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "move", stop_at_second)
        replace("second")
    assert "manifest.json" not in cloud.below("out")
    assert not [name for name in cloud.objects if name.startswith("out.")]
    replace("third")
    assert cloud.below("out") == whole(b"third")


def test_an_output_that_is_not_a_dataset_or_in_use_is_refused(cloud, capsys):
    cloud.put("app/manifest.json", b'{"name": "a web app"}')
    cloud.put("app/.git/config", b"[core]")
    cloud.put("dump2/posts.jsonl", b"")
    before = dict(cloud.objects)
    prepare = ("prepare", "--posts=gs://bucket/dump2/posts.jsonl")
    assert "not a hashvision dataset: it holds .git/" in one_sentence(
        capsys, *prepare, "--output=gs://bucket/app"
    )
    assert "contains gs://bucket/dump2/posts.jsonl" in one_sentence(
        capsys, *prepare, "--output=gs://bucket/dump2"
    )
    assert cloud.objects == before
    with folder.make_staging("gs://bucket/busy"):
        assert "in use by process" in one_sentence(capsys, *prepare, "--output=gs://bucket/busy")
    dead = "busy.preparing-0a1b2c3d"
    cloud.put(f"{dead}/spool/{'0' * 32}", b"photos")
    cloud.put(f"{dead}/notes.txt", b"mine")
    with folder.make_staging("gs://bucket/busy"):
        assert cloud.below(dead) == {"notes.txt": b"mine"}


# From posts to an evaluation


@pytest.fixture(scope="module")
def place(cloud, tmp_path_factory):
    """A folder with a dump and its copy in the bucket, each prepared into a dataset."""
    place = tmp_path_factory.mktemp("gs")
    dump = place / "dump"
    (dump / "photos").mkdir(parents=True)
    lines = []
    with tarfile.open(dump / "photos" / "half.tar", "w") as tar:
        for number in range(PHOTOS):
            photo, name = datasets.jpeg(number), f"{number}.jpg"
            if number % 2:
                entry = tarfile.TarInfo(name)
                entry.size = len(photo)
                tar.addfile(entry, io.BytesIO(photo))
                name = f"half.tar/{name}"
            else:
                (dump / "photos" / name).write_bytes(photo)
            post = {"id": f"p{number}", "image": f"photos/{name}", "owner": f"u{number}"}
            tags = "#dog" if number % 3 else "#tree"
            lines.append(json.dumps({**post, "text": tags, "visibility": "public"}))
    lines.append(json.dumps({**post, "id": "gone", "image": "photos/gone.jpg"}))
    (dump / "posts.jsonl").write_text("\n".join(lines))
    (dump / "removals.csv").write_text("kind,value,reason,received_at\nid,p3,left,2020\n")
    for number in range(16):
        file = dump / "test" / ("dogs", "trees")[number % 2] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(datasets.jpeg(number if number == 4 else 1000 + number))
    cloud.upload(dump, "dump")
    (place / "base.py").write_text((REPO / "configs" / "base.py").read_text())
    (place / "tiny.py").write_text(TINY)
    (place / "dataset.key").write_text(datasets.KEY.secret.hex())
    cloud.put("dataset.key", datasets.KEY.secret.hex().encode())
    preparing = []
    for root in (place, "gs://bucket"):
        options = [f"--posts={root}/dump/posts.jsonl", f"--evaluation_sets={root}/dump/test"]
        options += [f"--removals={root}/dump/removals.csv", f"--output={root}/dataset"]
        preparing.append(started("prepare", "--minimum_count=2", *options))
    for process in preparing:
        assert "70 of 73 posts kept" in ended(process)
    return place


@pytest.mark.slow
def test_a_dataset_in_a_bucket_equals_one_on_a_disk(cloud, place):
    wanted = {file.name: file.read_bytes() for file in (place / "dataset").iterdir()}
    assert "manifest.json" in wanted and cloud.below("dataset") == wanted
    assert [name for name in cloud.objects if name.startswith("dataset.")] == ["dataset.key"]


def training(root, place, *more):
    removals = f"--removals={root}/dump/removals.csv"
    options = (f"--workdir={root}/run", f"--config.dataset={root}/dataset", removals)
    return started("train", f"--config={place}/tiny.py", *options, *more)


def curve(lines):
    found = [json.loads(line) for line in lines.splitlines()]
    return {line["step"]: (line["loss"], line["learning_rate"]) for line in found}


def until_saved(cloud, process, step):
    while f"run/checkpoints/{step}/commit_success.txt" not in cloud.objects:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
def test_a_stopped_killed_and_damaged_run_in_a_bucket_equals_one_on_a_disk(
    cloud, place, monkeypatch
):
    ended(training(place, place))
    wanted = curve((place / "run" / "metrics.jsonl").read_bytes())
    cloud.log.clear()
    process = training("gs://bucket", place)
    until_saved(cloud, process, 5)
    process.send_signal(signal.SIGTERM)
    assert "saved; the same command resumes the run" in ended(process, 75)
    stopped = max(curve(cloud["run/metrics.jsonl"]))
    process = training("gs://bucket", place)
    until_saved(cloud, process, 20)
    process.send_signal(signal.SIGKILL)
    ended(process, -signal.SIGKILL)
    told = curve(cloud["run/metrics.jsonl"])
    assert 20 in told and {step: wanted[step] for step in told} == told and stopped < 20
    for name in list(cloud.below("run/checkpoints/20/default/d")):
        cloud.put(f"run/checkpoints/20/default/d/{name}", b"broken")
    out = ended(training("gs://bucket", place, "--config.profile=18,2"))
    assert "step 20 is damaged, moved to gs://bucket/run/damaged" in out
    assert "steps 15 to 24" in out and cloud.below("run/damaged/20.0")
    assert cloud.below("run/tensorboard/plugins/profile")
    assert curve(cloud["run/metrics.jsonl"]) == wanted
    shards = [asked for _, name, asked, _ in cloud.log if name.startswith("dataset/posts-train")]
    spans = [[*map(int, asked.removeprefix("bytes=").split("-"))] for asked in shards if asked]
    assert spans and max(last - first for first, last in spans) < 2**16

    run, removals = "--workdir=gs://bucket/run", "--removals=gs://bucket/dump/removals.csv"
    assert program.main(["audit", run, removals]) == 0
    tiny = regnet.RegNetParameters(2, 8, 8.0, 2.0, 8)
    monkeypatch.setitem(regnet.PARAMETERS, "tiny", tiny)
    test = "--dataset=gs://bucket/dump/test"
    assert program.main(["evaluate", run, removals, test, "--protocol=knn"]) == 0
    report = json.loads(cloud["run/evaluations/knn-test.json"])
    assert report["step"] == 24 and report["photos"] == {"train": 12, "test": 4}
