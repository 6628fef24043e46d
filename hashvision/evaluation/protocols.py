"""The evaluate verb: reads a dataset, runs protocols, prints the tables and writes the JSON."""

import collections
import hashlib
import json
import os
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hashvision import storage
from hashvision.data import removals
from hashvision.errors import UserError
from hashvision.evaluation import bootstrap, datasets, features, knn, linear, matching, multilabel
from hashvision.sources import files

NEIGHBOURS = 20
TEMPERATURE = 0.07
_EXAMPLES = 20  # names given of photos that could not be read
_LONGEST_NAME = 180  # bytes of a dataset's name in a report's; file systems take 255


Report = dict[str, Any]


class _Multilabel(typing.NamedTuple):
    """Which classes of the network's vocabulary a set's labels name."""

    match: matching.Match
    columns: np.ndarray  # int64 (C,), the classes, ascending


def _multilabel_of(encoder: features.Encoder, dataset: datasets.Dataset) -> _Multilabel:
    number = collections.Counter(label for labels in dataset.test.labels for label in labels)
    names = [name for name, _ in sorted(number.items(), key=lambda item: (-item[1], item[0]))]
    match = matching.match(names, encoder.vocabulary)
    if not match.classes:
        raise UserError(
            f"None of the {len(names):,} class names of {dataset.name} ({', '.join(names[:5])}) is "
            "in the network's vocabulary; evaluate on a set that shows what it was trained on, or "
            "use --protocol=knn."
        )
    return _Multilabel(match, np.unique(list(match.classes.values())))


class _Seen(typing.NamedTuple):
    """What the network says of a dataset's photos; it has looked at each of them once."""

    dataset: datasets.Dataset
    split: datasets.Split | None
    multilabel: _Multilabel | None
    tests: datasets.Photos  # of dataset.test those that it has looked at
    test: features.Encoded
    train: features.Encoded | None  # of dataset.train, where the dataset has one

    def parts(self) -> tuple[datasets.Split, features.Encoded, features.Encoded]:
        """The split, and what the network says of its train and test photos."""
        assert self.split is not None
        train = self.train or self.test.of(self.tests, self.split.train)
        return self.split, train, self.test.of(self.tests, self.split.test)


def _see(encoder: features.Encoder, dataset: datasets.Dataset, chosen: Sequence[str]) -> _Seen:
    """Runs the network, after all that can be refused without it."""
    learns = any(protocol != "multilabel" for protocol in chosen)
    split = datasets.single_label(dataset) if learns else None
    multilabel = _multilabel_of(encoder, dataset) if "multilabel" in chosen else None
    tests = dataset.test
    if split and dataset.train is None and multilabel is None:  # some of them are in neither part
        places = np.concatenate([split.train.places, split.test.places])
        tests = datasets.take(tests, np.flatnonzero(np.isin(tests.places, places)))
    test = features.encode(encoder, tests, multilabel.columns if multilabel else None)
    train = features.encode(encoder, split.train) if split and dataset.train else None
    return _Seen(dataset, split, multilabel, tests, test, train)


def _skipped(*parts: tuple[datasets.Photos, features.Encoded]) -> Report:
    """Counts and names the photos that could not be read."""
    names = [
        photos.names[index]
        for photos, encoded in parts
        for index in np.flatnonzero(~encoded.readable)
    ]
    return {"count": len(names), "examples": [files.shown(each) for each in names[:_EXAMPLES]]}


def _single_label(seen: _Seen, protocol: str) -> Report:
    split, train, test = seen.parts()
    train_labels = split.train_labels[train.readable]
    test_labels = split.test_labels[test.readable]
    unseen = np.setdiff1d(test_labels, train_labels)
    if len(unseen) or len(np.unique(train_labels)) < 2:
        lost = np.setdiff1d(split.train_labels, train_labels)
        raise UserError(
            f"No training photo of {split.classes[lost[0]]} in {seen.dataset.name} can be read; "
            "mend the files or remove the class."
        )
    classes = len(split.classes)
    if protocol == "knn":
        predicted = knn.predict(
            train.features, train_labels, test.features, classes, NEIGHBOURS, TEMPERATURE
        )
        details: Report = {"k": NEIGHBOURS, "temperature": TEMPERATURE}
    else:
        probe = linear.fit(train.features, train_labels, classes)
        predicted = probe.predict(test.features)
        held_out = {f"{l2:.3g}": round(top1, 4) for l2, top1 in probe.held_out.items()}
        details = {"l2": probe.l2, "held_out_top1": held_out}
    right = bootstrap.mean_of(predicted == test_labels)
    return {
        "metrics": {"top1": bootstrap.estimate(right, len(test_labels))._asdict()},
        "baselines": {"commonest_class": float(np.bincount(test_labels).max() / len(test_labels))},
        "photos": {"train": len(train_labels), "test": len(test_labels)},
        "classes": classes,
        "split": split.note,
        **details,
        "skipped": _skipped((split.train, train), (split.test, test)),
    }


def _multilabel(seen: _Seen, vocabulary: Mapping[str, Any]) -> Report:
    assert seen.multilabel is not None and seen.test.scores is not None
    photos, (match, columns) = seen.tests, seen.multilabel
    column = {number: position for position, number in enumerate(columns.tolist())}
    positives = np.zeros((len(photos.names), len(columns)), bool)
    for photo, labels in enumerate(photos.labels):
        shown = [column[match.classes[label]] for label in labels if label in match.classes]
        positives[photo, shown] = True
    positives = positives[seen.test.readable]
    if not positives.any():
        raise UserError(
            f"No readable photo of {seen.dataset.name} shows a class of the network's vocabulary; "
            "mend its image files."
        )
    entries = vocabulary["classes"]
    estimates = multilabel.estimates(seen.test.scores, positives)
    return {
        "metrics": {name: estimate._asdict() for name, estimate in estimates.items()},
        "baselines": multilabel.baselines(positives),
        "photos": {"test": len(positives), "with_a_class": int(positives.any(axis=1).sum())},
        "classes": int(positives.any(axis=0).sum()),
        "matched": {name: entries[number]["name"] for name, number in match.classes.items()},
        "unmatched": list(match.unmatched),
        "skipped": _skipped((photos, seen.test)),
    }


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _some(names: Sequence[str], number: int = 10) -> str:
    return ", ".join(names[:number]) + (", ..." if len(names) > number else "")


def table(report: Report) -> str:
    """A report as the lines that are printed: values in percent, then what they rest on."""
    network = "untrained network" if report["untrained"] else f"step {report['step']:,}"
    lines = [f"{report['protocol']} on {report['dataset']}, {network}", ""]
    lines.append(f"{'':<30}{'value':>8}{'95% interval':>20}")
    for name, metric in report["metrics"].items():
        interval = f"{_percent(metric['low'])} to {_percent(metric['high'])}"
        lines.append(f"{name:<30}{_percent(metric['value']):>8}{interval:>20}")
    for name, value in report["baselines"].items():
        lines.append(f"{name:<30}{_percent(value):>8}{'baseline':>20}")
    lines.append("")
    photos = ", ".join(
        f"{number:,} {part.replace('_', ' ')}" for part, number in report["photos"].items()
    )
    lines.append(f"photos: {photos}; {report['classes']:,} classes")
    if "split" in report:
        lines.append(f"split: {report['split']}")
    if "l2" in report:
        lines.append(f"L2 chosen on a held-out quarter of train: {report['l2']:.3g}")
    if "matched" in report:
        names = len(report["matched"]) + len(report["unmatched"])
        line = f"names matched to the vocabulary: {len(report['matched']):,} of {names:,}"
        if report["unmatched"]:
            line += f"; not matched: {_some(report['unmatched'])}"
        lines.append(line)
    if report["removed"]:
        lines.append(f"left out, for the removal list names them: {report['removed']:,}")
    if report["skipped"]["count"]:
        skipped = report["skipped"]
        lines.append(f"unreadable, skipped: {skipped['count']:,} ({_some(skipped['examples'])})")
    return "\n".join(lines)


def report_path(workdir: str, protocol: str, dataset: str, untrained: bool = False) -> str:
    """Where the report of a protocol on a dataset lies: WORKDIR/evaluations/PROTOCOL-NAME.json.

    NAME is that of the dataset's folder. Where a report on another folder of that name lies
    already, it is made of the folder's parents' names too, as many as it takes: imagenet-val.

    Args:
      workdir: of the run.
      protocol: one of PROTOCOLS.
      dataset: path of what `datasets.read` reads.
      untrained: whether of the network before its first step: -untrained.json.
    """
    folder = os.path.join(workdir, "evaluations")
    name = _report_name(folder, datasets.locate(dataset))
    return os.path.join(folder, _report_file(protocol, name, untrained))


def _report_file(protocol: str, name: str, untrained: bool) -> str:
    return f"{protocol}-{name}{'-untrained' if untrained else ''}.json"


def _report_name(folder: str, path: str) -> str:
    """The name by which the reports in a folder know the dataset at a path."""
    path = files.shown(path)
    there = set(storage.names(folder, "*.json"))

    def is_free(name: str) -> bool:
        every = {_report_file(each, name, late) for each in PROTOCOLS for late in (False, True)}
        paths = {_path_in(os.path.join(folder, file)) for file in there & every}
        return paths <= {path, None}

    parts = [part for part in path.split("/") if part]
    for first in reversed(range(len(parts))):
        name = "-".join(parts[first:])
        if len(name.encode()) > _LONGEST_NAME:
            break
        if is_free(name):
            return name
    return f"{parts[-1][:40]}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def _path_in(file: str) -> str | None:
    """The path of the dataset that a report is of; None where it says none."""
    try:
        return json.loads(storage.read(file))["path"]
    except (ValueError, KeyError, TypeError):
        return None


def check(protocols: Sequence[str]) -> None:
    """Raises UserError for a protocol that does not exist, before anything is read."""
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            known = ", ".join(PROTOCOLS)
            raise UserError(f"There is no protocol {protocol!r}; choose one of {known}.")


def evaluate(
    encoder: features.Encoder,
    dataset: str,
    protocols: Sequence[str],
    workdir: str,
    untrained: bool = False,
    removed: removals.RemovalList = removals.NO_LIST,
) -> list[Report]:
    """Evaluates a network on a dataset, prints a table and writes a report for each protocol.

    The network looks at each photo once, however many protocols there are.

    Args:
      encoder: the network.
      dataset: path of what `datasets.read` reads.
      protocols: "knn" or "linear" (top1), "multilabel" (mAP, precision_at_1, recall_at_5).
      workdir: the reports go to `report_path`.
      untrained: whether the network is freshly initialised; only noted.
      removed: photos that are left out.

    Returns:
      The reports: {"protocol", "dataset", "path", "step", "untrained", "metrics": {name: {"value",
      "low", "high"}}, "baselines": {name: value}, "photos", "classes", "skipped", "removed", ...}.
      All metrics are fractions in [0, 1]; the table prints them in percent.

    Raises:
      UserError: no such protocol or dataset, or the one does not fit the other.
    """
    check(protocols)
    read = datasets.read(dataset, removed)
    seen = _see(encoder, read, protocols)
    folder = os.path.join(workdir, "evaluations")
    name = _report_name(folder, read.path)
    reports = []
    for protocol in protocols:
        if protocol == "multilabel":
            found = _multilabel(seen, encoder.vocabulary)
        else:
            found = _single_label(seen, protocol)
        report = {
            "protocol": protocol,
            "dataset": name,
            "path": files.shown(read.path),
            "step": encoder.step,
            "untrained": untrained,
            **found,
            "removed": read.removed,
        }
        reports.append(report)
        if encoder.leads:
            print(table(report))
            path = os.path.join(folder, _report_file(protocol, name, untrained))
            storage.write(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return reports


PROTOCOLS = ("knn", "linear", "multilabel")
