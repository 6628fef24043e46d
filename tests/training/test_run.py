"""What a workdir keeps of the start of its run, and on which datasets the run may resume."""

import json

import pytest
from ml_collections import config_dict

import datasets
from hashvision import objectives
from hashvision.config import derive, recipes
from hashvision.data import dataset
from hashvision.errors import UserError
from hashvision.training import program, run
from runs import REPO

LENGTH = 1000.0


def config_of(*overrides, objective="hashtag"):
    given = ["--config.batch_size=16", f"--config.objective.name={objective}", *overrides]
    config = recipes.load(str(REPO / "configs" / "base.py"), given)
    if objective == "swav":
        with config.unlocked():
            config.optimizer.learning_rate = config_dict.placeholder(float)
    return config.copy_and_resolve_references()


@pytest.fixture
def folder(tmp_path):
    return datasets.write(tmp_path / "set")


def claim(path, folder, *overrides, length=LENGTH, **options):
    """Does what `train` does before it builds anything; the config and the classes' numbers."""
    source = dataset.load(str(folder))
    config = config_of(f"--config.dataset={folder}", *overrides, **options)
    objectives.fill(config, length, run.began(str(path)))
    return config, run.claim(str(path), config, source.vocabulary, source.manifest)


def change(folder, changed):
    """Writes the folder's vocabulary anew: `changed` makes classes of classes."""
    path = folder / "vocabulary.json"
    vocabulary = json.loads(path.read_text())
    path.write_text(json.dumps({**vocabulary, "classes": changed(vocabulary["classes"])}))
    if (folder / "manifest.json").exists():
        datasets.seal(folder)


def fewer(classes):
    """As fewer posts leave them: counted anew, in another order."""
    return [{**entry, "count": number} for number, entry in enumerate(classes[::-1], 1)]


def test_classes_that_were_counted_anew_keep_their_numbers(tmp_path, folder):
    run = tmp_path / "run"
    assert claim(run, folder)[1].tolist() == [0, 1, 2]
    began = (run / "vocabulary.json").read_text()
    change(folder, fewer)
    assert claim(run, folder)[1].tolist() == [2, 1, 0]
    assert (run / "vocabulary.json").read_text() == began
    assert claim(run, folder)[1].tolist() == [2, 1, 0]


def test_a_class_that_is_gone_or_new_is_named(tmp_path, folder):
    claim(tmp_path / "run", folder)
    change(folder, lambda classes: classes[:2])
    with pytest.raises(UserError, match="'boat'.*--removals.*new --workdir"):
        claim(tmp_path / "run", folder)
    claim(tmp_path / "fewer", folder)
    with pytest.raises(UserError, match="'boat'.*new --workdir"):
        claim(tmp_path / "fewer", datasets.write(tmp_path / "whole"))


def test_swav_needs_no_classes(tmp_path, folder):
    assert claim(tmp_path / "run", folder, objective="swav")[1] is None
    change(folder, lambda classes: [])
    assert claim(tmp_path / "run", folder, objective="swav")[1] is None


def test_classes_whose_numbers_were_tampered_with_are_refused(tmp_path, folder):
    claim(tmp_path / "run", folder)
    change(tmp_path / "run", lambda classes: classes[::-1])
    with pytest.raises(UserError, match=r"run/vocabulary\.json is not as `train` wrote it"):
        claim(tmp_path / "run", folder)
    with pytest.raises(UserError, match="copy it again"):
        run.read(str(tmp_path / "run"))


def test_what_is_left_open_stays_as_the_run_began(tmp_path, folder):
    first, _ = claim(tmp_path / "run", folder, objective="swav")
    second, _ = claim(tmp_path / "run", folder, objective="swav", length=400.0)
    for key in derive.OPEN:
        group, _, name = key.rpartition(".")
        one, other = ((config[group] if group else config)[name] for config in (first, second))
        assert one == other is not None
    with pytest.raises(UserError, match=r"trained with swav\.prototypes=60, not 61"):
        claim(tmp_path / "run", folder, "--config.swav.prototypes=61", objective="swav")


def test_what_was_set_at_the_start_need_not_be_set_again(tmp_path, folder):
    claim(tmp_path / "run", folder, "--config.swav.prototypes=70", objective="swav")
    config, _ = claim(tmp_path / "run", folder, objective="swav")
    assert config.swav.prototypes == 70


def test_a_run_stays_as_long_as_it_was_to_be(tmp_path, folder):
    def steps(*overrides, length):
        config, _ = claim(tmp_path / "run", folder, *overrides, length=length)
        return derive.total_steps(config, config.epoch_length)

    assert steps("--config.epochs=2", length=LENGTH) == 125
    assert steps("--config.epochs=2", length=400.0) == 125
    assert steps("--config.epochs=4", length=400.0) == 250  # unless the user says otherwise
    assert steps("--config.steps=99", length=400.0) == 99
    assert steps("--config.epochs=2", length=400.0) == 125  # steps that are no longer set
    assert steps("--config.epochs=2", "--config.epoch_length=400", length=400.0) == 50
    assert steps("--config.epochs=2", length=LENGTH) == 50


def test_the_schedule_goes_by_the_epochs_of_the_first_dataset(tmp_path, folder, monkeypatch):
    asked = []

    def schedule(kind, peak, *, total_steps, warmup_steps, **_):
        asked.append((total_steps, warmup_steps))
        return max

    monkeypatch.setattr(program.optim, "schedule", schedule)
    few = ("--config.epochs=2", "--config.model.name=resnet50", "--config.data.lanes=8")
    for length in (LENGTH, 400.0):
        config, _ = claim(tmp_path / "run", folder, *few, length=length)
        program.build(config, 3, length)
    assert asked == [(125, 62), (125, 62)]


def test_how_much_an_epoch_differs_is_said(tmp_path, folder):
    claim(tmp_path / "run", folder)
    config, began = config_of(), run.began(str(tmp_path / "run"))
    assert objectives.fill(config, LENGTH, began) == []
    (line,) = objectives.fill(config_of(), 400.0, began)
    assert "1,000" in line and line.endswith("400")
