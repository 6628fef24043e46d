"""Tests of evaluation during training: the photos it uses, and the ones it leaves out."""

import hashlib

import numpy as np
import pytest

import datasets
from hashvision.commands.main import main
from hashvision.data import removals
from hashvision.errors import UserError
from hashvision.evaluation.protocols import InTraining
from hashvision.training import loop
from places import load


@pytest.fixture
def labelled(tmp_path):
    """Two classes, each with 4 training photos and 3 test photos."""
    for part, first, number in (("train", 0, 4), ("test", 50, 3)):
        for kind, name in enumerate(("dog", "boat")):
            folder = tmp_path / "labelled" / part / name
            folder.mkdir(parents=True)
            for photo in range(number):
                picture = datasets.jpeg(first + 2 * photo + kind)
                (folder / f"{photo}.jpg").write_bytes(picture)
    return tmp_path / "labelled"


def in_training(labelled, removed=removals.NO_LIST):
    config = load("demo_swav", f"--config.evaluate_on={labelled}")
    return InTraining(config, dict, batch_size=8, removed=removed)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def named(paths):
    lines = [removals.Removal("sha256", digest(path), "", "") for path in paths]
    return removals.RemovalList(lines)


def shown(check):
    """The number of photos that the network is shown."""
    seen = []

    def predict(images):
        seen.extend(image for image in np.asarray(images) if image.any())
        return np.asarray(images).mean((1, 2)), None

    assert 0 <= check(predict, 24, 5)["knn_top1_labelled"] <= 1
    return len(seen)


def test_removed_photos_are_not_shown(labelled):
    assert shown(in_training(labelled)) == 14
    removed = named([labelled / "train/dog/1.jpg", labelled / "test/boat/0.jpg"])
    assert shown(in_training(labelled, removed)) == 12


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_completely_removed_or_unreadable_part_is_refused(labelled, part):
    photos = sorted(labelled.glob(f"{part}/*/*.jpg"))
    with pytest.raises(UserError, match=f"names all {len(photos)} {part} photos of .*labelled"):
        in_training(labelled, named(photos))
    for photo in photos:
        photo.write_bytes(b"broken")
    with pytest.raises(UserError, match=f"None of the {len(photos)} images"):
        shown(in_training(labelled))


def test_train_applies_its_removal_list_to_evaluation(labelled, tmp_path, monkeypatch):
    """`train --removals` applies to all photos that a run is shown, not only its dataset's."""
    found = []
    monkeypatch.setattr(loop, "train", lambda *arguments: found.append(arguments) or True)
    removed = labelled / "test/dog/2.jpg"
    (tmp_path / "list.csv").write_text(
        f"kind,value,reason,received_at\nsha256,{digest(removed)},,\n"
    )
    code = main(
        [
            "train",
            "--config=configs/demo_swav.py",
            f"--workdir={tmp_path / 'run'}",
            f"--config.evaluate_on={labelled}",
            f"--removals={tmp_path / 'list.csv'}",
        ]
    )
    assert code == 0
    ((_, _, check, names),) = found
    assert shown(check) == 13 and [line.value for line in names.lines] == [digest(removed)]
