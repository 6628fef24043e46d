"""Linear probe on frozen features: multinomial logistic regression, its L2 chosen inside train."""

import typing
from collections.abc import Iterator

import numpy as np
import threadpoolctl
from sklearn.linear_model import LogisticRegression

from hashvision.evaluation.encoded import EncodedSet, Findings, top1

# Weight of the L2 term beside the mean cross-entropy, strongest first: each fit starts from the
# solution before it, and a strongly regularised problem is solved in a few steps.
L2_GRID = tuple(float(l2) for l2 in np.logspace(1, -4, 9))
HELD_OUT_SHARE = 0.25
# Features come standardised and the weakest L2 is 1e-4, so the loss is smooth and strongly convex:
# L-BFGS has needed at most some 600 iterations. Should it ever need more than this, scikit-learn's
# ConvergenceWarning reaches the user.
_MAX_ITERATIONS = 5000
# Multiply-adds of one gradient below which threads wait for one another more than they work: with
# a busy second core, two BLAS and OpenMP threads made a probe of 1,470 x 368 x 98 14 times slower.
_WORTH_THREADS = 1e9


class Probe(typing.NamedTuple):
    """A fitted probe: logits are standardised features @ weights + bias."""

    mean: np.ndarray  # float64 (D,), of the training features
    scale: np.ndarray  # float64 (D,)
    weights: np.ndarray  # float64 (D, C)
    bias: np.ndarray  # float64 (C,)
    l2: float
    held_out: dict[float, float]  # L2 to top-1 on the held-out part of train

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Class numbers, int64 (N,), for features float (N, D)."""
        standard = (np.asarray(features, np.float64) - self.mean) / self.scale
        return np.argmax(standard @ self.weights + self.bias, axis=1)


def standardization(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature, float64 (D,); 1 for a feature that is constant.

    "Constant" allows for float32 rounding, else a dead channel's noise would be blown up.
    """
    features = np.asarray(features, np.float64)
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    return mean, np.where(deviation > 1e-6 * np.abs(mean), deviation, 1.0)


def held_out(labels: np.ndarray, share: float = HELD_OUT_SHARE, seed: int = 0) -> np.ndarray:
    """Marks a share of each class for validation, and at least one photo unless it has but one.

    Args:
      labels: int (N,), class numbers.
      share: of each class, rounded.
      seed: key of the draw.

    Returns:
      bool (N,).
    """
    labels = np.asarray(labels)
    marks = np.zeros(len(labels), bool)
    rng = np.random.Generator(np.random.Philox(key=[seed, len(labels)]))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        number = min(max(1, round(share * len(members))), len(members) - 1)
        marks[members[:number]] = True
    return marks


def _path(
    features: np.ndarray, labels: np.ndarray, grid: tuple[float, ...]
) -> Iterator[LogisticRegression]:
    """Fits along the grid, each from the solution before it; yields the one model, refitted."""
    model = LogisticRegression(warm_start=True, max_iter=_MAX_ITERATIONS, tol=1e-4)
    work = features.size * len(np.unique(labels))
    for l2 in grid:
        # scikit-learn weighs the summed cross-entropy by C against |W|^2 / 2.
        model.set_params(C=1 / (l2 * len(labels)))
        with threadpoolctl.threadpool_limits(1 if work < _WORTH_THREADS else None):
            model.fit(features, labels)
        yield model


def _dense(model: LogisticRegression, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (D, C) and bias (C,) over all classes, from scikit-learn's form.

    It keeps a row for each class it saw, but a single row, the log-odds of the second, for two.
    """
    coefficients, intercepts = np.asarray(model.coef_), np.asarray(model.intercept_)
    if len(model.classes_) == 2:
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    weights = np.zeros((coefficients.shape[1], classes))
    bias = np.full(classes, -np.inf)
    weights[:, model.classes_], bias[model.classes_] = coefficients.T, intercepts
    return weights, bias


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    grid: tuple[float, ...] = L2_GRID,
    seed: int = 0,
) -> Probe:
    """Fits a linear probe on training features alone.

    Minimises mean_i -log softmax(W^T x_i + b)[y_i] + l2 / 2 |W|^2 on standardised features. l2 is
    the grid's value with the best top-1 on a held-out quarter of train (the strongest of equals);
    the final weights are then fitted on all of train. Test photos play no part. (With two classes
    W is one column, the log-odds, as in scikit-learn.)

    Args:
      features: float (N, D).
      labels: int (N,), class numbers in [0, classes); at least two of them present.
      classes: C; a class with no training photo is never predicted.
      grid: L2 values, strongest first.
      seed: key of the held-out draw.
    """
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    marks = held_out(labels, seed=seed)
    tops: dict[float, float] = {}
    if marks.any() and len(grid) > 1:
        mean, scale = standardization(features[~marks])
        standard = (features - mean) / scale
        models = _path(standard[~marks], labels[~marks], grid)
        for l2, model in zip(grid, models, strict=True):
            tops[l2] = float(np.mean(model.predict(standard[marks]) == labels[marks]))
        chosen = max(grid, key=lambda l2: (tops[l2], l2))
    else:  # one photo a class, or nothing to choose from
        chosen = grid[len(grid) // 2]
    mean, scale = standardization(features)
    # The strongest fits first again: a cold start at the chosen L2 takes longer than the path.
    *_, model = _path((features - mean) / scale, labels, grid[: grid.index(chosen) + 1])
    weights, bias = _dense(model, classes)
    return Probe(mean, scale, weights, bias, chosen, tops)


def evaluate(encoded: EncodedSet) -> Findings:
    """The protocol `linear`: top-1 of a linear probe."""
    split, train, test = encoded.parts()
    probe = fit(train.features, split.train_labels[train.readable], len(split.classes))
    chosen = {f"{l2:.3g}": round(top1, 4) for l2, top1 in probe.held_out.items()}
    predicted = probe.predict(test.features)
    return top1(encoded, predicted, {"l2": probe.l2, "held_out_top1": chosen})
