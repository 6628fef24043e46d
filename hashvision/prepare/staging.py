"""Outputs that appear complete or not at all: made in a folder beside the output, under its lock.

`prepare` and `draw` use it. It deletes only files that this program wrote, which it knows by name.
"""

import contextlib
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator

from hashvision import locks, storage
from hashvision.errors import UserError

_FORMER = "-former"
# The suffix of the output's name; earlier versions added host and process id.
_STAGING = re.compile(rf"\.preparing-(.+-\d+-)?[0-9a-f]{{8}}({_FORMER})?")
_MOUNTS = "/proc/self/mountinfo"

# Whether this program writes a path, relative to the output; a folder's path ends in "/".
IsOwn = Callable[[str], bool]


def resolve_output(output: str, inputs: Iterable[str] = ()) -> str:
    """Returns the absolute path of an output, with links resolved.

    Args:
      output: as the user gives it.
      inputs: paths that the command reads, which must not be in the output.

    Raises:
      UserError: the output cannot be replaced by another folder, or holds a path that is needed.
      OSError: the output cannot be inspected.
    """
    path = storage.absolute(output)
    if storage.is_remote(path):
        if "/" not in path.partition("://")[2]:
            raise UserError(f"--output={output} is a whole bucket; give a folder in it.")
    else:
        path = os.path.realpath(path)
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)
        if _contains(path, os.path.realpath(os.curdir)):
            raise UserError(
                f"--output={output} is or contains the current folder; give another folder."
            )
        if os.path.ismount(path) or path in _mounts():
            raise UserError(
                f"--output={output} is a mount point, which a new dataset cannot replace; give a"
                f" folder in it, such as {os.path.join(path, 'dataset')}."
            )
    for each in inputs:
        there = each if storage.is_remote(each) else os.path.realpath(each)
        if _contains(path, there):
            raise UserError(
                f"--output={output} contains {each}, which this command reads; give another folder."
            )
    return path


def _contains(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _mounts() -> set[str]:
    """Returns all mount points, bind mounts included; the empty set on systems other than Linux."""
    try:
        with open(_MOUNTS, encoding="utf-8", errors="surrogateescape") as file:
            paths = [line.split()[4] for line in file]
    except OSError:
        return set()
    # The file writes a space as \040.
    return {re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), path) for path in paths}


@contextlib.contextmanager
def staging_folder(output: str, is_own: IsOwn, check: Callable[[str], None]) -> Iterator[str]:
    """Holds the output's lock and makes an empty folder beside it, which is removed at the end.

    First it removes what killed runs left there: while this process holds the lock, all of them
    have ended. If one was killed in `replace` after it had moved the output away, and nothing has
    taken the output's place, the output is moved back.

    Args:
      output: as `resolve_output` returns it.
      is_own: which files belong to this program.
      check: raises a UserError if the output must not be replaced.

    Yields:
      The folder.

    Raises:
      UserError: another process holds the lock.
      OSError: the folder cannot be written.
    """
    with locks.Lock(f"{output}.lock", f"The output {output}", "give another --output"):
        _remove_leftovers(output, is_own)
        check(output)
        staging = f"{output}.preparing-{uuid.uuid4().hex[:8]}"
        try:
            storage.make_folder(staging)
            yield staging
        finally:
            remove(staging, is_own)


def _remove_leftovers(output: str, is_own: IsOwn) -> None:
    """Removes the staging folders of killed runs, or moves the former output back."""
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
    """Returns the first path in a folder, relative to it, that this program did not write."""
    for path, folders, files in storage.walk(folder):
        below = path[len(folder) + 1 :]
        for each in [*(f"{name}/" for name in folders), *files]:
            relative = f"{below}/{each}" if below else each
            if not is_own(relative):
                return relative
    return None


def remove(folder: str, is_own: IsOwn) -> None:
    """Removes a folder if it exists, except files in it that this program did not write."""
    remote, files, emptied = storage.is_remote(folder), [], [folder]
    for path, folders, names in storage.walk(folder):
        below = path[len(folder) + 1 :]
        inside = f"{below}/" if below else ""
        files += [f"{path}/{name}" for name in names if is_own(inside + name)]
        emptied += [f"{path}/{name}" for name in folders if is_own(f"{inside}{name}/")]
    storage.parallel_map(_remove_file, files, remote)
    if not remote:
        for path in sorted(emptied, reverse=True):  # subfolders first
            with contextlib.suppress(OSError):  # the folder still holds foreign files
                os.rmdir(path)


def _remove_file(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        storage.remove(path)


def replace(staging: str, output: str, is_own: IsOwn) -> None:
    """Moves a finished local folder to the output's place, and then removes the former output.

    Raises:
      OSError: the folder cannot be moved; the output is unchanged.
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
