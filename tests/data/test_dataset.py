"""Tests that dataset folders open, and that damaged ones raise errors naming the file."""

import collections
import hashlib
import json
import os

import numpy as np
import pytest

import datasets
from hashvision.data import dataset, records, removals, stream
from hashvision.errors import UserError

INDEX, COPIES = records.index_name(0, 2), records.copies_name(0, 2)


def copy(number, owner="elsewhere"):
    """The post c{number}, which is a copy of a record."""
    digest = hashlib.sha256(b"copy %d" % number).digest()
    return records.Copy(f"c{number}", owner, digest)


def write(folder, size=64, **options):
    return datasets.write(folder, size, photo=lambda number: b"photo %d" % number, **options)


def listed(*lines, keep=False):
    lines = [removals.Removal(kind, value, "", "") for kind, value in lines]
    return removals.RemovalList(lines, keep_copies=keep)


def positions(source, first, last, listed):
    names = source.names(listed)
    return np.flatnonzero(
        removals.marks(source.find_removed(first, last, names), first, last - first)
    )


def edit(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def opened(folder):
    """Reads everything that a run reads before its first photo."""
    source = dataset.load(str(folder))
    stream.Stream(source, batch_size=16, lanes=4, seed=0, method="square_root")
    return source


@pytest.mark.parametrize("version", [1, 2])
def test_loads_what_was_written(tmp_path, version):
    folder = write(tmp_path / "set", size=20, shards=3, version=version)
    loaded = dataset.load(str(folder))
    assert len(loaded) == 20 and len(loaded.shards) == 3 and loaded.version == version
    assert np.bincount(loaded.shard_of(np.arange(20))).tolist() == [6, 7, 7]
    rows = loaded.rows(0, 20)
    key = loaded.key()
    assert rows["id"].tolist() == [key.hash("id", f"p{number}") for number in range(20)]
    np.testing.assert_array_equal(loaded.rows(4, 15), rows[4:15])
    np.testing.assert_array_equal(loaded.rows(7, 7), rows[7:7])
    values, photos = loaded.rarest
    assert dict(zip(values, photos, strict=True)) == collections.Counter(rows["rarest"])
    assert loaded.class_counts.sum() >= 20


def test_a_list_matches_records_by_their_copies(tmp_path):
    # The border between the shards is between records 31 and 32.
    copies = [(3, copy(0)), (31, copy(1)), (31, copy(2, "u0")), (32, copy(3)), (63, copy(4))]
    source = opened(write(tmp_path / "set", copies=copies))
    assert source.copies(0, 64)["record"].tolist() == [3, 31, 31, 32, 63]
    assert source.copies(31, 33)["record"].tolist() == [31, 31, 32]
    assert positions(source, 0, 64, listed(("id", "c0"), ("id", "p7"))).tolist() == [3, 7]
    assert positions(source, 30, 40, listed(("id", "c1"), ("id", "c3"))).tolist() == [1, 2]
    digest = copy(4).sha256.hex()
    assert positions(source, 0, 64, listed(("sha256", digest.upper()))).tolist() == [63]
    hits = source.find_removed(0, 64, source.names(listed(("owner", "u0"))))
    assert sorted(hits["record"][~hits["copy"]].tolist()) == list(range(0, 64, 5))
    assert hits["record"][hits["copy"]].tolist() == [31]


def test_keep_copies_applies_to_owners_but_not_to_posts_and_files(tmp_path):
    source = opened(write(tmp_path / "set", copies=[(3, copy(0)), (9, copy(1))]))
    lines = ("owner", "elsewhere"), ("id", "c0")
    assert positions(source, 0, 64, listed(*lines)).tolist() == [3, 9]
    assert positions(source, 0, 64, listed(*lines, keep=True)).tolist() == [3]


def test_datasets_without_copies_and_of_version_1_list_none(tmp_path):
    for version in (1, 2):
        folder = write(tmp_path / str(version), version=version)
        assert len(opened(folder).copies(0, 64)) == 0


@pytest.mark.parametrize("name", ["vocabulary.json", "manifest.json", INDEX, COPIES])
def test_a_missing_file_is_named(tmp_path, name):
    folder = write(tmp_path / "set")
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        source = opened(folder)
        source.copies(0, 64)


def rolled(table):
    return np.roll(table, 1)


def shuffled(table):
    return np.random.default_rng(0).permutation(table)


def other_columns(table):
    """Changes only the hashes, so lengths and offsets stay valid."""
    table = table.copy()
    table["id"] = np.roll(table["id"], 1)
    return table


@pytest.mark.parametrize("change", [rolled, shuffled, other_columns, lambda table: table[:3]])
def test_an_index_that_does_not_match_its_shard_is_refused(tmp_path, change):
    folder = write(tmp_path / "set")
    np.save(folder / INDEX, change(np.load(folder / INDEX)))
    with pytest.raises(UserError, match=f"{INDEX} is not the file that manifest.json lists"):
        opened(folder)


@pytest.mark.parametrize("change", [rolled, shuffled, lambda table: table[:3]])
def test_an_index_without_a_digest_is_checked_by_its_offsets(tmp_path, change):
    folder = write(tmp_path / "set", version=1)
    np.save(folder / INDEX, change(np.load(folder / INDEX)))
    with pytest.raises(UserError, match=f"{INDEX} is not the index of the 32 records"):
        opened(folder)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "content",
    [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff", np.random.default_rng(0).bytes(999)]
    + [b"\x93NUMPY\x01\x00\x40\x1f" + b"(" * 8000, b"\x93NUMPY\x01\x00\x40\x1f" + b"-" * 8000],
    ids=len,
)
def test_a_garbage_index_is_named(tmp_path, version, content):
    folder = write(tmp_path / "set", version=version)
    (folder / INDEX).write_bytes(content)
    with pytest.raises(UserError, match=INDEX):
        opened(folder)


def test_an_index_that_claims_to_be_huge_takes_no_memory(tmp_path):
    folder = write(tmp_path / "set", version=1)
    content = (folder / INDEX).read_bytes()
    assert content.count(b"(32,), }        ") == 1
    (folder / INDEX).write_bytes(content.replace(b"(32,), }        ", b"(9999999999,), }"))
    with pytest.raises(UserError, match=INDEX):
        opened(folder)


@pytest.mark.parametrize("records_", [[32], [5, 4], [2**63]])
def test_copies_of_missing_records_are_named(tmp_path, records_):
    folder = write(tmp_path / "set")
    table = np.zeros(len(records_), records.COPIES_DTYPE)
    table["record"] = records_
    np.save(folder / COPIES, table)
    with pytest.raises(UserError, match=f"{COPIES} is not the file"):
        opened(folder).copies(0, 64)
    datasets.seal(folder)
    with pytest.raises(UserError, match=f"{COPIES} is not the list of copies of the 32 records"):
        opened(folder).copies(0, 64)


def cut(classes):
    return classes[:-1]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("change", [cut, lambda classes: [*classes, classes[0]]])
def test_a_vocabulary_of_other_classes_is_refused(tmp_path, version, change):
    folder = write(tmp_path / "set", version=version)
    vocabulary = json.loads((folder / "vocabulary.json").read_text())
    vocabulary["classes"] = change(vocabulary["classes"])
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match="vocabulary.json.*that manifest.json lists"):
        opened(folder)


def test_a_vocabulary_in_another_order_is_refused(tmp_path):
    folder = write(tmp_path / "set")
    vocabulary = json.loads((folder / "vocabulary.json").read_text())
    vocabulary["classes"].reverse()
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match="vocabulary.json is not the file that manifest.json lists"):
        opened(folder)


DEEP = "[" * 100_000
ANYTHING = ["null", "[]", '"manifest"', "-5", "1e18", "NaN", "true", "{}", "", "\x00", DEEP]
ANYTHING += ['{"a":' * 100_000, '{"a":' * 300 + "1" + "}" * 300, '{"shards": []}'[:-1], "9" * 9999]


@pytest.mark.parametrize("text", ANYTHING, ids=lambda text: text[:20])
@pytest.mark.parametrize("name", ["vocabulary.json", "manifest.json"])
@pytest.mark.parametrize("version", [1, 2])
def test_wrong_json_gives_a_one_sentence_error(tmp_path, version, name, text):
    folder = write(tmp_path / "set", size=16, version=version)
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=name) as told:
        opened(folder)
    assert "\n" not in str(told.value) and len(str(told.value)) < 600
    if name == "vocabulary.json" and version == 2:  # with a matching digest
        edit(folder, vocabulary_sha256=hashlib.sha256(text.encode()).hexdigest())
        with pytest.raises(UserError, match=name):
            opened(folder)


VALUES = [None, [], {}, "x", -5, 0, 1.5, 10**18, float("nan"), True, [1], {"a": 1}, [None], "../x"]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "key", ["format", "shards", "rarest", "classes", "key", "vocabulary_sha256"]
)
def test_a_wrong_value_in_a_manifest_gives_a_one_sentence_error(tmp_path, key, version):
    folder = write(tmp_path / "set", version=version)
    whole = (folder / "manifest.json").read_text()
    for value in VALUES:
        (folder / "manifest.json").write_text(whole)
        if version == 1 and key in ("key", "vocabulary_sha256"):
            continue  # version 1 has none
        edit(folder, **{key: value})
        with pytest.raises(UserError, match=r"manifest\.json") as told:
            opened(folder)
        assert "\n" not in str(told.value) and len(str(told.value)) < 400


@pytest.mark.parametrize("key", ["name", "records", "bytes", "sha256", "index_sha256"])
def test_a_wrong_shard_in_a_manifest_gives_an_error(tmp_path, key):
    folder = write(tmp_path / "set")
    whole = (folder / "manifest.json").read_text()
    for value in [*VALUES, "../set/" + records.shard_name(0, 2), records.shard_name(1, 2)]:
        manifest = json.loads(whole)
        manifest["shards"][0][key] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=r"manifest\.json|index-"):
            opened(folder)


def test_shards_in_another_order_are_refused(tmp_path):
    folder = write(tmp_path / "set")
    edit(folder, shards=json.loads((folder / "manifest.json").read_text())["shards"][::-1])
    with pytest.raises(UserError, match="the invalid shard 0"):
        opened(folder)


def test_a_dataset_of_a_later_version_is_named(tmp_path):
    folder = write(tmp_path / "set")
    edit(folder, format={"name": dataset.FORMAT, "version": dataset.VERSION + 1})
    with pytest.raises(UserError, match="has format version 3.*versions up to 2"):
        dataset.load(str(folder))


def test_a_dataset_of_an_earlier_version_is_named(tmp_path):
    folder = write(tmp_path / "set", version=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["rarest"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="earlier format"):
        dataset.load(str(folder))


def test_examples_of_version_1_that_name_people_are_discarded(tmp_path):
    folder = write(tmp_path / "set", version=1)
    dropped = {"private": {"count": 1, "examples": ["anna"]}}
    edit(folder, posts={"read": 65, "kept": 64, "dropped": dropped})
    manifest = dataset.load(str(folder)).manifest
    assert manifest["posts"]["dropped"] == {"private": {"count": 1, "examples": []}}
    assert manifest["posts"]["read"] == 65


@pytest.mark.parametrize("version", [1, 2])
def test_verify_checks_all_bytes_of_a_dataset(tmp_path, version):
    folder = write(tmp_path / "set", version=version)
    dataset.load(str(folder)).verify()
    names = [records.shard_name(1, 2), records.index_name(1, 2), records.copies_name(1, 2)]
    for name in names if version == 2 else names[:1]:
        whole = (folder / name).read_bytes()
        for content in (whole[:-1], whole + b"\0", whole[:-20] + bytes(20)):
            if version == 1 and len(content) == len(whole):
                continue  # version 1 has no digest that could detect it
            (folder / name).write_bytes(content)
            with pytest.raises(UserError, match=f"{name} is not the file that manifest.json lists"):
                dataset.load(str(folder)).verify()
        (folder / name).unlink()
        with pytest.raises(UserError, match=name):
            dataset.load(str(folder)).verify()
        (folder / name).write_bytes(whole)
    dataset.load(str(folder)).verify()


def test_the_key_is_next_to_the_target_of_a_link(tmp_path):
    folder = write(tmp_path / "set")
    os.symlink(folder, tmp_path / "current")
    assert dataset.load(str(tmp_path / "current")).key() == datasets.KEY
    assert dataset.load(f"{folder}/").key() == datasets.KEY


def test_a_key_that_is_missing_wrong_or_damaged_is_named(tmp_path):
    folder = write(tmp_path / "set")
    source, beside = dataset.load(str(folder)), tmp_path / "set.key"
    beside.rename(tmp_path / "kept")
    with pytest.raises(UserError, match="set.key cannot be read .*if the key is lost"):
        source.names(listed(("id", "p1")))
    assert not source.names(removals.RemovalList())  # needs none
    given = listed(("id", "p1"))._replace(key=str(tmp_path / "kept"))
    assert positions(source, 0, 64, removals.RemovalList()).tolist() == []
    hits = source.find_removed(0, 64, source.names(given))
    assert hits["record"].tolist() == [1]
    beside.write_text("00" * 32)
    with pytest.raises(UserError, match="set.key is the key [0-9a-f]{16}, but .*--key"):
        source.names(listed(("id", "p1")))
    for text in ("", "00" * 31, "not hex " * 8, "é"):
        beside.write_text(text)
        with pytest.raises(UserError, match="set.key is not the key of a dataset"):
            source.names(listed(("id", "p1")))
