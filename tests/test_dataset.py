import json

import datasets
import numpy as np
import pytest

from hashvision.data import dataset, records
from hashvision.errors import UserError


def test_loads_what_was_written(tmp_path):
    loaded = dataset.load(str(datasets.write(tmp_path / "set", size=20, shards=3)))
    assert len(loaded.index) == 20 and len(loaded.shards) == 3
    assert np.bincount(loaded.shard).tolist() == [6, 7, 7]
    assert loaded.class_counts.sum() >= 20


@pytest.mark.parametrize(
    "name",
    ["vocabulary.json", "manifest.json", records.shard_name(1, 2), records.index_name(0, 2)],
)
def test_a_missing_file_is_named(tmp_path, name):
    folder = datasets.write(tmp_path / "set")
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        dataset.load(str(folder))


@pytest.mark.parametrize("name", [records.shard_name(1, 2), records.index_name(0, 2)])
def test_a_file_cut_short_is_named(tmp_path, name):
    folder = datasets.write(tmp_path / "set")
    (folder / name).write_bytes((folder / name).read_bytes()[:-30])
    with pytest.raises(UserError, match=name):
        dataset.load(str(folder))


def test_an_index_of_other_records_is_named(tmp_path):
    folder = datasets.write(tmp_path / "set")
    np.save(folder / records.index_name(0, 2), np.zeros(3, records.INDEX_DTYPE))
    with pytest.raises(UserError, match=records.index_name(0, 2)):
        dataset.load(str(folder))


def test_broken_json_is_named(tmp_path):
    folder = datasets.write(tmp_path / "set")
    (folder / "manifest.json").write_text(json.dumps({"shards": []})[:-1])
    with pytest.raises(UserError, match="manifest.json is not valid JSON"):
        dataset.load(str(folder))
