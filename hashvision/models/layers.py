"""The layers of all networks but BatchNorm: GroupConv, Dense, SqueezeExcite, max_pool.

Arrays are NHWC. Parameters and statistics are float32; `dtype` is the dtype of computation. If a
mesh is set (`jax.set_mesh`), batches are sharded over its axes BATCH_AXES.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

BATCH_AXES = ("data", "fsdp")

# The forms of a grouped convolution; all compute the same function of the same kernel.
#   blocks: dense convolutions over blocks of about 16 channels. XLA's native form trains some
#           twenty times slower on CPU: ResNeXt-50, 128 px, batch 16: 0.36 against 6.95 img/s.
#           Blocks of 32 or 64 channels are slower.
#   packed: groups merged up to the 128 lanes of a TPU; if there are few merged groups, each is a
#           dense convolution, else they are a native grouped one. The native form puts groups in a
#           separate dimension, and copies activations there and back. Compiler's estimates for 64
#           photos: ResNeXt-50's step at 224 px on v5e takes 121M cycles, 129M with merged groups
#           in native form, and 176M without merging; a block of RegNetY-128GF's third stage (11
#           groups of 264) on v5p takes 14.8M, against 17.0M in native form. With 32 groups of 128
#           or more, dense convolutions gain 2% and take three times as long to compile.
#   native: XLA's grouped convolution.
GROUP_CONV_FORMS = {"cpu": "blocks", "tpu": "packed", "gpu": "native"}
CPU_BLOCK = 16
TPU_LANES = 128
TPU_BLOCKS = 16  # most merged groups that become separate convolutions

# The name of values that are stored for the backward pass, not computed again (convnet.Stage).
KEPT = "kept"

# Kernels with at least this many elements are stored with zero outputs added up to a multiple of
# 128, so that every power of two up to 128 divides the outputs, and fsdp can shard them. The 11,110
# channels of RegNetY-10B could otherwise be sharded over two devices only.
LARGE_KERNEL = 2**20
STORED_MULTIPLE = 128

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# PyTorch's kaiming_normal_(mode="fan_out"), used by the authors of both families: std
# sqrt(2 / (h w D)). For a grouped kernel both count all D output channels.
fan_out_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def gathered(parameter: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Gathers a sharded parameter, so that every device has all of it.

    Without this XLA would instead shard the activations like the kernel, and gather those.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return parameter
    return lax.with_sharding_constraint(parameter, PartitionSpec())


def stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which a kernel of `shape` is stored: large kernels have padded outputs.

    The padding is zero and stays zero: no computation reads it, so its gradient is zero, and no
    optimiser here changes a zero whose gradient is zero.
    """
    if math.prod(shape) < LARGE_KERNEL:
        return shape
    return (*shape[:-1], -(-shape[-1] // STORED_MULTIPLE) * STORED_MULTIPLE)


def _kernel(module: nn.Module, shape: tuple[int, ...], init: Any) -> jax.Array:
    """The module's parameter `kernel` in the module's dtype, gathered and without padding."""
    stored = stored_shape(shape)

    def padded(rng: PRNGKeyArray, dtype: Any) -> jax.Array:
        kernel = init(rng, shape, dtype)
        return jnp.pad(kernel, [(0, more - size) for size, more in zip(shape, stored, strict=True)])

    kernel = module.param("kernel", padded, jnp.float32)
    return gathered(kernel.astype(module.dtype))[..., : shape[-1]]


def conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "h w _ D"], stride: int, *, groups: int = 1
) -> Float[Array, "B _ _ D"]:
    """Convolution with PyTorch's symmetric padding of (size - 1) // 2 on each side.

    Args:
      x: (B, H, W, C).
      kernel: (h, w, C / groups, D), h and w odd.
      stride: in both directions.
      groups: the number of channel groups, which divides C and D.

    Returns:
      (B, ceil(H / stride), ceil(W / stride), D).
    """
    if kernel.shape[:2] == (1, 1) and groups == 1:  # as a matrix product: twice as fast on CPU
        return matmul(x[:, ::stride, ::stride], kernel[0, 0])
    padding = [((size - 1) // 2, (size - 1) // 2) for size in kernel.shape[:2]]
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=_DIMENSIONS,
        feature_group_count=groups,
    )


@jax.custom_vjp
def matmul(x: Float[Array, "*rows C"], kernel: Float[Array, "C D"]) -> Float[Array, "*rows D"]:
    """The product x @ kernel, with gradients that need no copy of x or dy on CPU.

    With autodiff, XLA for CPU would write a transposed copy of one of them to compute the kernel's
    gradient; ResNeXt-50's step took a fifth longer.

    Args:
      x: (..., C).
      kernel: (C, D).
    """
    return x @ kernel


def _matmul_backward(saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    flat_x, flat_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dkernel = lax.dot_general(flat_x, flat_dy, (((0,), (0,)), ((), ())))
    return dy @ kernel.T, dkernel


matmul.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _matmul_backward)


def _max_of_windows(x: jax.Array) -> jax.Array:
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def _max_pool_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient in x, computed with arrays of the size of dy: one per position in a window."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    largest = jnp.full(dy.shape, -jnp.inf, x.dtype)
    index = jnp.zeros(dy.shape, jnp.uint8)  # position of the first maximum among the window's nine
    for place in range(9):
        row, column = divmod(place, 3)
        value = padded[:, row : row + height : 2, column : column + width : 2]
        index = jnp.where(value > largest, jnp.uint8(place), index)
        largest = jnp.maximum(largest, value)

    after = ((0, 0), (0, 1), (0, 1), (0, 0))
    index, padded_dy = jnp.pad(index, after, constant_values=9), jnp.pad(dy, after)
    # An even row of x is the middle row of one window; an odd one is the last row of one window and
    # the first row of the next.
    windows = (((1, 0),), ((2, 0), (0, 1)))

    def part(row_parity: int, column_parity: int) -> jax.Array:
        total = jnp.zeros_like(dy)
        for row, down in windows[row_parity]:
            for column, right in windows[column_parity]:
                at = np.s_[:, down : down + dy.shape[1], right : right + dy.shape[2]]
                total += jnp.where(index[at] == 3 * row + column, padded_dy[at], 0)
        return total

    rows = [jnp.stack([part(parity, 0), part(parity, 1)], 3) for parity in (0, 1)]
    dx = jnp.stack(rows, 2).reshape(len(x), 2 * dy.shape[1], 2 * dy.shape[2], -1)
    return dx[:, :height, :width]


def _xla_max_pool_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    return jax.vjp(_max_of_windows, x)[1](dy)[0]


@jax.custom_vjp
def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B (H+1)//2 (W+1)//2 C"]:
    """The maximum of each 3x3 window, stride 2, padding 1: (B, H, W, C) to (B, H / 2, W / 2, C).

    Among equal values the first gets the gradient, as in PyTorch. XLA's own gradient takes a dozen
    passes on CPU (82 ms, against 7 ms here, for 16 photos of 64x64x64). On TPU it is the faster one
    (8.8M cycles by the compiler's estimate, against 17.3M, for a stem with 64 photos on v5e).
    """
    return _max_of_windows(x)


def _max_pool_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    forms = {"cpu": _max_pool_gradient, "default": _xla_max_pool_gradient}
    return (lax.platform_dependent(x, dy, **forms),)


max_pool.defvjp(lambda x: (_max_of_windows(x), x), _max_pool_backward)


def merge_groups(kernel: Float[Array, "h w g D"], merge: int) -> Float[Array, "h w {merge}*g D"]:
    """Merges neighbouring groups of a kernel; the convolution stays the same.

    Args:
      kernel: (h, w, g, D), a kernel of D / g groups with g input and g output channels each.
      merge: number of groups that become one; divides D / g.

    Returns:
      Block-diagonal kernels (h, w, merge * g, D), zero between channels of different old groups.
    """
    height, width, group, features = kernel.shape
    if merge == 1:
        return kernel
    blocks = kernel.reshape(height, width, group, features // (merge * group), merge, group)
    merged = jnp.einsum("hwinmo,pm->hwpinmo", blocks, jnp.eye(merge, dtype=kernel.dtype))
    return merged.reshape(height, width, merge * group, features)


def block_conv(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "h w g C"],
    stride: int,
    *,
    block: int = CPU_BLOCK,
) -> Float[Array, "B _ _ C"]:
    """Grouped convolution as dense convolutions over blocks of at most `block` channels.

    A block holds at least one group. The last block is narrower than the others if they do not
    divide the channels.
    """
    group, features = kernel.shape[2:]
    width = max(1, block // group) * group
    # The gradient of a split is one concatenation; that of slices is a sum of padded arrays.
    cuts = tuple(range(width, features, width))
    parts = zip(jnp.split(x, cuts, -1), jnp.split(kernel, cuts, -1), strict=True)
    outputs = [conv(y, merge_groups(k, k.shape[-1] // group), stride) for y, k in parts]
    return jnp.concatenate(outputs, axis=-1)


def packed_conv(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "h w g C"],
    stride: int,
    *,
    lanes: int = TPU_LANES,
) -> Float[Array, "B _ _ C"]:
    """Grouped convolution with groups merged up to `lanes` channels; see GROUP_CONV_FORMS."""
    group, features = kernel.shape[2:]
    if features <= TPU_BLOCKS * max(1, lanes // group) * group:
        return block_conv(x, kernel, stride, block=lanes)
    groups = features // group
    merge = max(
        m for m in range(1, groups + 1) if groups % m == 0 and (m == 1 or m * group <= lanes)
    )
    return native_conv(x, merge_groups(kernel, merge), stride)


def native_conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "h w g C"], stride: int
) -> Float[Array, "B _ _ C"]:
    """XLA's own grouped convolution."""
    return conv(x, kernel, stride, groups=x.shape[-1] // kernel.shape[2])


def grouped_conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "h w g C"], stride: int, form: str
) -> Float[Array, "B _ _ C"]:
    """Grouped convolution in the given form; each device convolves its own part of the batch.

    XLA's partitioner for CPU and GPU would gather the whole batch on every device for a grouped
    convolution (openxla/xla issue 47945), and part of it for blocks under a sharded state. With
    `jax.shard_map` it has nothing to partition.

    Args:
      x: (B, H, W, C); the number of devices of the present mesh divides B.
      kernel: (h, w, g, C), not sharded.
      stride: in both directions.
      form: one of the values of GROUP_CONV_FORMS.

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
    """Convolution without bias, dense (groups=1) or grouped; a grouped one keeps the width.

    The kernel has the shape (h, w, C / groups, D) in every form, so a checkpoint written on one
    platform loads on another.
    """

    features: int
    size: int
    stride: int = 1
    groups: int = 1
    form: str = "blocks"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B _ _ {self.features}"]:
        """Maps (B, H, W, C) to (B, ceil(H / stride), ceil(W / stride), features)."""
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        x, kernel = x.astype(self.dtype), _kernel(self, shape, fan_out_normal)
        if self.groups == 1:
            return checkpoint_name(conv(x, kernel, self.stride), KEPT)
        if x.shape[-1] != self.features:
            raise ValueError(
                f"a grouped convolution keeps the width, but {x.shape[-1]} channels in and"
                f" {self.features} out differ"
            )
        return checkpoint_name(grouped_conv(x, kernel, self.stride, self.form), KEPT)


class Dense(nn.Module):
    """A fully connected layer with bias."""

    features: int
    dtype: Any = jnp.float32
    kernel_init: Any = fan_out_normal

    @nn.compact
    def __call__(self, x: Float[Array, "B C"]) -> Float[Array, "B {self.features}"]:
        """Maps (B, C) to (B, features)."""
        shape = (x.shape[-1], self.features)
        kernel = _kernel(self, shape, self.kernel_init)
        bias = self.param("bias", nn.initializers.zeros, shape[1:], jnp.float32)
        return x.astype(self.dtype) @ kernel + bias.astype(self.dtype)


@jax.custom_vjp
def gated(x: Float[Array, "B H W C"], gates: Float[Array, "B C"]) -> Float[Array, "B H W C"]:
    """Multiplies the channels of x, (B, H, W, C), by gates, (B, C)."""
    return x * gates[:, None, None, :]


def _gated_backward(saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, gates = saved
    # Without the barrier XLA for TPU fuses the sum below into the convolution that computes dy. A
    # block of RegNetY-128GF's third stage, 64 photos on v5p: 14.6M cycles fused, 14.2M separate.
    dy = lax.optimization_barrier(dy)
    dgates = jnp.sum(dy.astype(jnp.float32) * x.astype(jnp.float32), (1, 2))
    return gated(dy, gates), dgates.astype(gates.dtype)


gated.defvjp(lambda x, gates: (gated(x, gates), (x, gates)), _gated_backward)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (Hu et al. 2018) of RegNetY: two dense layers, ReLU, then sigmoid."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Scales the channels of (B, H, W, C) by gates in (0, 1) computed from their means."""
        pooled = checkpoint_name(jnp.mean(x, (1, 2), dtype=jnp.float32), KEPT)
        hidden = nn.relu(Dense(self.hidden, self.dtype, name="reduce")(pooled))
        gates = nn.sigmoid(Dense(x.shape[-1], self.dtype, name="expand")(hidden))
        return gated(x, gates)
