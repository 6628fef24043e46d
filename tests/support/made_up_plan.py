"""A plan with round numbers, for tests of the table and of the search."""

from hashvision.planning import hlo, plan

MADE_UP = plan.Plan(
    model="made_up",
    topology="v5e:2x2",
    devices=4,
    chips=4,
    hosts=1,
    batch_size=64,
    steps=1000,
    held={"parameters": 20 * 2**30},
    memory=16 * 2**30,
    model_flops=4 * 197e12 / 4,
    lane_flops=2 * 4 * 197e12 / 4,
    compiled_flops=0.0,
    cycles=750_000_000,
    collectives=[
        hlo.Collective(kind="all-reduce", elements=25 * 10**9, size=10**11, devices=2, times=1)
    ],
    compile_seconds=1.0,
    price_per_chip_hour=9.0,
)
