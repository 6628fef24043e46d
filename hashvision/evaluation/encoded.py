"""A labelled set and the network's outputs for it, computed once for all protocols."""

import collections
import typing
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from hashvision.errors import UserError
from hashvision.evaluation import bootstrap, features, labelled, matching
from hashvision.sources import files

_EXAMPLES = 20  # names of unreadable photos in a report


class Findings(typing.NamedTuple):
    """The results of a protocol; all metrics and baselines are fractions in [0, 1].

    Attributes:
      metrics: by name, each with its 95% interval.
      baselines: the same metrics for answers that ignore the photos.
      photos: number of photos of each kind.
      classes: number of classes.
      skipped: photos that could not be read: their "count", and some names as "examples".
      details: settings and choices of this protocol, for the JSON report.
    """

    metrics: dict[str, bootstrap.Estimate]
    baselines: dict[str, float]
    photos: dict[str, int]
    classes: int
    skipped: dict[str, Any]
    details: dict[str, Any]


class MatchedClasses(typing.NamedTuple):
    """The vocabulary classes that the labels of a set name."""

    match: matching.ClassMatch
    columns: Int64[np.ndarray, " C"]  # their class numbers, ascending


class EncodedSet(typing.NamedTuple):
    """A labelled set and the network's outputs for its photos.

    Attributes:
      dataset: the labelled set.
      vocabulary: of the network, as in vocabulary.json.
      split: train and test photos with one label each, if a protocol needs it.
      matched: vocabulary classes of the labels, if a protocol needs scores.
      tests: the photos of dataset.test that the network encoded.
      test: the outputs for `tests`.
      train: the outputs for dataset.train, if the set has one.
    """

    dataset: labelled.LabelledSet
    vocabulary: typing.Mapping[str, Any]
    split: labelled.Split | None
    matched: MatchedClasses | None
    tests: labelled.Photos
    test: features.Encoded
    train: features.Encoded | None

    def parts(self) -> tuple[labelled.Split, features.Encoded, features.Encoded]:
        """The split, and the outputs for its train and test photos.

        Raises:
          UserError: a class has no readable photo in train.
        """
        assert self.split is not None
        split = self.split
        train = self.train or self.test.of(self.tests, split.train)
        test = self.test.of(self.tests, split.test)
        train_labels = split.train_labels[train.readable]
        unseen = np.setdiff1d(split.test_labels[test.readable], train_labels)
        if len(unseen) or len(np.unique(train_labels)) < 2:
            lost = np.setdiff1d(split.train_labels, train_labels)
            raise UserError(
                f"No training photo of {split.classes[lost[0]]} in {self.dataset.name} can be"
                " read; fix the files or remove the class."
            )
        return split, train, test


def encode(
    encoder: features.Encoder,
    dataset: labelled.LabelledSet,
    *,
    single_label: bool,
    scores: bool,
) -> EncodedSet:
    """Runs the network over a labelled set, after checking that the set can be evaluated.

    Args:
      encoder: the network.
      dataset: the labelled set.
      single_label: whether a protocol needs train and test photos with one label each.
      scores: whether a protocol needs scores of the classes that the labels name.

    Raises:
      UserError: the set lacks what the protocols need, or no photo can be read.
    """
    split = labelled.single_label(dataset) if single_label else None
    matched = _matched(encoder, dataset) if scores else None
    tests = dataset.test
    if split and dataset.train is None and matched is None:  # some photos may be in neither part
        places = np.concatenate([split.train.places, split.test.places])
        tests = labelled.take(tests, np.flatnonzero(np.isin(tests.places, places)))
    return EncodedSet(
        dataset=dataset,
        vocabulary=encoder.vocabulary,
        split=split,
        matched=matched,
        tests=tests,
        test=features.encode(encoder, tests, matched.columns if matched else None),
        train=features.encode(encoder, split.train) if split and dataset.train else None,
    )


def skipped(*parts: tuple[labelled.Photos, features.Encoded]) -> dict[str, Any]:
    """Counts and names the photos that could not be read."""
    names = [
        photos.names[index]
        for photos, encoded in parts
        for index in np.flatnonzero(~encoded.readable)
    ]
    return {"count": len(names), "examples": [files.printable(each) for each in names[:_EXAMPLES]]}


def top1(
    encoded: EncodedSet, predicted: Int[np.ndarray, " M"], details: dict[str, Any]
) -> Findings:
    """Findings of a protocol that predicts one class per test photo.

    Args:
      encoded: the set.
      predicted: int (M,), class numbers of the readable test photos.
      details: of the protocol.
    """
    split, train, test = encoded.parts()
    labels = split.test_labels[test.readable]
    right = bootstrap.mean_of(predicted == labels)
    return Findings(
        metrics={"top1": bootstrap.estimate(right, len(labels))},
        baselines={"commonest_class": float(np.bincount(labels).max() / len(labels))},
        photos={"train": int(train.readable.sum()), "test": len(labels)},
        classes=len(split.classes),
        skipped=skipped((split.train, train), (split.test, test)),
        details={"split": split.note, **details},
    )


def _matched(encoder: features.Encoder, dataset: labelled.LabelledSet) -> MatchedClasses:
    number = collections.Counter(label for labels in dataset.test.labels for label in labels)
    names = [name for name, _ in sorted(number.items(), key=lambda item: (-item[1], item[0]))]
    match = matching.match(names, encoder.vocabulary)
    if not match.classes:
        raise UserError(
            f"None of the {len(names):,} class names of {dataset.name} ({', '.join(names[:5])}) is"
            " in the network's vocabulary; evaluate on a set that shows what it was trained on, or"
            " use --protocol=knn."
        )
    return MatchedClasses(match, np.unique(list(match.classes.values())))
