"""The evaluate verb: reads a dataset, runs a protocol, prints the table and writes the JSON."""

import collections
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from hashvision import storage
from hashvision.data import removals
from hashvision.errors import UserError
from hashvision.evaluation import bootstrap, datasets, features, knn, linear, matching, multilabel

NEIGHBOURS = 20
TEMPERATURE = 0.07
_EXAMPLES = 20  # names given of photos that could not be read


class _Skipped:
    """Counts and names the photos that could not be read."""

    def __init__(self) -> None:
        self.count, self.examples = 0, []

    def add(self, photos: datasets.Photos, readable: np.ndarray) -> None:
        unreadable = np.flatnonzero(~readable)
        self.count += len(unreadable)
        names = [photos.names[index] for index in unreadable]
        self.examples = (self.examples + names)[:_EXAMPLES]


Report = dict[str, Any]


def _single_label(
    encoder: features.Encoder, dataset: datasets.Dataset, protocol: str, skipped: _Skipped
) -> Report:
    split = datasets.single_label(dataset)
    train = features.features(encoder, split.train)
    test = features.features(encoder, split.test)
    skipped.add(split.train, train.readable)
    skipped.add(split.test, test.readable)
    train_labels = split.train_labels[train.readable]
    test_labels = split.test_labels[test.readable]
    unseen = np.setdiff1d(test_labels, train_labels)
    if len(unseen) or len(np.unique(train_labels)) < 2:
        lost = np.setdiff1d(split.train_labels, train_labels)
        raise UserError(
            f"No training photo of {split.classes[lost[0]]} in {dataset.name} can be read; "
            "mend the files or remove the class."
        )
    classes = len(split.classes)
    if protocol == "knn":
        predicted = knn.predict(
            train.values, train_labels, test.values, classes, NEIGHBOURS, TEMPERATURE
        )
        details: Report = {"k": NEIGHBOURS, "temperature": TEMPERATURE}
    else:
        probe = linear.fit(train.values, train_labels, classes)
        predicted = probe.predict(test.values)
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
    }


def _multilabel(encoder: features.Encoder, dataset: datasets.Dataset, skipped: _Skipped) -> Report:
    photos = dataset.test
    number = collections.Counter(label for labels in photos.labels for label in labels)
    names = [name for name, _ in sorted(number.items(), key=lambda item: (-item[1], item[0]))]
    match = matching.match(names, encoder.vocabulary)
    if not match.classes:
        raise UserError(
            f"None of the {len(names):,} class names of {dataset.name} ({', '.join(names[:5])}) is "
            "in the network's vocabulary; evaluate on a set that shows what it was trained on, or "
            "use --protocol=knn."
        )
    columns = np.unique(list(match.classes.values()))
    column = {number: position for position, number in enumerate(columns.tolist())}
    encoded = features.scores(encoder, photos, columns)
    skipped.add(photos, encoded.readable)
    positives = np.zeros((len(photos.names), len(columns)), bool)
    for photo, labels in enumerate(photos.labels):
        shown = [column[match.classes[label]] for label in labels if label in match.classes]
        positives[photo, shown] = True
    positives = positives[encoded.readable]
    if not positives.any():
        raise UserError(
            f"No readable photo of {dataset.name} shows a class of the network's vocabulary; "
            "mend its image files."
        )
    entries = encoder.vocabulary["classes"]
    estimates = multilabel.estimates(encoded.values, positives)
    return {
        "metrics": {name: estimate._asdict() for name, estimate in estimates.items()},
        "baselines": multilabel.baselines(positives),
        "photos": {"test": len(positives), "with_a_class": int(positives.any(axis=1).sum())},
        "classes": int(positives.any(axis=0).sum()),
        "matched": {name: entries[number]["name"] for name, number in match.classes.items()},
        "unmatched": list(match.unmatched),
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
    if report["skipped"]["count"]:
        skipped = report["skipped"]
        lines.append(f"unreadable, skipped: {skipped['count']:,} ({_some(skipped['examples'])})")
    return "\n".join(lines)


def report_path(workdir: str, protocol: str, dataset: str, untrained: bool = False) -> str:
    """Where the report of a protocol on a dataset lies: evaluations/PROTOCOL-DATASETNAME.json."""
    name = f"{protocol}-{dataset}-untrained.json" if untrained else f"{protocol}-{dataset}.json"
    return os.path.join(workdir, "evaluations", name)


def check(protocols: Sequence[str]) -> None:
    """Raises UserError for a protocol that does not exist, before anything is read."""
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            known = ", ".join(PROTOCOLS)
            raise UserError(f"There is no protocol {protocol!r}; choose one of {known}.")


def evaluate(
    encoder: features.Encoder,
    dataset: str,
    protocol: str,
    workdir: str,
    untrained: bool = False,
    removed: removals.RemovalList = removals.NO_LIST,
) -> Report:
    """Evaluates a network on a dataset, prints a table and writes the report.

    Args:
      encoder: the network.
      dataset: path of what `datasets.read` reads.
      protocol: "knn" or "linear" (top1), or "multilabel" (mAP, precision_at_1, recall_at_5).
      workdir: the report goes to WORKDIR/evaluations/PROTOCOL-DATASETNAME.json, or
        -untrained.json.
      untrained: whether the network is freshly initialised; only noted.
      removed: photos that are left out.

    Returns:
      The report: {"protocol", "dataset", "step", "untrained", "metrics": {name: {"value", "low",
      "high"}}, "baselines": {name: value}, "photos", "classes", "skipped", ...}. All metrics are
      fractions in [0, 1]; the table prints them in percent.

    Raises:
      UserError: no such protocol or dataset, or the one does not fit the other.
    """
    check([protocol])
    read = datasets.read(dataset, removed)
    skipped = _Skipped()
    if protocol == "multilabel":
        found = _multilabel(encoder, read, skipped)
    else:
        found = _single_label(encoder, read, protocol, skipped)
    report = {
        "protocol": protocol,
        "dataset": read.name,
        "step": encoder.step,
        "untrained": untrained,
        **found,
        "skipped": {"count": skipped.count, "examples": skipped.examples},
    }
    print(table(report))
    path = report_path(workdir, protocol, read.name, untrained)
    storage.write(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


PROTOCOLS = ("knn", "linear", "multilabel")
