"""Tests of the program: help, exit codes, and messages for errors of files and storage."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest

import datasets
from hashvision import __version__
from hashvision.commands import draw
from hashvision.commands.main import main
from hashvision.training import hosts
from runs import REPO


def test_help_answers_in_under_a_second():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "hashvision", "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        times.append(time.perf_counter() - start)
    assert min(times) < 1
    for command in ("draw", "prepare", "config", "train", "evaluate"):
        assert command in done.stdout


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--config=nowhere.py", "--workdir=w"], "nowhere.py does not exist"),
        (["prepare", "--posts=nowhere.jsonl", "--output=o"], "nowhere.jsonl"),
        (["evaluate", "--workdir=nowhere", "--dataset=d", "--protocol=knn"], "nowhere"),
        (["evaluate", "--workdir=w", "--dataset=d", "--protocol=knn", "--fast"], "--fast"),
    ],
)
def test_user_errors_print_one_sentence_and_exit_with_2(
    arguments, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("hashvision: ") and words in error and "\n" not in error


def test_an_unknown_protocol_among_several_is_named_before_anything_is_read(tmp_path, capsys):
    arguments = ["evaluate", f"--workdir={tmp_path}", f"--dataset={tmp_path}"]
    assert main([*arguments, "--protocol=knn,svm"]) == 2
    assert "no protocol 'svm'; choose from knn, linear, multilabel" in capsys.readouterr().err


def test_a_full_disk_is_reported_in_one_sentence(monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "posts.jsonl")

    monkeypatch.setattr(draw, "run", full)
    assert main(["draw", "--output=posts"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "posts.jsonl" in err and "run the same command again" in err


def raised_by_draw(monkeypatch, capsys, error, cause=None):
    """The exit code and the lines on stderr of a command that raises this error."""

    def fail(*_):
        raise error from cause

    monkeypatch.setattr(draw, "run", fail)
    return main(["draw", "--output=posts"]), capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    "number", ["EACCES", "EROFS", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "ELOOP", "EBUSY", "EEXIST"]
)
def test_os_errors_about_a_path_print_one_sentence(monkeypatch, capsys, number):
    refusal = OSError(getattr(errno, number), os.strerror(getattr(errno, number)), "/data/set")
    for error, cause in ((refusal, None), (RuntimeError("a page"), refusal)):
        code, lines = raised_by_draw(monkeypatch, capsys, error, cause)
        assert code == 2 and len(lines) == 1
        assert lines[0].startswith(f"hashvision: /data/set cannot be used ({refusal.strerror});")


def test_a_missing_temporary_folder_is_reported_in_one_sentence(monkeypatch, capsys):
    code, lines = raised_by_draw(
        monkeypatch, capsys, FileNotFoundError(errno.ENOENT, "No usable one in /x")
    )
    assert code == 2 and len(lines) == 1
    assert "folder, or one for temporary files, cannot be used (No usable one in /x)" in lines[0]


def test_an_unreachable_bucket_exits_with_75(monkeypatch, capsys):
    error = OSError(errno.EIO, "no answer", "gs://bucket/set")
    code, lines = raised_by_draw(monkeypatch, capsys, error)
    assert code == hosts.AGAIN and "gs://bucket/set cannot be reached (no answer)" in lines[0]


def test_unexpected_errors_exit_with_70_and_a_traceback(monkeypatch, capsys):
    for error in (KeyError("x"), OSError("of no file"), ConnectionResetError(errno.ECONNRESET, "")):
        code, lines = raised_by_draw(monkeypatch, capsys, error)
        assert code == 70 and lines[0].startswith("Traceback") and type(error).__name__ in lines[-1]


def test_files_given_as_folders_and_folders_given_as_files_are_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "set" / "manifest.json").mkdir(parents=True)
    (tmp_path / "set" / "vocabulary.json").write_text("{}")
    (tmp_path / "list.csv").write_text("kind,value,reason,received_at\n")
    (tmp_path / "base.py").write_text((REPO / "configs" / "base.py").read_text())
    audit = ["audit", f"--removals={tmp_path / 'list.csv'}"]
    train = ["train", f"--config={tmp_path / 'base.py'}", "--config.dataset=nowhere"]
    for arguments, words in (
        ([*audit, f"--dataset={tmp_path / 'file'}"], "file/vocabulary.json cannot be used (Not a "),
        ([*audit, f"--workdir={tmp_path / 'file'}"], "file/config.json cannot be used (Not a dir"),
        ([*audit, f"--dataset={tmp_path / 'set'}"], "manifest.json cannot be used (Is a directory"),
        ([*train, f"--workdir={tmp_path / 'file'}"], "file/lock cannot be used (Not a directory"),
        ([*train, f"--workdir={tmp_path / ('x' * 300)}"], "cannot be used (File name too long)"),
        (["draw", f"--output={tmp_path / 'file' / 'x'}"], "file/x cannot be used (Not a director"),
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("hashvision: ") and words in line


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    """An audit that finds removed photos, with a reason that is not ASCII."""
    place = tmp_path_factory.mktemp("audit")
    datasets.write(place / "set", size=8, shards=1)
    lines = [f"owner,u{n},Zoë {n},2020\n" for n in range(5)]
    (place / "list.csv").write_text("".join(["kind,value,reason,received_at\n", *lines]))
    found = [f"--removals={place / 'list.csv'}", f"--dataset={place / 'set'}"]
    command = [sys.executable, "-m", "hashvision", "audit", *found, f"--json={place / 'json'}"]
    return command, place / "json"


def test_non_ascii_output_is_escaped_on_an_ascii_terminal(audit):
    environment = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(audit[0], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (1, b"")
    assert b"Zo\\xeb 3" in done.stdout


def test_a_closed_pipe_does_not_change_the_result(audit):
    command, json_file = audit
    json_file.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    for closed in (["stdout"], ["stdout", "stderr"]):
        pipes = {name: os.pipe() for name in closed}
        for reader, _ in pipes.values():
            os.close(reader)
        streams = {"stderr": subprocess.PIPE, **{name: pipe[1] for name, pipe in pipes.items()}}
        done = subprocess.run(command, env=environment, **streams)
        for _, writer in pipes.values():
            os.close(writer)
        assert done.returncode == 1 and not done.stderr
    assert json.loads(json_file.read_text())["still_inside"] == 8


# As in a container whose user is not in /etc/passwd.
NOBODY = """
import os, pwd, sys
def unknown(*_):
    raise KeyError("no such user")
pwd.getpwuid = pwd.getpwnam = unknown
os.environ.pop("HOME", None)
from hashvision.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_commands_run_for_a_user_without_a_home(tmp_path):
    command = [sys.executable, "-c", NOBODY, "prepare", f"--output={tmp_path / 'set'}"]
    done = subprocess.run(
        [*command, f"--posts={tmp_path / 'none.jsonl'}"],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "none.jsonl cannot be read" in done.stderr
    assert len(done.stderr.splitlines()) == 1
