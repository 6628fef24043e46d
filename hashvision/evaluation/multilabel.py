"""How well class scores find and name what photos show: mAP, precision@1, recall@5, baselines.

All work on the same three arrays: scores float (N, C), higher for a surer class; positives bool
(N, C), what the photos show; counts int (B, N), how often a photo lies in each bootstrap resample.
"""

import numpy as np

from hashvision.errors import UserError
from hashvision.evaluation import bootstrap
from hashvision.evaluation.encoded import EncodedSet, Findings, skipped


def average_precision(
    scores: np.ndarray, positives: np.ndarray, counts: np.ndarray | None = None
) -> np.ndarray:
    """Non-interpolated average precision of each class, over photos weighted by their counts.

    AP_c = sum_i n_i y_ic P_ic / sum_i n_i y_ic, where P_ic, the precision at photo i, is the share
    of positives among the photos that score at least as high as i for class c (so tied photos
    share one precision, as in scikit-learn's average_precision_score). Among these, photo i itself
    counts once however often it was drawn: a copy of a photo is not a second find. With all
    counts 1 this is plain average precision; in resamples it removes the bias by which copies of a
    rare class's only photo would lift its rank.

    Args:
      scores: float (N, C); compared within a class only.
      positives: bool (N, C).
      counts: int (B, N); by default (1, N) ones.

    Returns:
      float64 (B, C), NaN where a resample has no positive of a class.
    """
    if counts is None:
        counts = np.ones((1, len(scores)))
    return _average_precisions(scores, positives, counts)[0]


def _average_precisions(
    scores: np.ndarray, positives: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Average precision as it is reported, and without its bias: float64 (2, B, C).

    A positive photo counts in its own precision, which is why even chance finds something where
    photos are few (`random_average_precision`), and less where they are many. Without itself P_ic
    is the share of positives among the other photos that score as high: its expectation is the
    precision at that score on endless photos. Where there are none, it is 1, as with itself.
    """
    photos, classes = scores.shape
    # Photos in rows: a class's ranking then reorders whole rows, and sums run along memory.
    counts_NB = np.ascontiguousarray(counts.T, np.float32)
    precision = np.full((2, counts_NB.shape[1], classes), np.nan)
    for c in range(classes):
        order = np.argsort(-scores[:, c], kind="stable")
        ranks = np.flatnonzero(positives[order, c])
        if not len(ranks):
            continue
        ranked = scores[order, c]
        # The last rank of each photo's tie group: where the next lower score begins, less one.
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


def mean_average_precision(scores: np.ndarray, positives: np.ndarray) -> bootstrap.Statistic:
    """The statistic mAP: the mean over the classes that have a positive photo (in the resample).

    It gives two numbers a resample, float (2, B): mAP, and mAP without the bias of AP.
    """

    def statistic(counts: np.ndarray) -> np.ndarray:
        precision = _average_precisions(scores, positives, counts)
        defined = ~np.isnan(precision)
        with np.errstate(invalid="ignore"):
            return np.where(defined, precision, 0).sum(axis=2) / defined.sum(axis=2)

    return statistic


def top_classes(scores: np.ndarray, k: int) -> np.ndarray:
    """The k best classes of each photo, best first, int64 (N, min(k, C)); ties to the lower one."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def precision_at_1(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Whether a photo's best class is one it shows: float64 (N,).

    Means of it are taken over the photos that show at least one of the C classes.
    """
    best = top_classes(scores, 1)
    return np.take_along_axis(positives, best, axis=1)[:, 0].astype(np.float64)


def recall_at_k(scores: np.ndarray, positives: np.ndarray, k: int = 5) -> np.ndarray:
    """The share of a photo's classes among its k best: float64 (N,), 0 for a photo that has none.

    The denominator is the number of the photo's own classes, also where it has more than k. Means
    of it are taken over the photos that show at least one of the C classes.
    """
    found = np.take_along_axis(positives, top_classes(scores, k), axis=1).sum(axis=1)
    return found / np.maximum(positives.sum(axis=1), 1)


def estimates(scores: np.ndarray, positives: np.ndarray) -> dict[str, bootstrap.Estimate]:
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


def random_average_precision(positives: int | np.ndarray, photos: int) -> np.ndarray:
    """Expected average precision of a random order of `photos` photos, of which some are positive.

    A positive photo stands at each rank k with equal chance, and then the expected precision there
    is (1 + (k - 1) (m - 1) / (n - 1)) / k, for m positives among n. Averaged over k, with the
    harmonic number H_n: H_n / n + (1 - H_n / n) (m - 1) / (n - 1). For a rare class this is well
    above its prevalence m / n.
    """
    if photos == 1:
        return np.ones(np.shape(positives))
    harmonic = np.sum(1 / np.arange(1, photos + 1)) / photos
    return harmonic + (1 - harmonic) * (np.asarray(positives) - 1) / (photos - 1)


def baselines(positives: np.ndarray) -> dict[str, float]:
    """What scores that never look at a photo reach, over the classes that have a positive photo.

    Returns:
      prevalence: the mean share of positive photos, the usual baseline of mAP.
      random_mAP: the expected mAP of a random order, exactly; above prevalence for rare classes.
      constant_precision_at_1, constant_recall_at_5: of naming the commonest classes every time.
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


def evaluate(encoded: EncodedSet) -> Findings:
    """The protocol `multilabel`: how well the tag head finds and names the labels of the test set.

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
