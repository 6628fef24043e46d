"""Tests of the settings that are derived for SwAV."""

import ml_collections
import pytest

from hashvision import objectives
from hashvision.config import derive, recipes
from hashvision.errors import UserError
from places import CONFIGS

IMAGENET = 1_281_167.0


def swav(batch_size, *overrides, recipe="base"):
    settings = ["--config.objective.name=swav", f"--config.batch_size={batch_size}", *overrides]
    return recipes.load(str(CONFIGS / f"{recipe}.py"), settings)


def filled(batch_size, *overrides, photos=IMAGENET):
    config = swav(batch_size, *overrides)
    config.unlock()
    config.optimizer.learning_rate = ml_collections.config_dict.placeholder(float)
    config.lock()
    return config, objectives.fill(config, photos)


@pytest.mark.parametrize(
    ("batch", "peak", "queue", "frozen"), [(4096, 4.8, 0, 313), (256, 0.6, 3840, 5005)]
)
def test_derived_settings_match_the_authors_two_recipes(batch, peak, queue, frozen):
    config, why = filled(batch)
    assert config.optimizer.learning_rate * batch / 256 == pytest.approx(peak, rel=1e-3)
    assert config.swav.prototypes == 3000
    assert config.swav.queue == queue
    assert config.swav.frozen_steps == pytest.approx(frozen, abs=1)
    assert config.swav.queue_start == 15 * round(IMAGENET / batch)
    assert any("learning_rate" in line for line in why)
    assert any("swav.queue=" in line for line in why)


def test_a_small_dataset_gets_few_prototypes():
    config, why = filled(64, photos=5000.0)
    assert config.swav.prototypes == 60 and config.swav.queue == 0
    assert "5 to 250 prototypes for codes over 64 photos; this run has 60" in why[-1]


def test_explicit_settings_stay_and_no_key_stays_none():
    config, why = filled(256, "--config.swav.queue=512", "--config.swav.prototypes=500")
    assert config.swav.queue == 512 and config.swav.prototypes == 500
    assert not any("swav.queue=" in line for line in why)
    assert all(value is not None for value in config.swav.values())
    assert objectives.fill(config, IMAGENET) == why[-1:]  # all are set now


def test_a_batch_too_small_for_its_prototypes_is_refused_with_a_remedy():
    with pytest.raises(UserError, match=r"queue=3840 or --config.swav.prototypes=1000"):
        filled(256, "--config.swav.queue=0", "--config.swav.prototypes=3000")
    with pytest.raises(
        UserError, match="must be a multiple of batch_size=256; set --config.swav.queue=512"
    ):
        filled(256, "--config.swav.queue=600")


def test_the_hashtag_objective_derives_only_the_epoch_length():
    config = recipes.load(str(CONFIGS / "demo.py"), [])
    assert objectives.fill(config, 5000.0) == [] and config.epoch_length == 5000.0
    before = config.to_json()
    assert objectives.fill(config, 5000.0) == [] and config.to_json() == before


@pytest.mark.parametrize(
    ("overrides", "photos", "patience"),
    [
        ([], IMAGENET, 4 * 313),  # four epochs of 30
        (["--config.epochs=8"], IMAGENET, 626),  # a quarter of 2,503 steps
        (["--config.epochs=4"], IMAGENET, 500),
        (["--config.epochs=1"], 1e9, 61_035),  # SEER's one epoch of 244,141 steps
        (["--config.epochs=1", "--config.swav.patience=9"], 1e9, 9),
    ],
)
def test_patience_is_shorter_than_the_run(overrides, photos, patience):
    config, why = filled(4096, *overrides, photos=photos)
    assert config.swav.patience == patience <= derive.total_steps(config, photos)
    assert any("swav.patience=" in line for line in why) == (patience != 9)


def test_patience_exceeds_a_very_short_run():
    config, _ = filled(4096, "--config.steps=300", photos=IMAGENET)
    assert config.swav.patience == 500


@pytest.mark.parametrize("variant", ["32gf", "64gf", "128gf", "256gf", "10b"])
def test_seers_patience_is_shorter_than_its_run(variant):
    config = recipes.load(str(CONFIGS / f"seer_regnety.py:{variant}"), [])
    objectives.fill(config, 1e9)
    assert config.swav.patience <= 0.26 * derive.total_steps(config, 1e9)
