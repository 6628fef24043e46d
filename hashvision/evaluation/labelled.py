"""Labelled photos to evaluate on: class folders, a labels.jsonl or a dataset folder, read alike."""

import collections
import functools
import hashlib
import json
import os
import typing
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hashvision import storage
from hashvision.data import dataset as prepared
from hashvision.data import records, removals
from hashvision.errors import UserError
from hashvision.sources import files, pictures
from hashvision.sources.reasons import Dropped

LABELS_FILE = "labels.jsonl"
TEST_SHARE = 0.25
_TOGETHER = 32  # files that are read at once, where that is quicker
_TEST_FOLDERS = ("test", "val", "validation")


class Photos(typing.NamedTuple):
    """Photos with the names of what they show; the bytes are read only when asked for."""

    names: tuple[str, ...]  # path inside the dataset, or post id
    labels: tuple[tuple[str, ...], ...]
    places: np.ndarray  # int64 (N,), rising: where these photos stand in what `read` reads
    read: Callable[[np.ndarray], Iterator[bytes]]  # of rising places; b"" where a file is missing

    def images(self) -> Iterator[bytes]:
        """The encoded images, in the order of names."""
        return self.read(self.places)


class LabelledSet(typing.NamedTuple):
    """What lies at a path: its photos for testing and, if it says which, those for training."""

    path: str  # absolute
    test: Photos
    train: Photos | None
    removed: int = 0  # photos that were left out because a removal list names them

    @property
    def name(self) -> str:
        """The folder's own name."""
        return files.printable(os.path.basename(self.path))


class Split(typing.NamedTuple):
    """A dataset cut for the protocols that learn one class a photo from train."""

    classes: tuple[str, ...]
    train: Photos
    train_labels: np.ndarray  # int64 (N,), positions in classes
    test: Photos
    test_labels: np.ndarray  # int64 (M,)
    note: str  # one sentence: where the split comes from


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


def take(photos: Photos, indices: np.ndarray) -> Photos:
    """The photos at the given positions, int (n,), in the order of `photos`."""
    rising = np.sort(indices)
    return Photos(
        tuple(photos.names[index] for index in rising),
        tuple(photos.labels[index] for index in rising),
        photos.places[rising],
        photos.read,
    )


def _subfolders(folder: str) -> list[str]:
    """Names of the folders in a folder that are not hidden; none where it is not there."""
    _, names, _ = next(storage.walk(folder), ("", [], []))
    return [name for name in names if not name.startswith(".")]


def _class_folders(root: str, folder: str) -> Photos:
    """Every image file at any depth under a class folder, labelled with the class folder's name."""
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
            f"{folder} holds no images in class folders; "
            "evaluation wants FOLDER/CLASS/photo.jpg or FOLDER/train and FOLDER/test of that form."
        )
    names = [path.removeprefix(f"{root}/") for path in paths]
    return _photos(names, labels, functools.partial(_read_files, paths))


def _read_tree(root: str) -> LabelledSet:
    train, folders = f"{root}/train", _subfolders(root)
    tests = [f"{root}/{name}" for name in _TEST_FOLDERS if name in folders]
    # A class may itself be called "train"; split folders hold folders.
    if tests and _subfolders(train) and _subfolders(tests[0]):
        return LabelledSet(root, _class_folders(root, tests[0]), _class_folders(root, train))
    return LabelledSet(root, _class_folders(root, root), None)


def _parse_row(line: str) -> tuple[str, tuple[str, ...]] | None:
    """The image and the labels (once each) of a line of labels.jsonl; None if it is malformed."""
    try:
        row = json.loads(line)
        image, labels = row["image"], row["labels"]
        os.fsencode(image)  # fails for surrogates that stand for no byte
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    texts = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not (isinstance(image, str) and "\0" not in image and texts):
        return None
    if any(files.printable(label) != label for label in labels):
        return None
    return image, tuple(dict.fromkeys(labels))


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
                f"Line {number} of {file} is not of the form "
                '{"image": PATH, "labels": [NAME, ...]}; mend or remove it.'
            )
        paths.append(os.path.join(folder, row[0]))
        names.append(row[0])
        labels.append(row[1])
    if not paths:
        raise UserError(f"{file} names no images; each line wants an image and its labels.")
    photos = _photos(names, labels, functools.partial(_read_files, paths))
    return LabelledSet(locate(file), photos, None)


def _read_record_images(shards: Sequence[str], places: np.ndarray) -> Iterator[bytes]:
    import tensorflow as tf

    wanted = frozenset(places.tolist())
    serialized = tf.data.TFRecordDataset(list(shards))
    images = serialized.map(lambda record: records.parse(record)["image"])
    for place, image in enumerate(images.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()):
        if place in wanted:
            yield bytes(image)


def _shards(root: str) -> list[str]:
    shards = storage.names(root, f"{records.DATASET}-{records.SPLIT}.tfrecord-*-of-*")
    if not shards:
        raise UserError(f"{root} holds a manifest.json but no TFRecord shards; prepare it again.")
    number = int(shards[0].rpartition("-")[2])
    expected = [records.shard_name(shard, number) for shard in range(number)]
    missing = [name for name in expected if name not in {*shards}]
    if missing:
        raise UserError(
            f"{root} lacks the shard {missing[0]} ({len(missing)} of {number} are missing); "
            "copy it again or prepare the folder again."
        )
    return [f"{root}/{name}" for name in expected]


def _read_records(source: prepared.Dataset) -> LabelledSet:
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
            f"A shard of {root} is damaged or does not fit its vocabulary.json "
            f"(after {len(names)} records); prepare the folder again."
        ) from error
    if not names:
        raise UserError(f"{root} holds no records; nothing can be evaluated on it.")
    photos = _photos(names, labels, functools.partial(_read_record_images, shards))
    return LabelledSet(root, photos, None)


def locate(path: str | os.PathLike[str]) -> str:
    """The absolute path by which a dataset is known, links followed; a labels.jsonl's folder."""
    root = os.fspath(path)
    if not storage.is_remote(root):
        root = os.path.realpath(os.path.expanduser(root))
    return storage.absolute(root).removesuffix(f"/{LABELS_FILE}")


def read(
    path: str | os.PathLike[str], removed: removals.RemovalList = removals.NO_LIST
) -> LabelledSet:
    """Reads the names and labels of the photos at a path; the images stay where they are.

    Args:
      path: a folder FOLDER/CLASS/photo.jpg; FOLDER/train and FOLDER/test (or val, validation) of
        that form; a labels.jsonl (lines {"image": path beside the file, "labels": [name, ...]}) or
        the folder that holds it; or a dataset folder as `prepare` writes it.
      removed: photos to leave out: of a dataset folder by post, owner and file, of files by file.

    Raises:
      UserError: nothing of this kind lies there, or it is broken.
    """
    root = locate(path)
    if storage.is_file(f"{root}/{prepared.MANIFEST}"):
        source = prepared.load(root)
        names = source.names(removed)
        return _without(_read_records(source), lambda _: _match_records(source, names), names)
    names = removals.names(removed.lines)
    return _without(_read_files_at(root), lambda photos: _match_files(photos, names), names)


def _read_files_at(root: str) -> LabelledSet:
    if storage.is_file(root):
        if not root.endswith(".jsonl"):
            raise UserError(f"{root} is no dataset; name a folder of images or a {LABELS_FILE}.")
        return _read_jsonl(root)
    if not storage.is_folder(root):
        raise UserError(f"There is no folder {root}; name the dataset to evaluate on.")
    if storage.is_file(f"{root}/{LABELS_FILE}"):
        return _read_jsonl(f"{root}/{LABELS_FILE}")
    return _read_tree(root)


def _without(
    dataset: LabelledSet, match: Callable[[Photos], np.ndarray], removed: removals.Names
) -> LabelledSet:
    """The dataset without the photos that match, where there is a list at all."""
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


def _match_records(source: prepared.Dataset, removed: removals.Names) -> np.ndarray:
    """Bool (N,), by all that the index knows of the posts, and of the copies they stand for."""
    return removals.marks(source.find_removed(0, len(source), removed), 0, len(source))


def _match_files(photos: Photos, removed: removals.Names) -> np.ndarray:
    """Bool (N,), by the bytes of the files: they know neither posts nor owners."""
    if not len(removed.values["sha256"]):
        return np.zeros(len(photos.names), bool)
    digests = (hashlib.sha256(image).digest() for image in photos.images())
    return np.array([removed.holds("sha256", each) for each in digests], bool)


def _name_hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _test_part(names: Sequence[str], labels: np.ndarray) -> np.ndarray:
    """Marks the test photos, bool (N,): of each class, the quarter whose names hash lowest."""
    marks = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = sorted(
            np.flatnonzero(labels == label).tolist(), key=lambda index: _name_hash(names[index])
        )
        marks[members[: max(1, round(TEST_SHARE * len(members)))]] = True
    return marks


def _numbers(photos: Photos, classes: Sequence[str]) -> np.ndarray:
    position = {name: number for number, name in enumerate(classes)}
    return np.array([position[labels[0]] for labels in photos.labels], np.int64)


def single_label(dataset: LabelledSet) -> Split:
    """Cuts a dataset into train and test photos of one class each.

    Where the dataset does not say which photos are for training, a quarter of each class, chosen
    by the hash of the photos' names, becomes the test; photos with no label or several are left
    out, and so are classes of a single photo, which cannot stand on both sides.

    Raises:
      UserError: fewer than two classes remain, or the test shows classes that train does not.
    """
    train, test = dataset.train, dataset.test
    if train is not None:
        classes = tuple(sorted({labels[0] for labels in train.labels}))
        unknown = sorted({labels[0] for labels in test.labels} - set(classes))
        if unknown:
            raise UserError(
                f"The test part of {dataset.name} has {len(unknown)} classes that its train part "
                f"lacks ({', '.join(unknown[:5])}); add photos of them to train or remove them."
            )
        note = f"train and test as the folders of {dataset.name} say"
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
            note += f"; left out {left_out:,} photos without exactly one label or alone in a class"
    if len(classes) < 2:
        raise UserError(
            f"{dataset.name} has {len(classes)} classes with photos of exactly one label, and kNN "
            "and linear probes need two; give another dataset or use --protocol=multilabel."
        )
    return Split(classes, train, _numbers(train, classes), test, _numbers(test, classes), note)
