"""`hashvision evaluate`: measures a run's network on labelled photos."""

import argparse
import os

from hashvision.commands import flags
from hashvision.commands.joining import join_hosts

HELP = "measure a run's network on labelled photos"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument("--workdir", required=True, help="the workdir of a run")
    parser.add_argument(
        "--dataset", required=True, help="folders by class, a labels.jsonl, or a dataset folder"
    )
    parser.add_argument(
        "--protocol", required=True, help="knn, linear or multilabel, or several: knn,linear"
    )
    parser.add_argument(
        "--untrained",
        action="store_true",
        help="evaluate the same network, freshly initialised, for comparison",
    )
    flags.add_takedown(parser, removals="CSV of photos to leave out, as for prepare")


def run(arguments: argparse.Namespace, rest: list[str]) -> int | None:
    """Prints a table for each protocol."""
    flags.refuse_unknown(arguments, rest)
    from hashvision.evaluation import encoder, protocols
    from hashvision.training import run

    chosen = arguments.protocol.split(",")
    protocols.check(chosen)
    removed = flags.removal_list(arguments)
    config, _ = run.read(arguments.workdir)
    # In the workdir itself the hosts of a run in progress find one another.
    code = join_hosts(os.path.join(arguments.workdir, "evaluations", "hosts"), config)
    if code is not None:
        return code
    network = encoder.load(arguments.workdir, untrained=arguments.untrained)
    reports = protocols.evaluate(
        network,
        arguments.dataset,
        chosen,
        workdir=arguments.workdir,
        untrained=arguments.untrained,
        removed=removed,
    )
    for report in reports if network.leads else ():
        print(report.table())
    return None
