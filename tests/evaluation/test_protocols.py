"""Tests of the evaluation protocols, from image files to the table and the JSON report."""

import hashlib
import json
import math
import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from hashvision.data import removals
from hashvision.errors import UserError
from hashvision.evaluation import features, protocols
from hashvision.evaluation.bootstrap import Estimate
from hashvision.evaluation.report import Report

COLOURS = {"red apple": (200, 40, 40), "green leaf": (40, 200, 40), "blue sky": (40, 40, 200)}
VOCABULARY = {
    "classes": [
        {"name": "sky", "tags": {"sky": 9, "bluesky": 2}, "lemmas": ["sky"]},
        {"name": "dog", "tags": {"dog": 8}, "lemmas": []},
        {"name": "apple", "tags": {"apple": 7, "redapples": 1}, "lemmas": ["apple"]},
        {"name": "leaf", "tags": {"leaf": 6}, "lemmas": ["green leaf", "foliage"]},
    ]
}


def encode(batch):
    """Features are the mean colour; the scores of the four classes are blue, low, red, green."""
    mean = batch.mean(axis=(1, 2)) / 255
    return mean, mean[:, [2, 0, 0, 1]] - [0, 9, 0, 0]


ENCODER = features.Encoder(encode, 8, 17, VOCABULARY, batch_size=16)


def save(path, colour, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = rng.integers(-35, 36, (10, 12, 3))
    Image.fromarray((np.array(colour) + noise).astype(np.uint8)).save(path)


@pytest.fixture
def colours(tmp_path):
    """Class folders of noisy colours, with 16 training and 8 test photos each."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for number in range(24):
            part = "train" if number < 16 else "test"
            save(tmp_path / "colours" / part / name / f"{number}.png", colour, rng)
    return tmp_path / "colours"


def evaluate(encoder, dataset, names, workdir, **options):
    """Evaluates and prints the tables; returns the content of the report files."""
    reports = protocols.evaluate(encoder, dataset, names, workdir=workdir, **options)
    for report in reports:
        print(report.table())
    return [json.loads(report.as_json()) for report in reports]


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_single_label_protocols(colours, tmp_path, capsys, protocol):
    (colours / "train" / "red apple" / "0.png").write_bytes(b"broken")
    workdir = tmp_path / "run"
    (report,) = evaluate(ENCODER, f"{colours}/", [protocol], str(workdir))
    path = workdir / "evaluations" / f"{protocol}-colours.json"
    assert json.loads(path.read_text()) == report
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert (report["protocol"], report["dataset"], report["step"]) == (protocol, "colours", 17)
    assert report["metrics"] == {"top1": {"value": 1.0, "low": 1.0, "high": 1.0}}
    assert report["photos"] == {"train": 47, "test": 24}
    assert report["baselines"] == {"commonest_class": pytest.approx(1 / 3)}
    assert report["skipped"] == {"count": 1, "examples": ["train/red apple/0.png"]}
    printed = capsys.readouterr().out
    assert f"{protocol} on colours, step 17" in printed
    assert "100.0% to 100.0%" in printed and "train/red apple/0.png" in printed
    assert ("L2 chosen" in printed) == (protocol == "linear")


def test_multilabel_on_class_folders_uses_the_folder_names_as_labels(colours, tmp_path):
    (report,) = evaluate(ENCODER, str(colours), ["multilabel"], str(tmp_path / "run"))
    expected = {"red apple": "apple", "green leaf": "leaf", "blue sky": "sky"}
    assert report["matched"] == expected and report["unmatched"] == []
    assert {name: metric["value"] for name, metric in report["metrics"].items()} == {
        "mAP": 1.0, "precision_at_1": 1.0, "recall_at_5": 1.0,
    }  # fmt: skip
    assert report["photos"]["test"] == 24
    assert report["baselines"]["prevalence"] == pytest.approx(1 / 3)


@pytest.fixture
def words(tmp_path):
    rng = np.random.default_rng(1)
    rows = []
    for number in range(30):
        colour = (220 if number % 2 else 30, 90, 220 if number % 3 else 30)
        save(tmp_path / "words" / f"{number}.png", colour, rng)
        labels = ["apple"] * (number % 2) + ["redapple"] * (number % 2) + ["sky"] * bool(number % 3)
        rows.append({"image": f"{number}.png", "labels": [*labels, "person"]})
    rows.append({"image": "gone.png", "labels": ["apple"]})
    (tmp_path / "words" / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "words"


def test_multilabel_of_a_labels_file(words, tmp_path, capsys):
    (report,) = evaluate(ENCODER, str(words), ["multilabel"], str(tmp_path), untrained=True)
    assert (tmp_path / "evaluations" / "multilabel-words-untrained.json").is_file()
    assert report["untrained"] and report["classes"] == 2
    assert report["matched"] == {"sky": "sky", "apple": "apple", "redapple": "apple"}
    assert report["unmatched"] == ["person"]
    assert report["skipped"] == {"count": 1, "examples": ["gone.png"]}
    assert report["photos"] == {"test": 30, "with_a_class": 25}
    metrics = report["metrics"]
    assert metrics["mAP"]["value"] == metrics["recall_at_5"]["value"] == 1.0
    assert metrics["precision_at_1"]["value"] == 1.0
    for metric in metrics.values():
        assert metric["low"] <= metric["value"] <= metric["high"]
    printed = capsys.readouterr().out
    assert "untrained network" in printed and "3 of 4; not matched: person" in printed
    assert "prevalence" in printed


def counting(seen):
    def count(batch):
        seen.append(batch)
        return encode(batch)

    return ENCODER._replace(encode=count, batch_size=1)


def test_several_protocols_encode_each_photo_once(colours, tmp_path):
    chosen = ["knn", "multilabel", "linear"]
    alone = [evaluate(ENCODER, str(colours), [each], str(tmp_path))[0] for each in chosen]
    seen = []
    together = evaluate(counting(seen), str(colours), chosen, str(tmp_path))
    assert together == alone and len(seen) == 72
    seen.clear()
    evaluate(counting(seen), str(colours), ["multilabel"], str(tmp_path))
    assert len(seen) == 24  # only the test part


def test_several_protocols_on_a_dataset_without_a_training_part(tmp_path):
    """kNN leaves out photos with several labels; multilabel uses them."""
    rng, rows = np.random.default_rng(2), []
    for number in range(24):
        red = number % 2
        save(tmp_path / "set" / f"{number}.png", (220, 40, 40) if red else (40, 40, 220), rng)
        several = ["sky"] if number > 19 and red else []
        rows.append({"image": f"{number}.png", "labels": ["apple" if red else "sky", *several]})
    (tmp_path / "set" / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path, chosen, seen = str(tmp_path / "set"), ["knn", "multilabel"], []
    alone = [evaluate(ENCODER, path, [each], str(tmp_path))[0] for each in chosen]
    assert evaluate(counting(seen), path, chosen, str(tmp_path)) == alone
    assert len(seen) == 24
    assert sum(alone[0]["photos"].values()) == 22 and alone[1]["photos"]["test"] == 24
    seen.clear()
    evaluate(counting(seen), path, ["knn"], str(tmp_path))
    assert len(seen) == 22


def test_reports_on_different_folders_of_one_name_have_different_names(colours, tmp_path):
    run = str(tmp_path / "run")

    def evaluated(path, untrained=False):
        (report,) = evaluate(ENCODER, str(path), ["knn"], run, untrained=untrained)
        file = protocols.report_path(run, "knn", str(path), untrained)
        assert json.loads(pathlib.Path(file).read_text()) == report
        return pathlib.Path(file).name, report["dataset"]

    places = ["a/imagenet/val", "b/places/val", "c/places/val", "c/places-val", "val-untrained"]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(colours, tmp_path / place)
    expected = ["val", "places-val", "c-places-val", f"{tmp_path.name}-c-places-val"]
    for _ in range(2):  # the second time, each report replaces itself
        found = [evaluated(tmp_path / place) for place in places[:4]]
        assert [dataset for _, dataset in found] == expected
        assert evaluated(tmp_path / "a/imagenet/val", untrained=True) == (
            "knn-val-untrained.json",
            "val",
        )
        assert evaluated(tmp_path / places[4])[1] == f"{tmp_path.name}-val-untrained"
    assert len(list((tmp_path / "run/evaluations").iterdir())) == 6


def test_an_old_report_without_a_path_is_replaced(colours, tmp_path):
    old = tmp_path / "evaluations" / "knn-colours.json"
    old.parent.mkdir()
    old.write_text('{"protocol": "knn"}')
    evaluate(ENCODER, str(colours), ["knn"], str(tmp_path))
    assert json.loads(old.read_text())["path"] == str(colours)


def test_a_name_too_long_for_a_file_is_cut(colours, tmp_path):
    path = tmp_path / ("long" * 60)
    colours.rename(path)
    (report,) = evaluate(ENCODER, str(path), ["knn"], str(tmp_path))
    assert report["dataset"].startswith("long" * 10 + "-")
    assert pathlib.Path(protocols.report_path(str(tmp_path), "knn", str(path))).is_file()


def test_names_in_latin_1_are_printed_and_written(tmp_path, capsysbinary):
    """Linux allows any bytes in file names."""
    rng = np.random.default_rng(3)
    root = os.fsencode(tmp_path / "set") + b"\xe9"
    for name, colour in ((b"caf\xe9", COLOURS["red apple"]), (b"th\xe9", COLOURS["blue sky"])):
        for number in range(8):
            save(tmp_path / "new.png", colour, rng)
            place = os.path.join(root, name, b"%d\xe9.png" % number)
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.rename(tmp_path / "new.png", place)
    with open(os.path.join(root, b"th\xe9", b"bro\nken\xe9.jpg"), "wb"):
        pass
    (report,) = evaluate(ENCODER, os.fsdecode(root), ["knn"], str(tmp_path / "run"))
    assert report["metrics"]["top1"]["value"] == 1 and report["dataset"] == r"set\udce9"
    assert report["skipped"]["examples"] == [r"th\udce9/bro\nken\udce9.jpg"]
    file = protocols.report_path(str(tmp_path / "run"), "knn", os.fsdecode(root))
    assert json.loads(pathlib.Path(file).read_text(encoding="utf-8")) == report
    assert rb"th\udce9/bro\nken" in capsysbinary.readouterr().out


def listed(photos):
    """A removal list with the hashes of these files."""
    kinds = (hashlib.sha256(photo.read_bytes()).hexdigest() for photo in photos)
    return removals.RemovalList([removals.Removal("sha256", value, "", "") for value in kinds])


def test_removed_photos_are_counted_and_a_completely_removed_part_is_refused(
    colours, tmp_path, capsys
):
    test = sorted((colours / "test").glob("*/*.png"))
    (report,) = evaluate(ENCODER, str(colours), ["knn"], str(tmp_path), removed=listed(test[:3]))
    assert report["removed"] == 3 and report["photos"]["test"] == 21
    assert "the removal list names them: 3" in capsys.readouterr().out
    train = sorted((colours / "train").glob("*/*.png"))
    for part, photos in (("test", test), ("train", train)):
        with pytest.raises(UserError, match=f"names all .* {part} photos of {colours}"):
            evaluate(ENCODER, str(colours), ["knn"], str(tmp_path), removed=listed(photos))
    for photo in test:
        photo.write_bytes(b"broken")
    with pytest.raises(UserError, match="None of the 24 images"):
        evaluate(ENCODER, str(colours), ["knn"], str(tmp_path))


def test_only_the_leading_host_writes_reports(colours, tmp_path):
    other = ENCODER._replace(leads=False)
    (report,) = evaluate(other, str(colours), ["knn"], str(tmp_path))
    assert report["metrics"]
    assert not (tmp_path / "evaluations").exists()


def test_the_table_prints_percent_aligned():
    report = Report(
        protocol="knn", dataset="flowers", path="/flowers", step=1200, untrained=False,
        metrics={"top1": Estimate(0.5123, 0.48, 0.5451)}, baselines={"commonest_class": 0.2},
        photos={"train": 2000, "test": 1000}, classes=5, removed=0, details={},
        skipped={"count": 0, "examples": []},
    )  # fmt: skip
    assert report.table().split("\n") == [
        "knn on flowers, step 1,200",
        "",
        "                                 value        95% interval",
        "top1                             51.2%      48.0% to 54.5%",
        "commonest_class                  20.0%            baseline",
        "",
        "photos: 2,000 train, 1,000 test; 5 classes",
    ]


def test_errors(colours, words, tmp_path):
    with pytest.raises(UserError, match="no protocol 'svm'; choose from knn, linear, multilabel"):
        evaluate(ENCODER, str(colours), ["knn", "svm"], str(tmp_path))
    other = ENCODER._replace(vocabulary={"classes": VOCABULARY["classes"][1:2]})
    with pytest.raises(UserError, match="None of the 4 class names of words"):
        evaluate(other, str(words), ["multilabel"], str(tmp_path))
    with pytest.raises(UserError, match="--protocol=multilabel"):
        evaluate(ENCODER, str(words), ["knn"], str(tmp_path))
    for file in (colours / "train" / "blue sky").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="No training photo of blue sky"):
        evaluate(ENCODER, str(colours), ["knn"], str(tmp_path))
    assert not (tmp_path / "evaluations").exists()


def pixels(batch):
    """Features: the photo at 8 x 8 pixels. Scores: the same numbers, which mean nothing."""
    photos, side = batch.shape[0], batch.shape[1] // 8
    small = batch.reshape(photos, 8, side, 8, side, 3).mean(axis=(2, 4))
    return small.reshape(photos, -1), small.reshape(photos, -1)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("dataset", "protocol", "low", "high"),
    [("flowers5", "knn", 0.30, 0.50), ("caltech97", "linear", 0.15, 0.35)],
)
def test_pixels_are_slightly_better_than_chance_on_real_photos(
    shared_data, tmp_path, dataset, protocol, low, high
):
    encoder = features.Encoder(pixels, 64, 0, {"classes": []})
    path = shared_data / "transfer" / dataset
    (report,) = evaluate(encoder, str(path), [protocol], str(tmp_path))
    top1 = report["metrics"]["top1"]
    assert low < top1["low"] < top1["value"] < top1["high"] < high
    assert report["skipped"]["count"] == 0


@pytest.mark.realdata
def test_random_scores_reach_the_random_baseline_on_real_photos(shared_data, tmp_path):
    path = shared_data / "transfer" / "flickr8k_multilabel"
    words = {
        label
        for line in (path / "labels.jsonl").read_text().splitlines()
        for label in json.loads(line)["labels"]
    }
    classes = [{"name": word, "tags": {word: 1}, "lemmas": []} for word in sorted(words)]
    rng = np.random.default_rng(0)

    def guess(batch):
        return batch[:, 0, 0], rng.random((len(batch), len(classes)))

    encoder = features.Encoder(guess, 16, 0, {"classes": classes})
    (report,) = evaluate(encoder, str(path), ["multilabel"], str(tmp_path))
    assert len(report["matched"]) == 297 and report["unmatched"] == []
    assert report["photos"] == {"test": 919, "with_a_class": 919}
    found, baselines = report["metrics"]["mAP"]["value"], report["baselines"]
    assert math.isclose(found, baselines["random_mAP"], rel_tol=0.3)
    assert baselines["prevalence"] < baselines["random_mAP"]
