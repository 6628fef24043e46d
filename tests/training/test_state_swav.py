"""Tests of SwAV's training step on 8 simulated devices, with its queue and in parts of a batch."""

import numpy as np
import pytest

from hashvision.training import sharding
from steps import losses, parts_change_nothing, same_as_alone

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def single():
    return losses(1, 1, name="swav")


@pytest.fixture(autouse=True)
def shard_everything(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 64)


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (2, 4)])
def test_eight_devices_equal_one(single, data, fsdp):
    final, alone = same_as_alone(single, data, fsdp, "swav")
    assert np.abs(alone.extra["queue"]).max() > 0.1  # full and in use since step 5
    np.testing.assert_allclose(final.extra["queue"], alone.extra["queue"], atol=1e-3)


@pytest.mark.parametrize(("data", "fsdp", "parts"), [(1, 1, 4), (4, 2, 2)])
def test_accumulating_over_parts_learns_the_same_as_the_whole_batch(data, fsdp, parts):
    parts_change_nothing("swav", data, fsdp, parts)
