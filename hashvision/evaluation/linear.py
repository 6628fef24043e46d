"""The protocol `linear`: multinomial logistic regression on frozen features, L2 chosen on train."""

import typing
from collections.abc import Iterator

import numpy as np
import threadpoolctl
from jaxtyping import Bool, Float, Float64, Int, Integer
from sklearn.linear_model import LogisticRegression

from hashvision.evaluation.encoded import EncodedSet, Findings, top1

# Weights of the L2 term, relative to the mean cross-entropy. The strongest comes first, since it
# needs few iterations and each fit starts from the solution of the one before.
L2_GRID = tuple(float(l2) for l2 in np.logspace(1, -4, 9))
HELD_OUT_SHARE = 0.25
# Features are standardised and the weakest L2 is 1e-4, so the loss is smooth and strongly convex.
# L-BFGS has needed at most about 600 iterations; if it ever needs more than this, the user sees
# scikit-learn's ConvergenceWarning.
_MAX_ITERATIONS = 5000
# Below this many multiply-adds per gradient, threads wait for one another more than they work: with
# a busy second core, two BLAS and OpenMP threads made a probe of 1,470 x 368 x 98 14 times slower.
_WORTH_THREADS = 1e9


class Probe(typing.NamedTuple):
    """A fitted probe; the logits are standardised features @ weights + bias."""

    mean: Float64[np.ndarray, " D"]  # of the training features
    scale: Float64[np.ndarray, " D"]
    weights: Float64[np.ndarray, "D C"]
    bias: Float64[np.ndarray, " C"]
    l2: float
    held_out: dict[float, float]  # L2 -> top-1 accuracy on the held-out part of train

    def predict(self, features: Float[np.ndarray, "N D"]) -> Int[np.ndarray, " N"]:
        """Predicts class numbers, int64 (N,), from features float (N, D)."""
        standard = (np.asarray(features, np.float64) - self.mean) / self.scale
        return np.argmax(standard @ self.weights + self.bias, axis=1)


def evaluate(encoded: EncodedSet) -> Findings:
    """Runs the protocol `linear`: top-1 accuracy of a linear probe."""
    split, train, test = encoded.parts()
    probe = fit(train.features, split.train_labels[train.readable], len(split.classes))
    chosen = {f"{l2:.3g}": round(top1, 4) for l2, top1 in probe.held_out.items()}
    predicted = probe.predict(test.features)
    return top1(encoded, predicted, {"l2": probe.l2, "held_out_top1": chosen})


def fit(
    features: Float[np.ndarray, "N D"],
    labels: Integer[np.ndarray, " N"],
    classes: int,
    *,
    grid: tuple[float, ...] = L2_GRID,
    seed: int = 0,
) -> Probe:
    """Fits a linear probe on training photos only.

    It minimises mean_i -log softmax(W^T x_i + b)[y_i] + l2 / 2 |W|^2 on standardised features. l2
    is the grid's value with the best top-1 accuracy on a held-out quarter of train, and the
    strongest of equals. The final weights are fitted on all of train. With two classes W is one
    column, the log-odds, as in scikit-learn.

    Args:
      features: float (N, D), of the training photos.
      labels: int (N,), class numbers in [0, classes), at least two different ones.
      classes: C; a class without a training photo is never predicted.
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
    else:  # one photo per class, or a single L2
        chosen = grid[len(grid) // 2]
    mean, scale = standardization(features)
    # Along the path again: a cold start at the chosen L2 takes longer.
    *_, model = _path((features - mean) / scale, labels, grid[: grid.index(chosen) + 1])
    weights, bias = _dense(model, classes)
    return Probe(mean=mean, scale=scale, weights=weights, bias=bias, l2=chosen, held_out=tops)


def held_out(
    labels: Integer[np.ndarray, " N"], share: float = HELD_OUT_SHARE, seed: int = 0
) -> Bool[np.ndarray, " N"]:
    """Marks a share of each class for validation: at least one photo, but never the only one.

    Args:
      labels: int (N,), class numbers.
      share: of each class, rounded.
      seed: key of the random draw.

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


def standardization(
    features: Float[np.ndarray, "N D"],
) -> tuple[Float64[np.ndarray, " D"], Float64[np.ndarray, " D"]]:
    """Mean and standard deviation of each feature, float64 (D,); 1 for a constant feature.

    A feature counts as constant up to float32 rounding; otherwise the rounding noise of a dead
    channel would be amplified.
    """
    features = np.asarray(features, np.float64)
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    return mean, np.where(deviation > 1e-6 * np.abs(mean), deviation, 1.0)


def _path(
    features: np.ndarray, labels: np.ndarray, grid: tuple[float, ...]
) -> Iterator[LogisticRegression]:
    """Fits along the grid, each time from the previous solution; yields the model, refitted."""
    model = LogisticRegression(warm_start=True, max_iter=_MAX_ITERATIONS, tol=1e-4)
    work = features.size * len(np.unique(labels))
    for l2 in grid:
        # scikit-learn weighs the summed cross-entropy by C against |W|^2 / 2.
        model.set_params(C=1 / (l2 * len(labels)))
        with threadpoolctl.threadpool_limits(1 if work < _WORTH_THREADS else None):
            model.fit(features, labels)
        yield model


def _dense(model: LogisticRegression, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (D, C) and bias (C,) over all classes, from scikit-learn's coefficients.

    scikit-learn has a row for each class in the labels, or, for two classes, a single row with the
    log-odds of the second. Classes without photos get a bias of -inf.
    """
    coefficients, intercepts = np.asarray(model.coef_), np.asarray(model.intercept_)
    if len(model.classes_) == 2:
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    weights = np.zeros((coefficients.shape[1], classes))
    bias = np.full(classes, -np.inf)
    weights[:, model.classes_], bias[model.classes_] = coefficients.T, intercepts
    return weights, bias
