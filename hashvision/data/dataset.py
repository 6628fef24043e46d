"""Opens and checks prepared dataset folders: shards, index, vocabulary and manifest."""

import dataclasses
import hashlib
import io
import json
import os
import re
import typing
from collections.abc import Callable
from typing import Any

import numpy as np

from hashvision import storage
from hashvision.data import documents, keys, records, removals
from hashvision.errors import UserError

# The "format" in manifest.json, which alone identifies a folder as a dataset.
FORMAT = "hashvision dataset"
VERSION = 2

MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.json"

_RESTORE = "copy it again from the original dataset, or prepare the dataset again"
_SHARD = r"\d{5,}-of-\d{5,}"
# All files of a dataset folder; the last three belong to TFDS.
_FILES = re.compile(
    rf"{records.DATASET}-{records.SPLIT}\.tfrecord-{_SHARD}|index-{_SHARD}\.npy"
    rf"|copies-{_SHARD}\.npy|duplicates-{_SHARD}\.csv|duplicates\.png"
    r"|vocabulary\.json|manifest\.json|dataset_info\.json|features\.json|labels\.labels\.txt"
)


def is_dataset_file(name: str) -> bool:
    """Whether `prepare` writes a file of this name to a dataset folder."""
    return _FILES.fullmatch(name) is not None


def is_manifest(content: bytes) -> bool:
    """Whether this is the content of a manifest.json of this format version or an earlier one."""
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        return False
    if not isinstance(manifest, dict):
        return False
    form = manifest.get("format")
    if form is None:  # version 1
        return {"hashvision", "options", "shards"} <= manifest.keys()
    return isinstance(form, dict) and form.get("name") == FORMAT


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset folder; its records and index are read on demand.

    Attributes:
      path: of the folder.
      shards: paths of the TFRecord files.
      starts: int64 (S + 1,), the position of each shard's first record, and the number of records.
      shard_bytes: int64 (S,), the expected size of each shard.
      vocabulary: content of vocabulary.json.
      manifest: content of manifest.json.
    """

    path: str
    shards: tuple[str, ...]
    starts: np.ndarray
    shard_bytes: np.ndarray
    vocabulary: dict[str, Any]
    manifest: dict[str, Any]

    def __len__(self) -> int:
        """The number of records."""
        return int(self.starts[-1])

    @property
    def version(self) -> int:
        """Version of the format; version 1 has no key, no copies, and digests of shards only."""
        return self.manifest["format"]["version"] if "format" in self.manifest else 1

    @property
    def class_counts(self) -> np.ndarray:
        """int64 (K,), the number of posts that have each class."""
        return np.array([entry["count"] for entry in self.vocabulary["classes"]], np.int64)

    @property
    def rarest(self) -> tuple[np.ndarray, np.ndarray]:
        """Two int64 (D,): values of `rarest` in the index, and the number of records of each."""
        photos = self.manifest["rarest"]
        return np.array([int(value) for value in photos], np.int64), np.array([*photos.values()])

    def shard_of(self, positions: np.ndarray) -> np.ndarray:
        """int64 (N,), the shard of each record at these positions, int (N,)."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    def rows(self, first: int, last: int) -> np.ndarray:
        """Reads the index of the records at positions first to last (exclusive).

        Returns:
          records.INDEX_DTYPE (last - first,).

        Raises:
          UserError: an index file is missing or does not match its shard.
        """

        def part(shard: int) -> np.ndarray:
            start = int(self.starts[shard])
            return self._read_index(shard)[max(first - start, 0) : last - start]

        return self._read_shards(part, first, last, records.INDEX_DTYPE)

    def copies(self, first: int, last: int) -> np.ndarray:
        """Reads the dropped copies of the records at positions first to last (exclusive).

        Returns:
          records.COPIES_DTYPE (M,), ascending; `record` is a position in the dataset. Datasets of
          version 1 list none.

        Raises:
          UserError: a file that lists copies is missing or does not match its shard.
        """

        def part(shard: int) -> np.ndarray:
            copies = self._read_copies(shard).copy()
            copies["record"] += np.uint64(self.starts[shard])
            return copies[(copies["record"] >= first) & (copies["record"] < last)]

        if self.version == 1:
            return np.empty(0, records.COPIES_DTYPE)
        return self._read_shards(part, first, last, records.COPIES_DTYPE)

    def key(self, given: str | None = None) -> keys.Key:
        """Reads the dataset's key; keys.NO_KEY for a dataset of version 1.

        Args:
          given: path of a file that may contain it. The file next to the dataset is tried after it,
            since a command may read several datasets.

        Raises:
          UserError: neither file contains the key.
        """
        if self.version == 1:
            return keys.NO_KEY
        wrong, beside = [], keys.beside(self.path)
        for path in filter(None, (given, beside)):
            if wrong and not storage.exists(path):
                break
            key = keys.read(path)
            if key.id == self.manifest["key"]:
                return key
            wrong.append(f"{path} is the key {key.id}")
        raise UserError(
            f"{wrong[0]}, but {self.path} was made with the key {self.manifest['key']}; give --key"
            " the file that `prepare` wrote next to this dataset."
        )

    def names(self, listed: removals.RemovalList) -> removals.Names:
        """Hashes a removal list for this dataset's index; reads the key only if the list has lines.

        Raises:
          UserError: the key cannot be read, or belongs to another dataset.
        """
        return listed.names(self.key(listed.key)) if listed.lines else removals.NOTHING

    def find_removed(self, first: int, last: int, names: removals.Names) -> np.ndarray:
        """Finds the listed records, and records with a listed copy, at positions first to last.

        Args:
          first: position of the first record.
          last: position after the last record.
          names: the removal list, hashed with the dataset's key.

        Returns:
          removals.HITS_DTYPE (M,).

        Raises:
          UserError: as `rows` and `copies` do.
        """
        if not names:
            return np.empty(0, removals.HITS_DTYPE)
        return names.hits(first, self.rows(first, last), self.copies(first, last))

    def verify(self) -> None:
        """Reads every file that manifest.json lists and compares it with the manifest.

        Version 1 has only digests of the shards; its index is checked for consistency.

        Raises:
          UserError: a file is missing or damaged.
        """

        def check(shard: int) -> None:
            listed = self.manifest["shards"][shard]
            self._read_index(shard)
            if self.version > 1:
                self._read_copies(shard)
            try:
                found, size = digest(self.shards[shard])
            except FileNotFoundError:
                raise self._missing(self.shards[shard]) from None
            if size != listed["bytes"] or found != listed.get("sha256", found):
                raise UserError(
                    f"{self.shards[shard]} is not the file that {MANIFEST} lists; {_RESTORE}."
                )

        storage.parallel_map(check, range(len(self.shards)), storage.is_remote(self.path))

    def _read_shards(
        self, part: Callable[[int], np.ndarray], first: int, last: int, dtype: np.dtype
    ) -> np.ndarray:
        """Concatenates what `part` reads from each shard that contains some of these records."""
        first_shard = max(int(np.searchsorted(self.starts, first, side="right")) - 1, 0)
        last_shard = int(np.searchsorted(self.starts[:-1], last)) if last > first else 0
        shards = range(first_shard, last_shard)
        parts = storage.parallel_map(part, shards, storage.is_remote(self.path))
        return np.concatenate([np.empty(0, dtype), *parts])

    def _read_index(self, shard: int) -> np.ndarray:
        name = records.index_name(shard, len(self.shards))
        rows = self._read_table(shard, name, "index_sha256", records.INDEX_DTYPE)
        size, offsets = int(np.diff(self.starts)[shard]), rows["offset"].astype(np.int64)
        ends = np.append(offsets[1:], self.shard_bytes[shard])
        if len(rows) != size or (offsets[:1] != 0).any() or (ends <= offsets).any():
            raise self._mismatch(name, f"the index of the {size:,} records")
        return rows

    def _read_copies(self, shard: int) -> np.ndarray:
        name = records.copies_name(shard, len(self.shards))
        copies = self._read_table(shard, name, "copies_sha256", records.COPIES_DTYPE)
        size, positions = int(np.diff(self.starts)[shard]), copies["record"].astype(np.int64)
        if (np.diff(positions, prepend=0, append=size - 1) < 0).any() and len(copies):
            raise self._mismatch(name, f"the list of copies of the {size:,} records")
        return copies

    def _read_table(self, shard: int, name: str, digest: str, dtype: np.dtype) -> np.ndarray:
        """Reads the .npy file `name` of a shard; `digest` is the manifest's key for its digest."""
        path = os.path.join(self.path, name)
        try:
            content = storage.read(path)
        except FileNotFoundError:
            raise self._missing(path) from None
        expected = self.manifest["shards"][shard].get(digest)
        try:
            if expected and hashlib.sha256(content).hexdigest() != expected:
                raise ValueError("another digest")
            file = io.BytesIO(content)
            np.lib.format.read_magic(file)
            shape, _, found = np.lib.format.read_array_header_1_0(file)
            table = np.frombuffer(content, dtype, offset=file.tell())
            if found != dtype or shape != table.shape:
                raise ValueError("another table")
        except Exception:  # on damaged files NumPy can raise any exception
            raise self._mismatch(name, "the file") from None
        return table

    def _missing(self, path: str) -> UserError:
        return UserError(f"{path} is missing, though {MANIFEST} lists its shard; {_RESTORE}.")

    def _mismatch(self, name: str, what: str) -> UserError:
        path = os.path.join(self.path, name)
        return UserError(f"{path} is not {what} that {MANIFEST} lists; {_RESTORE}.")


def load(path: str) -> Dataset:
    """Opens a dataset folder.

    Raises:
      UserError: one of its JSON files is missing, damaged, or of an unsupported version.
    """
    missing = "so its folder is not a dataset; make one with `python -m hashvision prepare`"
    vocabulary_path, manifest_path = os.path.join(path, VOCABULARY), os.path.join(path, MANIFEST)
    text = documents.read(vocabulary_path, missing)
    manifest = documents.load(manifest_path, missing, _RESTORE)
    check_manifest(manifest_path, manifest)
    digest = manifest.get("vocabulary_sha256")
    if digest and hashlib.sha256(text).hexdigest() != digest:
        raise UserError(f"{vocabulary_path} is not the file that {MANIFEST} lists; {_RESTORE}.")
    vocabulary = documents.parse(vocabulary_path, text, _RESTORE)
    check_vocabulary(vocabulary_path, vocabulary)
    classes = len(vocabulary["classes"])
    if manifest.get("classes", classes) != classes:
        raise UserError(
            f"{vocabulary_path} has {classes:,} classes, not the {manifest['classes']:,} that"
            f" {MANIFEST} lists; {_RESTORE}."
        )
    shards = manifest["shards"]
    return Dataset(
        path,
        tuple(os.path.join(path, shard["name"]) for shard in shards),
        np.cumsum([0] + [shard["records"] for shard in shards]),
        np.array([shard["bytes"] for shard in shards], np.int64),
        vocabulary,
        _without_examples(manifest),
    )


def fingerprint(manifest: dict[str, Any]) -> str:
    """Identifies a dataset, wherever it is stored, by its shards' names, sizes and digests."""
    shards = json.dumps(manifest["shards"], sort_keys=True)
    return hashlib.sha256(shards.encode()).hexdigest()


def digest(path: str) -> tuple[str, int]:
    """Returns the SHA-256 of a file in hexadecimal, and its size in bytes."""
    found, size = hashlib.sha256(), 0
    with storage.open(path) as file:
        while chunk := file.read(2**24):
            found.update(chunk)
            size += len(chunk)
    return found.hexdigest(), size


def check_manifest(path: str, manifest: dict[str, Any], remedy: str = _RESTORE) -> None:
    """Checks that a manifest has all values that this program reads, with the right types.

    Args:
      path: of the manifest's file.
      manifest: a JSON object.
      remedy: what to do if it is damaged.

    Raises:
      UserError: a value is missing or wrong, or the version is not supported.
    """

    def expect(fits: bool, name: str, value: Any) -> None:
        if not fits:
            raise UserError(f"{path} has {name} {documents.shorten(value)}; {remedy}.")

    version, made = 1, typing.cast(Any, manifest.get("format"))
    if "format" in manifest:
        expect(isinstance(made, dict) and made.get("name") == FORMAT, "the invalid format", made)
        version = made.get("version", 0)
        expect(documents.is_count(version) and version > 1, "the invalid version", version)
    if version > VERSION:
        raise UserError(
            f"{path} has format version {version}, but this hashvision reads versions up to"
            f" {VERSION}; install a newer hashvision, or prepare the dataset again."
        )
    if version == 1 and "rarest" not in manifest:
        raise UserError(
            f"{path} has an earlier format, which does not support removals; prepare the dataset"
            " again."
        )
    shards = typing.cast(Any, manifest.get("shards"))
    expect(isinstance(shards, list) and bool(shards), "the invalid shards", shards)
    digests = ("sha256", "index_sha256", "copies_sha256") if version > 1 else ()
    for number, shard in enumerate(shards):
        expect(
            isinstance(shard, dict)
            and shard.get("name") == records.shard_name(number, len(shards))
            and documents.is_count(shard.get("records"))
            and documents.is_count(shard.get("bytes"))
            and all(_is_digest(shard.get(name), 64) for name in digests),
            f"the invalid shard {number}",
            shard,
        )
    rarest = typing.cast(Any, manifest.get("rarest"))
    size = sum(shard["records"] for shard in shards)
    expect(
        isinstance(rarest, dict)
        and all(value.isdecimal() and len(value) <= 10 for value in rarest)
        and all(map(documents.is_count, rarest.values()))
        and sum(rarest.values()) == size,
        f"rarest classes that do not match its {size:,} records,",
        rarest,
    )
    classes = manifest.get("classes", 0 if version == 1 else None)
    expect(documents.is_count(classes), "an invalid number of classes", classes)
    if version > 1:
        key = manifest.get("key")
        expect(_is_digest(key, 16), "an invalid key", key)
        vocabulary = manifest.get("vocabulary_sha256")
        expect(_is_digest(vocabulary, 64), "an invalid vocabulary_sha256", vocabulary)


def check_vocabulary(path: str, vocabulary: dict[str, Any], remedy: str = _RESTORE) -> None:
    """Checks that a vocabulary has all values that this program reads, with the right types.

    Args:
      path: of the vocabulary's file.
      vocabulary: a JSON object.
      remedy: what to do if it is damaged.

    Raises:
      UserError: a value is missing or wrong.
    """
    classes = vocabulary.get("classes")
    for entry in classes if isinstance(classes, list) else [classes]:
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and documents.is_count(entry.get("count"))
            and isinstance(entry.get("tags"), dict)
            and isinstance(entry.get("lemmas"), list)
            and all(isinstance(lemma, str) for lemma in entry["lemmas"])
        ):
            raise UserError(f"{path} has the invalid class {documents.shorten(entry)}; {remedy}.")


def _is_digest(value: Any, digits: int) -> bool:
    return isinstance(value, str) and len(value) == digits and {*value} <= {*"0123456789abcdef"}


def _without_examples(manifest: dict[str, Any]) -> dict[str, Any]:
    """Removes the ids of private and removed posts, which manifests of version 1 contain."""
    posts = manifest.get("posts")
    if "format" in manifest or not isinstance(posts, dict):
        return manifest
    dropped = posts.get("dropped")
    counts = dropped if isinstance(dropped, dict) else {}
    counts = {reason: {**each, "examples": []} for reason, each in counts.items()}
    return {**manifest, "posts": {**posts, "dropped": counts}}
