"""BatchNorm, of the global batch or of equal parts of it, with the ReLU that follows."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from hashvision.models.layers import KEPT


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def normalise(
    x: jax.Array, scale: jax.Array, bias: jax.Array, near: jax.Array, epsilon: float, relu: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch normalisation of each part by its own statistics (Ioffe and Szegedy 2015, algorithm 1).

    The backward pass is written out, and keeps x in its own dtype where autodiff would keep a
    float32 x - mean, and the ReLU's mask.

    Args:
      x: (parts, B, H, W, C).
      scale: float32 (C,).
      bias: float32 (C,).
      near: float32 (C,), roughly the mean, or 0; see `statistics`.
      epsilon: added to the variance.
      relu: y is not below 0.

    Returns:
      y as x, and the float32 (parts, 1, 1, 1, C) mean and variance, which carry no gradient.
    """
    return _normalise_forward(x, scale, bias, near, epsilon, relu)[0]


def statistics(x: jax.Array, near: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of each part, float32 (parts, 1, 1, 1, C).

    The variance of float32 takes a second pass, since E[x^2] - E[x]^2 cancels badly at large means.
    That of narrower dtypes is taken in the same pass as the mean, which XLA makes part of what
    computes x: a mean of m deviations costs some m^2 2^-23 of the variance, and rounding x to
    bfloat16 has cost ten times that already (m^2 2^-16 / 12). Taken about `near` it costs less.

    Args:
      x: (parts, B, H, W, C).
      near: float32 (C,), roughly the mean, or 0.
    """
    axes = tuple(range(1, x.ndim - 1))
    wide = x.astype(jnp.float32)
    if x.dtype == jnp.float32:
        mean = jnp.mean(wide, axes, keepdims=True)
        return mean, jnp.mean(jnp.square(wide - mean), axes, keepdims=True)
    offset = jnp.mean(wide - near, axes, keepdims=True)
    square = jnp.mean(jnp.square(wide - near), axes, keepdims=True)
    return near + offset, jnp.maximum(square - jnp.square(offset), 0)


def _normalise_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, near: jax.Array, epsilon: float, relu: bool
) -> Any:
    mean, var = (checkpoint_name(each, KEPT) for each in statistics(x, near))
    y = (x.astype(jnp.float32) - mean) * (scale * lax.rsqrt(var + epsilon)) + bias
    y = jnp.maximum(y, 0) if relu else y
    return (y.astype(x.dtype), mean, var), (x, mean, var, scale, bias)


def _normalise_backward(
    epsilon: float, relu: bool, saved: Any, gradients: Any
) -> tuple[jax.Array, ...]:
    x, mean, var, scale, bias = saved
    axes = tuple(range(1, x.ndim - 1))
    dy = gradients[0].astype(jnp.float32)
    centred = x.astype(jnp.float32) - mean
    inverse = lax.rsqrt(var + epsilon)
    if relu:
        dy = jnp.where(centred * (scale * inverse) + bias > 0, dy, 0)
    mean_dy = jnp.mean(dy, axes, keepdims=True)
    mean_dy_centred = jnp.mean(dy * centred, axes, keepdims=True)
    slope = mean_dy_centred * inverse * inverse
    dx = (dy - mean_dy - centred * slope) * (scale * inverse)
    count = x.size // mean.size
    dscale = jnp.sum(mean_dy_centred * inverse, range(x.ndim - 1)) * count
    dbias = jnp.sum(mean_dy, range(x.ndim - 1)) * count
    return dx.astype(x.dtype), dscale, dbias, jnp.zeros_like(dbias)


normalise.defvjp(_normalise_forward, _normalise_backward)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) with float32 statistics.

    Under `jit` the statistics are those of the global batch. With `groups` above 1 the batch is cut
    into that many equal parts, each normalised by its own statistics; with one part a device (or a
    group of devices) no statistics travel further than that. The running statistics average over
    the parts. Momentum, epsilon and the unbiased running variance are PyTorch's, as
    both authors used them.
    """

    groups: int = 1
    momentum: float = 0.9
    epsilon: float = 1e-5
    scale_init: Any = nn.initializers.ones
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, relu: bool = False) -> jax.Array:
        """Normalises (B, H, W, C) over all axes but the last; with `relu` sets to 0 what is below.

        Raises:
          ValueError: B does not divide into the groups.
        """
        shape = (x.shape[-1],)
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        if not train:
            scale = scale * lax.rsqrt(running_var.value + self.epsilon)
            y = (x.astype(jnp.float32) - running_mean.value) * scale + bias
            return (jnp.maximum(y, 0) if relu else y).astype(self.dtype)

        if x.shape[0] % self.groups:
            raise ValueError(f"a batch of {x.shape[0]} does not divide into {self.groups} groups")
        parts = x.reshape(self.groups, -1, *x.shape[1:])
        results: Any = normalise(parts, scale, bias, running_mean.value, self.epsilon, relu)
        y, mean, var = results
        if not self.is_initializing():
            count = parts.size // (self.groups * x.shape[-1])
            mean = jnp.mean(mean, 0).reshape(shape)
            unbiased = jnp.mean(var, 0).reshape(shape) * (count / max(count - 1, 1))
            keep = self.momentum
            running_mean.value = keep * running_mean.value + (1 - keep) * mean
            running_var.value = keep * running_var.value + (1 - keep) * unbiased
        return y.reshape(x.shape).astype(self.dtype)
