"""A prepared dataset folder as training sees it: shards, index, vocabulary and manifest."""

import dataclasses
import json
import os
from typing import Any

import numpy as np

from hashvision.data import records
from hashvision.errors import UserError


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What lies in a dataset folder; nothing but the index is read into memory.

    Attributes:
      path: the folder.
      shards: the TFRecord files.
      shard: int32 (N,), which shard each record lies in.
      index: records.INDEX_DTYPE (N,), one row a record, in the shards' order.
      vocabulary: vocabulary.json.
      manifest: manifest.json.
    """

    path: str
    shards: tuple[str, ...]
    shard: np.ndarray
    index: np.ndarray
    vocabulary: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def class_counts(self) -> np.ndarray:
        """int64 (K,), the number of posts that carry each class."""
        return np.array([entry["count"] for entry in self.vocabulary["classes"]], np.int64)


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
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
      UserError: the folder, its JSON files, a shard or an index is missing, cut short or does not
        fit the others.
    """
    vocabulary = _read_json(os.path.join(path, "vocabulary.json"))
    manifest = _read_json(os.path.join(path, "manifest.json"))
    described = manifest["shards"]
    shards, shard, index = [], [], []
    for number, expected in enumerate(described):
        file = os.path.join(path, expected["name"])
        beside = os.path.join(path, records.index_name(number, len(described)))
        for needed in (file, beside):
            if not os.path.exists(needed):
                raise UserError(
                    f"{needed} is missing, though manifest.json lists it; copy it from where the"
                    " dataset was made or prepare the dataset again."
                )
        if os.path.getsize(file) != expected["bytes"]:
            raise UserError(
                f"{file} has {os.path.getsize(file):,} bytes, not the {expected['bytes']:,} that"
                " manifest.json lists; copy it again or prepare the dataset again."
            )
        try:
            rows = np.load(beside)
        except (ValueError, EOFError):
            rows = np.empty(0)
        if rows.dtype != records.INDEX_DTYPE or len(rows) != expected["records"]:
            raise UserError(
                f"{beside} is not the index of {expected['records']:,} records that manifest.json"
                " lists; copy it again or prepare the dataset again."
            )
        shards.append(file)
        index.append(rows)
        shard.append(np.full(len(rows), number, np.int32))
    return Dataset(
        path, tuple(shards), np.concatenate(shard), np.concatenate(index), vocabulary, manifest
    )
