"""`hashvision plan`: estimates memory, speed and price of a run without its devices."""

import argparse
import os

from hashvision.commands import flags
from hashvision.config.ranges import number

HELP = "estimate memory, speed and price of a run on a TPU pod, without a TPU"
DESCRIPTION = (
    "Compiles the step that `train` would run; needs requirements-tpu.txt. --config.KEY=VALUE sets"
    " any key; `hashvision config` lists them."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    flags.add_config(parser)
    parser.add_argument(
        "--topology",
        required=True,
        help="KIND:SHAPE, such as v4:4x4x8 or v5e:16x16; cpu:N; or gpu for the GPUs of this"
        " machine",
    )
    parser.add_argument(
        "--classes",
        type=flags.COUNT,
        default=1500,
        help="classes of the vocabulary (default: 1500)",
    )
    parser.add_argument(
        "--images",
        type=flags.within(number(1, 1e15)),
        default=1e9,
        help="photos of an epoch (default: 1e9)",
    )
    parser.add_argument(
        "--price_per_chip_hour",
        type=flags.within(number(0, 1e9)),
        default=0.0,
        help="in any currency, to price the run",
    )
    parser.add_argument(
        "--fit",
        action="store_true",
        help="search for the fsdp, remat and accumulate that fit and are fastest",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="compile in a third of the time: nearly the same memory, up to twice the cycles",
    )
    parser.add_argument("--json", help="also write all figures to this file")


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Prints the plan."""
    flags.refuse_unknown(arguments, rest, settings=True)
    if arguments.topology != "gpu":
        os.environ["JAX_PLATFORMS"] = "cpu"  # the topology's devices are only described
    from hashvision.config import recipes

    config = recipes.load(arguments.config, rest)
    from hashvision.planning import fit, plan

    target = plan.Target(
        topology=arguments.topology,
        classes=arguments.classes,
        photos=arguments.images,
        price_per_chip_hour=arguments.price_per_chip_hour,
        quick=arguments.quick,
    )
    if arguments.fit:
        choice, found = fit.fit(config, target)
        print(f"\nThe fastest settings that fit: {choice.overrides()}\n")
    else:
        found = plan.plan(config, target)
    print(plan.table(found))
    flags.write_json(arguments.json, found.as_json, "the plan")
