"""Tests of a workdir's config and vocabulary, and of the datasets on which a run may resume."""

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
    """Completes the config and claims the workdir as `train` does; returns config and numbers."""
    source = dataset.load(str(folder))
    config = config_of(f"--config.dataset={folder}", *overrides, **options)
    objectives.fill(config, length, run.frozen_config(str(path)))
    return config, run.claim(str(path), config, source.vocabulary, source.manifest)


def change(folder, changed):
    """Applies `changed` to the classes in the folder's vocabulary."""
    path = folder / "vocabulary.json"
    vocabulary = json.loads(path.read_text())
    path.write_text(json.dumps({**vocabulary, "classes": changed(vocabulary["classes"])}))
    if (folder / "manifest.json").exists():
        datasets.seal(folder)


def recounted(classes):
    """The classes in another order with other counts, as a dataset of fewer posts has them."""
    return [{**entry, "count": number} for number, entry in enumerate(classes[::-1], 1)]


def test_recounted_classes_keep_their_numbers(tmp_path, folder):
    run = tmp_path / "run"
    assert claim(run, folder)[1].tolist() == [0, 1, 2]
    first = (run / "vocabulary.json").read_text()
    change(folder, recounted)
    assert claim(run, folder)[1].tolist() == [2, 1, 0]
    assert (run / "vocabulary.json").read_text() == first
    assert claim(run, folder)[1].tolist() == [2, 1, 0]


def test_a_missing_or_new_class_is_refused_and_named(tmp_path, folder):
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


def test_a_changed_vocabulary_in_the_workdir_is_refused(tmp_path, folder):
    claim(tmp_path / "run", folder)
    change(tmp_path / "run", lambda classes: classes[::-1])
    with pytest.raises(UserError, match=r"run/vocabulary\.json has changed since `train` wrote it"):
        claim(tmp_path / "run", folder)
    with pytest.raises(UserError, match="copy it again"):
        run.read(str(tmp_path / "run"))


def test_derived_settings_stay_as_the_run_began(tmp_path, folder):
    first, _ = claim(tmp_path / "run", folder, objective="swav")
    second, _ = claim(tmp_path / "run", folder, objective="swav", length=400.0)
    for key in derive.OPEN:
        group, _, name = key.rpartition(".")
        one, other = ((config[group] if group else config)[name] for config in (first, second))
        assert one == other is not None
    with pytest.raises(UserError, match=r"trained with swav\.prototypes=60, not 61"):
        claim(tmp_path / "run", folder, "--config.swav.prototypes=61", objective="swav")


def test_overrides_of_derived_settings_need_not_be_repeated(tmp_path, folder):
    claim(tmp_path / "run", folder, "--config.swav.prototypes=70", objective="swav")
    config, _ = claim(tmp_path / "run", folder, objective="swav")
    assert config.swav.prototypes == 70


def test_a_run_keeps_its_length_on_another_dataset(tmp_path, folder):
    def steps(*overrides, length):
        config, _ = claim(tmp_path / "run", folder, *overrides, length=length)
        return derive.total_steps(config, config.epoch_length)

    assert steps("--config.epochs=2", length=LENGTH) == 125
    assert steps("--config.epochs=2", length=400.0) == 125
    assert steps("--config.epochs=4", length=400.0) == 250  # unless the user changes it
    assert steps("--config.steps=99", length=400.0) == 99
    assert steps("--config.epochs=2", length=400.0) == 125  # steps is None again
    assert steps("--config.epochs=2", "--config.epoch_length=400", length=400.0) == 50
    assert steps("--config.epochs=2", length=LENGTH) == 50


def test_the_schedule_uses_the_epoch_length_of_the_first_dataset(tmp_path, folder, monkeypatch):
    lengths = []

    def schedule(kind, peak, *, total_steps, warmup_steps, **_):
        lengths.append((total_steps, warmup_steps))
        return max

    monkeypatch.setattr(program.optim, "schedule", schedule)
    few = ("--config.epochs=2", "--config.model.name=resnet50", "--config.data.lanes=8")
    for length in (LENGTH, 400.0):
        config, _ = claim(tmp_path / "run", folder, *few, length=length)
        program.build(config, 3, length)
    assert lengths == [(125, 62), (125, 62)]


def test_another_epoch_length_is_printed(tmp_path, folder):
    claim(tmp_path / "run", folder)
    config, frozen = config_of(), run.frozen_config(str(tmp_path / "run"))
    assert objectives.fill(config, LENGTH, frozen) == []
    (line,) = objectives.fill(config_of(), 400.0, frozen)
    assert "1,000" in line and line.endswith("400")
