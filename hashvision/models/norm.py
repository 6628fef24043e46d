"""BatchNorm over all photos or over groups of them, optionally fused with the ReLU after it."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

from hashvision.models.layers import KEPT


class Groups(NamedTuple):
    """Groups of photos; BatchNorm computes separate statistics for each.

    Group g of n has every n-th photo, starting with photo g. So the parts of a batch, where photo i
    is in part i % parts, have the same groups as the whole batch. Each device holds neighbouring
    photos, so it has photos of each group and of each part. The statistics are therefore sums over
    devices, as without groups; the devices exchange (groups, C) numbers instead of (C,).
    """

    photos: int  # per group
    number: int  # of groups


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def batch_normalize(
    x: Float[Array, "B *space C"],
    scale: Float32[Array, " C"],
    bias: Float32[Array, " C"],
    near: Float32[Array, " C"],
    groups: Groups | None,
    epsilon: float,
    relu: bool,
) -> tuple[Float[Array, "B *space C"], Float32[Array, "G C"], Float32[Array, "G C"]]:
    """Normalises each group by its own statistics (Ioffe and Szegedy 2015, algorithm 1).

    The backward pass is written by hand. It stores only x in its own dtype; autodiff would store a
    float32 x - mean and the mask of the ReLU.

    Args:
      x: (B, ..., C), with the same number of neighbouring rows for each photo.
      scale: float32 (C,).
      bias: float32 (C,).
      near: float32 (C,), roughly the mean, or 0; see `statistics`.
      groups: of the photos; None: a single group.
      epsilon: added to the variance.
      relu: whether a ReLU follows.

    Returns:
      y, of the shape and dtype of x, and the float32 (groups, C) mean and variance, which carry no
      gradient.
    """
    return _batch_normalize_forward(x, scale, bias, near, groups, epsilon, relu)[0]


def statistics(
    x: Float[Array, "B *space C"], near: Float32[Array, " C"], groups: Groups | None
) -> tuple[Float32[Array, "G C"], Float32[Array, "G C"]]:
    """Mean and variance of each group, float32 (groups, C).

    For float32 the variance takes a second pass, since E[x^2] - E[x]^2 cancels badly if the mean is
    large. For narrower dtypes it is computed in the same pass as the mean, which XLA can fuse with
    the computation of x. With a mean of m standard deviations, this loses about m^2 2^-23 of the
    variance; rounding x to bfloat16 has already cost ten times as much (m^2 2^-16 / 12).
    Subtracting `near` first reduces the loss.

    Args:
      x: (B, ..., C).
      near: float32 (C,), roughly the mean, or 0.
      groups: of the photos; None: a single group.
    """
    wide = x.astype(jnp.float32)
    if x.dtype == jnp.float32:
        mean = _mean(wide, groups)
        return mean, _mean(jnp.square(wide - _spread(mean, x, groups)), groups)
    offset = _mean(wide - near, groups)
    square = _mean(jnp.square(wide - near), groups)
    return near + offset, jnp.maximum(square - jnp.square(offset), 0)


def _mean(x: jax.Array, groups: Groups | None) -> jax.Array:
    """The mean of x, (B, ..., C), over each group: (groups, C).

    Rows are averaged first, since regrouping x itself would copy it. Compiler's estimates for a
    ResNet-50 block of 14x14x1024 with 64 photos per chip on v5e:2x2: 1.57M cycles with one group,
    1.64M with eight, and 3.77M with eight if x is regrouped.
    """
    if groups is None:
        return jnp.mean(x, tuple(range(x.ndim - 1)))[None]
    rows = jnp.mean(x, tuple(range(1, x.ndim - 1)))
    return jnp.mean(rows.reshape(*groups, -1, rows.shape[-1]), (0, 2))


def _spread(each: jax.Array, x: jax.Array, groups: Groups | None) -> jax.Array:
    """Expands (groups, C) to one row per row of x, with axes to broadcast against x."""
    channels = each.shape[-1]
    if groups is not None:
        rows = (*groups, x.shape[0] // (groups.photos * groups.number), channels)
        each = jnp.broadcast_to(each[:, None], rows).reshape(-1, channels)
    return each.reshape(-1, *(1,) * (x.ndim - 2), channels)


def _batch_normalize_forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    near: jax.Array,
    groups: Groups | None,
    epsilon: float,
    relu: bool,
) -> Any:
    mean, var = (checkpoint_name(each, KEPT) for each in statistics(x, near, groups))
    slope = _spread(scale * lax.rsqrt(var + epsilon), x, groups)
    y = (x.astype(jnp.float32) - _spread(mean, x, groups)) * slope + bias
    y = jnp.maximum(y, 0) if relu else y
    return (y.astype(x.dtype), mean, var), (x, mean, var, scale, bias)


def _batch_normalize_backward(
    groups: Groups | None, epsilon: float, relu: bool, saved: Any, gradients: Any
) -> tuple[jax.Array, ...]:
    x, mean, var, scale, bias = saved
    spread = functools.partial(_spread, x=x, groups=groups)
    dy = gradients[0].astype(jnp.float32)
    centred = x.astype(jnp.float32) - spread(mean)
    inverse = lax.rsqrt(var + epsilon)
    slope = spread(scale * inverse)
    if relu:
        dy = jnp.where(centred * slope + bias > 0, dy, 0)
    mean_dy, mean_dy_centred = _mean(dy, groups), _mean(dy * centred, groups)
    tilt = mean_dy_centred * inverse * inverse
    dx = (dy - spread(mean_dy) - centred * spread(tilt)) * slope
    count = x.size // mean.size
    dscale = jnp.sum(mean_dy_centred * inverse, 0) * count
    dbias = jnp.sum(mean_dy, 0) * count
    return dx.astype(x.dtype), dscale, dbias, jnp.zeros_like(dbias)


batch_normalize.defvjp(_batch_normalize_forward, _batch_normalize_backward)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) with float32 statistics.

    Under `jit` the statistics are those of the global batch, or of each of its groups of photos.
    The running statistics are updated with the mean over the groups. Momentum, epsilon and the
    unbiased running variance are those of PyTorch, which both families' authors used.
    """

    groups: Groups | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    scale_init: Any = nn.initializers.ones
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B *space C"], train: bool, relu: bool = False
    ) -> Float[Array, "B *space C"]:
        """Normalises (B, ..., C) over all axes but the last; `relu` adds a ReLU.

        If there are several crops per photo, those of a photo are neighbouring rows.

        Raises:
          ValueError: the B rows do not divide into the groups.
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

        groups = self.groups
        if groups and x.shape[0] % (groups.photos * groups.number):
            raise ValueError(
                f"{x.shape[0]} rows do not divide into {groups.number} groups of {groups.photos}"
                " photos"
            )
        results: Any = batch_normalize(
            x,
            scale,
            bias,
            near=running_mean.value,
            groups=groups,
            epsilon=self.epsilon,
            relu=relu,
        )
        y, mean, var = results
        if not self.is_initializing():
            count = x.size // mean.size
            unbiased = jnp.mean(var, 0) * (count / max(count - 1, 1))
            keep = self.momentum
            running_mean.value = keep * running_mean.value + (1 - keep) * jnp.mean(mean, 0)
            running_var.value = keep * running_var.value + (1 - keep) * unbiased
        return y.astype(self.dtype)
