"""The dataset folder that `prepare` writes: shards, metadata and manifest, complete or absent."""

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
from hashvision.sources.reasons import CONFIDENTIAL, REASONS

SUMMARY = "summary.json"
VOCABULARY = dataset.VOCABULARY
MANIFEST = dataset.MANIFEST
# An object in a remote output while it is replaced; it stays if the run is killed meanwhile.
_REPLACING = "replacing"
DUPLICATES = "duplicates"  # -*.csv and .png
_PARTIAL = re.compile(r"\.[0-9a-f]{32}(\.partial)?$")  # suffix of a name until the file is complete
_SPOOLED = re.compile(rf"{spool.FOLDER}/(([0-9a-f]{{16}}){{1,2}})?")  # 32 in earlier versions


def write_json(path: str, content: typing.Any) -> str:
    """Writes `content` as JSON, in ASCII, and returns the SHA-256 of the file."""
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
    """Writes a shard, its index and its table of copies; a file gets its name when it is complete.

    Args:
      folder: of the dataset.
      shard: number of the shard, from 0.
      shards: number of all shards.
      rows: the shard's records, in order.
      counts: int64 (classes,), posts of each class.
      key: of the dataset.

    Returns:
      The shard's entry in the manifest: name, records, bytes, and digests of the three files.
    """
    path = f"{folder}/{records.shard_name(shard, shards)}"
    suffix = f".{uuid.uuid4().hex}"  # two workers may write the same shard
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
    """Writes an array as .npy and returns the SHA-256 of the file."""
    saved = io.BytesIO()
    np.save(saved, table)
    storage.write(path, saved.getvalue())
    return hashlib.sha256(saved.getvalue()).hexdigest()


class Summary(typing.NamedTuple):
    """What the graph passes to the driver; only the list of shards grows with the dump."""

    dropped: Mapping[str, tuple[int, list[int]]]  # reason -> (count, offsets of some posts)
    vocabulary: Mapping[str, typing.Any]
    labels: Mapping[int, int]  # number of classes of a photo -> photos
    shards: Sequence[Mapping[str, typing.Any]]
    shard_count: int
    read: int  # lines of the dump, counted when they are read
    pairs: Sequence[
        Sequence[typing.Any]
    ]  # the least similar ones, as `once.sheet_entry` returns them
    matched: Sequence[tuple[str, int]]  # kind and hash of each removal that matches a post


def read_summary(folder: str) -> Summary:
    """Reads the graph's summary and removes its file."""
    summary = Summary(**json.loads(storage.read(f"{folder}/{SUMMARY}")))
    storage.remove(f"{folder}/{SUMMARY}")
    return summary


def finish(
    folder: str, summary: Summary, settings: Mapping[str, typing.Any], key: Key
) -> dict[str, typing.Any]:
    """Adds the vocabulary, TFDS metadata and, last, the manifest to the shards of a run.

    Args:
      folder: in which the graph has written the shards.
      summary: of the graph.
      settings: the run's options, for the manifest.
      key: of the dataset.

    Returns:
      The manifest.

    Raises:
      UserError: no post was kept, or the runner lost some.
    """
    dropped = {reason: {"count": 0, "examples": []} for reason in REASONS}
    for reason, (count, offsets) in summary.dropped.items():
        shown = [] if reason in CONFIDENTIAL else offsets
        dropped[reason] = {"count": count, "examples": [f"byte {offset}" for offset in shown]}
    kept = sum(shard["records"] for shard in summary.shards)
    if not kept:
        counts = ", ".join(f"{d['count']} {reason}" for reason, d in dropped.items())
        raise UserError(
            f"No post of {settings['posts']} was kept ({counts}); check the file, --images and, for"
            " no_tag, --minimum_count, or keep posts without a tag with --keep_untagged."
        )
    accounted = kept + sum(d["count"] for d in dropped.values())
    if accounted != summary.read:
        raise UserError(
            f"The Beam runner returned {accounted:,} of the {summary.read:,} posts of"
            f" {settings['posts']}; run prepare again, without --direct_running_mode."
        )
    if summary.pairs:
        once.write_duplicate_pairs(
            f"{folder}/{DUPLICATES}.png", staging=folder, pairs=summary.pairs
        )
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
    """Returns the shards in order; writes empty ones for those without posts, as TFDS needs."""
    written = {shard["name"]: shard for shard in summary.shards}
    ordered = []
    for shard in range(summary.shard_count):
        found = written.get(records.shard_name(shard, summary.shard_count))
        ordered.append(
            found
            or write_shard(
                folder,
                shard=shard,
                shards=summary.shard_count,
                rows=[],
                counts=class_counts,
                key=key,
            )
        )
    return ordered


def write_duplicates(folder: str, shard: int, shards: int, rows: Iterable[tuple[str, ...]]) -> None:
    """Writes a CSV file of the dropped copies whose ids are in a shard's range.

    Args:
      folder: of the dataset.
      shard: number of the shard, from 0.
      shards: number of all shards.
      rows: as `once.csv_row` returns them, in any order.
    """
    path = f"{folder}/{DUPLICATES}-{shard:05d}-of-{shards:05d}.csv"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(once.FIELDS)
    writer.writerows([_escape_formula(cell) for cell in row] for row in sorted(rows))
    storage.write(path, text.getvalue())


def _escape_formula(cell: str) -> str:
    """Puts an apostrophe before a cell that a spreadsheet would take for a formula."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def _rarest(folder: str, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts the photos by the number of posts of their rarest class.

    Returns:
      The distinct numbers of posts, ascending, and the photos of each: two int64 (D,).
    """

    def of_shard(shard: int) -> tuple[np.ndarray, np.ndarray]:
        index = np.load(io.BytesIO(storage.read(f"{folder}/{records.index_name(shard, shards)}")))
        return np.unique(index["rarest"], return_counts=True)

    photos: collections.Counter[int] = collections.Counter()
    for values, counts in storage.parallel_map(of_shard, range(shards), storage.is_remote(folder)):
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
    """Holds the output's lock and makes an empty folder beside it, in which the dataset is made.

    Raises:
      UserError: another `prepare` holds the lock, or the output holds anything but a dataset.
      OSError: the folder cannot be written.
    """
    return staging.staging_folder(output, is_own=_is_staging_file, check=_check_replaceable)


def _is_output_file(path: str) -> bool:
    return path == _REPLACING or dataset.is_dataset_file(_PARTIAL.sub("", path))


def _is_staging_file(path: str) -> bool:
    spooled = _SPOOLED.fullmatch(path) is not None
    return spooled or _PARTIAL.sub("", path) == SUMMARY or _is_output_file(path)


def _check_replaceable(output: str) -> None:
    """Raises a UserError unless the output is empty, or holds a dataset and nothing else."""
    if storage.exists(output) and not storage.is_folder(output):
        raise UserError(f"The output {output} is a file; give --output a folder.")
    _, folders, files = next(storage.walk(output), ("", [], []))
    if not folders and not files:
        return
    has_manifest = MANIFEST in files and dataset.is_manifest(storage.read(f"{output}/{MANIFEST}"))
    foreign = staging.first_foreign_path(output, _is_output_file)
    if not has_manifest and _REPLACING not in files:
        raise UserError(
            f"The output {output} exists and is not a hashvision dataset: it holds"
            f" {foreign or files[0]}; choose another --output."
        )
    if foreign:
        raise UserError(
            f"The output {output} holds {foreign}, which is not part of its dataset and would be"
            " lost; move it elsewhere, or choose another --output."
        )


def replace(made: str, output: str) -> None:
    """Moves the finished folder to the output's place, and then removes the former dataset.

    Remote storage cannot move a folder in one step. There the former files are removed first,
    beginning with the manifest, and the new manifest is moved last. A run that is killed meanwhile
    leaves no dataset that opens, and another run may replace its output.

    Raises:
      UserError: the output holds anything but a dataset by now.
    """
    _check_replaceable(output)
    for name in storage.names(made):  # files of failed attempts at a shard
        if not dataset.is_dataset_file(name):
            storage.remove(f"{made}/{name}")
    if storage.is_remote(output):
        return _replace_objects(made, output)
    staging.replace(made, output, _is_output_file)


def _replace_objects(made: str, output: str) -> None:
    def move(name: str) -> None:
        storage.move(f"{made}/{name}", f"{output}/{name}")

    manifest, mark = f"{output}/{MANIFEST}", f"{output}/{_REPLACING}"
    storage.write(mark, "")
    every = [f"{output}/{name}" for name in storage.names(output)]
    if manifest in every:
        storage.remove(manifest)
    storage.parallel_map(storage.remove, {*every} - {manifest, mark}, remote=True)
    storage.parallel_map(move, {*storage.names(made)} - {MANIFEST}, remote=True)
    move(MANIFEST)
    storage.remove(mark)
