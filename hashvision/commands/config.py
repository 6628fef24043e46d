"""`hashvision config`: prints every key of a config, its value, and what set it."""

import argparse

from hashvision.commands import flags

HELP = "print every key of a config, its value, what set it, and its meaning"
DESCRIPTION = "Prints a config as `train` would use it; --config.KEY=VALUE sets any key."


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--config", help="a recipe, NAME or NAME:VARIANT, or the path of one, FILE.py:VARIANT"
    )
    which.add_argument("--list", action="store_true", help="list the recipes and their variants")
    parser.add_argument("--json", help="also write the config to this file")


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Prints the config as a table."""
    flags.refuse_unknown(arguments, rest, settings=True)
    from hashvision.config import explain, recipes

    if arguments.list:
        print("\n".join(recipes.listed()))
        return
    found = explain.explain(arguments.config, rest)
    print(found.table(), flush=True)
    flags.write_json(arguments.json, found.as_json, "the config")
