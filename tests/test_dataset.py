import collections
import json

import datasets
import numpy as np
import pytest

from hashvision.data import dataset, records
from hashvision.errors import UserError


def test_loads_what_was_written(tmp_path):
    loaded = dataset.load(str(datasets.write(tmp_path / "set", size=20, shards=3)))
    assert len(loaded) == 20 and len(loaded.shards) == 3
    assert np.bincount(loaded.shard_of(np.arange(20))).tolist() == [6, 7, 7]
    rows = loaded.rows(0, 20)
    assert rows["id"].tolist() == [records.id_hash(f"p{number}") for number in range(20)]
    np.testing.assert_array_equal(loaded.rows(4, 15), rows[4:15])
    values, photos = loaded.rarest
    assert dict(zip(values, photos, strict=True)) == collections.Counter(rows["rarest"])
    assert loaded.class_counts.sum() >= 20


@pytest.mark.parametrize("name", ["vocabulary.json", "manifest.json", records.index_name(0, 2)])
def test_a_missing_file_is_named(tmp_path, name):
    folder = datasets.write(tmp_path / "set")
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        dataset.load(str(folder)).rows(0, 64)


def test_an_index_cut_short_is_named(tmp_path):
    folder = datasets.write(tmp_path / "set")
    path = folder / records.index_name(0, 2)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=path.name):
        dataset.load(str(folder)).rows(0, 1)


def test_a_dataset_of_an_earlier_version_is_named(tmp_path):
    folder = datasets.write(tmp_path / "set")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["rarest"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="earlier version"):
        dataset.load(str(folder))


def test_an_index_of_other_records_is_named(tmp_path):
    folder = datasets.write(tmp_path / "set")
    np.save(folder / records.index_name(0, 2), np.zeros(3, records.INDEX_DTYPE))
    with pytest.raises(UserError, match=records.index_name(0, 2)):
        dataset.load(str(folder)).rows(0, 1)


def test_broken_json_is_named(tmp_path):
    folder = datasets.write(tmp_path / "set")
    (folder / "manifest.json").write_text(json.dumps({"shards": []})[:-1])
    with pytest.raises(UserError, match="manifest.json is not valid JSON"):
        dataset.load(str(folder))
