"""What lies in a workdir beside checkpoints: the frozen config, vocabulary and dataset seen.

What only reads it, such as `audit`, needs no JAX.
"""

import contextlib
import json
import os
import stat
from collections.abc import Mapping
from typing import Any

import ml_collections

from hashvision import locks, storage
from hashvision.data import dataset, removals
from hashvision.errors import UserError
from hashvision.training import Config

_REMOVED = "removed.jsonl"

# Keys that may differ when a run goes on: they change neither the model, nor what it is shown.
_FREE = (
    "dataset",
    "epochs",
    "steps",
    "log_every",
    "profile",
    "knn",
    "swav.patience",
    "checkpoint",
    "mesh",
    "data.threads",
    "data.broken",
    "hosts",
    "model.remat",
    "model.unroll",
    "model.group_conv",
)


def _read(workdir: str, name: str) -> Any:
    path = os.path.join(workdir, name)
    try:
        return json.loads(storage.read(path))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing, so {workdir} is not the workdir of a run; give --workdir the"
            " folder that `python -m hashvision train` wrote."
        ) from None
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); train into a new --workdir."
        ) from None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat


def claim(
    workdir: str,
    config: Config,
    vocabulary: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> None:
    """Makes `workdir` that of this run, or checks that it already is.

    Raises:
      UserError: the workdir holds a run of another vocabulary or with other settings.
    """
    import jax

    frozen = json.loads(json.dumps(config.to_dict()))
    if storage.exists(os.path.join(workdir, "config.json")):
        if _read(workdir, "vocabulary.json")["classes"] != vocabulary["classes"]:
            raise UserError(
                f"The vocabulary of {config.dataset} is not the one that the checkpoints in"
                f" {workdir} were trained with; train into a new --workdir, or on the old dataset."
            )
        before, now = _flat(_read(workdir, "config.json")), _flat(frozen)
        for key in sorted(before.keys() | now.keys()):
            free = any(key == name or key.startswith(f"{name}.") for name in _FREE)
            if before.get(key) != now.get(key) and not free:
                raise UserError(
                    f"{workdir} was trained with {key}={before.get(key)!r}, not {now.get(key)!r};"
                    f" set --config.{key} back, or train into a new --workdir."
                )
    if jax.process_index():
        return  # the first host writes what is the same on all
    seen = {"dataset": storage.absolute(config.dataset), "manifest": manifest}
    for name, content in (
        ("vocabulary.json", json.dumps(vocabulary, ensure_ascii=False)),
        ("dataset.json", json.dumps(seen, ensure_ascii=False, indent=1)),
        ("config.json", json.dumps(frozen, indent=1)),  # last: a workdir with a config is whole
    ):
        storage.write(os.path.join(workdir, name), content)


def held(workdir: str) -> contextlib.AbstractContextManager[None]:
    """Holds WORKDIR/lock while the run writes there; of several hosts the first does, for all.

    Raises:
      UserError: another run holds it.
      OSError: it cannot be written.
    """
    import jax

    if jax.process_index():
        return contextlib.nullcontext()
    path = os.path.join(storage.absolute(workdir), "lock")
    return locks.Lock(path, f"The workdir {workdir}", "give another --workdir")


def note_start(workdir: str, step: int, removed: removals.Names) -> None:
    """Adds to WORKDIR/removed.jsonl what is not shown from this step on, for `audit`.

    Args:
      workdir: of the run.
      step: from which the run goes on.
      removed: by hashes, so that the workdir names nobody.
    """
    import jax

    if jax.process_index():
        return
    names = {kind: values.tolist() for kind, values in removed._asdict().items()}
    # A run without tags may go on with another dataset than it began with.
    folder, manifest = seen(workdir)
    data = {"dataset": folder, "fingerprint": dataset.fingerprint(manifest)}
    line = json.dumps({"step": step, "removed": names, **data}) + "\n"
    locks.append(os.path.join(workdir, _REMOVED), line)


def starts_of(workdir: str) -> list[dict[str, Any]]:
    """What `note_start` has noted, in the order of steps.

    What a start said of the steps from a later start's on does not count: they were done again.
    """
    try:
        lines = storage.read(os.path.join(workdir, _REMOVED)).splitlines()
    except FileNotFoundError:
        return []
    starts: list[dict[str, Any]] = []
    for start in map(json.loads, lines):
        while starts and starts[-1]["step"] >= start["step"]:
            starts.pop()
        starts.append(start)
    return starts


def checkpoints(workdir: str) -> list[int]:
    """The steps of the whole checkpoints, ascending.

    On a disk one that is not whole has another name; elsewhere it lacks Orbax's last file.
    """
    folder = os.path.join(workdir, "checkpoints")
    steps = [name for name in storage.names(folder) if name.isdecimal()]
    if storage.is_remote(folder):
        last = [f"{folder}/{step}/commit_success.txt" for step in steps]
        there = storage.each(storage.exists, last, remote=True)
        steps = [step for step, whole in zip(steps, there, strict=True) if whole]
    return sorted(map(int, steps))


def seen(workdir: str) -> tuple[str, dict[str, Any]]:
    """The folder and the manifest of the dataset that a run was last started with.

    Raises:
      UserError: `workdir` is none.
    """
    noted = _read(workdir, "dataset.json")
    return noted["dataset"], noted["manifest"]


def keep_compiled() -> None:
    """Keeps compiled programs in the user's own cache: the next run on this machine starts sooner.

    A compiled program is code. So none is taken from where others may write, or from what travels,
    as a workdir does; where the user has no such folder, nothing is kept and a line says why.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # the user has chosen
        return
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # which the specification has ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(base, "hashvision", "compiled")
    try:
        why = _not_private(folder)
    except OSError as error:
        why = error.strerror
    if why:
        print(f"Compiled programs are not kept: {folder} cannot be used ({why}).", flush=True)
    else:
        import jax

        jax.config.update("jax_compilation_cache_dir", folder)


def _not_private(folder: str) -> str | None:
    """Makes a folder, and the one it lies in; why it is not this user's alone, if it is not."""
    if not os.path.isabs(folder):
        return "this user has no home"
    parent = os.path.dirname(folder)
    os.makedirs(os.path.dirname(parent), 0o700, exist_ok=True)
    for path in (parent, folder):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode):
            return f"{path} is not a folder"
        if found.st_uid != os.geteuid():
            return f"{path} is not this user's"
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"others may write to {path}"
    return None


def read(workdir: str) -> tuple[Config, dict[str, Any]]:
    """The frozen config and the vocabulary of a run.

    Raises:
      UserError: `workdir` is none.
    """
    config = ml_collections.ConfigDict(_read(workdir, "config.json"))
    return config, _read(workdir, "vocabulary.json")
