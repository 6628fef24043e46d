"""Tests of the outputs of `prepare` and `draw`: no foreign file is lost, and no photo remains."""

import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from datasets import jpeg, record
from full_disk import files_of_at_most
from hashvision import locks
from hashvision.commands import main as program
from hashvision.data import dataset
from hashvision.data.keys import NO_KEY
from hashvision.errors import UserError
from hashvision.prepare import folder, pipeline, runner, staging
from hashvision.synthetic import draw
from runs import REPO


def write_posts(folder: pathlib.Path, count: int = 8) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
        post = {"id": f"p{number}", "image": f"{number}.jpg", "visibility": "public"}
        lines.append(json.dumps({**post, "owner": f"u{number}", "text": "#dog"}))
    (folder / "posts.jsonl").write_text("\n".join(lines))
    return str(folder / "posts.jsonl")


@pytest.fixture(scope="module")
def posts(tmp_path_factory) -> str:
    return write_posts(tmp_path_factory.mktemp("posts"))


def contents(path: pathlib.Path) -> dict[str, bytes]:
    return {
        str(each.relative_to(path)): each.read_bytes()
        for each in sorted(path.rglob("*"))
        if each.is_file()
    }


def put(path: pathlib.Path, **files: str) -> pathlib.Path:
    """Makes a folder of files; in their names, `__` stands for a slash and `_` for a dot."""
    for name, content in files.items():
        file = path / name.replace("__", "/").replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return path


OLD = {"hashvision": "0.1.0", "options": {}, "shards": [], "rarest": {}}
NEW = {"format": {"name": dataset.FORMAT, "version": dataset.VERSION}}
STAGING = "set.preparing-0a1b2c3d"
SPOOLED = "0123456789abcdef" * 2


def refused(posts: str, output: object, **options) -> str:
    with pytest.raises(UserError) as refusal:
        pipeline.prepare(posts, str(output), minimum_count=1, **options)
    return str(refusal.value)


# Outputs that may be replaced


@pytest.mark.parametrize("manifest", ["{}", '{"name": "a web app"}', "[1]", "no JSON", "[" * 10**5])
def test_a_folder_with_a_manifest_of_another_program_is_kept(posts, tmp_path, manifest):
    app = put(tmp_path / "app", manifest_json=manifest, _git__config="[core]", index_html="<html>")
    before = contents(app)
    assert "is not a hashvision dataset: it holds .git/" in refused(posts, app)
    assert contents(app) == before and os.listdir(tmp_path) == ["app"]


@pytest.mark.parametrize("manifest", [OLD, NEW])
def test_foreign_files_in_the_output_are_named_and_kept(posts, tmp_path, manifest):
    made = put(tmp_path / "set", manifest_json=json.dumps(manifest), notes_txt="mine")
    before = contents(made)
    assert "holds notes.txt" in refused(posts, made)
    (made / "notes.txt").rename(tmp_path / "notes.txt")
    (made / "manifest.json").rename(tmp_path / "manifest.json")
    (made / "index-00000-of-00001.npy").mkdir()
    (tmp_path / "manifest.json").rename(made / "manifest.json")
    assert "holds index-00000-of-00001.npy/" in refused(posts, made)
    assert contents(made) == {"manifest.json": before["manifest.json"]}


@pytest.mark.slow
def test_a_dataset_of_each_version_is_replaced_with_all_its_files(posts, tmp_path):
    for number, manifest in enumerate((OLD, NEW)):
        output = put(tmp_path / f"set{number}", manifest_json=json.dumps(manifest))
        for name in ("index-00003-of-00007.npy", f"posts-train.tfrecord-00000-of-00001.{SPOOLED}"):
            (output / name).write_text("old")
        pipeline.prepare(posts, str(output), minimum_count=1)
        assert dataset.load(str(output)).manifest["images"] == 8
        assert all(dataset.is_dataset_file(name) for name in os.listdir(output))
        assert not (output / "index-00003-of-00007.npy").exists()
    assert sorted(os.listdir(tmp_path)) == ["set0", "set0.key", "set1", "set1.key"]


@pytest.mark.slow
def test_files_added_to_the_output_during_the_run_are_kept(posts, tmp_path, monkeypatch):
    output = put(tmp_path / "set", manifest_json=json.dumps(OLD))
    finish = folder.finish

    def late(*arguments, **options):
        put(output, thesis_txt="mine")
        return finish(*arguments, **options)

    monkeypatch.setattr(folder, "finish", late)
    assert "holds thesis.txt" in refused(posts, output)
    assert contents(output) == {"manifest.json": json.dumps(OLD).encode(), "thesis.txt": b"mine"}
    assert sorted(os.listdir(tmp_path)) == ["set", "set.key"]


def test_draw_leaves_neighbouring_folders_alone(tmp_path):
    put(tmp_path / "x.partial", thesis_txt="mine")
    put(tmp_path / "x.preparing-12345678", thesis_txt="mine", images__p000001_jpg="drawn")
    draw.write(tmp_path / "x", 20, 1, size=32)
    assert contents(tmp_path / "x.partial") == {"thesis.txt": b"mine"}
    assert contents(tmp_path / "x.preparing-12345678") == {"thesis.txt": b"mine"}
    every = [os.path.relpath(path, tmp_path / "x") for path in (tmp_path / "x").rglob("*.*")]
    assert len(every) > 40 and all(draw._is_own(path) for path in every)
    assert sorted(os.listdir(tmp_path)) == ["x", "x.partial", "x.preparing-12345678"]


# Leftovers of killed runs


def test_staging_folders_of_killed_runs_are_removed_and_nothing_else(posts, tmp_path):
    elder = tmp_path / "set.preparing-otherhost-12-abcdef01"
    for path in (tmp_path / STAGING, elder):
        put(path, **{f"spool__{name}": "photos" for name in (SPOOLED, SPOOLED[:16])})
        (path / "summary.json").write_text("")
        (path / f"posts-train.tfrecord-00000-of-00001.{SPOOLED}").write_text("photos")
    kept = (
        put(tmp_path / "set.preparing-backup", spool__photo="mine", manifest_json="{}"),
        put(tmp_path / "settle.preparing-0a1b2c3d", **{f"spool__{SPOOLED}": "another output's"}),
        put(tmp_path / "set.preparing-0a1b2c3e", spool__notes_txt="mine"),
    )
    before = [contents(path) for path in kept]
    with folder.make_staging(str(tmp_path / "set")) as made:
        assert not (tmp_path / STAGING).exists() and not elder.exists()
        assert os.listdir(made) == []
    assert [contents(path) for path in kept] == before
    assert not os.path.exists(made) and not (tmp_path / "set.lock").exists()


def test_a_second_run_on_an_output_in_use_is_refused(posts, tmp_path):
    output = tmp_path / "set"
    with folder.make_staging(str(output)) as made:
        put(pathlib.Path(made), **{f"spool__{SPOOLED}": "photos"})
        told = refused(posts, output)
        assert f"{output} is in use by process {os.getpid()} on " in told and "--output" in told
        assert list(contents(pathlib.Path(made))) == [f"spool/{SPOOLED}"]
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_second_run_between_the_two_renames_is_refused(posts, tmp_path, monkeypatch):
    output = put(tmp_path / "set", manifest_json=json.dumps(OLD))
    move, seen = folder.storage.move, []

    def moved(path, target):
        move(path, target)
        if target.endswith("-former"):  # the output is not there now
            seen.append(refused(posts, output))

    monkeypatch.setattr(folder.storage, "move", moved)
    pipeline.prepare(posts, str(output), minimum_count=1)
    assert "in use by process" in seen[0]
    assert sorted(os.listdir(tmp_path)) == ["set", "set.key"]


def test_a_staging_folder_of_a_silent_host_is_removed(posts, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_HEARTBEAT", 0.05)
    monkeypatch.setattr(locks, "_TAKEOVER", 0.3)
    put(tmp_path / STAGING, **{f"spool__{SPOOLED}": "photos"})
    holder = locks._this_process()._replace(machine="another", token="silent")
    (tmp_path / "set.lock").write_bytes(holder.json())
    with folder.make_staging(str(tmp_path / "set")):
        assert not (tmp_path / STAGING).exists()
    assert os.listdir(tmp_path) == []


# Errors of the system


def fails(capsys, *arguments) -> str:
    """The line that a failing command prints."""
    assert program.main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hashvision: ")
    return line


IN_PROCESSES = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), IN_PROCESSES])
# Python closes the other files of a failed graph when it collects them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_gives_one_sentence_and_leaves_no_files(posts, tmp_path, capfd, flags):
    with files_of_at_most(8_000):
        line = fails(capfd, "prepare", f"--posts={posts}", f"--output={tmp_path / 'set'}", *flags)
    gc.collect()  # now, and not in another test
    assert "There is no space for " in line and "(File too large)" in line
    assert str(tmp_path / "set.preparing-") in line and os.listdir(tmp_path) == ["set.key"]


def test_a_full_disk_names_the_shard(tmp_path):
    rows = [record(number, jpeg(number), ()) for number in range(40)]
    wanted = "File too large.*posts-train.tfrecord-00000-of-00001"
    with files_of_at_most(8_000), pytest.raises(OSError, match=wanted):
        folder.write_shard(
            str(tmp_path),
            shard=0,
            shards=1,
            rows=rows,
            counts=np.zeros(1, int),
            key=NO_KEY,
        )


def test_impossible_outputs_give_one_sentence(posts, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    for output, why in (
        (tmp_path / "file" / "set", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (tmp_path / "file", "is a file"),
    ):
        assert why in fails(capsys, "prepare", f"--posts={posts}", f"--output={output}")
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


def test_errors_of_steps_are_raised_again(tmp_path):
    for told, kind, words in (
        (
            "a\nOSError: [Errno 28] No space left on device [while running 'X']",
            OSError,
            "'the set'",
        ),
        ("OSError: [Errno 28] No space: '/a: b' -> '/c'\n\n", OSError, "'/a: b'"),
        ("RuntimeError: OSError: [Errno 28] No: \"/it's\" [while running 'X[a]']", OSError, "it's"),
        (
            "hashvision.errors.UserError: Fix it: now. [while running 'X']",
            UserError,
            "^Fix .*w.$",
        ),
        ("KeyError: 28\nValueError: [Errno x] no", RuntimeError, "Errno x"),
    ):
        with pytest.raises(kind, match=words), runner.reraise_step_errors("the set"):
            raise RuntimeError(told)


# Paths of the output


@pytest.mark.slow
def test_a_link_is_followed_and_the_dataset_replaced_where_it_leads(posts, tmp_path):
    target = put(tmp_path / "disk" / "v1", manifest_json=json.dumps(OLD))
    (target / "posts-train.tfrecord-00000-of-00009").write_text("a photo that was taken down")
    os.symlink(target, tmp_path / "current")
    pipeline.prepare(posts, str(tmp_path / "current"), minimum_count=1)
    assert os.path.islink(tmp_path / "current")
    assert dataset.load(str(target)).manifest["images"] == 8
    assert not (target / "posts-train.tfrecord-00000-of-00009").exists()
    assert sorted(os.listdir(tmp_path / "disk")) == ["v1", "v1.key"]


def test_outputs_that_cannot_be_replaced_are_refused_before_any_work(posts, tmp_path, monkeypatch):
    images = tmp_path / "parent" / "images"
    images.mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    nothing = str(tmp_path / "absent.jsonl")  # is never opened
    for output, words in (
        (".", "is or contains the current folder"),
        ("..", "is or contains the current folder"),
        ("/", "is or contains the current folder"),
        ("", "path is empty"),
        ("file:///data/set", "give its path, /data/set"),
        ("gs://bucket", "a whole bucket"),
        (os.path.dirname(posts), "contains .*posts.jsonl"),
        (images, "contains .*images"),
        (images.parent, "contains .*images"),
    ):
        dump = posts if "posts.jsonl" in words else nothing
        with pytest.raises(UserError, match=words):
            pipeline.prepare(dump, str(output), images=str(images))
    assert sorted(os.listdir(tmp_path)) == ["here", "parent"]


def test_a_mount_point_is_refused_before_any_work(tmp_path, monkeypatch):
    mounted, bound = tmp_path / "a disk", tmp_path / "dätä"
    mounted.mkdir()
    line = f"22 27 0:21 / {bound} rw,relatime - ext4 /dev/x rw\n"
    escaped = f"23 27 0:21 /in {mounted} rw - ext4 /dev/x rw\n".replace("a disk", "a\\040disk")
    (tmp_path / "mounts").write_text(line + escaped)
    monkeypatch.setattr(staging, "_MOUNTS", str(tmp_path / "mounts"))
    for output in (mounted, bound):
        with pytest.raises(UserError, match=f"{output} is a mount point.*{output}/dataset"):
            pipeline.prepare("absent.jsonl", str(output), images=str(tmp_path))
    assert staging.resolve_output(str(mounted / "set")) == str(mounted / "set")


# The runner


def test_invalid_beam_options_give_one_sentence(posts, tmp_path):
    for flag, words in (
        ("--runner=Foo", "--runner=Foo is not a runner"),
        ("--runner=no.such.Runner", "--runner=no.such.Runner is not a runner"),
        ("--direct_num_workers=-1", "--direct_num_workers=-1 is not a number of workers"),
        ("--direct_num_workers=x", "direct_num_workers: invalid int value: 'x'"),
        ("--direct_running_mode=x", "direct_running_mode: invalid choice: 'x'"),
    ):
        assert words in refused(posts, tmp_path / "set", beam_options=[flag])
    assert os.listdir(tmp_path) == []


def processes_of(group: int) -> list[int]:
    """The processes of a group that still run."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(of_group) == group and state not in "ZX":
            found.append(int(path.parent.name))
    return found


WITH_SIGINT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.Handlers(int(sys.argv[1])))
os.execv(sys.executable, [sys.executable, "-m", "hashvision", *sys.argv[2:]])
"""


def with_sigint(handler):
    """hashvision as it starts at a terminal (SIG_DFL), or in the background of a script."""
    return [sys.executable, "-c", WITH_SIGINT, str(int(handler))]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_removes_its_photos(tmp_path, number):
    posts = write_posts(tmp_path / "in", 2000)
    command = [*with_sigint(signal.SIG_DFL), "prepare", f"--posts={posts}"]
    running = subprocess.Popen(
        [*command, f"--output={tmp_path / 'set'}"],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob("set.preparing-*/spool/*")):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(number)
    _, err = running.communicate()
    assert running.returncode == 130 and len(err.splitlines()) == 1 and "stopped" in err
    assert sorted(os.listdir(tmp_path)) == ["in", "set.key"]


@pytest.mark.slow
@pytest.mark.parametrize("sigint", [signal.SIG_DFL, signal.SIG_IGN])  # terminal, background
def test_a_killed_worker_ends_prepare(tmp_path, sigint):
    posts = write_posts(tmp_path / "in", 2000)
    command = [*with_sigint(sigint), "prepare", f"--posts={posts}"]
    driver = subprocess.Popen(
        [*command, f"--output={tmp_path / 'set'}", *IN_PROCESSES],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        while not list(tmp_path.glob("set.preparing-*/spool/*")):
            assert driver.poll() is None
            time.sleep(0.01)
        worker = max(set(processes_of(driver.pid)) - {driver.pid})
        os.kill(worker, signal.SIGKILL)
        _, err = driver.communicate(timeout=120)
    finally:
        for process in processes_of(driver.pid):
            os.kill(process, signal.SIGKILL)
    assert driver.returncode == 2 and len(err.splitlines()) == 1, err
    assert "A worker process has ended" in err
    assert sorted(os.listdir(tmp_path)) == ["in", "set.key"]


@pytest.mark.slow
def test_workers_end_when_the_driver_is_killed(tmp_path):
    posts = write_posts(tmp_path, 2000)
    command = [sys.executable, "-m", "hashvision", "prepare", f"--posts={posts}"]
    driver = subprocess.Popen(
        [*command, f"--output={tmp_path / 'set'}", *IN_PROCESSES],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        while not list(tmp_path.glob("set.preparing-*/spool/*")):  # two workers write
            assert driver.poll() is None
            time.sleep(0.01)
        assert len(processes_of(driver.pid)) >= 3
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        end = time.monotonic() + 20
        while processes_of(driver.pid) and time.monotonic() < end:
            time.sleep(0.05)
        assert not processes_of(driver.pid)
    finally:
        for process in processes_of(driver.pid):
            os.kill(process, signal.SIGKILL)
    with folder.make_staging(str(tmp_path / "set")):
        assert len(list(tmp_path.glob("set.preparing-*"))) == 1
