"""Multiplications of a function, counted in its jaxpr: what a model asks for, and what lanes do."""

import math
from collections.abc import Iterator
from typing import Any


def forward(jaxpr: Any, lanes: int = 1) -> float:
    """Two for each multiplication of the convolutions and products of a jaxpr; loops by length.

    Args:
      jaxpr: of a forward pass.
      lanes: of the matrix units that do it. What they multiply is a multiple of that, in and out;
        a convolution's window counts as channels in, and its groups merge as suits them best.
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
        # Of a condition one branch runs; a function with its own gradient may stand there twice.
        inside = max((forward(each, lanes) for each in _jaxprs(equation.params)), default=0.0)
        total += inside * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total


def _padded(size: int, lanes: int) -> int:
    return -(-size // lanes) * lanes


def _jaxprs(parameters: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in parameters.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(each, "jaxpr", each)
            if hasattr(inner, "eqns"):
                yield inner
