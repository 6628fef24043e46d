"""The precision that a function's matrix products request, and an emulation of it as on TPUs."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_PRODUCTS = ("dot_general", "conv_general_dilated")
# Number of bfloat16 products that a TPU uses for one float32 product, by precision.
_PASSES = {None: 1, "DEFAULT": 1, "HIGH": 3, "HIGHEST": 6}


def products(jaxpr: Jaxpr) -> Iterator[Any]:
    """The equations of matrix products and convolutions, including those of inner functions."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in _PRODUCTS:
            yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from products(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def requested(function: Any, *arguments: Any) -> list[str]:
    """The precision that each product of a function requests; DEFAULT if it requests none."""
    names = []
    for equation in products(jax.make_jaxpr(function)(*arguments).jaxpr):
        precision = equation.params["precision"]
        both = precision if isinstance(precision, tuple) else (precision,)
        names.append(min((_name(each) for each in both), key=lambda name: _PASSES[name]))
    return names


def on_tpu(function: Any, *arguments: Any) -> Any:
    """The function's result, with float32 products computed as a TPU computes them."""
    closed = jax.make_jaxpr(function)(*arguments)
    leaves = jax.tree.leaves(arguments)
    found = _evaluated(closed.jaxpr, closed.consts, leaves)
    return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(function, *arguments)), found)


def _evaluated(jaxpr: Jaxpr, consts: Any, arguments: Any) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs, inner = [value(atom) for atom in equation.invars], equation.params.get("jaxpr")
        if inner is not None and equation.primitive.name in ("jit", "pjit"):
            outputs = _evaluated(inner.jaxpr, inner.consts, inputs)
        elif equation.primitive.name == "dot_general":
            outputs = [_product(inputs[0], inputs[1], equation.params)]
        else:
            found = equation.primitive.bind(*inputs, **equation.params)
            outputs = found if equation.primitive.multiple_results else [found]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _product(left: jax.Array, right: jax.Array, options: dict[str, Any]) -> jax.Array:
    """The sum of products of bfloat16 parts, largest first, as many as the precision uses."""
    precision = options["precision"]
    name = _name(precision[0] if isinstance(precision, tuple) else precision)
    orders = {1: 1, 3: 2, 6: 3}[_PASSES[name]]  # of parts i and j, i + j < orders
    lefts, rights = _parts(left, orders), _parts(right, orders)
    exact = {**options, "precision": jax.lax.Precision.HIGHEST}
    total = jnp.zeros(())
    for i, part in enumerate(lefts):
        for other in rights[: orders - i]:
            total += jax.lax.dot_general_p.bind(part, other, **exact)
    return total


def _parts(x: jax.Array, count: int) -> list[jax.Array]:
    """Arrays of bfloat16 values, stored as float32, whose sum is nearly x."""
    found = []
    for _ in range(count):
        # Rounds the bits, since XLA would remove a conversion to bfloat16 and back.
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & jnp.uint32(0xFFFF0000)
        found.append(jax.lax.bitcast_convert_type(rounded, jnp.float32))
        x = x - found[-1]
    return found


def _name(precision: Any) -> str:
    return "DEFAULT" if precision is None else precision.name


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, ClosedJaxpr | Jaxpr)
