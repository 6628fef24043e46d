"""Outputs that appear whole or not at all: made in a folder beside their place, under its lock.

Nothing is deleted that this program did not write: what may go is known by its name.
"""

import contextlib
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator

from hashvision import locks, storage
from hashvision.errors import UserError

_FORMER = "-former"
# What stands behind the output's name; earlier versions put in host and process, too.
_STAGING = re.compile(rf"\.preparing-(.+-\d+-)?[0-9a-f]{{8}}({_FORMER})?")
_MOUNTS = "/proc/self/mountinfo"

# Whether this program writes a path, relative to the output; that of a folder ends in "/".
IsOwn = Callable[[str], bool]


def resolve_output(output: str, inputs: Iterable[str] = ()) -> str:
    """The folder that an output names: absolute, and of a link the one it leads to.

    Args:
      output: as the user gives it.
      inputs: what is read, which the output must not hold.

    Raises:
      UserError: it cannot be replaced by another folder, or holds what is needed.
      OSError: it cannot be looked at.
    """
    path = storage.absolute(output)
    if storage.is_remote(path):
        if "/" not in path.partition("://")[2]:
            raise UserError(f"--output={output} is a whole bucket; give a folder in it.")
    else:
        path = os.path.realpath(path)
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)
        if _holds(path, os.path.realpath(os.curdir)):
            raise UserError(
                f"--output={output} is the folder in which this command runs, or holds it; give a"
                " folder of its own."
            )
        if os.path.ismount(path) or path in _mounts():
            raise UserError(
                f"--output={output} is a mount point, which cannot be replaced by a new dataset;"
                f" give a folder in it, such as {os.path.join(path, 'dataset')}."
            )
    for each in inputs:
        there = each if storage.is_remote(each) else os.path.realpath(each)
        if _holds(path, there):
            raise UserError(
                f"--output={output} holds {each}, which this command reads; give a folder of its"
                " own."
            )
    return path


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _mounts() -> set[str]:
    """Where file systems are mounted, parts of one on itself included; none without Linux."""
    try:
        with open(_MOUNTS, encoding="utf-8", errors="surrogateescape") as file:
            paths = [line.split()[4] for line in file]
    except OSError:
        return set()
    # A space stands there as \040.
    return {re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), path) for path in paths}


@contextlib.contextmanager
def staging_folder(output: str, is_own: IsOwn, check: Callable[[str], None]) -> Iterator[str]:
    """Holds the output's lock and makes an empty folder beside it; what stays of that goes.

    What runs that were killed left there is cleared away first: under the lock all of them are
    dead. A folder that one of them had moved in `replace` comes back, if nothing took its place.

    Args:
      output: what `place` found.
      is_own: which files are this program's.
      check: raises a UserError if the output may not be replaced.

    Yields:
      The folder.

    Raises:
      UserError: another process holds the lock.
      OSError: the folder cannot be written.
    """
    with locks.Lock(f"{output}.lock", f"The output {output}", "give another --output"):
        _clear_away(output, is_own)
        check(output)
        staging = f"{output}.preparing-{uuid.uuid4().hex[:8]}"
        try:
            storage.make_folder(staging)
            yield staging
        finally:
            remove(staging, is_own)


def _clear_away(output: str, is_own: IsOwn) -> None:
    parent, name = os.path.split(output)
    _, folders, _ = next(storage.walk(parent), ("", [], []))
    for each in folders:
        if not each.startswith(name) or not _STAGING.fullmatch(each[len(name) :]):
            continue
        path = os.path.join(parent, each)
        if path.endswith(_FORMER) and not storage.exists(output):
            storage.move(path, output)
        else:
            remove(path, is_own)


def first_foreign_path(folder: str, is_own: IsOwn) -> str | None:
    """The first path in a folder, relative to it, that this program did not write."""
    for path, folders, files in storage.walk(folder):
        below = path[len(folder) + 1 :]
        for each in [*(f"{name}/" for name in folders), *files]:
            relative = f"{below}/{each}" if below else each
            if not is_own(relative):
                return relative
    return None


def remove(folder: str, is_own: IsOwn) -> None:
    """Removes a folder, if it is there, but for what this program did not write in it."""
    remote, files, emptied = storage.is_remote(folder), [], [folder]
    for path, folders, names in storage.walk(folder):
        below = path[len(folder) + 1 :]
        inside = f"{below}/" if below else ""
        files += [f"{path}/{name}" for name in names if is_own(inside + name)]
        emptied += [f"{path}/{name}" for name in folders if is_own(f"{inside}{name}/")]
    storage.each(_remove_file, files, remote)
    if not remote:
        for path in sorted(emptied, reverse=True):  # what lies in a folder sorts behind it
            with contextlib.suppress(OSError):  # something else lies in it
                os.rmdir(path)


def _remove_file(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        storage.remove(path)


def replace(staging: str, output: str, is_own: IsOwn) -> None:
    """Puts a finished folder of a disk in the output's place; what lay there goes when it stands.

    Raises:
      OSError: it cannot be moved; the output is as it was.
    """
    former = staging + _FORMER
    had_former = os.path.exists(output)
    if had_former:
        storage.move(output, former)
    try:
        storage.move(staging, output)
    except BaseException:
        if had_former:
            storage.move(former, output)
        raise
    if had_former:
        remove(former, is_own)
