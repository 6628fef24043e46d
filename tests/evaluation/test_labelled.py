"""Tests of reading labelled photos: class folders, labels.jsonl, dataset folders."""

import collections
import hashlib
import importlib
import json
import os
import signal
import tracemalloc

import numpy as np
import pytest

from hashvision.data import keys, records, removals
from hashvision.errors import UserError
from hashvision.evaluation import labelled


def write_tree(root, photos):
    """Writes files that hold their own relative path; they are never decoded."""
    for name in photos:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def write_jsonl(root, rows):
    root.mkdir(exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (root / "labels.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return root


def write_dataset_folder(root, labels):
    """Writes a dataset folder with two shards, in the layout of prepare."""
    root.mkdir()
    classes = ["dog", "cat", "bird"]
    counts = np.array([30, 20, 10])
    rows = [
        records.Record(f"p{number}", "o", f"image {number}".encode(), tuple(row), b"")
        for number, row in enumerate(labels)
    ]
    half, shards, rarest = len(rows) // 2, [], collections.Counter()
    for shard, part in enumerate((rows[:half], rows[half:])):
        path = root / records.shard_name(shard, 2)
        index, _ = records.write_shard(path, part, counts, keys.NO_KEY)
        rarest.update(index["rarest"].tolist())
        shards.append({"name": path.name, "records": len(part), "bytes": path.stat().st_size})
    entry = {"count": 1, "tags": {}, "lemmas": []}
    vocabulary = {"classes": [{"name": name, **entry} for name in classes]}
    (root / "vocabulary.json").write_text(json.dumps(vocabulary))
    (root / "manifest.json").write_text(json.dumps({"shards": shards, "rarest": rarest}))
    return root


def test_tree_with_train_and_test(tmp_path):
    root = write_tree(
        tmp_path / "pets",
        [
            "train/dog/1.jpg", "train/dog/deep/2.PNG", "train/dog/notes.txt", "train/cat/3.jpeg",
            "train/.cache/4.jpg", "test/dog/5.jpg", "test/dog/.6.jpg", "test/cat/7.webp",
        ],
    )  # fmt: skip
    dataset = labelled.read(root)
    assert dataset.name == "pets"
    assert dataset.test.names == ("test/cat/7.webp", "test/dog/5.jpg")
    assert dataset.test.labels == (("cat",), ("dog",))
    assert list(dataset.test.images()) == [b"test/cat/7.webp", b"test/dog/5.jpg"]
    split = labelled.single_label(dataset)
    assert split.classes == ("cat", "dog")
    assert split.train.names == ("train/cat/3.jpeg", "train/dog/1.jpg", "train/dog/deep/2.PNG")
    np.testing.assert_array_equal(split.train_labels, [0, 1, 1])
    np.testing.assert_array_equal(split.test_labels, [0, 1])


def test_validation_folder_serves_as_test(tmp_path):
    names = [f"{part}/{kind}/1.jpg" for part in ("train", "val") for kind in "ab"]
    assert labelled.read(write_tree(tmp_path / "x", names)).test.names == (
        "val/a/1.jpg",
        "val/b/1.jpg",
    )


def test_tree_without_parts_is_split_by_name(tmp_path):
    names = [f"{kind}/{number}.jpg" for kind in ("dog", "train", "test") for number in range(12)]
    root = write_tree(tmp_path / "things", [*names, "single/1.jpg"])
    split = labelled.single_label(labelled.read(root))
    assert split.classes == ("dog", "test", "train")  # classes may have these names
    np.testing.assert_array_equal(np.bincount(split.train_labels), [9, 9, 9])
    np.testing.assert_array_equal(np.bincount(split.test_labels), [3, 3, 3])
    assert set(split.train.names) | set(split.test.names) == set(names)
    assert [image.decode() for image in split.test.images()] == list(split.test.names)
    assert [image.decode() for image in split.train.images()] == list(split.train.names)
    assert "no train and test parts" in split.note and "left out 1 photos" in split.note
    again = labelled.single_label(labelled.read(root))
    assert again.test.names == split.test.names


def test_the_split_by_name_does_not_depend_on_the_trees_path(tmp_path):
    names = [f"{kind}/{number}.jpg" for kind in "ab" for number in range(20)]
    here, there = write_tree(tmp_path / "x", names), write_tree(tmp_path / "y" / "z", names)
    first = labelled.single_label(labelled.read(here))
    assert first.test.names == labelled.single_label(labelled.read(there)).test.names


def test_labels_jsonl(tmp_path):
    rows = [
        {"image": "images/1.jpg", "labels": ["dog", "snow", "dog"]},
        {"image": "images/2.jpg", "labels": []},
        {"image": "images/gone.jpg", "labels": ["line\u2028break"]},
    ]
    root = write_jsonl(tmp_path / "words", rows)
    write_tree(root, ["images/1.jpg", "images/2.jpg"])
    for path in (root, root / "labels.jsonl"):
        dataset = labelled.read(path)
        assert dataset.name == "words"
        assert dataset.test.labels == (("dog", "snow"), (), ("line\u2028break",))
        assert list(dataset.test.images()) == [b"images/1.jpg", b"images/2.jpg", b""]


def test_photos_with_one_label_in_a_labels_jsonl_are_split(tmp_path):
    rows = [{"image": f"{n}.jpg", "labels": ["dog" if n % 2 else "cat"]} for n in range(16)]
    rows += [{"image": "both.jpg", "labels": ["dog", "cat"]}, {"image": "none.jpg", "labels": []}]
    split = labelled.single_label(labelled.read(write_jsonl(tmp_path / "w", rows)))
    assert (len(split.train.names), len(split.test.names)) == (12, 4)
    assert "both.jpg" not in split.train.names + split.test.names
    assert "left out 2 photos" in split.note


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "3", '{"image": "x.jpg"}', '{"image": 3, "labels": []}',
     '{"image": "x.jpg", "labels": "dog"}', '{"image": "x.jpg", "labels": [1]}'],
)  # fmt: skip
def test_the_message_on_a_malformed_labels_jsonl_names_the_line(tmp_path, line):
    (tmp_path / "labels.jsonl").write_text('{"image": "x.jpg", "labels": []}\n' + line)
    with pytest.raises(UserError, match=r"Line 2 of .*labels\.jsonl"):
        labelled.read(tmp_path)


def test_dataset_folder(tmp_path):
    root = write_dataset_folder(tmp_path / "prepared", [(0,), (1,), (0, 2), (1,), (0,)])
    dataset = labelled.read(root)
    assert dataset.name == "prepared"
    assert dataset.test.names == ("p0", "p1", "p2", "p3", "p4")
    assert dataset.test.labels == (("dog",), ("cat",), ("dog", "bird"), ("cat",), ("dog",))
    assert list(dataset.test.images()) == [f"image {number}".encode() for number in range(5)]
    split = labelled.single_label(dataset)
    assert split.classes == ("cat", "dog")
    assert sorted(split.train.names + split.test.names) == ["p0", "p1", "p3", "p4"]
    expected = [f"image {name[1:]}".encode() for name in split.train.names]
    assert list(split.train.images()) == expected


def test_dataset_folder_with_a_missing_or_damaged_shard(tmp_path):
    root = write_dataset_folder(tmp_path / "prepared", [(0,), (1,)] * 4)
    shard = root / records.shard_name(1, 2)
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    with pytest.raises(UserError, match="damaged"):
        labelled.read(root)
    shard.unlink()
    with pytest.raises(UserError, match="posts-train.tfrecord-00001-of-00002"):
        labelled.read(root)
    (root / records.shard_name(0, 2)).unlink()
    with pytest.raises(UserError, match="no TFRecord shards"):
        labelled.read(root)
    (root / "vocabulary.json").write_text("{}")
    with pytest.raises(UserError, match=r"vocabulary\.json"):
        labelled.read(root)


def test_errors_name_the_path(tmp_path):
    with pytest.raises(UserError, match="no folder .*nowhere"):
        labelled.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no images"):
        labelled.read(tmp_path)
    file = tmp_path / "photo.jpg"
    file.write_bytes(b"")
    with pytest.raises(UserError, match="is not a dataset"):
        labelled.read(file)
    (tmp_path / "labels.jsonl").write_text("\n")
    with pytest.raises(UserError, match="names no images"):
        labelled.read(tmp_path)
    (tmp_path / "labels.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        labelled.read(tmp_path)


def test_single_label_errors(tmp_path):
    tree = write_tree(tmp_path / "x", ["train/a/1.jpg", "train/b/1.jpg", "test/c/1.jpg"])
    with pytest.raises(UserError, match=r"1 classes .* lacks \(c\)"):
        labelled.single_label(labelled.read(tree))
    rows = [{"image": f"{n}.jpg", "labels": ["dog", "cat"]} for n in range(4)]
    with pytest.raises(UserError, match="--protocol=multilabel"):
        labelled.single_label(labelled.read(write_jsonl(tmp_path / "w", rows)))


def test_removed_photos_are_left_out(tmp_path):
    """In a dataset folder by id, owner or file; in other datasets by file."""
    folder = importlib.import_module("datasets").write(tmp_path / "set", size=20)  # tests/
    listed = [removals.Removal("owner", "u3", "", ""), removals.Removal("id", "p5", "", "")]
    found = labelled.read(folder, removals.RemovalList(listed)).test
    assert set(found.names) == {f"p{n}" for n in range(20) if n % 5 != 3 and n != 5}
    assert len(list(found.images())) == 15
    assert labelled.read(folder, removals.RemovalList(listed)).removed == 5
    root = write_tree(tmp_path / "pets", ["dog/1.jpg", "dog/2.jpg", "cat/3.jpg", "cat/4.jpg"])
    digest = hashlib.sha256(b"dog/2.jpg").hexdigest()
    listed.append(removals.Removal("sha256", digest, "", ""))
    assert labelled.read(root, removals.RemovalList(listed)).test.names == (
        "cat/3.jpg",
        "cat/4.jpg",
        "dog/1.jpg",
    )


HARMFUL_LINES = {
    "path with a null byte": '{"image": "a\\u0000.jpg", "labels": ["dog"]}',
    "surrogate that encodes no byte": '{"image": "a\\ud800.jpg", "labels": ["dog"]}',
    "label with a surrogate": '{"image": "a.jpg", "labels": ["do\\ud800g"]}',
    "label with a control character": '{"image": "a.jpg", "labels": ["dog\\u0000"]}',
    "brackets": "[" * 100_000,
    "objects": '{"image":' * 100_000,
    "a number for a path": '{"image": 5, "labels": ["dog"]}',
    "a long number": '{"image": ' + "9" * 10_000 + ', "labels": ["dog"]}',
}


@pytest.mark.parametrize("kind", HARMFUL_LINES)
def test_hostile_lines_are_refused_and_named(tmp_path, kind):
    good = '{"image": "a.jpg", "labels": ["dog"]}'
    (tmp_path / "labels.jsonl").write_text(f"{good}\n{HARMFUL_LINES[kind]}\n")
    with pytest.raises(UserError, match="Line 2 of .*labels.jsonl is not of the form"):
        labelled.read(tmp_path)


def test_a_labels_file_may_name_files_that_are_not_utf_8(tmp_path):
    """Python's json writes such names, as os.listdir returns them, with surrogates."""
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg"), "wb") as file:
        file.write(b"photo")
    write_jsonl(tmp_path / "set", [])
    row = json.dumps({"image": "../caf\udce9.jpg", "labels": ["dog"]})
    (tmp_path / "set" / "labels.jsonl").write_text("\ufeff" + row, encoding="utf-8")
    assert list(labelled.read(tmp_path / "set").test.images()) == [b"photo"]


def test_pipes_devices_loops_and_sparse_files_are_not_read(tmp_path):
    root = write_tree(tmp_path / "pets", ["dog/1.jpg", "cat/2.jpg"])
    os.mkfifo(root / "dog" / "pipe.jpg")
    (root / "dog" / "zero.png").symlink_to("/dev/zero")
    (root / "dog" / "link.png").symlink_to(root / "cat" / "2.jpg")
    (root / "dog" / "loop.png").symlink_to("loop.png")
    with open(root / "dog" / "sparse.tif", "wb") as file:
        file.truncate(5 * 2**30)
    photos = labelled.read(root).test
    signal.alarm(20)  # ends the test if it waits for the pipe
    tracemalloc.start()
    found = dict(zip(photos.names, photos.images(), strict=True))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    signal.alarm(0)
    assert {name for name, image in found.items() if image} == {
        "dog/1.jpg", "cat/2.jpg", "dog/link.png",
    }  # fmt: skip
    assert len(found) == 7 and most < 2**27


def test_every_path_of_a_dataset_locates_the_same_folder(tmp_path, monkeypatch):
    root = write_jsonl(tmp_path / "set", [{"image": "a.jpg", "labels": ["dog"]}])
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    for path in (root, f"{root}/", root / "labels.jsonl", "set", "link", "link/labels.jsonl"):
        assert labelled.read(path).path == labelled.locate(path) == str(root)
    (root / "labels.jsonl").rename(root / "people.jsonl")
    assert labelled.read(root / "people.jsonl").name == "people.jsonl"
