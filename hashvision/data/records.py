"""Writes and parses the records, indexes and copies files of a dataset folder."""

import hashlib
import os
import typing
from collections.abc import Iterable, Sequence

import numpy as np

if typing.TYPE_CHECKING:
    import tensorflow as tf
    import tensorflow_datasets as tfds

    from hashvision.data.keys import Key

DATASET = "posts"
SPLIT = "train"

# Hashes, with the dataset's key, of a post's id, its owner and its file as posted, which removal
# lists are matched to.
_NAMES = [("id", "<u8"), ("owner", "<u8"), ("photo", "<u8")]
# One row per record, in the order of the shard, 36 bytes. `offset` is the record's first byte in
# its shard. `rarest` is the number of posts that have its rarest class, which every sampling rule
# uses; 0 if it has none.
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("rarest", "<u4"), *_NAMES])
# One row per post that `prepare` dropped as a copy, 32 bytes. `record` is the position in the shard
# of the record that shows its photo, in ascending order.
COPIES_DTYPE = np.dtype([("record", "<u8"), *_NAMES])

# TFRecord framing: u64 length, u32 CRC of the length, the bytes, u32 CRC of the bytes.
_FRAMING_BYTES = 8 + 4 + 4


class Copy(typing.NamedTuple):
    """A post dropped because a record shows its photo; its removal excludes that record."""

    id: str
    owner: str
    sha256: bytes  # digest of the file as it was posted


class Record(typing.NamedTuple):
    """One photo of a shard."""

    id: str
    owner: str
    image: bytes  # JPEG
    labels: tuple[int, ...]  # sorted class numbers, positions in vocabulary.json's "classes"
    sha256: bytes  # digest of the file as it was posted; only in the index
    copies: tuple[Copy, ...] = ()


def shard_name(shard: int, shards: int) -> str:
    """File name of shard number `shard` of `shards`, in TFDS's default template."""
    return f"{DATASET}-{SPLIT}.tfrecord-{shard:05d}-of-{shards:05d}"


def index_name(shard: int, shards: int) -> str:
    """File name of the index of that shard."""
    return f"index-{shard:05d}-of-{shards:05d}.npy"


def copies_name(shard: int, shards: int) -> str:
    """File name of the list of copies of that shard."""
    return f"copies-{shard:05d}-of-{shards:05d}.npy"


def encoded(name: str) -> bytes:
    """The bytes of an id or an owner, for hashing."""
    return name.encode("utf-8", "surrogatepass")


def id_hash(name: str) -> int:
    """64-bit BLAKE2b hash of a post's id, without a key; records are sorted by it."""
    return int.from_bytes(hashlib.blake2b(encoded(name), digest_size=8).digest(), "little")


def photo_hash(sha256: bytes) -> int:
    """The first 64 bits of a posted file's SHA-256 digest, as in indexes of version 1."""
    return int.from_bytes(sha256[:8], "little")


def features(class_names: Sequence[str]) -> "tfds.features.FeaturesDict":
    """The schema for TFDS, so that `tfds.builder_from_directory` opens the folder."""
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
    """Serializes a record as a tf.train.Example."""
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
    path: str | os.PathLike[str], records: Iterable[Record], counts: np.ndarray, key: "Key"
) -> tuple[np.ndarray, np.ndarray]:
    """Writes one shard and returns its index and its list of copies.

    Args:
      path: of the TFRecord file to write.
      records: the photos, in order.
      counts: int (K,), the number of posts that have each class.
      key: of the dataset.

    Returns:
      INDEX_DTYPE (N,), one row per record, and COPIES_DTYPE (M,), one row per dropped copy.
    """
    import tensorflow as tf

    def names(post: Record | Copy) -> tuple[int, int, int]:
        photo = key.hash("sha256", post.sha256)
        return key.hash("id", post.id), key.hash("owner", post.owner), photo

    index, copies, offset = [], [], 0
    with tf.io.TFRecordWriter(os.fspath(path)) as writer:
        for place, record in enumerate(records):
            serialized = serialize(record)
            writer.write(serialized)
            rarest = min(counts[list(record.labels)], default=0)
            index.append((offset, rarest, *names(record)))
            copies += sorted((place, *names(copy)) for copy in record.copies)
            offset += len(serialized) + _FRAMING_BYTES
    return np.array(index, INDEX_DTYPE), np.array(copies, COPIES_DTYPE)


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
