"""FLOPs of a function, counted in its jaxpr: of the model itself, or as matrix units execute it."""

import math
from collections.abc import Iterator
from typing import Any


def forward(jaxpr: Any, lanes: int = 1) -> float:
    """FLOPs of the convolutions and matrix products of a jaxpr: two per multiplication.

    A scan counts once per iteration. A condition counts as its most expensive branch.

    Args:
      jaxpr: jaxpr of a forward pass.
      lanes: width of the matrix units; 1 counts the model's own FLOPs. Otherwise the input and the
        output channels are rounded up to a multiple of it. The window of a convolution counts as
        input channels, and its groups are merged in the cheapest way.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        operands = [x.aval.shape for x in (*equation.invars, *equation.outvars)]
        if equation.primitive.name == "dot_general":
            contracted, batched = equation.params["dimension_numbers"]
            inner = math.prod(operands[0][axis] for axis in contracted[0])
            shared = math.prod(operands[0][axis] for axis in batched[0])
            outer = math.prod(operands[1]) // (inner * shared)
            rows = math.prod(operands[0]) // (inner * shared)
            total += 2.0 * shared * rows * _padded(inner, lanes) * _padded(outer, lanes)
        elif equation.primitive.name == "conv_general_dilated":
            features = operands[1][equation.params["dimension_numbers"].rhs_spec[0]]
            groups = equation.params["feature_group_count"]
            inner, outer = math.prod(operands[1]) // features, features // groups
            merged = min(
                groups // m * _padded(m * inner, lanes) * _padded(m * outer, lanes)
                for m in range(1, groups + 1)
                if groups % m == 0
            )
            total += 2.0 * (math.prod(operands[-1]) // features) * merged
        # The maximum: one branch of a condition runs, and a function with a custom gradient may
        # have its jaxpr among the parameters twice.
        inside = max((forward(each, lanes) for each in _jaxprs(equation.params)), default=0.0)
        total += inside * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total


def _padded(size: int, lanes: int) -> int:
    """Rounds size up to a multiple of lanes."""
    return -(-size // lanes) * lanes


def _jaxprs(parameters: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in parameters.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(each, "jaxpr", each)
            if hasattr(inner, "eqns"):
                yield inner
