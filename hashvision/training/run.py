"""The files of a workdir besides its checkpoints: config, vocabulary, dataset and removal notes.

Only functions that write import JAX, so `audit`, which reads, works without it.
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

# Keys, and groups of keys, that a run may change when it resumes.
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
    """The config of the run, upgraded to the present schema."""
    return upgrade.upgrade(_load(workdir, "config.json"), os.path.join(workdir, "config.json"))


def frozen_config(workdir: str) -> dict[str, Any] | None:
    """The config that the run in `workdir` began with, by dotted key; None before its start."""
    if not storage.exists(os.path.join(workdir, "config.json")):
        return None
    return schema.flat(_config(workdir))


def claim(
    workdir: str,
    config: Config,
    vocabulary: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> np.ndarray | None:
    """Writes the config, vocabulary and dataset of a new run, or checks that they fit the old one.

    The vocabulary stays the one that the run began with; the dataset may be another at each start.

    Args:
      workdir: of the run.
      config: complete: objectives.fill has set what the recipe leaves open.
      vocabulary: of the dataset.
      manifest: of the dataset.

    Returns:
      int32 (K,), the run's class number of each class of the dataset; None if the objective needs
      no classes.

    Raises:
      UserError: the workdir holds a run with other classes or other settings.
    """
    import jax

    frozen = json.loads(json.dumps(config.to_dict()))
    text, before = json.dumps(vocabulary, ensure_ascii=False), frozen_config(workdir)
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
        return numbers  # the first host writes for all
    note = {
        "dataset": storage.absolute(config.dataset),
        "manifest": manifest,
        "vocabulary": hashlib.sha256(text.encode()).hexdigest(),  # of the workdir's vocabulary
    }
    for name, content in (
        (dataset.VOCABULARY, text),
        (_DATASET, json.dumps(note, ensure_ascii=False, indent=1)),
        ("config.json", json.dumps(frozen, indent=1)),  # last: its presence means that all is there
    ):
        storage.write(os.path.join(workdir, name), content)
    return numbers


def _vocabulary(workdir: str) -> dict[str, Any]:
    """The vocabulary that a run began with; its order gives the class numbers of the network."""
    path = os.path.join(workdir, dataset.VOCABULARY)
    text = documents.read(path, _missing(workdir))
    vocabulary = documents.parse(path, text, _AGAIN)
    dataset.check_vocabulary(path, vocabulary, _AGAIN)
    noted = {}
    if storage.exists(os.path.join(workdir, _DATASET)):
        noted = _load(workdir, _DATASET)
    # Runs of earlier versions noted no digest.
    if noted.get("vocabulary") not in (None, hashlib.sha256(text).hexdigest()):
        raise UserError(
            f"{path} has changed since `train` wrote it, so the network's classes are unknown; copy"
            " it again from where the run began."
        )
    return vocabulary


def lock(workdir: str) -> locks.Lock:
    """WORKDIR/lock, which the first host holds while the run writes there."""
    path = os.path.join(storage.absolute(workdir), "lock")
    return locks.Lock(path, f"The workdir {workdir}", "give another --workdir")


def note_start(workdir: str, step: int, removed: removals.Names) -> None:
    """Adds a line to WORKDIR/removed.jsonl, for `audit`: what this start leaves out.

    Args:
      workdir: of the run.
      step: the step from which the run starts or resumes.
      removed: the removal list as hashes, so that the workdir names nobody.
    """
    import jax

    if jax.process_index():
        return
    # A run may resume on another dataset than it began with.
    folder, manifest = last_dataset(workdir)
    start = {
        "step": step,
        "removed": {kind: removed.values[kind].tolist() for kind in removals.KINDS},
        "keep_copies_of_removed": removed.keep_copies,
        "key": manifest.get("key"),
        "dataset": folder,
        "fingerprint": dataset.fingerprint(manifest),
    }
    locks.append(os.path.join(workdir, _REMOVED), json.dumps(start) + "\n")


def starts(workdir: str) -> list[dict[str, Any]]:
    """The notes of `note_start` that still hold, in the order of steps.

    A start at an earlier or equal step replaces the ones before it, since their steps were redone.

    Raises:
      UserError: a line is damaged.
    """
    path = os.path.join(workdir, _REMOVED)
    try:
        lines = storage.read(path).splitlines()
    except FileNotFoundError:
        return []
    found: list[dict[str, Any]] = []
    for n, line in enumerate(lines, 1):
        start = _parse_start(f"Line {n} of {path}", line)
        while found and found[-1]["step"] >= start["step"]:
            found.pop()
        found.append(start)
    return found


def _parse_start(where: str, line: bytes) -> dict[str, Any]:
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
            f"{where} is not a note that `train` writes ({documents.shorten(start)}); {_AGAIN}."
        )
    return start


def checkpoints(workdir: str) -> list[int]:
    """The steps of the complete checkpoints, ascending.

    On a disk an incomplete checkpoint has another name; in a bucket it lacks Orbax's last file.
    """
    folder = os.path.join(workdir, "checkpoints")
    steps = [name for name in storage.names(folder) if name.isdecimal()]
    if storage.is_remote(folder):
        last = [f"{folder}/{step}/commit_success.txt" for step in steps]
        there = storage.parallel_map(storage.exists, last, remote=True)
        steps = [step for step, complete in zip(steps, there, strict=True) if complete]
    return sorted(map(int, steps))


def last_dataset(workdir: str) -> tuple[str, dict[str, Any]]:
    """The folder and the manifest of the dataset that the run last started with.

    Raises:
      UserError: `workdir` is not a workdir, or the file is damaged.
    """
    path, noted = os.path.join(workdir, _DATASET), _load(workdir, _DATASET)
    folder, manifest = noted.get("dataset"), noted.get("manifest")
    if not (isinstance(folder, str) and isinstance(manifest, dict)):
        raise UserError(
            f"{path} is not a file that `train` writes ({documents.shorten(noted)}); {_AGAIN}."
        )
    dataset.check_manifest(path, manifest, _AGAIN)
    return folder, manifest


def read(workdir: str) -> tuple[Config, dict[str, Any]]:
    """The config and the vocabulary of a run.

    Raises:
      UserError: `workdir` is not a workdir, or one of its files is damaged.
    """
    config = schema.get_config(schema.flat(_config(workdir)))
    return config, _vocabulary(workdir)
