"""Writes small dataset folders for tests, with real shards and indexes, without Beam."""

import collections
import hashlib
import io
import json
import pathlib

import numpy as np
from PIL import Image

from hashvision.data import dataset, keys, records

CLASSES = ("dog", "tree", "boat")
KEY = keys.Key(bytes(range(32)))


def jpeg(seed: int, height: int = 40, width: int = 56) -> bytes:
    """Encodes a smooth coloured picture as a JPEG."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    file = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def record(number: int, image: bytes, labels: tuple[int, ...]) -> records.Record:
    """Makes a record: post p{number} of owner u{number % 5}."""
    digest = hashlib.sha256(image).digest()
    return records.Record(f"p{number}", f"u{number % 5}", image, labels, digest)


def write(
    folder: pathlib.Path, size: int = 64, shards: int = 2, photo=jpeg, copies=(), version: int = 2
) -> pathlib.Path:
    """Writes a dataset; class 0 is on most records and class 2 on few.

    The key next to it is always KEY.

    Args:
      folder: to write.
      size: number of records.
      shards: number of shards.
      photo: makes the bytes of a photo from the number of its record.
      copies: (record, records.Copy) pairs.
      version: of the format; 1 has no keys, copies or digests.
    """
    folder.mkdir(parents=True)
    key = keys.NO_KEY if version == 1 else KEY
    if version > 1:
        folder.with_name(f"{folder.name}.key").write_text(f"{KEY.secret.hex()}\n")
    rng = np.random.default_rng(0)
    labels = [
        tuple(sorted({int(c) for c in rng.choice(3, 1 + i % 2, p=[0.7, 0.2, 0.1])}))
        for i in range(size)
    ]
    counts = np.array([sum(c in each for each in labels) for c in range(3)])
    described = []
    for shard in range(shards):
        numbers = range(shard * size // shards, (shard + 1) * size // shards)
        name = records.shard_name(shard, shards)
        rows = [
            record(i, photo(i), labels[i])._replace(copies=tuple(c for at, c in copies if at == i))
            for i in numbers
        ]
        index, own_copies = records.write_shard(folder / name, rows, counts, key)
        np.save(folder / records.index_name(shard, shards), index)
        np.save(folder / records.copies_name(shard, shards), own_copies)
        size_bytes = (folder / name).stat().st_size
        described.append({"name": name, "records": len(rows), "bytes": size_bytes})
    classes = [
        {"name": name, "count": int(count), "tags": {name: int(count)}, "lemmas": [name]}
        for name, count in zip(CLASSES, counts, strict=True)
    ]
    (folder / "vocabulary.json").write_text(json.dumps({"posts": size, "classes": classes}))
    manifest = {"images": size, "classes": len(classes), "shards": described}
    if version == 1:
        for path in folder.glob("copies-*"):
            path.unlink()
    else:
        manifest |= {"format": {"name": dataset.FORMAT, "version": version}, "key": KEY.id}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    seal(folder)
    return folder


def seal(folder: pathlib.Path) -> None:
    """Updates the counts and digests in the manifest to the current files of a folder."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())

    def digest(name: str) -> str:
        return hashlib.sha256((folder / name).read_bytes()).hexdigest()

    rarest, shards = collections.Counter(), manifest["shards"]
    for number, shard in enumerate(shards):
        index = records.index_name(number, len(shards))
        rarest.update(np.load(folder / index)["rarest"].tolist())
        if "format" in manifest:
            shard["sha256"], shard["index_sha256"] = digest(shard["name"]), digest(index)
            shard["copies_sha256"] = digest(records.copies_name(number, len(shards)))
    manifest["rarest"] = rarest
    vocabulary = json.loads((folder / "vocabulary.json").read_text())
    manifest["classes"] = len(vocabulary["classes"])
    if "format" in manifest:
        manifest["vocabulary_sha256"] = digest("vocabulary.json")
    path.write_text(json.dumps(manifest))
