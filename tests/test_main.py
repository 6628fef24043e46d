import errno
import subprocess
import sys
import time

import pytest

from hashvision import __main__, __version__
from hashvision.__main__ import main


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
    for verb in ("drawn", "prepare", "config", "train", "evaluate"):
        assert verb in done.stdout


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
def test_mistakes_are_one_sentence_and_exit_code_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("hashvision: ") and words in error and "\n" not in error


def test_an_unknown_protocol_among_several_is_named_before_anything_is_read(tmp_path, capsys):
    arguments = ["evaluate", f"--workdir={tmp_path}", f"--dataset={tmp_path}"]
    assert main([*arguments, "--protocol=knn,svm"]) == 2
    assert "no protocol 'svm'; choose one of knn, linear, multilabel" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence(monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "posts.jsonl")

    monkeypatch.setattr(__main__, "_drawn", full)
    assert main(["drawn", "--output=posts"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "posts.jsonl" in err and "the same command goes on" in err
