"""What a network is trained for. An objective is six pure functions over plain arrays."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Tree = Any  # a nested dict of arrays
Batch = dict[str, jax.Array]


class Objective(NamedTuple):
    """All that the training loop and the evaluations need to know of what is being learnt.

    Attributes:
      init: (rng, batch) -> (params, extra); `extra` holds what is updated without gradients
        (BatchNorm statistics, queues), and params["trunk"] and extra["batch_stats"] the network.
      loss: (params, extra, batch, rng, step) -> (loss, (changed, metrics)), with float32 scalars;
        `changed` holds the members of extra that the step changes. Over the parts of a batch it is
        averaged, and each part is given what the step began with.
      after_update: params -> params, once after every optimiser step (normalised prototypes, say).
      predict: (params, extra, images) -> (features, scores) of uint8 photos (B, H, W, 3): float32
        (B, D) and (B, K), a score per class that ranks photos and classes alike; or None, where
        there are no classes.
      of_whole_batch: (params, extra, parts, step) -> (parts, changed), before gradients accumulate
        over the parts of a batch: gives them what depends on the whole of it. An array of `parts`
        is (N, B / N, ...), with photo i of the batch in part i % N.
      diagnose: scalars of a log line -> the cause and its likeliest remedies, where they are those
        of a run that learns nothing; None otherwise.
    """

    init: Callable[[jax.Array, Batch], tuple[Tree, Tree]]
    loss: Callable[
        [Tree, Tree, Batch, jax.Array, jax.Array],
        tuple[jax.Array, tuple[Tree, dict[str, jax.Array]]],
    ]
    after_update: Callable[[Tree], Tree]
    predict: Callable[[Tree, Tree, jax.Array], tuple[jax.Array, jax.Array | None]]
    of_whole_batch: Callable[[Tree, Tree, Batch, jax.Array], tuple[Batch, Tree]]
    diagnose: Callable[[Mapping[str, float]], str | None]
