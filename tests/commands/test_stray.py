"""Tests that no stray word of a command line is ignored: it may be meant to name a removal list."""

import json
import shutil

import pytest

from hashvision.commands.main import main
from places import REPO

DEMO = "--config=configs/demo.py"
PREPARE = ("prepare", "--posts=posts.jsonl", "--output=made")
COMMANDS = {
    "draw": ("draw", "--output=made"),
    "prepare": PREPARE,
    "prepare elsewhere": (*PREPARE, "--runner=FlinkRunner"),
    "prepare on Dataflow": (*PREPARE, "--runner=DataflowRunner"),
    "config": ("config", DEMO),
    "train": ("train", DEMO, "--workdir=made"),
    "plan": ("plan", DEMO, "--topology=cpu:1"),
    "evaluate": ("evaluate", "--workdir=made", "--dataset=made", "--protocol=knn"),
    "audit": ("audit", "--removals=list.csv", "--dataset=made"),
}
TAKE_REMOVALS = [name for name in COMMANDS if name.startswith(("prepare", "train", "evaluate"))]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with a post, a removal list and the demo's recipe."""
    (tmp_path / "posts.jsonl").write_text(json.dumps({"id": "a", "visibility": "public"}) + "\n")
    (tmp_path / "list.csv").write_text("kind,value,reason,received_at\nid,a,,\n")
    (tmp_path / "configs").mkdir()
    shutil.copy(REPO / "configs" / "base.py", tmp_path / "configs")
    (tmp_path / "configs" / "demo.py").write_text(
        "import base\n\n\ndef get_config():\n    return base.get_config()\n"
    )
    monkeypatch.chdir(tmp_path)


def refused(capsys, *arguments):
    """The sentence with which the command line is refused."""
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("hashvision: ") and "\n" not in said, said
    return said


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("word", ["list.csv", "removals=list.csv", "-removals=list.csv"])
def test_a_word_that_no_option_takes_is_refused(command, word, capsys, place, tmp_path):
    said = refused(capsys, *COMMANDS[command], word)
    assert word in said and not (tmp_path / "made").exists()
    if "removals" in word and command in TAKE_REMOVALS:
        assert "--removals" in said


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("word", ["--removal=list.csv", "--remvoals=list.csv", "--rem=list.csv"])
def test_a_misspelt_or_abbreviated_flag_is_refused(command, word, capsys):
    said = refused(capsys, *COMMANDS[command], word)
    assert word in said
    if command in TAKE_REMOVALS and not word.startswith("--rem="):
        assert "--removals" in said.replace(word, "")


@pytest.mark.parametrize("command", TAKE_REMOVALS)
def test_an_empty_or_repeated_removals_flag_is_refused(command, capsys):
    given = COMMANDS[command]
    assert "--removals: '' is not" in refused(capsys, *given, "--removals=")
    two = ("--removals=list.csv", "--removals=other.csv")
    assert "--removals is given twice, as list.csv and as" in refused(capsys, *given, *two)
    assert "--removals" in refused(capsys, *given, "--removals")


def test_flags_after_a_double_dash_are_refused(capsys):
    for arguments in COMMANDS.values():
        assert "--" in refused(capsys, *arguments, "--", "--removals=list.csv")


def test_an_empty_evaluation_set_is_refused(capsys):
    for given in ("", ",", "a,", "a,,b"):
        said = refused(capsys, *PREPARE, f"--evaluation_sets={given}")
        assert f"--evaluation_sets: {given!r} is not" in said


def test_a_config_key_given_as_a_flag_is_refused_with_the_right_form(capsys):
    assert "--config.batch_size" in refused(capsys, *COMMANDS["train"], "--batch_size=3")
    assert "--config.batch_size" in refused(capsys, *COMMANDS["train"], "batch_size=3")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "COMMAND"),
        (("prepar",), "prepare"),
        (("prepare", "--posts=posts.jsonl"), "--output"),
        (("plan", DEMO, "--topology=cpu:1", "--classes=0"), "--classes: '0' is not an integer"),
        (("plan", DEMO, "--topology=cpu:1", "--classes=many"), "--classes: 'many' is not an"),
        (("plan", DEMO, "--topology=cpu:1", "--images=nan"), "--images: 'nan' is not a number"),
        (("plan", DEMO, "--topology=cpu:1", "--images=0"), "--images: '0' is not a number"),
        (("plan", DEMO, "--topology=cpu:1", "--images=1e308"), "--images: '1e308' is not a"),
        (("plan", DEMO, "--topology=cpu:1", "--price_per_chip_hour=-1"), "--price_per_chip_hour:"),
        (("plan", DEMO, "--topology=cpu:1", "--price_per_chip_hour=inf"), "--price_per_chip_hour:"),
        (("draw", "--output=made", "--posts=1e3"), "--posts: '1e3' is not an integer"),
        (("draw", "--output=made", "--posts=-1"), "--posts: '-1' is not an integer"),
        (("draw", "--output=made", "--test_per_class=0"), "--test_per_class: '0' is not"),
        (("draw", "--output=made", "--seed=100000000000000000000"), "--seed: '1000000000"),
        ((*PREPARE, "--minimum_count=0"), "--minimum_count: '0' is not an integer from 1"),
        ((*PREPARE, "--short_side=-5"), "--short_side: '-5' is not an integer from 1"),
        ((*PREPARE, "--minimum_count=" + "9" * 5000), "--minimum_count: '999"),
    ],
)
def test_a_refused_flag_value_is_reported_in_one_sentence(arguments, words, capsys, tmp_path):
    assert words in refused(capsys, *arguments)
    assert not (tmp_path / "made").exists()
