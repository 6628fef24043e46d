"""The optimisers (SGD with Nesterov momentum, LARC, AdamW) and learning-rate schedules."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[Any], jax.Array]


def schedule(
    kind: str,
    peak: float,
    *,
    total_steps: int,
    warmup_steps: int,
    final: float = 0.0,
    halvings: int = 10,
    warmup_start: float = 0.0,
) -> Schedule:
    """The learning rate by step: linear warm-up to `peak`, then the given kind of schedule.

    cosine falls to final * peak along half a cosine (SwAV, SWAG). halving halves the rate
    `halvings` times, evenly spaced (WSL: 10 to 20 halvings). constant keeps the peak. plateau keeps
    it too here; `build` makes the optimiser halve it when the loss stops falling (SEER, for endless
    data).

    Args:
      kind: cosine, halving, constant or plateau.
      peak: the learning rate after warm-up, already scaled by the batch.
      total_steps: steps of the whole run.
      warmup_steps: W; step s of the warm-up, from 0, has the rate r + (peak - r) (s + 1) / W.
      final: the last learning rate as a share of the peak (cosine).
      halvings: number of halvings (halving).
      warmup_start: r, or the peak if that is lower.

    Returns:
      step -> float32 scalar.
    """

    def rate(step: Any) -> jax.Array:
        # float32, since a plan may have more steps than int32 can count.
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip(
            (step - float(warmup_steps)) / max(float(total_steps - warmup_steps), 1), 0.0, 1.0
        )
        if kind == "cosine":
            decay = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        elif kind == "halving":
            decay = 0.5 ** jnp.floor(done * (halvings + 1)).clip(0, halvings)
        else:
            decay = jnp.ones(())
        risen = jnp.minimum((step + 1) / max(float(warmup_steps), 1), 1.0)
        start = min(warmup_start, peak)
        return jnp.asarray((start + (peak - start) * risen) * decay, jnp.float32)

    return rate


def is_kernel(path: tuple[Any, ...]) -> bool:
    """Whether the parameter at `path` is a kernel, not a bias or a BatchNorm scale."""
    return path[-1].key == "kernel"


def is_stacked(path: tuple[Any, ...]) -> bool:
    """Whether the parameter at `path` stacks a stage's equal layers for a scan (convnet.py)."""
    return any(getattr(key, "key", None) == "rest" for key in path)


def kernels_only(params: Any) -> Any:
    """The mask that limits weight decay to kernels; by name, since stacking changes ranks."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_kernel(path), params)


def scale_by_larc(
    weight_decay: float, trust: float = 0.001, epsilon: float = 1e-8
) -> optax.GradientTransformation:
    """LARC without clipping, which SwAV and SEER call LARS; applied before momentum.

    g' = trust |p| / (|g| + wd |p| + eps) (g + wd p) for every parameter p with gradient g, biases
    and BatchNorm included; g' = g if |p| or |g| is 0. This is LARC of NVIDIA apex, which the
    authors used. The learning rate stays outside the momentum trace, unlike in `optax.lars`. Each
    layer of a stacked parameter has its own norms.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("LARC needs the parameters")

        def leaf(path: tuple[Any, ...], g: jax.Array, p: jax.Array) -> jax.Array:
            axes = tuple(range(1 if is_stacked(path) else 0, p.ndim))
            p_norm = jnp.sqrt(jnp.sum(jnp.square(p), axes, keepdims=True))
            g_norm = jnp.sqrt(jnp.sum(jnp.square(g), axes, keepdims=True))
            rate = trust * p_norm / (g_norm + weight_decay * p_norm + epsilon)
            return jnp.where((p_norm > 0) & (g_norm > 0), rate * (g + weight_decay * p), g)

        return jax.tree_util.tree_map_with_path(leaf, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def build(
    name: str,
    rate: Schedule,
    *,
    weight_decay: float,
    momentum: float = 0.9,
    nesterov: bool = True,
    clip: float = 0.0,
    plateau_steps: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """The optimiser: gradient clipping, weight decay, momentum, then the learning rate.

    Args:
      name: sgd, larc or adamw.
      rate: step -> learning rate.
      weight_decay: of kernels (larc: of all parameters), added to the gradient before momentum, as
        in PyTorch's SGD; decoupled for adamw (Loshchilov and Hutter 2019).
      momentum: in [0, 1); adamw's beta 1.
      nesterov: whether sgd uses Nesterov momentum.
      clip: largest global norm of the gradients; 0 does not clip.
      plateau_steps: if above 0, the learning rate is halved when the loss, averaged over this many
        steps, has not fallen three times in a row; `update` then needs the loss as `value`.
    """
    steps = [optax.clip_by_global_norm(clip)] if clip else []
    if name == "sgd":
        steps.append(optax.add_decayed_weights(weight_decay, kernels_only))
    elif name == "larc":
        steps.append(scale_by_larc(weight_decay))
        nesterov = False
    elif name == "adamw":
        adamw = optax.adamw(rate, momentum, weight_decay=weight_decay, mask=kernels_only)
        steps.append(adamw)
    else:
        raise ValueError(name)
    if name != "adamw":
        steps.append(optax.sgd(rate, momentum, nesterov=nesterov))
    if plateau_steps:
        steps.append(
            optax.contrib.reduce_on_plateau(0.5, patience=3, accumulation_size=plateau_steps)
        )
    chain = optax.with_extra_args_support(optax.chain(*steps))

    def update(*arguments: Any, **extra: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # optax counts in int32 and divides by it
            return chain.update(*arguments, **extra)

    return optax.GradientTransformationExtraArgs(chain.init, update)


def plateau_scale(opt_state: Any) -> jax.Array:
    """The factor of the learning rate after the plateaus so far: float32 scalar, 1 without any."""

    def is_plateau(node: Any) -> bool:
        return isinstance(node, optax.contrib.ReduceLROnPlateauState)

    found = filter(is_plateau, jax.tree.leaves(opt_state, is_leaf=is_plateau))
    return jnp.asarray(next((node.scale for node in found), 1.0), jnp.float32)
