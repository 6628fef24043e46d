"""The cache of compiled programs, in the user's own cache folder."""

import contextlib
import os
import stat

import jax


def use_cache() -> None:
    """Caches compiled programs for this user, so that the next run on this machine starts sooner.

    A compiled program is code. So the cache is never in a folder that others may write to, nor in
    one that is copied between machines, such as a workdir. If there is no safe folder, nothing is
    cached and a line says why.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # the user has chosen
        return
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification says to ignore relative paths
        base = os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(base, "hashvision", "compiled")
    try:
        why = _not_private(folder)
    except OSError as error:
        why = error.strerror
    if why:
        print(f"Compiled programs are not cached: {folder} cannot be used ({why}).", flush=True)
    else:
        jax.config.update("jax_compilation_cache_dir", folder)


def _not_private(folder: str) -> str | None:
    """Makes a folder and its parent; returns why others could write to them, or None."""
    if not os.path.isabs(folder):
        return "this user has no home folder"
    parent = os.path.dirname(folder)
    os.makedirs(os.path.dirname(parent), 0o700, exist_ok=True)
    for path in (parent, folder):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode):
            return f"{path} is not a folder"
        if found.st_uid != os.geteuid():
            return f"{path} belongs to another user"
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"others may write to {path}"
    return None
