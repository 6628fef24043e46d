"""The TFRecord schema of a dataset folder, written and parsed in this one place."""

import hashlib
import os
import typing
from collections.abc import Iterable, Sequence

import numpy as np

if typing.TYPE_CHECKING:
    import tensorflow as tf
    import tensorflow_datasets as tfds

DATASET = "posts"
SPLIT = "train"

# One row a record, in the shards' order; 36 bytes, of which a host reads those of its own lanes.
# `offset` is the record's first byte in its shard, `rarest` the number of posts that carry its
# rarest class (from which every sampling rule follows; 0 without one). The rest is what a removal
# list knows it by: hashes of the post's id and of its owner, and of the posted file.
INDEX_DTYPE = np.dtype(
    [("offset", "<u8"), ("rarest", "<u4"), ("id", "<u8"), ("owner", "<u8"), ("photo", "<u8")]
)

# TFRecord framing: u64 length, u32 CRC of the length, the bytes, u32 CRC of the bytes.
_FRAMING_BYTES = 8 + 4 + 4


class Copy(typing.NamedTuple):
    """A post that was left out because a record shows its photo; removals follow it there."""

    id: str
    owner: str
    sha256: bytes  # digest of the file as it was posted


class Record(typing.NamedTuple):
    """One photo as it lies in a shard."""

    id: str
    owner: str
    image: bytes  # JPEG
    labels: tuple[int, ...]  # sorted class numbers, positions in vocabulary.json's "classes"
    sha256: bytes  # digest of the file as it was posted; stands in the index alone
    copies: tuple[Copy, ...] = ()


def shard_name(shard: int, shards: int) -> str:
    """File name of shard number `shard` of `shards`, in TFDS's default template."""
    return f"{DATASET}-{SPLIT}.tfrecord-{shard:05d}-of-{shards:05d}"


def index_name(shard: int, shards: int) -> str:
    """File name of the index that lies beside that shard."""
    return f"index-{shard:05d}-of-{shards:05d}.npy"


def id_hash(name: str) -> int:
    """64-bit BLAKE2b hash of a post's or an owner's id: what position and removals know it by."""
    encoded = name.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


def photo_hash(sha256: bytes) -> int:
    """The first 64 bits of a posted file's SHA-256 digest."""
    return int.from_bytes(sha256[:8], "little")


def features(class_names: Sequence[str]) -> "tfds.features.FeaturesDict":
    """The schema as TFDS knows it, so that `tfds.builder_from_directory` opens the folder."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "owner": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "labels": tfds.features.Sequence(tfds.features.ClassLabel(names=list(class_names))),
        }
    )


def serialize(record: Record) -> bytes:
    """`record` as a serialized tf.train.Example."""
    import tensorflow as tf

    def text(value: str) -> "tf.train.Feature":
        encoded = value.encode("utf-8", "replace")
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[encoded]))

    example = tf.train.Example(
        features=tf.train.Features(
            feature={
                "id": text(record.id),
                "owner": text(record.owner),
                "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[record.image])),
                "labels": tf.train.Feature(int64_list=tf.train.Int64List(value=record.labels)),
            }
        )
    )
    return example.SerializeToString(deterministic=True)


def write_shard(
    path: str | os.PathLike[str], records: Iterable[Record], counts: np.ndarray
) -> np.ndarray:
    """Writes one shard and returns its index.

    Args:
      path: the TFRecord file to write.
      records: the photos, in order.
      counts: int (K,), the number of posts that carry each class.

    Returns:
      INDEX_DTYPE (N,), one row a record.
    """
    import tensorflow as tf

    rows, offset = [], 0
    with tf.io.TFRecordWriter(os.fspath(path)) as writer:
        for record in records:
            serialized = serialize(record)
            writer.write(serialized)
            rarest = min(counts[list(record.labels)], default=0)
            names = id_hash(record.id), id_hash(record.owner), photo_hash(record.sha256)
            rows.append((offset, rarest, *names))
            offset += len(serialized) + _FRAMING_BYTES
    return np.array(rows, INDEX_DTYPE)


def parse(serialized: "tf.Tensor") -> dict[str, "tf.Tensor"]:
    """Parses a serialized record inside tf.data.

    Returns:
      id and owner (string scalars), image (string scalar, JPEG bytes), labels (int64 vector).
    """
    import tensorflow as tf

    parsed = tf.io.parse_single_example(
        serialized,
        {
            "id": tf.io.FixedLenFeature([], tf.string),
            "owner": tf.io.FixedLenFeature([], tf.string),
            "image": tf.io.FixedLenFeature([], tf.string),
            "labels": tf.io.RaggedFeature(tf.int64),
        },
    )
    return typing.cast("dict[str, tf.Tensor]", parsed)
