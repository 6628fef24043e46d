"""`hashvision train`: starts a run on a dataset folder, or resumes it."""

import argparse

from hashvision.commands import flags
from hashvision.commands.joining import join_hosts

HELP = "train a network on a dataset folder, or resume a run"
DESCRIPTION = (
    "Starts a run, or resumes it. --config.KEY=VALUE sets any key; `hashvision config` lists them."
    " Configs are Python code: use only those you trust."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    flags.add_config(parser)
    parser.add_argument(
        "--workdir", required=True, help="folder for checkpoints, metrics and config"
    )
    flags.add_takedown(parser, removals="CSV of photos to leave out: kind,value,reason,received_at")


def run(arguments: argparse.Namespace, rest: list[str]) -> int | None:
    """Trains; returns hosts.AGAIN if the run was stopped before its last step."""
    flags.refuse_unknown(arguments, rest, settings=True)
    from hashvision.config import recipes

    config = recipes.load(arguments.config, rest)
    from hashvision.training import hosts, run

    workdir, place = arguments.workdir, hosts.place()
    if place and place.host == 0 and not hosts.watched():
        with run.lock(workdir):  # refuses a workdir in use before changing anything in it
            pass
    code = join_hosts(workdir, config)
    if code is not None:
        return code
    from hashvision.training import loop

    evaluate, removed = None, flags.removal_list(arguments)
    if config.evaluate_on:
        from hashvision.evaluation import encoder, protocols

        evaluate = protocols.InTraining(
            config,
            lambda: run.read(workdir)[1],
            batch_size=encoder.batch_size(),
            removed=removed,
        )
    if not loop.train(config, workdir, evaluate, removed):
        return hosts.AGAIN
    print(f"The run is in {workdir}.")
    return None
