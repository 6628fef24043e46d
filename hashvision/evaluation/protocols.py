"""The evaluation protocols by name, and the ways to run them: after training and during it."""

import hashlib
import json
import os
import typing
from collections.abc import Callable, Sequence

from hashvision import storage
from hashvision.config import Config
from hashvision.data import removals
from hashvision.errors import UserError
from hashvision.evaluation import encoded, features, knn, labelled, linear, multilabel
from hashvision.evaluation.report import Report
from hashvision.sources import files

_LONGEST_NAME = 180  # bytes of a dataset's name in a report's; file systems take 255


class Protocol(typing.NamedTuple):
    """A way to evaluate a network on a labelled set.

    Attributes:
      evaluate: computes the findings.
      single_label: whether it needs train and test photos with one label each.
      scores: whether it needs the scores of a tag head.
    """

    evaluate: Callable[[encoded.EncodedSet], encoded.Findings]
    single_label: bool = False
    scores: bool = False


PROTOCOLS = {
    "knn": Protocol(knn.evaluate, single_label=True),
    "linear": Protocol(linear.evaluate, single_label=True),
    "multilabel": Protocol(multilabel.evaluate, scores=True),
}


def check(names: Sequence[str]) -> None:
    """Raises UserError if a protocol does not exist."""
    for name in names:
        if name not in PROTOCOLS:
            known = ", ".join(PROTOCOLS)
            raise UserError(f"There is no protocol {name!r}; choose from {known}.")


def run(
    encoder: features.Encoder, dataset: labelled.LabelledSet, names: Sequence[str]
) -> dict[str, encoded.Findings]:
    """Runs protocols on a labelled set; the network sees each photo once.

    Args:
      encoder: the network.
      dataset: the labelled set.
      names: of PROTOCOLS.

    Raises:
      UserError: a protocol does not exist or does not fit the set or the network.
    """
    check(names)
    chosen = {name: PROTOCOLS[name] for name in names}
    subject = encoded.encode(
        encoder,
        dataset,
        single_label=any(each.single_label for each in chosen.values()),
        scores=any(each.scores for each in chosen.values()),
    )
    return {name: each.evaluate(subject) for name, each in chosen.items()}


def evaluate(
    encoder: features.Encoder,
    dataset: str,
    names: Sequence[str],
    *,
    workdir: str,
    untrained: bool = False,
    removed: removals.RemovalList = removals.NO_LIST,
) -> list[Report]:
    """Evaluates a network on a dataset and writes a report for each protocol.

    Args:
      encoder: the network.
      dataset: a path that labelled.read takes.
      names: "knn" or "linear" (top1), "multilabel" (mAP, precision_at_1, recall_at_5).
      workdir: the folder for the reports; see report_path.
      untrained: whether the network is freshly initialised; the reports say so.
      removed: photos to leave out.

    Returns:
      The reports, in the order of names. With several hosts only the first one writes them.

    Raises:
      UserError: a protocol or the dataset does not exist, or they do not fit together.
    """
    check(names)
    read = labelled.read(dataset, removed)
    findings = run(encoder, read, names)
    folder = os.path.join(workdir, "evaluations")
    name = _report_name(folder, read.path)
    reports = [
        Report(
            protocol=protocol,
            dataset=name,
            path=files.printable(read.path),
            step=encoder.step,
            untrained=untrained,
            removed=read.removed,
            **found._asdict(),
        )
        for protocol, found in findings.items()
    ]
    for each in reports if encoder.leads else ():
        file = _report_file(each.protocol, name, untrained)
        storage.write(os.path.join(folder, file), each.as_json())
    return reports


class InTraining:
    """Runs the config's protocols during training; an `evaluate` for training.loop.train."""

    def __init__(
        self,
        config: Config,
        vocabulary: Callable[[], typing.Mapping[str, typing.Any]],
        *,
        batch_size: int,
        removed: removals.RemovalList = removals.NO_LIST,
    ) -> None:
        """Reads the labels, but no photos unless `removed` needs them.

        Args:
          config: of the run; its keys evaluate_on and evaluate_protocols are used.
          vocabulary: returns the run's vocabulary, which training writes before its first step.
          batch_size: photos per batch.
          removed: photos to leave out.

        Raises:
          UserError: a protocol does not exist or does not fit the dataset.
        """
        self._names, self._vocabulary = config.evaluate_protocols.split(","), vocabulary
        check(self._names)
        self._batch_size = batch_size
        self._dataset = labelled.read(config.evaluate_on, removed)
        if any(PROTOCOLS[name].single_label for name in self._names):
            labelled.single_label(self._dataset)

    def __call__(
        self, predict: Callable[..., typing.Any], resolution: int, step: int
    ) -> dict[str, float]:
        """Returns {"PROTOCOL_METRIC_NAME": value}; NAME is the name of the dataset's folder."""
        scores = any(PROTOCOLS[name].scores for name in self._names)
        encoder = features.Encoder(
            encode=predict,
            resolution=resolution,
            step=step,
            vocabulary=self._vocabulary() if scores else {},
            batch_size=self._batch_size,
        )
        return {
            f"{protocol}_{metric}_{self._dataset.name}": estimate.value
            for protocol, found in run(encoder, self._dataset, self._names).items()
            for metric, estimate in found.metrics.items()
        }


def report_path(workdir: str, protocol: str, dataset: str, untrained: bool = False) -> str:
    """Path of the report of a protocol on a dataset: WORKDIR/evaluations/PROTOCOL-NAME.json.

    NAME is the name of the dataset's folder. If there already is a report on another folder of that
    name, NAME starts with the names of as many parent folders as needed: imagenet-val.

    Args:
      workdir: of the run.
      protocol: one of PROTOCOLS.
      dataset: a path that labelled.read takes.
      untrained: whether the report is on the untrained network: PROTOCOL-NAME-untrained.json.
    """
    folder = os.path.join(workdir, "evaluations")
    name = _report_name(folder, labelled.locate(dataset))
    return os.path.join(folder, _report_file(protocol, name, untrained))


def _report_file(protocol: str, name: str, untrained: bool) -> str:
    return f"{protocol}-{name}{'-untrained' if untrained else ''}.json"


def _report_name(folder: str, path: str) -> str:
    """The name of the dataset at a path in the reports of a folder."""
    path = files.printable(path)
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
    """The path of a report's dataset; None if the report has none."""
    try:
        return json.loads(storage.read(file))["path"]
    except (ValueError, KeyError, TypeError):
        return None
