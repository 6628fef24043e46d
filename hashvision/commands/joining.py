"""How a command joins the other hosts of a run: all of them run the same command."""

import sys

from hashvision.config import Config


def join_hosts(folder: str, config: Config) -> int | None:
    """Joins the other hosts, if the environment names any.

    Args:
      folder: where the hosts find one another.
      config: of the run; says how long they wait for each other.

    Returns:
      None in the process that computes; the exit code in the one that watched it.
    """
    from hashvision.training import hosts

    place, settings = hosts.place(), config.hosts
    if place and not hosts.watched():
        command = [sys.executable, *sys.orig_argv[1:]]
        return hosts.watch(
            place, folder, command, join_seconds=settings.join, lost_seconds=settings.lost
        )
    if place:
        hosts.join(place, join_seconds=settings.join, lost_seconds=settings.lost)
    return None
