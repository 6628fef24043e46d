"""Reads labelled photos to evaluate on: class folders, a labels.jsonl, or a dataset folder."""

import collections
import functools
import hashlib
import json
import os
import typing
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Int64, Integer

from hashvision import storage
from hashvision.data import records, removals
from hashvision.data.dataset import MANIFEST, Dataset, load
from hashvision.errors import UserError
from hashvision.sources import files, pictures
from hashvision.sources.reasons import Dropped

LABELS_FILE = "labels.jsonl"
TEST_SHARE = 0.25
_TOGETHER = 32  # files of a bucket that are read concurrently
_TEST_FOLDERS = ("test", "val", "validation")


class Photos(typing.NamedTuple):
    """Photos and their labels; the encoded images are read on demand."""

    names: tuple[str, ...]  # path inside the dataset, or post id
    labels: tuple[tuple[str, ...], ...]
    places: Int64[np.ndarray, " N"]  # ascending: the photos' positions for `read`
    read: Callable[[np.ndarray], Iterator[bytes]]  # ascending positions -> b"" for a missing file

    def images(self) -> Iterator[bytes]:
        """The encoded images, in the order of names."""
        return self.read(self.places)


class LabelledSet(typing.NamedTuple):
    """The photos at a path: test photos and, if the dataset has such a part, training photos."""

    path: str  # absolute
    test: Photos
    train: Photos | None
    removed: int = 0  # photos left out because a removal list names them

    @property
    def name(self) -> str:
        """The name of the folder."""
        return files.printable(os.path.basename(self.path))


class Split(typing.NamedTuple):
    """Training and test photos with one class each."""

    classes: tuple[str, ...]
    train: Photos
    train_labels: Int64[np.ndarray, " N"]  # positions in classes
    test: Photos
    test_labels: Int64[np.ndarray, " M"]  # positions in classes
    note: str  # how the split was made, for the report


def read(
    path: str | os.PathLike[str], removed: removals.RemovalList = removals.NO_LIST
) -> LabelledSet:
    """Reads the names and labels of the photos at a path, but not the images.

    Args:
      path: a folder with CLASS/photo.jpg; a folder with train and test (or val, validation) of that
        form; a labels.jsonl with lines {"image": PATH, "labels": [NAME, ...]}, where PATH is
        relative to the file, or the folder that holds it; or a dataset folder of `prepare`.
      removed: photos to leave out: by post, owner and file in a dataset folder, otherwise by file.

    Raises:
      UserError: there is no such dataset at the path, or it is damaged.
    """
    root = locate(path)
    if storage.is_file(f"{root}/{MANIFEST}"):
        source = load(root)
        names = source.names(removed)
        return _without(_read_records(source), lambda _: _match_records(source, names), names)
    names = removals.names(removed.lines)
    return _without(_read_files_at(root), lambda photos: _match_files(photos, names), names)


def locate(path: str | os.PathLike[str]) -> str:
    """The absolute path of a dataset's folder, with links resolved; reports identify it by this."""
    root = os.fspath(path)
    if not storage.is_remote(root):
        root = os.path.realpath(os.path.expanduser(root))
    return storage.absolute(root).removesuffix(f"/{LABELS_FILE}")


def single_label(dataset: LabelledSet) -> Split:
    """Splits a dataset into training and test photos with one class each.

    If the dataset has no training part, a quarter of each class becomes the test part, chosen by
    the hash of the photos' names. Then photos without exactly one label are left out, and so are
    classes with a single photo, which cannot be in both parts.

    Raises:
      UserError: fewer than two classes remain, or the test part has classes that train lacks.
    """
    train, test = dataset.train, dataset.test
    if train is not None:
        classes = tuple(sorted({labels[0] for labels in train.labels}))
        unknown = sorted({labels[0] for labels in test.labels} - set(classes))
        if unknown:
            raise UserError(
                f"The test part of {dataset.name} has {len(unknown)} classes that its train part"
                f" lacks ({', '.join(unknown[:5])}); add photos of them to train or remove them."
            )
        note = f"the folders train and test of {dataset.name}"
    else:
        number = collections.Counter(labels[0] for labels in test.labels if len(labels) == 1)
        classes = tuple(sorted(name for name, photos in number.items() if photos > 1))
        kept = [
            index
            for index, labels in enumerate(test.labels)
            if len(labels) == 1 and number[labels[0]] > 1
        ]
        left_out = len(test.names) - len(kept)
        whole = take(test, np.array(kept, np.int64))
        marks = _test_part(whole.names, _numbers(whole, classes))
        train, test = take(whole, np.flatnonzero(~marks)), take(whole, np.flatnonzero(marks))
        note = f"{dataset.name} has no train and test parts: split by the hash of file names"
        if left_out:
            note += (
                f"; left out {left_out:,} photos that do not have exactly one label or are the only"
                " one of their class"
            )
    if len(classes) < 2:
        raise UserError(
            f"{dataset.name} has {len(classes)} classes with photos of exactly one label, and kNN"
            " and linear probes need two; give another dataset or use --protocol=multilabel."
        )
    return Split(
        classes=classes,
        train=train,
        train_labels=_numbers(train, classes),
        test=test,
        test_labels=_numbers(test, classes),
        note=note,
    )


def take(photos: Photos, indices: Integer[np.ndarray, " n"]) -> Photos:
    """The photos at the given positions, int (n,), in the order of `photos`."""
    rising = np.sort(indices)
    return Photos(
        tuple(photos.names[index] for index in rising),
        tuple(photos.labels[index] for index in rising),
        photos.places[rising],
        photos.read,
    )


def _read_records(source: Dataset) -> LabelledSet:
    import tensorflow as tf

    root = source.path
    classes = [entry["name"] for entry in source.vocabulary["classes"]]
    shards = _shards(root)
    names, labels = [], []

    def without_image(serialized: "tf.Tensor") -> tuple["tf.Tensor", "tf.Tensor"]:
        record = records.parse(serialized)
        return record["id"], record["labels"]

    serialized = tf.data.TFRecordDataset(list(shards))
    try:
        rows = serialized.map(without_image).prefetch(tf.data.AUTOTUNE)
        for post_id, numbers in rows.as_numpy_iterator():
            names.append(bytes(post_id).decode("utf-8", "backslashreplace"))
            labels.append(tuple(classes[number] for number in numbers))
        if len(names) != len(source):
            raise IndexError
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError, IndexError) as error:
        raise UserError(
            f"A shard of {root} is damaged or does not fit its vocabulary.json"
            f" (after {len(names)} records); prepare the folder again."
        ) from error
    if not names:
        raise UserError(f"{root} holds no records; give another --dataset.")
    photos = _photos(names, labels, functools.partial(_read_record_images, shards))
    return LabelledSet(root, photos, None)


def _shards(root: str) -> list[str]:
    shards = storage.names(root, f"{records.DATASET}-{records.SPLIT}.tfrecord-*-of-*")
    if not shards:
        raise UserError(f"{root} holds a manifest.json but no TFRecord shards; prepare it again.")
    number = int(shards[0].rpartition("-")[2])
    expected = [records.shard_name(shard, number) for shard in range(number)]
    missing = [name for name in expected if name not in {*shards}]
    if missing:
        raise UserError(
            f"{root} lacks the shard {missing[0]} ({len(missing)} of {number} are missing);"
            " copy it again or prepare the folder again."
        )
    return [f"{root}/{name}" for name in expected]


def _read_record_images(shards: Sequence[str], places: np.ndarray) -> Iterator[bytes]:
    import tensorflow as tf

    wanted = frozenset(places.tolist())
    serialized = tf.data.TFRecordDataset(list(shards))
    images = serialized.map(lambda record: records.parse(record)["image"])
    for place, image in enumerate(images.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()):
        if place in wanted:
            yield bytes(image)


def _read_files_at(root: str) -> LabelledSet:
    if storage.is_file(root):
        if not root.endswith(".jsonl"):
            raise UserError(f"{root} is not a dataset; give a folder of images or a {LABELS_FILE}.")
        return _read_jsonl(root)
    if not storage.is_folder(root):
        raise UserError(f"There is no folder {root}; give the path of a dataset to evaluate on.")
    if storage.is_file(f"{root}/{LABELS_FILE}"):
        return _read_jsonl(f"{root}/{LABELS_FILE}")
    return _read_tree(root)


def _read_jsonl(file: str) -> LabelledSet:
    folder = os.path.dirname(file)
    paths, names, labels = [], [], []
    try:
        lines = storage.read(file).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text ({error}).") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _parse_row(line)
        if row is None:
            raise UserError(
                f"Line {number} of {file} is not of the form"
                ' {"image": PATH, "labels": [NAME, ...]}; fix or remove it.'
            )
        paths.append(os.path.join(folder, row[0]))
        names.append(row[0])
        labels.append(row[1])
    if not paths:
        raise UserError(f"{file} names no images; write an image and its labels on each line.")
    photos = _photos(names, labels, functools.partial(_read_files, paths))
    return LabelledSet(locate(file), photos, None)


def _parse_row(line: str) -> tuple[str, tuple[str, ...]] | None:
    """The image and the distinct labels of a line of labels.jsonl; None if it is malformed."""
    try:
        row = json.loads(line)
        image, labels = row["image"], row["labels"]
        os.fsencode(image)  # fails for surrogates that do not encode a byte
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    texts = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not (isinstance(image, str) and "\0" not in image and texts):
        return None
    if any(files.printable(label) != label for label in labels):
        return None
    return image, tuple(dict.fromkeys(labels))


def _read_tree(root: str) -> LabelledSet:
    train, folders = f"{root}/train", _subfolders(root)
    tests = [f"{root}/{name}" for name in _TEST_FOLDERS if name in folders]
    # A class may be called "train", but only a split folder holds folders.
    if tests and _subfolders(train) and _subfolders(tests[0]):
        return LabelledSet(root, _class_folders(root, tests[0]), _class_folders(root, train))
    return LabelledSet(root, _class_folders(root, root), None)


def _subfolders(folder: str) -> list[str]:
    """Names of the folders in a folder that are not hidden; none if it does not exist."""
    _, names, _ = next(storage.walk(folder), ("", [], []))
    return [name for name in names if not name.startswith(".")]


def _class_folders(root: str, folder: str) -> Photos:
    """All image files below class folders, each labelled with its class folder's name."""
    paths, labels = [], []
    for class_name in _subfolders(folder):
        found = sorted(
            (
                f"{parent}/{name}"
                for parent, _, names in storage.walk(f"{folder}/{class_name}")
                for name in names
                if name.lower().endswith(pictures.SUFFIXES) and name[0] != "."
            ),
            key=lambda path: path.split("/"),
        )
        paths += found
        labels += [(files.printable(class_name),)] * len(found)
    if not paths:
        raise UserError(
            f"{folder} holds no images in class folders; give --dataset a folder with"
            " CLASS/photo.jpg, or with train and test folders of that form."
        )
    names = [path.removeprefix(f"{root}/") for path in paths]
    return _photos(names, labels, functools.partial(_read_files, paths))


def _photos(
    names: Sequence[str],
    labels: Sequence[tuple[str, ...]],
    read: Callable[[np.ndarray], Iterator[bytes]],
) -> Photos:
    return Photos(tuple(names), tuple(labels), np.arange(len(names)), read)


def _read_files(paths: Sequence[str], places: np.ndarray) -> Iterator[bytes]:
    def read(place: int) -> bytes:
        try:
            return files.read(paths[place])
        except Dropped:
            return b""

    if not paths or not storage.is_remote(paths[0]):
        yield from map(read, places.tolist())
        return
    for begin in range(0, len(places), _TOGETHER):
        yield from storage.parallel_map(
            read, places[begin : begin + _TOGETHER].tolist(), remote=True
        )


def _without(
    dataset: LabelledSet, match: Callable[[Photos], np.ndarray], removed: removals.Names
) -> LabelledSet:
    """The dataset without the photos that match; unchanged if the removal list is empty."""
    if not removed:
        return dataset
    kept, count = {}, 0
    for part in ("test", "train"):
        photos: Photos | None = getattr(dataset, part)
        if photos is None:
            continue
        out = match(photos)
        if out.all():
            raise UserError(
                f"The removal list names all {len(out):,} {part} photos of {dataset.path};"
                " use another dataset."
            )
        kept[part], count = take(photos, np.flatnonzero(~out)), count + int(out.sum())
    return dataset._replace(removed=count, **kept)


def _match_records(source: Dataset, removed: removals.Names) -> np.ndarray:
    """Bool (N,): whether the index says that a record, or a copy it stands for, is removed."""
    return removals.marks(source.find_removed(0, len(source), removed), 0, len(source))


def _match_files(photos: Photos, removed: removals.Names) -> np.ndarray:
    """Bool (N,): whether a file's bytes are removed; files have no posts or owners."""
    if not len(removed.values["sha256"]):
        return np.zeros(len(photos.names), bool)
    digests = (hashlib.sha256(image).digest() for image in photos.images())
    return np.array([removed.holds("sha256", each) for each in digests], bool)


def _numbers(photos: Photos, classes: Sequence[str]) -> np.ndarray:
    position = {name: number for number, name in enumerate(classes)}
    return np.array([position[labels[0]] for labels in photos.labels], np.int64)


def _test_part(names: Sequence[str], labels: np.ndarray) -> np.ndarray:
    """Marks the test photos, bool (N,): in each class, the quarter with the lowest name hashes."""
    marks = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = sorted(
            np.flatnonzero(labels == label).tolist(), key=lambda index: _name_hash(names[index])
        )
        marks[members[: max(1, round(TEST_SHARE * len(members)))]] = True
    return marks


def _name_hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
