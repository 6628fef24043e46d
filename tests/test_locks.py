"""Tests that a lock has one holder and survives killed holders, on a disk and in a bucket."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import fake_gcs
from hashvision import locks, storage
from hashvision.errors import UserError
from runs import REPO


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with fake_gcs.serve(tmp_path_factory.mktemp("cloud")) as (bucket, environment):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            yield bucket


@pytest.fixture(params=["disk", "bucket"])
def path(request, tmp_path):
    """Path of a lock, on a disk and in a bucket."""
    if request.param == "disk":
        return str(tmp_path / "run" / "lock")
    request.getfixturevalue("bucket")
    return f"gs://bucket/{tmp_path.name}/lock"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(locks, "_HEARTBEAT", 0.05)
    monkeypatch.setattr(locks, "_TAKEOVER", 0.5)


def lock(path):
    return locks.Lock(path, "The workdir", "give another --workdir")


def held_by(path, **other):
    """Writes the lock of a holder that differs from this process in these fields."""
    storage.write(path, locks._this_process()._replace(**other).json())


HOLD = """
import sys, time
from hashvision import locks
with locks.Lock(sys.argv[1], "x", "y"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def another_process(path):
    command = [sys.executable, "-c", HOLD, path]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_holder_is_refused_until_the_first_releases_the_lock(path):
    with lock(path):
        first = storage.read(path)
        with pytest.raises(UserError, match=f"The workdir is in use by process {os.getpid()} on "):
            lock(path).__enter__()
        assert storage.read(path) == first
    assert not storage.exists(path)
    with lock(path):
        pass


def test_a_lock_is_taken_over_once_its_process_is_killed(path):
    with another_process(path) as process:
        with pytest.raises(UserError, match=f"process {process.pid} on .* --workdir"):
            lock(path).__enter__()
        process.send_signal(signal.SIGKILL)
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            time.sleep(0.01)
        started = time.monotonic()
        with lock(path):  # the process is dead but not reaped
            assert time.monotonic() - started < 5
            assert json.loads(storage.read(path))["process"] == os.getpid()


def test_a_process_with_a_reused_id_is_not_the_holder(path):
    held_by(path, token="gone", started=1)
    with lock(path):
        pass


@pytest.mark.parametrize(
    "elsewhere", [{"machine": "other"}, {"processes": "pid:[1]"}, {"machine": ""}]
)
def test_a_lock_of_another_machine_or_container_is_taken_over_without_heartbeats(
    path, elsewhere, quick, capsys
):
    held_by(path, token="silent", host="far", process=os.getpid(), **elsewhere)
    started = time.monotonic()
    with lock(path):
        assert time.monotonic() - started >= 0.5
        assert "far" not in storage.read(path).decode()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "in use by process" in out and "on far, since 2" in out


def test_a_lock_of_another_machine_is_kept_while_heartbeats_arrive(path, quick, monkeypatch):
    monkeypatch.setattr(locks, "_TAKEOVER", 60)
    held_by(path, token="alive", host="far", machine="other")
    later = threading.Timer(0.2, held_by, [path], dict(token="alive", machine="other", beat=1))
    later.start()
    with pytest.raises(UserError, match="in use by process"):
        lock(path).__enter__()
    later.join()
    assert json.loads(storage.read(path))["token"] == "alive"


def test_a_holder_writes_heartbeats(path, quick):
    with lock(path):
        first = storage.read(path)
        end = time.monotonic() + 10
        while storage.read(path) == first and time.monotonic() < end:
            time.sleep(0.02)
        assert json.loads(storage.read(path))["beat"] > 0


def test_a_file_that_is_not_a_lock_is_refused_and_kept(path):
    for content in ("{", "[]", '{"token": 1}', "\xff", "[" * 10**5, json.dumps({"host": "x"})):
        storage.write(path, content)
        with pytest.raises(UserError, match="lock is not a lock file of hashvision"):
            lock(path).__enter__()
        assert storage.read(path) == content.encode()
    storage.write(path, "")  # left by a kill between creating and writing the file
    with lock(path):
        pass


def test_one_of_many_contenders_takes_over_a_dead_lock(path, quick):
    held_by(path, token="gone", started=1)
    got, refused = [], []

    def take():
        one = lock(path)
        try:
            one.__enter__()
            got.append(one)
        except UserError:
            refused.append(one)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)
    got[0].__exit__()
    assert not storage.exists(path)


def test_a_replaced_holder_exits_and_changes_nothing(path, quick, monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    codes = []
    one = lock(path)
    one.__enter__()
    held_by(path, token="other", host="far", machine="other", beat=10**6)
    assert ended.wait(10) and codes[0] == 2
    one.__exit__()
    assert json.loads(storage.read(path))["token"] == "other"
    assert "taken over by process" in capsys.readouterr().err


def test_a_deleted_lock_file_is_written_again(path, quick):
    with lock(path):
        storage.remove(path)
        end = time.monotonic() + 10
        while not storage.exists(path) and time.monotonic() < end:
            time.sleep(0.02)
        assert storage.exists(path)
    assert not storage.exists(path)


def test_concurrent_appends_lose_no_line(path):
    threads = [
        threading.Thread(target=lambda n=n: [locks.append(path, f"{n}\n") for _ in range(5)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = storage.read(path).decode().split()
    assert sorted(lines) == [str(n) for n in range(4) for _ in range(5)]


def test_missing_and_forbidden_paths_raise_os_errors(bucket, tmp_path):
    with pytest.raises(PermissionError, match="gs://forbidden/run/lock"):
        lock("gs://forbidden/run/lock").__enter__()
    with pytest.raises(FileNotFoundError, match="gs://nowhere/run/lock"):
        lock("gs://nowhere/run/lock").__enter__()
    with pytest.raises(OSError, match="unsupported URL scheme"):
        lock("xy://bucket/lock").__enter__()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        lock(str(tmp_path / "file" / "lock")).__enter__()
