"""plan: its figures, its table, its topologies, and the topologies that README names."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

import datasets
from hashvision import objectives
from hashvision.config import recipes
from hashvision.data import dataset, stream
from hashvision.errors import UserError
from hashvision.models import layers, regnet
from hashvision.planning import flops, plan
from hashvision.training import program
from made_up_plan import MADE_UP
from places import CONFIGS, load

SMALL = (
    "--config.data.photo_size=48",
    "--config.data.crops=((1, 32, 0.2, 1.0),)",
    "--config.model.unroll=1",
    "--config.mesh.fsdp=4",
)


@pytest.mark.slow
def test_bytes_per_device_are_the_bytes_of_its_shards(monkeypatch):
    """Uses the devices of this process in place of a TPU topology."""
    monkeypatch.setattr(plan, "devices_of", lambda topology: jax.devices())
    shallow = regnet.PARAMETERS["regnety_200mf"]._replace(depth=4)
    monkeypatch.setitem(regnet.PARAMETERS, "regnety_200mf", shallow)
    config = recipes.load(str(CONFIGS / "demo.py"), list(SMALL))
    found = plan.plan(config, plan.Target("v5e:2x4", 100, 5000.0))
    built = program.build(config, 100, 5000.0)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(built.abstract.params))
    assert whole / 4 < found.held["parameters"] < whole  # only large arrays are sharded
    assert found.held["optimiser"] >= 2 * found.held["parameters"]  # AdamW's two moments
    batch = 32 * (48 * 48 * 3 + 2 * 4 + 16 * 4 + 2 * 4)
    assert found.held["batch"] == batch / 8
    assert found.held["temporary"] > 0
    # Besides the state and the batch the executable has only a few scalars.
    assert 0 <= found.held["padding and results"] < 0.01 * found.needed
    assert found.memory == 16 * 2**30 and found.devices == 8
    assert f"{found.needed / 2**30:.2f}" in plan.table(found) and "fits" in plan.table(found)
    assert "all-gather" in found.text


# MADE_UP has 1,000 steps of 64 photos on four chips of 197 TFLOP/s at 1.5 GHz. A step has half a
# second of cycles and half a second of collectives: each device sends 100 GB at 200 GB/s, which is
# twice half of the all-reduced 100 GB.
def test_the_table_says_how_much_memory_is_missing():
    assert "does not fit: 4.00 GiB per device too much" in plan.table(MADE_UP)


def test_the_table_warns_that_quick_cycles_are_too_many():
    assert "Without --quick" not in plan.table(MADE_UP)
    assert "Without --quick" in plan.table(dataclasses.replace(MADE_UP, quick=True))


def test_time_price_and_mfu_follow_from_cycles_and_bytes():
    assert MADE_UP.compute_seconds == pytest.approx(0.5)
    assert MADE_UP.collective_seconds == pytest.approx(0.5)
    assert MADE_UP.mfu == pytest.approx(0.25) and MADE_UP.mfu_limit == 0.5
    text = plan.table(MADE_UP)
    assert "64 per second, 64 from each of 1 hosts" in text
    assert "0.3 hours of 1,000 steps" in text and "10 at 9.0 per chip-hour" in text
    values = json.loads(MADE_UP.as_json())
    assert values["mfu"] == pytest.approx(0.25) and values["held"] == MADE_UP.held
    assert values["collectives"][0]["sent"] == 1e11 and "text" not in values
    assert values["hours"] == pytest.approx(1000 / 3600) and values["photos_per_second"] == 64
    assert values["price"] == pytest.approx(10) and values["hosts"] == 1


def test_a_device_that_is_half_a_chip_has_half_the_interconnect():
    core = dataclasses.replace(MADE_UP, topology="v4:2x2x1", devices=8)
    seconds = 1e11 / (plan.CHIPS["v4"].interconnect / 2 * 1e9)
    assert core.collective_seconds == pytest.approx(seconds)


def test_matrix_units_at_this_clock_reach_the_peak():
    # Number and side of the matrix units per chip (cloud.google.com/tpu/docs, page of each kind).
    units = {"v3": (4, 128), "v4": (8, 128), "v5e": (4, 128), "v5p": (8, 128), "v6e": (4, 256)}
    for kind, (count, side) in units.items():
        peak = count * side**2 * 2 * plan.CHIPS[kind].clock / 1000
        assert peak == pytest.approx(plan.CHIPS[kind].tflops, rel=0.01)


def test_flops_of_loops_conditions_and_grouped_convolutions():
    def forward(x, kernel, matrix):
        y = layers.grouped_conv(x, kernel, 2, "native")  # 2x3x3 positions, 8 out of 3 * 3 * 4
        flat = y.reshape(18, 8)
        flat, _ = jax.lax.scan(lambda z, _: (jnp.tanh(z @ matrix), None), flat, length=5)
        other = lambda z: z  # noqa: E731
        return jax.lax.cond(flat[0, 0] > 0, lambda z: layers.matmul(z, matrix), other, flat)

    shapes = [jnp.zeros(shape) for shape in ((2, 6, 6, 8), (3, 3, 4, 8), (8, 8))]
    found = flops.forward(jax.make_jaxpr(forward)(*shapes).jaxpr)
    assert found == 2 * (2 * 3 * 3) * 8 * 3 * 3 * 4 + (5 + 1) * 2 * 18 * 8 * 8


def test_lanes_round_channels_up_and_merge_groups_if_cheaper():
    def forward(x, kernel):
        return layers.grouped_conv(x, kernel, 1, "native")

    def ratio(group, groups, lanes):
        width = group * groups
        shapes = jnp.zeros((1, 4, 4, width)), jnp.zeros((3, 3, group, width))
        jaxpr = jax.make_jaxpr(forward)(*shapes).jaxpr
        return flops.forward(jaxpr, lanes) / flops.forward(jaxpr)

    assert ratio(264, 2, 128) == pytest.approx(19 * 3 * 128**2 / (9 * 264**2))  # 2376, 264
    assert ratio(128, 2, 128) == 1
    # Groups of 4 channels have 36 inputs and 4 outputs; merging m groups multiplies both by m.
    assert ratio(4, 32, 128) == pytest.approx(
        min((32 // m) * -(-36 * m // 128) * 128 * 128 for m in (1, 2, 4, 8, 16, 32)) / (36 * 4 * 32)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "gflops"), [("32x8d", 16.4), ("32x48d", 153.0)])
def test_model_flops_match_the_paper(variant, gflops):
    """Table 3 of WSL: 16 and 153 billion multiplications per photo at 224 pixels.

    A step has 6 FLOPs per multiplication: 2 forward and 4 backward.
    """
    config = recipes.load(str(CONFIGS / f"wsl_resnext101.py:{variant}"), ["--config.batch_size=8"])
    objectives.fill(config, 1e9)
    built = program.build(config=config, classes=1500, epoch_length=1e9, devices=jax.devices()[:8])
    found = flops.forward(plan.forward_pass(config=config, program=built, classes=1500, photos=1e9))
    assert 3 * found == pytest.approx(8 * 6e9 * gflops, rel=0.02)


@pytest.mark.slow
def test_plan_on_simulated_cpus_needs_no_tpu_compiler(tmp_path):
    """Runs the command in its own process, since simulated devices need a fresh JAX."""
    arguments = [
        "plan",
        f"--config={CONFIGS / 'demo.py'}",
        "--topology=cpu:2",
        f"--json={tmp_path / 'plan.json'}",
        *SMALL[:3],
        "--config.batch_size=8",
        "--quick",
    ]
    command = [sys.executable, "-m", "hashvision", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiles in half the time
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "regnety_200mf on cpu:2: 2 devices" in done.stdout
    assert "with little effort" in done.stdout
    assert "does not estimate cycles" in done.stdout and "available" not in done.stdout
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["devices"] == 2 and values["step_seconds"] == 0
    assert {each["kind"] for each in values["collectives"]} == {"all-reduce"}
    # 200 million multiplications at 224 pixels, scaled to 32; borders and the classes add some.
    assert values["model_flops"] == pytest.approx(8 * 6 * 200e6 * (32 / 224) ** 2, rel=0.3)


@pytest.mark.parametrize("topology", ["v9:2x2", "v5e", "tpu", "cpu:0", "cpu:²", "cpu:1000000"])
def test_an_unknown_topology_is_refused_by_name(topology):
    with pytest.raises(UserError, match=f"--topology={topology} is unknown; give KIND:SHAPE"):
        plan.devices_of(topology)


def test_a_missing_compiler_message_says_how_to_install_it(monkeypatch):
    def absent(**_):
        raise RuntimeError("Unable to find libtpu\nand more")

    monkeypatch.setattr(plan.topologies, "get_topology_desc", absent)
    with pytest.raises(UserError, match=r"\(Unable to find libtpu\); install it with"):
        plan.devices_of("v5e:2x2")


README = (CONFIGS.parent / "README.md").read_text()
# (recipe, batch, KIND:SHAPE, fsdp) of each row of the README's table that names a TPU.
ROWS = [
    (recipe, int(batch.replace(",", "")), topology, int(fsdp))
    for recipe, batch, topology, fsdp in re.findall(
        r"^\|.*\| `(\w+:\w+)` \|.*\| ([\d,]+) \| (v\w+:[\dx]+), [^|]*\| (\d+) \|", README, re.M
    )
]
TOPOLOGIES = sorted({row[2] for row in ROWS})


def size_of(topology):
    """The number of devices of a topology, and the numbers of hosts that it may have."""
    kind, _, shape = topology.partition(":")
    chips = math.prod(map(int, shape.split("x")))
    hosts = {chips // math.prod(plan.host_bounds(topology)), max(1, chips // 4)}
    return chips * (2 if kind in ("v3", "v4") else 1), hosts


def test_the_readme_table_has_every_recipe_for_tpus():
    files = {row[0].partition(":")[0] for row in ROWS}
    assert files == {path.stem for path in CONFIGS.glob("*.py")} - {"base", "demo", "demo_swav"}
    assert len(ROWS) == 14 and "v5e:8x16" in TOPOLOGIES and "v4:8x8x8" in TOPOLOGIES


@pytest.mark.parametrize(("recipe", "batch", "own", "fsdp"), ROWS, ids=[row[0] for row in ROWS])
def test_a_recipe_runs_on_its_topology_and_on_others_that_divide_its_batch(
    recipe, batch, own, fsdp
):
    config = load(recipe)
    assert config.batch_size == batch
    for topology in TOPOLOGIES:
        devices, hosts = size_of(topology)
        if topology == own:
            assert batch % (devices * config.accumulate) == 0 and devices % fsdp == 0
        elif batch % devices:
            continue
        for count in hosts:
            stream.check_lanes(batch, config.data.lanes, count)


@pytest.mark.parametrize("topology", ["v5e:1x1", "v5e:2x4", "v6e:2x4", "v5e:4x4", *TOPOLOGIES])
def test_devices_and_hosts_of_a_topology(topology):
    pytest.importorskip("libtpu")
    devices = plan.devices_of(topology)
    count, hosts = size_of(topology)
    assert len(devices) == count
    assert len({device.process_index for device in devices}) in hosts
    if topology in ("v5e:1x1", "v5e:2x4", "v6e:2x4"):
        assert len({device.process_index for device in devices}) == 1


@pytest.mark.parametrize(
    ("batch", "lanes", "remedy"),
    [
        (8064, 336, "set --config.data.lanes=288."),
        (8064, 5, "set --config.data.lanes=32."),
        (8070, 10, "set --config.batch_size to a multiple of 32."),
    ],
)
def test_plan_and_train_refuse_lanes_with_the_same_message(
    batch, lanes, remedy, monkeypatch, tmp_path
):
    devices = [types.SimpleNamespace(process_index=number // 4) for number in range(128)]
    monkeypatch.setattr(plan, "devices_of", lambda topology: devices)
    overrides = [f"--config.batch_size={batch}", f"--config.data.lanes={lanes}"]
    config = recipes.load(str(CONFIGS / "wsl_resnext101.py"), overrides)
    with pytest.raises(UserError) as planned:
        plan.plan(config, plan.Target("v5e:8x16", 1500, 1e9))
    source = dataset.load(str(datasets.write(tmp_path / "set", size=6)))
    with pytest.raises(UserError) as trained:
        stream.Stream(
            source, batch_size=batch, lanes=lanes, seed=0, method="natural", hosts=32, host=0
        )
    assert str(planned.value) == str(trained.value)
    assert str(planned.value).endswith(remedy)


def test_a_host_of_eight_chips_has_the_cores_of_its_kind():
    eight = dataclasses.replace(MADE_UP, topology="v5e:2x4", devices=8, chips=8, hosts=1)
    assert eight.host_cores == 224 and dataclasses.replace(eight, hosts=2).host_cores == 112
    assert "from each of 1 hosts" in plan.table(eight)
    assert json.loads(eight.as_json())["hosts"] == 1
