import pathlib

import jax
import pytest

from hashvision import plan
from hashvision.__main__ import _config
from hashvision.errors import UserError
from hashvision.training import program

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
SMALL = (
    "--config.data.crops=((1, 32, 0.2, 1.0),)",
    "--config.model.unroll=1",
    "--config.mesh.fsdp=4",
)


@pytest.mark.slow
def test_bytes_a_device_are_those_of_its_shards(monkeypatch):
    """On the devices at hand in place of a topology's."""
    monkeypatch.setattr(plan, "devices_of", lambda topology: jax.devices())
    config = _config(str(CONFIGS / "demo.py"), list(SMALL))
    found = plan.plan(config, "v5e:2x4", 100, 5000.0)
    built = program.build(config, 100, 5000.0)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(built.abstract.params))
    assert whole / 4 < found.held["parameters"] < whole  # large arrays in four, small ones whole
    assert found.held["optimiser"] >= 2 * found.held["parameters"]  # AdamW's two moments
    batch = 32 * (32 * 32 * 3 + 16 * 4 + 2 * 4)
    assert found.held["batch"] == batch / 8
    assert found.held["temporary"] > 0
    assert found.memory == 16 * 2**30 and found.devices == 8
    assert f"{found.needed / 2**30:.2f}" in plan.table(found) and "fits" in plan.table(found)
    assert "all-gather" in found.text


def test_what_does_not_fit_says_by_how_much():
    found = plan.Plan("v5e:2x2", 4, {"parameters": 20 * 2**30}, 16 * 2**30, 1.0, "")
    assert "does not fit, by 4.00 GiB a device" in plan.table(found)


@pytest.mark.parametrize("topology", ["v9:2x2", "v5e", "tpu"])
def test_an_unknown_topology_is_named(topology):
    with pytest.raises(UserError, match=f"--topology={topology} is none that is known"):
        plan.devices_of(topology)


def test_without_the_compiler_it_is_said_how_to_get_it(monkeypatch):
    def absent(**_):
        raise RuntimeError("Unable to find libtpu\nand more")

    monkeypatch.setattr(plan.topologies, "get_topology_desc", absent)
    with pytest.raises(UserError, match=r"\(Unable to find libtpu\); install it with"):
        plan.devices_of("v5e:2x2")
