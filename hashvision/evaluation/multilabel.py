"""The protocol `multilabel`: mAP, precision@1 and recall@5 of class scores, with baselines.

The functions share three arrays: scores float (N, C), higher for a more likely class; positives
bool (N, C), the classes that each photo shows; counts int (B, N), how often each photo is in each
bootstrap resample.
"""

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from hashvision.errors import UserError
from hashvision.evaluation import bootstrap
from hashvision.evaluation.encoded import EncodedSet, Findings, skipped


def evaluate(encoded: EncodedSet) -> Findings:
    """Runs the protocol `multilabel`: measures the tag head on the labels of the test set.

    Raises:
      UserError: no readable photo shows a class of the vocabulary.
    """
    assert encoded.matched is not None and encoded.test.scores is not None
    photos, (match, columns) = encoded.tests, encoded.matched
    column = {number: position for position, number in enumerate(columns.tolist())}
    positives = np.zeros((len(photos.names), len(columns)), bool)
    for photo, labels in enumerate(photos.labels):
        shown = [column[match.classes[label]] for label in labels if label in match.classes]
        positives[photo, shown] = True
    positives = positives[encoded.test.readable]
    if not positives.any():
        raise UserError(
            f"No readable photo of {encoded.dataset.name} shows a class of the network's"
            " vocabulary; fix its image files."
        )
    entries = encoded.vocabulary["classes"]
    return Findings(
        metrics=estimates(encoded.test.scores, positives),
        baselines=baselines(positives),
        photos={"test": len(positives), "with_a_class": int(positives.any(axis=1).sum())},
        classes=int(positives.any(axis=0).sum()),
        skipped=skipped((photos, encoded.test)),
        details={
            "matched": {name: entries[number]["name"] for name, number in match.classes.items()},
            "unmatched": list(match.unmatched),
        },
    )


def estimates(
    scores: Float[np.ndarray, "N C"], positives: Bool[np.ndarray, "N C"]
) -> dict[str, bootstrap.Estimate]:
    """mAP, precision_at_1 and recall_at_5 with their intervals, in [0, 1].

    mAP ranks all N photos; the other two average over the photos with at least one positive class.
    """
    photos, labelled = len(scores), np.any(positives, axis=1)
    right = precision_at_1(scores, positives)
    recall = recall_at_k(scores, positives, 5)
    return {
        "mAP": bootstrap.estimate(mean_average_precision(scores, positives), photos),
        "precision_at_1": bootstrap.estimate(bootstrap.mean_of(right, labelled), photos),
        "recall_at_5": bootstrap.estimate(bootstrap.mean_of(recall, labelled), photos),
    }


def mean_average_precision(
    scores: Float[np.ndarray, "N C"], positives: Bool[np.ndarray, "N C"]
) -> bootstrap.Statistic:
    """The statistic mAP: the mean over the classes with a positive photo in the resample.

    It returns float (2, B): mAP, and mAP without the bias of average precision.
    """

    def statistic(counts: bootstrap.Counts) -> Float[np.ndarray, "2 b"]:
        precision = _average_precisions(scores, positives, counts)
        defined = ~np.isnan(precision)
        with np.errstate(invalid="ignore"):
            return np.where(defined, precision, 0).sum(axis=2) / defined.sum(axis=2)

    return statistic


def average_precision(
    scores: Float[np.ndarray, "N C"],
    positives: Bool[np.ndarray, "N C"],
    counts: bootstrap.Counts | None = None,
) -> Float64[np.ndarray, "_ C"]:
    """Non-interpolated average precision of each class, over photos weighted by their counts.

    AP_c = sum_i n_i y_ic P_ic / sum_i n_i y_ic, where P_ic, the precision at photo i, is the share
    of positives among the photos that score at least as high as i for class c. Tied photos so share
    one precision, as in scikit-learn's average_precision_score. In P_ic photo i itself counts once,
    however often it was drawn, since a copy is not a second find. If all counts are 1, this is
    plain average precision. In resamples it avoids the bias by which copies of a rare class's only
    photo would raise its precision.

    Args:
      scores: float (N, C); compared within a class only.
      positives: bool (N, C).
      counts: int (B, N); by default (1, N) ones.

    Returns:
      float64 (B, C), NaN if a resample has no positive photo of a class.
    """
    if counts is None:
        counts = np.ones((1, len(scores)))
    return _average_precisions(scores, positives, counts)[0]


def _average_precisions(
    scores: np.ndarray, positives: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Average precision as reported, and without its bias: float64 (2, B, C).

    A positive photo counts in its own precision, so average precision is biased upward, the more
    the fewer photos there are (`random_average_precision`). Without photo i itself, P_ic is the
    share of positives among the other photos that score at least as high; its expectation is the
    precision at that score on infinitely many photos. If there are no such photos, it is 1.
    """
    photos, classes = scores.shape
    # Photos are rows, so that a ranking reorders whole rows and sums run along memory.
    counts_NB = np.ascontiguousarray(counts.T, np.float32)
    precision = np.full((2, counts_NB.shape[1], classes), np.nan)
    for c in range(classes):
        order = np.argsort(-scores[:, c], kind="stable")
        ranks = np.flatnonzero(positives[order, c])
        if not len(ranks):
            continue
        ranked = scores[order, c]
        # The last rank of each photo's tie group: one before the next lower score.
        last = np.searchsorted(-ranked, -ranked[ranks], side="right") - 1
        ends, group = np.unique(last, return_inverse=True)
        starts = np.concatenate([[0], ends[:-1] + 1])
        seen = np.add.reduceat(counts_NB[order[: ends[-1] + 1]], starts, axis=0).cumsum(axis=0)
        drawn = counts_NB[order[ranks]]
        first = np.flatnonzero(np.diff(group, prepend=-1))
        found = np.add.reduceat(drawn, first, axis=0).cumsum(axis=0)
        found_others, seen_others = found[group] - drawn, seen[group] - drawn
        with_itself = (found_others + 1) / (seen_others + 1)
        alone = seen_others == 0
        without = np.where(alone, 1, found_others / np.maximum(seen_others, 1))
        total = found[-1]
        for kind, at_photo in enumerate((with_itself, without)):
            summed = (drawn * at_photo).sum(axis=0)
            precision[kind, :, c] = np.where(total > 0, summed / np.maximum(total, 1), np.nan)
    return precision


def precision_at_1(
    scores: Float[np.ndarray, "N C"], positives: Bool[np.ndarray, "N C"]
) -> Float64[np.ndarray, " N"]:
    """Whether each photo shows its best class: float64 (N,).

    Average it over the photos that show at least one of the C classes.
    """
    best = top_classes(scores, 1)
    return np.take_along_axis(positives, best, axis=1)[:, 0].astype(np.float64)


def recall_at_k(
    scores: Float[np.ndarray, "N C"], positives: Bool[np.ndarray, "N C"], k: int = 5
) -> Float64[np.ndarray, " N"]:
    """The share of each photo's classes among its k best: float64 (N,), 0 for a photo without any.

    The denominator is the number of the photo's classes, even if that exceeds k. Average it over
    the photos that show at least one of the C classes.
    """
    found = np.take_along_axis(positives, top_classes(scores, k), axis=1).sum(axis=1)
    return found / np.maximum(positives.sum(axis=1), 1)


def top_classes(scores: Float[np.ndarray, "N C"], k: int) -> Int[np.ndarray, "N _"]:
    """The k best classes of each photo, int64 (N, min(k, C)), best first, lower numbers on ties."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def baselines(positives: Bool[np.ndarray, "N C"]) -> dict[str, float]:
    """The metrics of scores that ignore the photos, over the classes with a positive photo.

    Returns:
      prevalence: the mean share of positive photos, the usual baseline of mAP.
      random_mAP: the exact expected mAP of a random order; above prevalence for rare classes.
      constant_precision_at_1, constant_recall_at_5: of always predicting the commonest classes.
    """
    photos, number = len(positives), positives.sum(axis=0)
    labelled = np.any(positives, axis=1)
    constant = np.broadcast_to(number.astype(np.float64), positives.shape)[labelled]
    shown = number[number > 0]
    return {
        "prevalence": float(np.mean(shown / photos)),
        "random_mAP": float(np.mean(random_average_precision(shown, photos))),
        "constant_precision_at_1": float(precision_at_1(constant, positives[labelled]).mean()),
        "constant_recall_at_5": float(recall_at_k(constant, positives[labelled]).mean()),
    }


def random_average_precision(
    positives: int | Int[np.ndarray, "*classes"], photos: int
) -> float | Float[np.ndarray, "*classes"]:
    """Expected average precision of `photos` photos in random order.

    With m positives among n photos, a positive photo has each rank k with equal probability, and
    the expected precision there is (1 + (k - 1) (m - 1) / (n - 1)) / k. The mean over k is, with
    the harmonic number H_n: H_n / n + (1 - H_n / n) (m - 1) / (n - 1). For a rare class this is
    well above its prevalence m / n.

    Args:
      positives: m, an int or an int array with one m per class.
      photos: n.

    Returns:
      Floats of the shape of `positives`.
    """
    if photos == 1:
        return np.ones(np.shape(positives))
    harmonic = np.sum(1 / np.arange(1, photos + 1)) / photos
    return harmonic + (1 - harmonic) * (np.asarray(positives) - 1) / (photos - 1)
