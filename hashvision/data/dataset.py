"""A prepared dataset folder as training sees it: shards, index, vocabulary and manifest."""

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

# What manifest.json says under "format": by this alone a folder is known as a dataset.
FORMAT = "hashvision dataset"
VERSION = 2

MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.json"

_AGAIN = "copy it again from where the dataset was made, or prepare the dataset again"
_OF_SHARD = r"\d{5,}-of-\d{5,}"
# All files that a dataset folder holds; the last three are TFDS's.
_FILES = re.compile(
    rf"{records.DATASET}-{records.SPLIT}\.tfrecord-{_OF_SHARD}|index-{_OF_SHARD}\.npy"
    rf"|copies-{_OF_SHARD}\.npy|duplicates-{_OF_SHARD}\.csv|duplicates\.png"
    r"|vocabulary\.json|manifest\.json|dataset_info\.json|features\.json|labels\.labels\.txt"
)


def is_file_of(name: str) -> bool:
    """Whether a file of this name in a dataset folder is one that `prepare` writes there."""
    return _FILES.fullmatch(name) is not None


def is_manifest(content: bytes) -> bool:
    """Whether this is a manifest.json that `prepare` wrote, in this version or an earlier one."""
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        return False
    if not isinstance(manifest, dict):
        return False
    form = manifest.get("format")
    if form is None:  # version 1 did not say
        return {"hashvision", "options", "shards"} <= manifest.keys()
    return isinstance(form, dict) and form.get("name") == FORMAT


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What lies in a dataset folder; records and index are read when asked for.

    Attributes:
      path: the folder.
      shards: the TFRecord files.
      starts: int64 (S + 1,), the position of each shard's first record, and the number of records.
      shard_bytes: int64 (S,), the length that each shard should have.
      vocabulary: vocabulary.json.
      manifest: manifest.json.
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
        """Of its format; 1 has no key, no notes on copies, and digests of its shards alone."""
        return self.manifest["format"]["version"] if "format" in self.manifest else 1

    @property
    def class_counts(self) -> np.ndarray:
        """int64 (K,), the number of posts that carry each class."""
        return np.array([entry["count"] for entry in self.vocabulary["classes"]], np.int64)

    @property
    def rarest(self) -> tuple[np.ndarray, np.ndarray]:
        """Two int64 (D,): values of the index's `rarest`, and how many records have each."""
        photos = self.manifest["rarest"]
        return np.array([int(value) for value in photos], np.int64), np.array([*photos.values()])

    def shard_of(self, positions: np.ndarray) -> np.ndarray:
        """int64 (N,), in which shard the records at these positions, int (N,), lie."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    def rows(self, first: int, last: int) -> np.ndarray:
        """The index of the records at positions first to last, records.INDEX_DTYPE (last - first,).

        Raises:
          UserError: an index file is missing or not that of its shard.
        """

        def part(shard: int) -> np.ndarray:
            start = int(self.starts[shard])
            return self._index(shard)[max(first - start, 0) : last - start]

        return self._joined(part, first, last, records.INDEX_DTYPE)

    def copies(self, first: int, last: int) -> np.ndarray:
        """The copies that the records at positions first to last stand for.

        Returns:
          records.COPIES_DTYPE (M,), ascending; `record` is a position in the dataset. Datasets of
          version 1 note none.

        Raises:
          UserError: a file with notes on copies is missing or not that of its shard.
        """

        def part(shard: int) -> np.ndarray:
            copies = self._copies(shard).copy()
            copies["record"] += np.uint64(self.starts[shard])
            return copies[(copies["record"] >= first) & (copies["record"] < last)]

        if self.version == 1:
            return np.empty(0, records.COPIES_DTYPE)
        return self._joined(part, first, last, records.COPIES_DTYPE)

    def key(self, given: str | None = None) -> keys.Key:
        """The dataset's key; keys.NO_KEY of a dataset of version 1.

        Args:
          given: a file that may hold it; the one beside the dataset is asked after it, since a
            command may read several datasets.

        Raises:
          UserError: it lies in neither.
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
            f"{wrong[0]}, and {self.path} was made with the key {self.manifest['key']}; give --key"
            " the file that `prepare` made beside it."
        )

    def names(self, listed: removals.RemovalList) -> removals.Names:
        """A removal list as the index holds it; the key is read only where there is one.

        Raises:
          UserError: the key cannot be read, or is that of another dataset.
        """
        return listed.names(self.key(listed.key)) if listed.lines else removals.NOTHING

    def named(self, first: int, last: int, names: removals.Names) -> np.ndarray:
        """What the list finds among the records at positions first to last, or in their copies.

        Returns:
          removals.HITS_DTYPE (M,).

        Raises:
          UserError: as `rows` and `copies` do.
        """
        if not names:
            return np.empty(0, removals.HITS_DTYPE)
        return names.hits(first, self.rows(first, last), self.copies(first, last))

    def verify(self) -> None:
        """Reads every file that manifest.json lists, and compares it with what stands there.

        Of version 1 that is the digests of the shards, and the index as far as it can be judged.

        Raises:
          UserError: a file is missing or damaged.
        """

        def check(shard: int) -> None:
            listed = self.manifest["shards"][shard]
            self._index(shard)
            if self.version > 1:
                self._copies(shard)
            try:
                found, size = digest(self.shards[shard])
            except FileNotFoundError:
                raise self._missing(self.shards[shard]) from None
            if size != listed["bytes"] or found != listed.get("sha256", found):
                raise UserError(
                    f"{self.shards[shard]} is not the file that {MANIFEST} lists; {_AGAIN}."
                )

        storage.each(check, range(len(self.shards)), storage.is_remote(self.path))

    def _joined(
        self, part: Callable[[int], np.ndarray], first: int, last: int, dtype: np.dtype
    ) -> np.ndarray:
        """What `part` reads of each shard that holds some of these records."""
        first_shard = max(int(np.searchsorted(self.starts, first, side="right")) - 1, 0)
        last_shard = int(np.searchsorted(self.starts[:-1], last)) if last > first else 0
        shards = range(first_shard, last_shard)
        parts = storage.each(part, shards, storage.is_remote(self.path))
        return np.concatenate([np.empty(0, dtype), *parts])

    def _index(self, shard: int) -> np.ndarray:
        name = records.index_name(shard, len(self.shards))
        rows = self._table(shard, name, "index_sha256", records.INDEX_DTYPE)
        size, offsets = int(np.diff(self.starts)[shard]), rows["offset"].astype(np.int64)
        ends = np.append(offsets[1:], self.shard_bytes[shard])
        if len(rows) != size or (offsets[:1] != 0).any() or (ends <= offsets).any():
            raise self._no_table(name, f"the index of the {size:,} records")
        return rows

    def _copies(self, shard: int) -> np.ndarray:
        name = records.copies_name(shard, len(self.shards))
        copies = self._table(shard, name, "copies_sha256", records.COPIES_DTYPE)
        size, places = int(np.diff(self.starts)[shard]), copies["record"].astype(np.int64)
        if (np.diff(places, prepend=0, append=size - 1) < 0).any() and len(copies):
            raise self._no_table(name, f"the list of copies of the {size:,} records")
        return copies

    def _table(self, shard: int, name: str, digest: str, dtype: np.dtype) -> np.ndarray:
        """A file that lies beside a shard, whole; `digest` is its name in the manifest."""
        path = os.path.join(self.path, name)
        try:
            content = storage.read(path)
        except FileNotFoundError:
            raise self._missing(path) from None
        wanted = self.manifest["shards"][shard].get(digest)
        try:
            if wanted and hashlib.sha256(content).hexdigest() != wanted:
                raise ValueError("another digest")
            file = io.BytesIO(content)
            np.lib.format.read_magic(file)
            shape, _, found = np.lib.format.read_array_header_1_0(file)
            table = np.frombuffer(content, dtype, offset=file.tell())
            if found != dtype or shape != table.shape:
                raise ValueError("another table")
        except Exception:  # NumPy raises what it likes on broken bytes
            raise self._no_table(name, "the file") from None
        return table

    def _missing(self, path: str) -> UserError:
        return UserError(f"{path} is missing, though {MANIFEST} lists its shard; {_AGAIN}.")

    def _no_table(self, name: str, what: str) -> UserError:
        path = os.path.join(self.path, name)
        return UserError(f"{path} is not {what} that {MANIFEST} lists; {_AGAIN}.")


def load(path: str) -> Dataset:
    """Opens a dataset folder.

    Raises:
      UserError: one of its JSON files is missing, damaged, or of a version that is not read.
    """
    missing = "so its folder is no dataset; make one with `python -m hashvision prepare`"
    vocabulary_path, manifest_path = os.path.join(path, VOCABULARY), os.path.join(path, MANIFEST)
    text = documents.read(vocabulary_path, missing)
    manifest = documents.load(manifest_path, missing, _AGAIN)
    check_manifest(manifest_path, manifest)
    digest = manifest.get("vocabulary_sha256")
    if digest and hashlib.sha256(text).hexdigest() != digest:
        raise UserError(f"{vocabulary_path} is not the file that {MANIFEST} lists; {_AGAIN}.")
    vocabulary = documents.parse(vocabulary_path, text, _AGAIN)
    check_vocabulary(vocabulary_path, vocabulary)
    classes = len(vocabulary["classes"])
    if manifest.get("classes", classes) != classes:
        raise UserError(
            f"{vocabulary_path} has {classes:,} classes and not the {manifest['classes']:,} that"
            f" {MANIFEST} lists; {_AGAIN}."
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
    """What tells a dataset from others, wherever it lies: its shards' names, sizes, digests."""
    shards = json.dumps(manifest["shards"], sort_keys=True)
    return hashlib.sha256(shards.encode()).hexdigest()


def digest(path: str) -> tuple[str, int]:
    """The SHA-256 of a file in hexadecimal, and its bytes."""
    found, size = hashlib.sha256(), 0
    with storage.open(path) as file:
        while chunk := file.read(2**24):
            found.update(chunk)
            size += len(chunk)
    return found.hexdigest(), size


def check_manifest(path: str, manifest: dict[str, Any], remedy: str = _AGAIN) -> None:
    """Sees that a manifest has what this program reads of one, each of its kind.

    Args:
      path: of the file that holds it.
      manifest: a JSON object.
      remedy: what to do where it is damaged.

    Raises:
      UserError: it has not, or its version is not read.
    """

    def expect(fits: bool, name: str, value: Any) -> None:
        if not fits:
            told = f"{path} has {name} {documents.shown(value)}, which no dataset has"
            raise UserError(f"{told}; {remedy}.")

    version, made = 1, typing.cast(Any, manifest.get("format"))
    if "format" in manifest:
        expect(isinstance(made, dict) and made.get("name") == FORMAT, "the format", made)
        version = made.get("version", 0)
        expect(documents.is_count(version) and version > 1, "the version", version)
    if version > VERSION:
        raise UserError(
            f"{path} is of version {version}, and this hashvision reads versions up to {VERSION};"
            " install a newer one, or prepare the dataset again."
        )
    if version == 1 and "rarest" not in manifest:
        raise UserError(
            f"{path} is of an earlier version, which knew no removals; prepare the dataset again."
        )
    shards = typing.cast(Any, manifest.get("shards"))
    expect(isinstance(shards, list) and bool(shards), "the shards", shards)
    digests = ("sha256", "index_sha256", "copies_sha256") if version > 1 else ()
    for number, shard in enumerate(shards):
        expect(
            isinstance(shard, dict)
            and shard.get("name") == records.shard_name(number, len(shards))
            and documents.is_count(shard.get("records"))
            and documents.is_count(shard.get("bytes"))
            and all(_is_digest(shard.get(name), 64) for name in digests),
            f"as shard {number}",
            shard,
        )
    rarest = typing.cast(Any, manifest.get("rarest"))
    size = sum(shard["records"] for shard in shards)
    expect(
        isinstance(rarest, dict)
        and all(value.isdecimal() and len(value) <= 10 for value in rarest)
        and all(map(documents.is_count, rarest.values()))
        and sum(rarest.values()) == size,
        f"for {size:,} records the rarest classes",
        rarest,
    )
    classes = manifest.get("classes", 0 if version == 1 else None)
    expect(documents.is_count(classes), "the classes", classes)
    if version > 1:
        key = manifest.get("key")
        expect(_is_digest(key, 16), "the key", key)
        vocabulary = manifest.get("vocabulary_sha256")
        expect(_is_digest(vocabulary, 64), "the vocabulary_sha256", vocabulary)


def check_vocabulary(path: str, vocabulary: dict[str, Any], remedy: str = _AGAIN) -> None:
    """Sees that a vocabulary has what this program reads of one, each of its kind.

    Args:
      path: of the file that holds it.
      vocabulary: a JSON object.
      remedy: what to do where it is damaged.

    Raises:
      UserError: it has not.
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
            raise UserError(
                f"{path} has the class {documents.shown(entry)}, which no vocabulary has; {remedy}."
            )


def _is_digest(value: Any, digits: int) -> bool:
    return isinstance(value, str) and len(value) == digits and {*value} <= {*"0123456789abcdef"}


def _without_examples(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest without what version 1 has in it: ids of posts that are private or removed."""
    posts = manifest.get("posts")
    if "format" in manifest or not isinstance(posts, dict):
        return manifest
    dropped = posts.get("dropped")
    counts = dropped if isinstance(dropped, dict) else {}
    counts = {reason: {**each, "examples": []} for reason, each in counts.items()}
    return {**manifest, "posts": {**posts, "dropped": counts}}
