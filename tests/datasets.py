"""Small dataset folders for tests: real shards, index and vocabulary, made without Beam."""

import collections
import hashlib
import io
import json
import pathlib

import numpy as np
from PIL import Image

from hashvision.data import records

CLASSES = ("dog", "tree", "boat")


def jpeg(seed: int, height: int = 40, width: int = 56) -> bytes:
    """A smooth coloured picture."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    file = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def record(number: int, image: bytes, labels: tuple[int, ...]) -> records.Record:
    """The photo as post p{number} of one of five owners."""
    digest = hashlib.sha256(image).digest()
    return records.Record(f"p{number}", f"u{number % 5}", image, labels, digest)


def write(folder: pathlib.Path, size: int = 64, shards: int = 2, photo=jpeg) -> pathlib.Path:
    """Writes a dataset of `size` records, photo(number) each; class 0 on most, class 2 on few."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels = [
        tuple(sorted({int(c) for c in rng.choice(3, 1 + i % 2, p=[0.7, 0.2, 0.1])}))
        for i in range(size)
    ]
    counts = np.array([sum(c in each for each in labels) for c in range(3)])
    described, rarest = [], collections.Counter()
    for shard in range(shards):
        numbers = range(shard * size // shards, (shard + 1) * size // shards)
        name = records.shard_name(shard, shards)
        rows = [record(i, photo(i), labels[i]) for i in numbers]
        index = records.write_shard(folder / name, rows, counts)
        np.save(folder / records.index_name(shard, shards), index)
        rarest.update(index["rarest"].tolist())
        size_bytes = (folder / name).stat().st_size
        described.append({"name": name, "records": len(rows), "bytes": size_bytes})
    classes = [
        {"name": name, "count": int(count), "tags": {name: int(count)}, "lemmas": [name]}
        for name, count in zip(CLASSES, counts, strict=True)
    ]
    (folder / "vocabulary.json").write_text(json.dumps({"posts": size, "classes": classes}))
    (folder / "manifest.json").write_text(
        json.dumps({"images": size, "shards": described, "rarest": rarest})
    )
    return folder
