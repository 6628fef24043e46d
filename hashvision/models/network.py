"""The interface between networks and their training: two pure functions, without Flax types."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

Tree = Any  # a nested dict of arrays

_STATISTICS = "batch_stats"  # the Flax collection of BatchNorm's running statistics


class Variables(NamedTuple):
    """The arrays of a network.

    Attributes:
      params: trained by gradients.
      statistics: updated by each training step without gradients; empty if a network has none.
    """

    params: Tree
    statistics: Tree


class Network(NamedTuple):
    """A trunk or a head, as two pure functions.

    Attributes:
      init: (rng, inputs) -> Variables. Only the shape of one input matters.
      apply: (variables, inputs, train, rng=None) -> (outputs, new statistics). The inputs of a
        trunk are normalised photos, float32 (B, H, W, 3), and its outputs features, float32 (B, D).
        Only networks that draw random numbers in training need `rng`.
    """

    init: Callable[[PRNGKeyArray, Float[Array, "B ..."]], Variables]
    apply: Callable[..., tuple[Float[Array, "B D"], Tree]]


def from_module(module: nn.Module) -> Network:
    """Turns a Flax module whose call takes (inputs, train) into a Network."""

    def init(rng: PRNGKeyArray, inputs: Float[Array, "B ..."]) -> Variables:
        found = module.init(rng, inputs, train=False)
        return Variables(found["params"], found.get(_STATISTICS, {}))

    def apply(
        variables: Variables,
        inputs: Float[Array, "B ..."],
        train: bool,
        rng: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B D"], Tree]:
        collections = {"params": variables.params, _STATISTICS: variables.statistics}
        if not train:
            predicted: Any = module.apply(collections, inputs, train=False)
            return predicted, variables.statistics
        found: Any = module.apply(
            collections,
            inputs,
            train=True,
            mutable=[_STATISTICS],
            rngs=None if rng is None else {"dropout": rng},
        )
        outputs, changed = found
        return outputs, changed.get(_STATISTICS, {})

    return Network(init, apply)
