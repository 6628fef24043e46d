"""The dataset folder as `prepare` leaves it: shards, metadata and manifest, whole or not at all."""

import collections
import csv
import hashlib
import io
import json
import os
import re
import typing
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np

import hashvision
from hashvision import storage
from hashvision.data import dataset, records, sampling
from hashvision.data.keys import Key
from hashvision.duplicates import spool
from hashvision.errors import UserError
from hashvision.prepare import once, staging
from hashvision.sources.reasons import REASONS, UNTOLD

SUMMARY = "summary.json"
VOCABULARY = dataset.VOCABULARY
MANIFEST = dataset.MANIFEST
_REPLACING = "replacing"  # an object in an output that is being copied to, or was when a kill came
DUPLICATES = "duplicates"  # -*.csv and .png
_PARTIAL = re.compile(r"\.[0-9a-f]{32}(\.partial)?$")  # behind a name, until the file is whole
_SPOOLED = re.compile(rf"{spool.FOLDER}/(([0-9a-f]{{16}}){{1,2}})?")  # 32 in earlier versions


def write_json(path: str, content: typing.Any) -> str:
    """Writes `content` as JSON, in ASCII; the SHA-256 of the file."""
    text = json.dumps(content, indent=1) + "\n"
    storage.write(path, text)
    return hashlib.sha256(text.encode()).hexdigest()


def write_shard(
    folder: str,
    shard: int,
    shards: int,
    rows: Iterable[records.Record],
    counts: np.ndarray,
    key: Key,
) -> dict[str, typing.Any]:
    """Writes a shard, its index and its notes on copies; each has its name when it is whole.

    Returns:
      What the manifest says of the shard: name, records, bytes, and digests of the three files.
    """
    path = f"{folder}/{records.shard_name(shard, shards)}"
    suffix = f".{uuid.uuid4().hex}"  # two workers may try the same shard
    with storage.as_os_errors(path + suffix):
        index, copies = records.write_shard(path + suffix, rows, counts, key)
    index_digest = _save(f"{folder}/{records.index_name(shard, shards)}", index)
    copies_digest = _save(f"{folder}/{records.copies_name(shard, shards)}", copies)
    digest, size = dataset.digest(path + suffix)
    storage.sync(path + suffix)
    storage.move(path + suffix, path)
    return {
        "name": os.path.basename(path),
        "records": len(index),
        "bytes": size,
        "sha256": digest,
        "index_sha256": index_digest,
        "copies_sha256": copies_digest,
    }


def _save(path: str, table: np.ndarray) -> str:
    """Writes an array; the SHA-256 of the file."""
    saved = io.BytesIO()
    np.save(saved, table)
    storage.write(path, saved.getvalue())
    return hashlib.sha256(saved.getvalue()).hexdigest()


class Summary(typing.NamedTuple):
    """What the graph hands to the driver; of it only the list of shards grows with the dump."""

    dropped: Mapping[str, tuple[int, list[int]]]  # reason -> count, offsets of some in the dump
    vocabulary: Mapping[str, typing.Any]
    labels: Mapping[int, int]  # classes of a photo -> photos
    shards: Sequence[Mapping[str, typing.Any]]
    shard_count: int
    read: int  # lines of the dump, counted where they are read
    pairs: Sequence[Sequence[typing.Any]]  # of the least alike photos taken for the same
    matched: Sequence[tuple[str, int]]  # kind and hash of each name on the removal list


def take_summary(folder: str) -> Summary:
    """What the graph has written; the file goes."""
    summary = Summary(**json.loads(storage.read(f"{folder}/{SUMMARY}")))
    storage.remove(f"{folder}/{SUMMARY}")
    return summary


def finish(
    folder: str, summary: Summary, settings: Mapping[str, typing.Any], key: Key
) -> dict[str, typing.Any]:
    """Adds vocabulary, TFDS metadata and, last, the manifest to the shards of a run.

    Args:
      folder: where the graph has written the shards.
      summary: what it says of them.
      settings: the run's options, as the manifest repeats them.
      key: of the dataset.

    Returns:
      The manifest.

    Raises:
      UserError: no post was kept, or the runner lost some on the way.
    """
    dropped = {reason: {"count": 0, "examples": []} for reason in REASONS}
    for reason, (count, offsets) in summary.dropped.items():
        told = [] if reason in UNTOLD else offsets
        dropped[reason] = {"count": count, "examples": [f"byte {offset}" for offset in told]}
    kept = sum(shard["records"] for shard in summary.shards)
    if not kept:
        counts = ", ".join(f"{d['count']} {reason}" for reason, d in dropped.items())
        raise UserError(
            f"no post of {settings['posts']} came through ({counts}); look at the file, at "
            "--images and, for no_tag, at --minimum_count, or keep what has no tag with "
            "--keep_untagged"
        )
    accounted = kept + sum(d["count"] for d in dropped.values())
    if accounted != summary.read:
        raise UserError(
            f"the runner accounts for {accounted:,} of the {summary.read:,} posts read from"
            f" {settings['posts']}; run prepare again, without --direct_running_mode"
        )
    if summary.pairs:
        once.write_duplicate_pairs(f"{folder}/{DUPLICATES}.png", folder, summary.pairs)
    storage.remove_folder(f"{folder}/{spool.FOLDER}")
    classes = summary.vocabulary["classes"]
    class_counts = np.array([entry["count"] for entry in classes], np.int64)
    shards = _all_shards(folder, summary, class_counts, key)
    vocabulary = write_json(f"{folder}/{VOCABULARY}", {"posts": kept, **summary.vocabulary})
    _write_tfds_metadata(folder, [entry["name"] for entry in classes], shards)
    threshold = sampling.default_threshold(class_counts, kept)
    rarest = _rarest(folder, len(shards))
    labels = {int(number): photos for number, photos in summary.labels.items()}
    manifest = {
        "format": {"name": dataset.FORMAT, "version": dataset.VERSION},
        "hashvision": hashvision.__version__,
        "key": key.id,
        "vocabulary_sha256": vocabulary,
        "options": dict(settings),
        "wordnet": summary.vocabulary["wordnet"],
        "merged_by": "WordNet" if summary.vocabulary["wordnet"] else "spelling only",
        "posts": {
            "read": summary.read,
            "kept": kept,
            "dropped": dropped,
        },
        "images": kept,
        "classes": len(classes),
        "labels_per_image": {
            "mean": round(sum(n * photos for n, photos in labels.items()) / kept, 3),
            "largest": max(labels),
            "images": {str(number): labels[number] for number in sorted(labels)},
        },
        "sampling_threshold": threshold,
        "epoch": sampling.epoch_summary(*rarest, kept, threshold),
        "rarest": {str(value): int(photos) for value, photos in zip(*rarest, strict=True)},
        "shards": shards,
    }
    write_json(f"{folder}/{MANIFEST}", manifest)
    return manifest


def _all_shards(
    folder: str, summary: Summary, class_counts: np.ndarray, key: Key
) -> list[Mapping[str, typing.Any]]:
    """The shards in order; one to which no id fell, however unlikely, is written empty for TFDS."""
    written = {shard["name"]: shard for shard in summary.shards}
    ordered = []
    for shard in range(summary.shard_count):
        found = written.get(records.shard_name(shard, summary.shard_count))
        ordered.append(
            found or write_shard(folder, shard, summary.shard_count, [], class_counts, key)
        )
    return ordered


def write_duplicates(folder: str, shard: int, shards: int, rows: Iterable[tuple[str, ...]]) -> None:
    """Writes the posts of a shard's range of ids that are left out as copies, as a CSV file."""
    path = f"{folder}/{DUPLICATES}-{shard:05d}-of-{shards:05d}.csv"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(once.FIELDS)
    writer.writerows([_safe(cell) for cell in row] for row in sorted(rows))
    storage.write(path, text.getvalue())


def _safe(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula: one that looks like it gets an apostrophe."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def _rarest(folder: str, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """How many photos have which number of posts of their rarest class: two int64 (D,)."""

    def of_shard(shard: int) -> tuple[np.ndarray, np.ndarray]:
        index = np.load(io.BytesIO(storage.read(f"{folder}/{records.index_name(shard, shards)}")))
        return np.unique(index["rarest"], return_counts=True)

    photos: collections.Counter[int] = collections.Counter()
    for values, counts in storage.each(of_shard, range(shards), storage.is_remote(folder)):
        photos.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    rarest = sorted(photos)
    return np.array(rarest, np.int64), np.array([photos[value] for value in rarest], np.int64)


def _write_tfds_metadata(
    folder: str, names: Sequence[str], shards: Sequence[Mapping[str, typing.Any]]
) -> None:
    import tensorflow_datasets as tfds

    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=records.features(names),
        split_infos=[
            tfds.core.SplitInfo(
                name=records.SPLIT,
                shard_lengths=[shard["records"] for shard in shards],
                num_bytes=sum(shard["bytes"] for shard in shards),
            )
        ],
        check_data=False,
    )


def make_staging(output: str) -> AbstractContextManager[str]:
    """Holds the output's lock and gives an empty folder beside it, in which the dataset is made.

    Raises:
      UserError: another `prepare` holds the lock, or the output holds other things than a dataset.
      OSError: the folder cannot be written.
    """
    return staging.staging_folder(output, _is_of_staging, _check)


def _is_of_output(path: str) -> bool:
    return path == _REPLACING or dataset.is_file_of(_PARTIAL.sub("", path))


def _is_of_staging(path: str) -> bool:
    spooled = _SPOOLED.fullmatch(path) is not None
    return spooled or _PARTIAL.sub("", path) == SUMMARY or _is_of_output(path)


def _check(output: str) -> None:
    """Raises a UserError unless there is nothing in the output, or a dataset and nothing else."""
    if storage.exists(output) and not storage.is_folder(output):
        raise UserError(f"The output {output} is a file; give a folder.")
    _, folders, files = next(storage.walk(output), ("", [], []))
    if not folders and not files:
        return
    marked = MANIFEST in files and dataset.is_manifest(storage.read(f"{output}/{MANIFEST}"))
    stranger = staging.first_foreign_path(output, _is_of_output)
    if not marked and _REPLACING not in files:
        raise UserError(
            f"The output {output} exists and is not a hashvision dataset: it holds"
            f" {stranger or files[0]}; give another --output."
        )
    if stranger:
        raise UserError(
            f"The output {output} holds {stranger}, which is not of its dataset and would be lost;"
            " move that away, or give another --output."
        )


def replace(made: str, output: str) -> None:
    """Puts the finished folder in the output's place; what lay there goes when it stands.

    Remote storage has no such step. There what lay in the output goes first, beginning with the
    manifest, and the new manifest comes last: killed on the way, it leaves no dataset that opens,
    and an output that another run takes.

    Raises:
      UserError: the output holds other things than a dataset by now.
    """
    _check(output)
    for name in storage.names(made):  # of attempts at a shard that failed
        if not dataset.is_file_of(name):
            storage.remove(f"{made}/{name}")
    if storage.is_remote(output):
        return _replace_objects(made, output)
    staging.replace(made, output, _is_of_output)


def _replace_objects(made: str, output: str) -> None:
    def move(name: str) -> None:
        storage.move(f"{made}/{name}", f"{output}/{name}")

    manifest, mark = f"{output}/{MANIFEST}", f"{output}/{_REPLACING}"
    storage.write(mark, "")
    every = [f"{output}/{name}" for name in storage.names(output)]
    if manifest in every:
        storage.remove(manifest)
    storage.each(storage.remove, {*every} - {manifest, mark}, remote=True)
    storage.each(move, {*storage.names(made)} - {MANIFEST}, remote=True)
    move(MANIFEST)
    storage.remove(mark)
