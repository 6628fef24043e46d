"""Optimisers and schedules as the papers' tables state them: SGD with Nesterov momentum, LARC."""

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
    """Learning rate of each step: linear warm-up to `peak`, then what `kind` says.

    cosine falls to final * peak along half a cosine (SwAV, SWAG); halving halves `halvings` times
    at even distances (WSL: 10 to 20 halvings); constant stays, and so does plateau, which the
    optimiser halves by what the loss does (SEER, for data without end).

    Args:
      kind: cosine, halving, constant or plateau.
      peak: the learning rate after warm-up, already scaled by the batch.
      total_steps: steps of the whole run.
      warmup_steps: steps W of the warm-up, from a rate r that no step takes: step s of them takes
        r + (peak - r) (s + 1) / W.
      final: the last learning rate as a share of the peak.
      halvings: for halving only.
      warmup_start: r, or the peak if that is lower.

    Returns:
      step -> float32 scalar.
    """

    def rate(step: Any) -> jax.Array:
        # Floats: a plan of a billion photos may have more steps than an int32 counts.
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
    """Whether the parameter at `path` is a kernel: neither a bias nor BatchNorm's scale."""
    return path[-1].key == "kernel"


def is_stacked(path: tuple[Any, ...]) -> bool:
    """Whether the parameter at `path` holds a layer a row, stacked for a scan (convnet.py)."""
    return any(getattr(key, "key", None) == "rest" for key in path)


def kernels_only(params: Any) -> Any:
    """The weight-decay mask that leaves out biases and BatchNorm, by name rather than by rank."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_kernel(path), params)


def scale_by_larc(
    weight_decay: float, trust: float = 0.001, epsilon: float = 1e-8
) -> optax.GradientTransformation:
    """LARC with clipping off, which SwAV and SEER call LARS, before momentum.

    g' = trust |p| / (|g| + wd |p| + eps) (g + wd p), of every parameter, BatchNorm and biases too;
    where |p| or |g| is 0, g' = g (NVIDIA apex's LARC, which the authors used). The learning rate
    stays outside the momentum trace, unlike in `optax.lars`. Layers stacked for a scan each have
    their own norms.
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
      weight_decay: of kernels (larc: of all), added to the gradient before momentum, as in
        PyTorch's SGD; for adamw decoupled (Loshchilov and Hutter 2019).
      momentum: in [0, 1); adamw's beta 1.
      nesterov: for sgd.
      clip: largest global norm of the gradients; 0 leaves them.
      plateau_steps: above 0, the learning rate is halved whenever the loss, averaged over so many
        steps, has not fallen three times running; updates are then given the loss as `value`.
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
    """What the plateaus so far have scaled the learning rate by: float32 scalar, 1 without any."""

    def is_plateau(node: Any) -> bool:
        return isinstance(node, optax.contrib.ReduceLROnPlateauState)

    found = filter(is_plateau, jax.tree.leaves(opt_state, is_leaf=is_plateau))
    return jnp.asarray(next((node.scale for node in found), 1.0), jnp.float32)
