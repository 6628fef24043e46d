"""How soon a host finds its photos when a run resumes in an epoch of a billion records.

The index is synthetic and on this machine's disk. It covers one host's lanes, which is all that the
host reads. Its tags are distributed as in WSL: 17,000 classes with frequencies of one over their
rank, up to three per photo. The comparison is with the 20 seconds that a restart may take.
"""

import argparse
import json
import pathlib
import tempfile
import time

import numpy as np

import figures
from hashvision.data import dataset, records, stream

ALLOWED = 20.0
SHARDS = 1024
PER_LANE = 16  # photos per batch
CLASSES = 17_000
PHOTO_BYTES = 30_000


def make(folder: pathlib.Path, size: int, last: int) -> None:
    """Writes the manifest of about `size` records, and the index of the first `last` of them."""
    rng = np.random.default_rng(0)
    length = size // SHARDS
    shares = 1 / np.arange(1, CLASSES + 1)
    tags = rng.choice(CLASSES, (length, 3), p=shares / shares.sum())
    tags = np.where(np.arange(3) < rng.integers(1, 4, (length, 1)), tags, tags[:, :1])
    tags.sort(1)
    first = np.diff(tags, axis=1, prepend=-1) > 0
    counts = np.bincount(tags[first], minlength=CLASSES) * SHARDS
    rows = np.zeros(length, records.INDEX_DTYPE)
    rows["rarest"] = counts[tags].min(1)
    rows["offset"] = np.arange(length) * PHOTO_BYTES
    values, photos = np.unique(rows["rarest"], return_counts=True)
    nobody = "0" * 64
    shards = [
        {
            "name": records.shard_name(shard, SHARDS),
            "records": length,
            "bytes": length * PHOTO_BYTES,
            **dict.fromkeys(("sha256", "index_sha256", "copies_sha256"), nobody),
        }
        for shard in range(SHARDS)
    ]
    for shard in range(-(-last // length)):
        rows["id"] = rng.integers(0, 2**64, length, np.uint64)
        path = folder / records.index_name(shard, SHARDS)
        np.save(path, rows)
        shards[shard]["index_sha256"], _ = dataset.digest(str(path))
    entries = enumerate(counts.tolist())
    classes = [{"name": str(n), "count": count, "tags": {}, "lemmas": []} for n, count in entries]
    (folder / "vocabulary.json").write_text(json.dumps({"classes": classes}))
    manifest = {
        "format": {"name": dataset.FORMAT, "version": dataset.VERSION},
        "key": "0" * 16,
        "vocabulary_sha256": dataset.digest(str(folder / "vocabulary.json"))[0],
        "classes": CLASSES,
        "shards": shards,
        "rarest": {str(value): int(n) * SHARDS for value, n in zip(values, photos, strict=True)},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=10**9)
    parser.add_argument("--lanes", type=int, default=512)
    parser.add_argument("--hosts", default="64,32,16")
    arguments = parser.parse_args()
    hosts = [int(count) for count in arguments.hosts.split(",")]
    batch, found = arguments.lanes * PER_LANE, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        make(folder, arguments.records, arguments.records // min(hosts) + 1)
        for count in hosts:
            slowest = 0.0
            for share in (0.0, 0.5, 0.99, 3.5):
                start = time.perf_counter()
                source = dataset.load(str(folder))
                photos = stream.Stream(
                    source,
                    batch_size=batch,
                    lanes=arguments.lanes,
                    seed=0,
                    method="square_root",
                    hosts=count,
                )
                step = int(share * photos.epoch_length / batch)
                items = photos.items(step)
                seconds = time.perf_counter() - start
                if len(items.record) != batch // count:
                    raise SystemExit(f"Step {step} has {len(items.record)} photos.")
                slowest = max(slowest, seconds)
                print(f"{count} hosts, step {step:,} ({share:.0%} of an epoch): {seconds:.1f} s")
            found.append(
                figures.Figure(
                    f"restart/{arguments.records:.0e}records/{count}hosts".replace("+", ""),
                    "s",
                    slowest,
                    ALLOWED,
                    "what is allowed",
                )
            )
    figures.write(found, figures.run())


if __name__ == "__main__":
    main()
