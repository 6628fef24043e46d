"""What a new trunk, objective and protocol each take: one file, and one line in a table."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import pytest

import datasets
import vit
from hashvision import models, objectives
from hashvision.config import objectives as table
from hashvision.config import schema
from hashvision.evaluation import encoded, protocols
from hashvision.evaluation.bootstrap import Estimate
from hashvision.models import regnet
from hashvision.training import loop
from places import load
from runs import make
from steps import SMALLEST

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path):
    return make(tmp_path)


def trained(place, *overrides):
    """The metrics of each of 20 steps of a run in this process."""
    few = "((1, 32, 0.3, 1.0),)"
    config = load(
        "demo",
        f"--config.dataset={place / 'dataset'}",
        "--config.steps=20",
        "--config.log_every=1",
        "--config.batch_size=16",
        "--config.data.photo_size=56",
        f"--config.data.crops={few}",
        *overrides,
    )
    assert loop.train(config, str(place / "run"))
    return [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_new_trunk_is_one_file_and_one_line(place, monkeypatch):
    """A ViT: without BatchNorm, so without statistics, and with draws of its own in training."""
    monkeypatch.setattr(models, "FAMILIES", (*models.FAMILIES, vit))
    lines = trained(place, "--config.model.name=vit_toy", "--config.optimizer.average=0.9")
    assert len(lines) == 20 and lines[-1]["loss"] < lines[0]["loss"]


def test_a_new_objective_is_one_file_and_one_line(place, monkeypatch):
    """Predicts the mean colour of a photo: no tags, one scalar to watch, no settings to derive."""

    def from_config(config, classes, platform):
        trunk = models.trunk(config, platform)

        def init(rng, batch):
            images = batch["crops0"][:, 0].astype(jnp.float32) / 255
            variables = trunk.init(rng, images)
            features, _ = jax.eval_shape(lambda: trunk.apply(variables, images, train=False))
            head = {"kernel": jnp.zeros((features.shape[-1], 3))}
            return {"trunk": variables.params, "head": head}, {"trunk": variables.statistics}

        def loss(params, extra, batch, rng, step):
            images = batch["crops0"][:, 0].astype(jnp.float32) / 255
            variables = models.Variables(params["trunk"], extra["trunk"])
            features, statistics = trunk.apply(variables, images, train=True, rng=rng)
            error = jnp.mean((features @ params["head"]["kernel"] - images.mean((1, 2))) ** 2)
            return error, ({"trunk": statistics}, {"error": error})

        def predict(params, extra, images):
            variables = models.Variables(params["trunk"], extra["trunk"])
            return trunk.apply(variables, images.astype(jnp.float32) / 255, train=False)[0], None

        return objectives.Objective(init, loss, predict, watch=("error",))

    module = types.ModuleType("mean_colour")
    module.from_config, module.fill = from_config, lambda config, epoch_length: []
    monkeypatch.setitem(sys.modules, "mean_colour", module)
    monkeypatch.setitem(table.OBJECTIVES, "colour", table.Entry("mean_colour", needs_tags=False))
    name = schema.KEYS["objective.name"]
    takes = name.takes._replace(holds=lambda value: value in table.OBJECTIVES)
    monkeypatch.setitem(schema.KEYS, "objective.name", name._replace(takes=takes))
    monkeypatch.setitem(regnet.PARAMETERS, "smallest", SMALLEST.parameters)
    model = "--config.model.name=smallest"
    lines = trained(place, "--config.objective.name=colour", model)
    assert lines[-1]["error"] < lines[0]["error"]


def test_a_new_protocol_is_one_function_and_one_line(place, monkeypatch):
    def count(subject):
        found = len(subject.test.features) / len(subject.tests.names)
        return encoded.Findings(
            metrics={"readable": Estimate(found, found, found)},
            baselines={}, photos={}, classes=0, skipped=encoded.skipped(), details={},
        )  # fmt: skip

    monkeypatch.setitem(protocols.PROTOCOLS, "readable", protocols.Protocol(count))
    folder = place / "photos" / "test" / "dog"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(datasets.jpeg(number))
    (folder / "broken.jpg").write_bytes(b"broken")
    config = load(
        "demo",
        f"--config.evaluate_on={place / 'photos'}",
        "--config.evaluate_protocols=readable",
    )
    evaluate = protocols.InTraining(config, dict, batch_size=4)
    assert evaluate(lambda photos: (photos.mean((1, 2)), None), 16, 0) == {
        "readable_readable_photos": 0.75
    }
