"""What lies in a workdir beside checkpoints: the frozen config, vocabulary and dataset seen.

What only reads it, such as `audit`, needs no JAX.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from hashvision import locks, storage
from hashvision.config import Config, schema, upgrade
from hashvision.config.objectives import OBJECTIVES
from hashvision.data import classes, dataset, documents, removals
from hashvision.errors import UserError

_DATASET = "dataset.json"
_REMOVED = "removed.jsonl"
_AGAIN = "copy it again from where the run was, or train into a new --workdir"

# Keys that may differ when a run goes on: they change neither the model, nor what it is shown.
_FREE = (
    "dataset",
    "epochs",
    "epoch_length",
    "steps",
    "log_every",
    "profile",
    "evaluate_on",
    "evaluate_protocols",
    "evaluate_every",
    "swav.patience",
    "checkpoint",
    "mesh",
    "data.threads",
    "data.broken",
    "hosts",
    "model.remat",
    "model.unroll",
    "model.group_conv",
    "accumulate",
)


def _load(workdir: str, name: str) -> dict[str, Any]:
    return documents.load(os.path.join(workdir, name), _missing(workdir), _AGAIN)


def _missing(workdir: str) -> str:
    return (
        f"so {workdir} is not the workdir of a run; give --workdir the folder that"
        " `python -m hashvision train` wrote"
    )


def _config(workdir: str) -> dict[str, Any]:
    """The frozen config as today's schema has it."""
    return upgrade.upgrade(_load(workdir, "config.json"), os.path.join(workdir, "config.json"))


def began(workdir: str) -> dict[str, Any] | None:
    """The frozen config of the run in `workdir`, by dotted key; None where none has begun."""
    if not storage.exists(os.path.join(workdir, "config.json")):
        return None
    return schema.flat(_config(workdir))


def claim(
    workdir: str,
    config: Config,
    vocabulary: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> np.ndarray | None:
    """Makes `workdir` that of this run, or checks that it already is.

    The vocabulary stays the one that the run began with; the dataset may be another each time.

    Args:
      workdir: of the run.
      config: with nothing left open (presets.fill).
      vocabulary: of the dataset.
      manifest: of the dataset.

    Returns:
      int32 (K,), for each class of the dataset its number in the run; None where the objective
      needs no classes.

    Raises:
      UserError: the workdir holds a run of other classes or with other settings.
    """
    import jax

    frozen = json.loads(json.dumps(config.to_dict()))
    text, before = json.dumps(vocabulary, ensure_ascii=False), began(workdir)
    known = vocabulary if before is None else _vocabulary(workdir)
    numbers = None
    if OBJECTIVES[config.objective.name].needs_tags:
        numbers = classes.match(known, vocabulary, config.dataset)
    if before is not None:
        text, now = json.dumps(known, ensure_ascii=False), schema.flat(frozen)
        for key in sorted(before.keys() | now.keys()):
            free = any(key == name or key.startswith(f"{name}.") for name in _FREE)
            if before.get(key) != now.get(key) and not free:
                raise UserError(
                    f"{workdir} was trained with {key}={before.get(key)!r}, not {now.get(key)!r};"
                    f" set --config.{key} back, or train into a new --workdir."
                )
    if jax.process_index():
        return numbers  # the first host writes what is the same on all
    seen = {
        "dataset": storage.absolute(config.dataset),
        "manifest": manifest,
        "vocabulary": hashlib.sha256(text.encode()).hexdigest(),  # of that beside this
    }
    for name, content in (
        (dataset.VOCABULARY, text),
        (_DATASET, json.dumps(seen, ensure_ascii=False, indent=1)),
        ("config.json", json.dumps(frozen, indent=1)),  # last: a workdir with a config is whole
    ):
        storage.write(os.path.join(workdir, name), content)
    return numbers


def _vocabulary(workdir: str) -> dict[str, Any]:
    """The vocabulary that a run began with, whose order numbers the classes of its network."""
    path = os.path.join(workdir, dataset.VOCABULARY)
    text = documents.read(path, _missing(workdir))
    vocabulary = documents.parse(path, text, _AGAIN)
    dataset.check_vocabulary(path, vocabulary, _AGAIN)
    noted = {}
    if storage.exists(os.path.join(workdir, _DATASET)):
        noted = _load(workdir, _DATASET)
    # Runs of earlier versions hold no digest.
    if noted.get("vocabulary") not in (None, hashlib.sha256(text).hexdigest()):
        raise UserError(
            f"{path} is not as `train` wrote it, so nothing tells which class is which; copy it"
            " again from where the run began."
        )
    return vocabulary


def held(workdir: str) -> locks.Lock:
    """WORKDIR/lock, to hold while a run writes there; of several hosts the first does, for all."""
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
    # A run may resume on another dataset than it began with.
    folder, manifest = seen(workdir)
    start = {
        "step": step,
        "removed": {kind: removed.values[kind].tolist() for kind in removals.KINDS},
        "keep_copies_of_removed": removed.keep_copies,
        "key": manifest.get("key"),
        "dataset": folder,
        "fingerprint": dataset.fingerprint(manifest),
    }
    locks.append(os.path.join(workdir, _REMOVED), json.dumps(start) + "\n")


def starts_of(workdir: str) -> list[dict[str, Any]]:
    """What `note_start` has noted, in the order of steps.

    What a start said of the steps from a later start's on does not count: they were done again.

    Raises:
      UserError: a line is damaged.
    """
    path = os.path.join(workdir, _REMOVED)
    try:
        lines = storage.read(path).splitlines()
    except FileNotFoundError:
        return []
    starts: list[dict[str, Any]] = []
    for n, line in enumerate(lines, 1):
        start = _start(f"Line {n} of {path}", line)
        while starts and starts[-1]["step"] >= start["step"]:
            starts.pop()
        starts.append(start)
    return starts


def _start(where: str, line: bytes) -> dict[str, Any]:
    start = documents.parse(where, line, _AGAIN)
    removed = start.get("removed")
    if not (
        documents.is_count(start.get("step"))
        and isinstance(removed, dict)
        and removed.keys() == {*removals.KINDS}
        and all(isinstance(values, list) for values in removed.values())
        and all(type(v) is int and 0 <= v < 2**64 for each in removed.values() for v in each)
        and isinstance(start.get("keep_copies_of_removed", False), bool)
        and all(isinstance(start.get(name, ""), str) for name in ("dataset", "fingerprint"))
    ):
        raise UserError(
            f"{where} is not as `train` leaves it ({documents.shorten(start)}); {_AGAIN}."
        )
    return start


def checkpoints(workdir: str) -> list[int]:
    """The steps of the whole checkpoints, ascending.

    On a disk one that is not whole has another name; elsewhere it lacks Orbax's last file.
    """
    folder = os.path.join(workdir, "checkpoints")
    steps = [name for name in storage.names(folder) if name.isdecimal()]
    if storage.is_remote(folder):
        last = [f"{folder}/{step}/commit_success.txt" for step in steps]
        there = storage.parallel_map(storage.exists, last, remote=True)
        steps = [step for step, whole in zip(steps, there, strict=True) if whole]
    return sorted(map(int, steps))


def seen(workdir: str) -> tuple[str, dict[str, Any]]:
    """The folder and the manifest of the dataset that a run was last started with.

    Raises:
      UserError: `workdir` is none, or its note of that is damaged.
    """
    path, noted = os.path.join(workdir, _DATASET), _load(workdir, _DATASET)
    folder, manifest = noted.get("dataset"), noted.get("manifest")
    if not (isinstance(folder, str) and isinstance(manifest, dict)):
        raise UserError(
            f"{path} is not as `train` leaves it ({documents.shorten(noted)}); {_AGAIN}."
        )
    dataset.check_manifest(path, manifest, _AGAIN)
    return folder, manifest


def read(workdir: str) -> tuple[Config, dict[str, Any]]:
    """The frozen config and the vocabulary of a run.

    Raises:
      UserError: `workdir` is none, or one of its files is damaged.
    """
    config = schema.get_config(schema.flat(_config(workdir)))
    return config, _vocabulary(workdir)
