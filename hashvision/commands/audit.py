"""`hashvision audit`: finds removed photos in a dataset, or in what a run's checkpoints saw."""

import argparse

from hashvision.commands import flags
from hashvision.errors import UserError

HELP = "find removed photos in a dataset, or in what a run's checkpoints saw"
DESCRIPTION = (
    "With --dataset, lists the removed photos that are still in it. With --workdir, lists which"
    " checkpoints saw which removed photo, and how often. The exit code is 1 if there are any, else"
    " 0."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument(
        "--dataset", help="a dataset folder; with --workdir, where the run's dataset is now"
    )
    parser.add_argument("--workdir", help="the workdir of a run")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare every byte of --dataset with its manifest; --removals may be left out",
    )
    flags.add_takedown(parser, removals="CSV: kind,value,reason,received_at")
    parser.add_argument("--json", help="also write all records to this file")


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Prints the audit; returns 1 if it finds anything."""
    flags.refuse_unknown(arguments, rest)
    from hashvision.takedowns import audit

    if not arguments.removals and not arguments.verify:
        raise UserError("There is nothing to look for; give a list with --removals, or --verify.")
    if not arguments.workdir and not arguments.dataset:
        raise UserError("There is nothing to audit; give --dataset or --workdir.")
    if arguments.verify and not arguments.dataset:
        raise UserError("--verify reads a dataset; give its folder with --dataset.")
    if arguments.verify:
        print(audit.verify_dataset(arguments.dataset))
    if not arguments.removals:
        return 0
    listed = flags.removal_list(arguments)
    if arguments.workdir:
        found = audit.audit_run(arguments.workdir, listed, arguments.dataset)
    else:
        found = audit.audit_dataset(arguments.dataset, listed)
    print(found.table())
    flags.write_json(arguments.json, found.as_json, "the audit")
    return found.code
