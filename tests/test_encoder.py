"""Tests of reading a workdir for evaluation."""

import json

import numpy as np
import pytest
from test_configs import load

from hashvision.errors import UserError
from hashvision.evaluation import encoder
from hashvision.models import regnet
from hashvision.training import workdir as workdirs

VOCABULARY = {"classes": [{"name": name} for name in ("dog", "boat", "tree")]}


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.setitem(regnet.PARAMETERS, "tiny", regnet.RegNetParameters(2, 8, 8.0, 2.0, 8))
    config = load("demo")
    config.model.name, config.data.crops = "tiny", ((1, 16, 0.2, 1.0),)
    workdirs.claim(str(tmp_path / "run"), config, VOCABULARY, {})
    return tmp_path / "run"


@pytest.mark.slow
def test_the_untrained_network_is_that_of_the_runs_seed(workdir):
    photos = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    network = encoder.load(str(workdir), untrained=True)
    features, scores = map(np.asarray, network.encode(photos))
    assert (network.resolution, network.step, scores.shape) == (16, 0, (4, 3))
    np.testing.assert_allclose(np.exp(scores).sum(1), 1, rtol=1e-5)
    assert np.ptp(features, axis=0).max() > 1e-3
    again, _ = encoder.load(str(workdir), untrained=True).encode(photos)
    np.testing.assert_array_equal(again, features)
    values = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**values, "seed": 1}))
    other, _ = encoder.load(str(workdir), untrained=True).encode(photos)
    assert np.abs(np.asarray(other) - features).max() > 1e-3


def test_a_workdir_without_a_checkpoint_is_refused(workdir):
    with pytest.raises(UserError, match="checkpoint"):
        encoder.load(str(workdir))


@pytest.mark.slow
def test_a_config_of_an_earlier_version_is_read(workdir):
    values = json.loads((workdir / "config.json").read_text())
    del values["augment"], values["optimizer"]["average"]
    (workdir / "config.json").write_text(json.dumps(values))
    assert encoder.load(str(workdir), untrained=True).step == 0
    (workdir / "config.json").write_text(json.dumps({**values, "resolution": 224}))
    with pytest.raises(UserError, match="config.json sets resolution, which this version"):
        encoder.load(str(workdir), untrained=True)
