"""The layers both families are made of: GroupConv, BatchNorm and SqueezeExcite.

Arrays are NHWC. Parameters and statistics are float32; `dtype` is the dtype of compute. Batches
are sharded over the mesh axes BATCH_AXES of the mesh in force (`jax.set_mesh`), if there is one.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")

# The forms of a grouped convolution; all give the same numbers from the same kernel.
#   blocks: dense convolutions over blocks of about 16 channels. XLA's own form is some twenty
#           times slower to train on CPU: ResNeXt-50, 128 px, batch 16: 6.95 against 0.36 img/s.
#   packed: groups merged up to the 128 lanes of a TPU, then XLA's grouped convolution. ResNeXt-50,
#           64 images at 224 px on v5e: 84.1M cycles against 120.2M by the compiler's estimate.
#   native: XLA's grouped convolution as it is.
GROUP_CONV_FORMS = {"cpu": "blocks", "tpu": "packed", "gpu": "native"}
CPU_BLOCK = 16
TPU_LANES = 128

# Kernels of this many elements are stored with outputs of zero up to a multiple of 128, so that
# every power of two up to it divides them, as a state sharded over that many devices needs: the
# 11,110 channels of RegNetY-10B would be cut into two at most, and be held whole everywhere.
LARGE_KERNEL = 2**20
STORED_MULTIPLE = 128

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# PyTorch's kaiming_normal_(mode="fan_out") of both families' authors: std sqrt(2 / (h w D)). For a
# grouped kernel PyTorch counts all D channels out, and so does this initializer.
fan_out_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def gathered(parameter: jax.Array) -> jax.Array:
    """A parameter whole on every device, wherever its shards lie: gathered where it is used.

    Without this XLA would follow a sharded kernel and shard, then gather, the activations.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return parameter
    return lax.with_sharding_constraint(parameter, PartitionSpec())


def stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which a kernel of `shape` is a parameter: its outputs padded where it is large.

    The rest is zero and stays so: nothing reads it, so it has no gradient, and no optimiser here
    moves a zero without one.
    """
    if math.prod(shape) < LARGE_KERNEL:
        return shape
    return (*shape[:-1], -(-shape[-1] // STORED_MULTIPLE) * STORED_MULTIPLE)


def _kernel(module: nn.Module, shape: tuple[int, ...], init: Any) -> jax.Array:
    """The module's parameter `kernel`, of `shape` and the module's dtype, whole on every device."""
    stored = stored_shape(shape)

    def padded(rng: jax.Array, dtype: Any) -> jax.Array:
        kernel = init(rng, shape, dtype)
        return jnp.pad(kernel, [(0, more - size) for size, more in zip(shape, stored, strict=True)])

    kernel = module.param("kernel", padded, jnp.float32)
    return gathered(kernel.astype(module.dtype))[..., : shape[-1]]


def conv(x: jax.Array, kernel: jax.Array, stride: int, groups: int = 1) -> jax.Array:
    """Convolution with PyTorch's symmetric padding of (size - 1) // 2.

    Args:
      x: (B, H, W, C).
      kernel: (h, w, C / groups, D), h and w odd.
      stride: in both directions.
      groups: the number of channel groups, which divides C and D.

    Returns:
      (B, ceil(H / stride), ceil(W / stride), D).
    """
    if kernel.shape[:2] == (1, 1) and groups == 1:  # a matrix product: twice as fast on CPU
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    padding = [((size - 1) // 2, (size - 1) // 2) for size in kernel.shape[:2]]
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=_DIMENSIONS,
        feature_group_count=groups,
    )


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of each 3x3 window, stride 2, padded by 1: (B, H, W, C) to half the sides."""
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def merge_groups(kernel: jax.Array, merge: int) -> jax.Array:
    """The same grouped convolution with `merge` times fewer groups: block-diagonal kernels.

    Args:
      kernel: (h, w, g, D), a kernel of D / g groups of g channels in and g out.
      merge: how many neighbouring groups become one; divides D / g.

    Returns:
      (h, w, merge * g, D), zero where a channel in and one out belong to different old groups.
    """
    height, width, group, features = kernel.shape
    if merge == 1:
        return kernel
    blocks = kernel.reshape(height, width, group, features // (merge * group), merge, group)
    merged = jnp.einsum("hwinmo,pm->hwpinmo", blocks, jnp.eye(merge, dtype=kernel.dtype))
    return merged.reshape(height, width, merge * group, features)


def block_conv(x: jax.Array, kernel: jax.Array, stride: int, block: int = CPU_BLOCK) -> jax.Array:
    """Grouped convolution as dense convolutions over blocks of about `block` channels.

    XLA's own grouped convolution is some twenty times slower to train on CPU (GROUP_CONV_FORMS).
    The last block is narrower where `block` does not divide the channels.
    """
    group, features = kernel.shape[2:]
    width = max(1, block // group) * group
    # The gradient of a split is one concatenation; that of slices, a sum of padded arrays.
    cuts = tuple(range(width, features, width))
    parts = zip(jnp.split(x, cuts, -1), jnp.split(kernel, cuts, -1), strict=True)
    outputs = [conv(y, merge_groups(k, k.shape[-1] // group), stride) for y, k in parts]
    return jnp.concatenate(outputs, axis=-1)


def packed_conv(x: jax.Array, kernel: jax.Array, stride: int, lanes: int = TPU_LANES) -> jax.Array:
    """Grouped convolution whose groups are merged, while they divide, up to `lanes` channels."""
    group, features = kernel.shape[2:]
    groups = features // group
    merge = max(
        m for m in range(1, groups + 1) if groups % m == 0 and (m == 1 or m * group <= lanes)
    )
    return native_conv(x, merge_groups(kernel, merge), stride)


def native_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """XLA's own grouped convolution."""
    return conv(x, kernel, stride, x.shape[-1] // kernel.shape[2])


def grouped_conv(x: jax.Array, kernel: jax.Array, stride: int, form: str) -> jax.Array:
    """Grouped convolution in the given form, by each device on its own part of the batch.

    On CPU and GPU XLA's partitioner gathers the whole batch on every device for a grouped
    convolution (openxla/xla issue 47945), and part of it for blocks of one under a sharded state;
    under `jax.shard_map` there is nothing left to partition.

    Args:
      x: (B, H, W, C), B a multiple of the devices of the mesh in force.
      kernel: (h, w, g, C), whole on every device.
      stride: in both directions.
      form: one of GROUP_CONV_FORMS' values.

    Returns:
      (B, ceil(H / stride), ceil(W / stride), C).
    """
    forms = {"blocks": block_conv, "packed": packed_conv, "native": native_conv}
    convolve = functools.partial(forms[form], stride=stride)
    if jax.sharding.get_abstract_mesh().empty:
        return convolve(x, kernel)
    batch = PartitionSpec(BATCH_AXES)
    return jax.shard_map(convolve, in_specs=(batch, PartitionSpec()), out_specs=batch)(x, kernel)


class GroupConv(nn.Module):
    """Grouped convolution without bias; dense where groups is 1, and of equal width otherwise.

    The kernel has the shape (h, w, C / groups, D) whatever the form, so a checkpoint written on one
    backend loads on another.
    """

    features: int
    size: int
    stride: int = 1
    groups: int = 1
    form: str = "blocks"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, ceil(H / stride), ceil(W / stride), features)."""
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        x, kernel = x.astype(self.dtype), _kernel(self, shape, fan_out_normal)
        if self.groups == 1:
            return conv(x, kernel, self.stride)
        if x.shape[-1] != self.features:
            raise ValueError(f"groups keep the width; {x.shape[-1]} in, {self.features} out differ")
        return grouped_conv(x, kernel, self.stride, self.form)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) with float32 statistics.

    Under `jit` the statistics are those of the global batch. With `groups` above 1 the batch is cut
    into that many equal parts, each normalised by its own statistics; with one part a device (or a
    group of devices) no statistics travel further than that. The running statistics average over
    the parts. The variance takes a second pass: E[x^2] - E[x]^2 cancels badly at large means.
    Momentum, epsilon and the unbiased running variance are PyTorch's, as both authors used them.
    """

    groups: int = 1
    momentum: float = 0.9
    epsilon: float = 1e-5
    scale_init: Any = nn.initializers.ones
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises (B, H, W, C) over all axes but the last."""
        shape = (x.shape[-1],)
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        if not train:
            scale = scale * lax.rsqrt(running_var.value + self.epsilon)
            y = (x.astype(jnp.float32) - running_mean.value) * scale + bias
            return y.astype(self.dtype)

        if x.shape[0] % self.groups:
            raise ValueError(f"a batch of {x.shape[0]} does not divide into {self.groups} groups")
        parts = x.reshape(self.groups, -1, *x.shape[1:]).astype(jnp.float32)
        axes = tuple(range(1, parts.ndim - 1))
        mean = jnp.mean(parts, axes, keepdims=True)
        centred = parts - mean
        var = jnp.mean(jnp.square(centred), axes, keepdims=True)
        if not self.is_initializing():
            count = parts.size // (self.groups * x.shape[-1])
            unbiased = jnp.mean(var, 0).reshape(shape) * (count / max(count - 1, 1))
            keep = self.momentum
            running_mean.value = keep * running_mean.value + (1 - keep) * jnp.mean(mean, 0).reshape(
                shape
            )
            running_var.value = keep * running_var.value + (1 - keep) * unbiased
        y = centred * (scale * lax.rsqrt(var + self.epsilon)) + bias
        return y.reshape(x.shape).astype(self.dtype)


class Dense(nn.Module):
    """A fully connected layer with bias."""

    features: int
    dtype: Any = jnp.float32
    kernel_init: Any = fan_out_normal

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, C) to (B, features)."""
        shape = (x.shape[-1], self.features)
        kernel = _kernel(self, shape, self.kernel_init)
        bias = self.param("bias", nn.initializers.zeros, shape[1:], jnp.float32)
        return x.astype(self.dtype) @ kernel + bias.astype(self.dtype)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (Hu et al. 2018) as RegNetY has it: ReLU inside, sigmoid outside."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales the channels of (B, H, W, C) by gates in (0, 1) computed from their means."""
        pooled = jnp.mean(x, (1, 2), dtype=jnp.float32)
        hidden = nn.relu(Dense(self.hidden, self.dtype, name="reduce")(pooled))
        gates = nn.sigmoid(Dense(x.shape[-1], self.dtype, name="expand")(hidden))
        return x * gates[:, None, None, :]
