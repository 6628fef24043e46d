"""A prepared dataset folder as training sees it: shards, index, vocabulary and manifest."""

import dataclasses
import hashlib
import json
import os
import re
from typing import Any

import numpy as np

from hashvision import storage
from hashvision.data import records
from hashvision.errors import UserError

# What manifest.json says of itself under "format".
FORMAT = "hashvision dataset"
VERSION = 2
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
        first_shard = max(int(np.searchsorted(self.starts, first, side="right")) - 1, 0)
        shards = range(first_shard, int(np.searchsorted(self.starts[:-1], last)))

        def part(shard: int) -> np.ndarray:
            begin, end = self.starts[shard : shard + 2].tolist()
            return self._index(shard, end - begin, max(first - begin, 0), min(last, end) - begin)

        nothing = np.empty(0, records.INDEX_DTYPE)
        return np.concatenate([nothing, *storage.each(part, shards, storage.is_remote(self.path))])

    def _index(self, shard: int, size: int, first: int, last: int) -> np.ndarray:
        """Rows first to last of the `size` that a shard's index has; no others are read."""
        if first >= last:
            return np.empty(0, records.INDEX_DTYPE)
        path = os.path.join(self.path, records.index_name(shard, len(self.shards)))
        try:
            with storage.open(path) as file:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                begin = file.tell()
                whole = file.seek(0, os.SEEK_END) == begin + size * dtype.itemsize
                file.seek(begin + first * dtype.itemsize)
                rows = file.read((last - first) * dtype.itemsize)
        except FileNotFoundError:
            raise UserError(
                f"{path} is missing, though manifest.json lists its shard; copy it from where the"
                " dataset was made or prepare the dataset again."
            ) from None
        except (ValueError, EOFError):
            shape, dtype, whole, rows = (), None, False, b""
        if dtype != records.INDEX_DTYPE or shape != (size,) or not whole:
            raise UserError(
                f"{path} is not the index of {size:,} records that manifest.json lists; copy it"
                " again or prepare the dataset again."
            )
        return np.frombuffer(rows, records.INDEX_DTYPE)


def fingerprint(manifest: dict[str, Any]) -> str:
    """What tells a dataset from others, wherever it lies: its shards' names, sizes, digests."""
    shards = json.dumps(manifest["shards"], sort_keys=True)
    return hashlib.sha256(shards.encode()).hexdigest()


def _read_json(path: str) -> dict[str, Any]:
    try:
        return json.loads(storage.read(path))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing, so its folder is no dataset; make one with"
            " `python -m hashvision prepare`."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); prepare the dataset again.") from None


def load(path: str) -> Dataset:
    """Opens a dataset folder.

    Raises:
      UserError: one of its JSON files is missing, broken, or of an earlier version.
    """
    vocabulary = _read_json(os.path.join(path, "vocabulary.json"))
    manifest = _read_json(os.path.join(path, "manifest.json"))
    if "rarest" not in manifest:
        raise UserError(
            f"{os.path.join(path, 'manifest.json')} is of an earlier version, which knew no"
            " removals; prepare the dataset again."
        )
    shards = manifest["shards"]
    return Dataset(
        path,
        tuple(os.path.join(path, shard["name"]) for shard in shards),
        np.cumsum([0] + [shard["records"] for shard in shards]),
        np.array([shard["bytes"] for shard in shards], np.int64),
        vocabulary,
        manifest,
    )
