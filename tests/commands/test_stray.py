"""Stray words of a command line: none is passed over, since one may have named a removal list."""

import json
import shutil

import pytest

from hashvision.commands.main import main
from places import REPO

DEMO = "--config=configs/demo.py"
PREPARE = ("prepare", "--posts=posts.jsonl", "--output=made")
VERBS = {
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
TAKE_REMOVALS = [name for name in VERBS if name.startswith(("prepare", "train", "evaluate"))]


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
    """The sentence that the command line ends with, before anything is made."""
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("hashvision: ") and "\n" not in said, said
    return said


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("word", ["list.csv", "removals=list.csv", "-removals=list.csv"])
def test_a_word_that_no_option_takes_is_refused(verb, word, capsys, place, tmp_path):
    said = refused(capsys, *VERBS[verb], word)
    assert word in said and not (tmp_path / "made").exists()
    if "removals" in word and verb in TAKE_REMOVALS:
        assert "--removals" in said


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("word", ["--removal=list.csv", "--remvoals=list.csv", "--rem=list.csv"])
def test_a_flag_that_is_not_spelled_out_is_refused(verb, word, capsys):
    said = refused(capsys, *VERBS[verb], word)
    assert word in said
    if verb in TAKE_REMOVALS and not word.startswith("--rem="):
        assert "--removals" in said.replace(word, "")


@pytest.mark.parametrize("verb", TAKE_REMOVALS)
def test_a_removal_list_is_neither_empty_nor_given_twice(verb, capsys):
    assert "--removals: '' is not" in refused(capsys, *VERBS[verb], "--removals=")
    two = ("--removals=list.csv", "--removals=other.csv")
    assert "--removals is given twice, as list.csv and as" in refused(capsys, *VERBS[verb], *two)
    assert "--removals" in refused(capsys, *VERBS[verb], "--removals")


def test_options_behind_two_dashes_are_not_passed_over(capsys):
    for verb in VERBS:
        assert "--" in refused(capsys, *VERBS[verb], "--", "--removals=list.csv")


def test_no_evaluation_set_is_left_out(capsys):
    for given in ("", ",", "a,", "a,,b"):
        said = refused(capsys, *PREPARE, f"--evaluation_sets={given}")
        assert f"--evaluation_sets: {given!r} is not" in said


def test_the_key_of_a_config_is_told_from_an_option(capsys):
    assert "--config.batch_size" in refused(capsys, *VERBS["train"], "--batch_size=3")
    assert "--config.batch_size" in refused(capsys, *VERBS["train"], "batch_size=3")


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
def test_what_an_option_does_not_take_is_one_sentence(arguments, words, capsys, tmp_path):
    assert words in refused(capsys, *arguments)
    assert not (tmp_path / "made").exists()
