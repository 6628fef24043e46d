"""ResNeXt (Xie et al. 2017, arXiv 1611.05431) with 50 or 101 layers, and ResNet (one group)."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from hashvision.config import Config
from hashvision.models import layers
from hashvision.models.convnet import Stage, options
from hashvision.models.norm import BatchNorm, Groups

STEM_WIDTH = 64
EXPANSION = 4


class ResNeXtParameters(NamedTuple):
    """The parameters of a ResNeXt."""

    depths: tuple[int, int, int, int]  # blocks per stage
    groups: int  # cardinality
    group: int  # channels per group in the first stage


PARAMETERS = {
    "resnet50": ResNeXtParameters((3, 4, 6, 3), 1, 64),  # SwAV's trunk
    "resnext50_32x4d": ResNeXtParameters((3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": ResNeXtParameters((3, 4, 23, 3), 32, 8),
    "resnext101_32x16d": ResNeXtParameters((3, 4, 23, 3), 32, 16),
    "resnext101_32x32d": ResNeXtParameters((3, 4, 23, 3), 32, 32),
    "resnext101_32x48d": ResNeXtParameters((3, 4, 23, 3), 32, 48),
}


class Bottleneck(nn.Module):
    """The bottleneck: 1x1, grouped 3x3, 1x1."""

    stride: int
    inner: int
    width: int
    groups: int
    norm: Any
    last_norm: Any
    conv: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], train: bool
    ) -> Float[Array, "B _ _ {self.width}"]:
        """Maps (B, H, W, C) to (B, H / stride, W / stride, width)."""
        y = self.conv(self.inner, 1, name="conv1")(x)
        y = self.norm(name="norm1")(y, train, relu=True)
        y = self.conv(self.inner, 3, stride=self.stride, groups=self.groups, name="conv2")(y)
        y = self.norm(name="norm2")(y, train, relu=True)
        y = self.conv(self.width, 1, name="conv3")(y)
        y = self.last_norm(name="norm3")(y, train)
        if x.shape != y.shape:
            x = self.conv(self.width, 1, stride=self.stride, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_norm")(x, train)
        return nn.relu(x + y)


class ResNeXt(nn.Module):
    """The trunk: 7x7 stem, max pooling, four stages, global average pooling."""

    parameters: ResNeXtParameters
    group_conv: str = "blocks"
    norm_groups: Groups | None = None  # BatchNorm's groups of photos; None: a single group
    zero_scale: bool = True  # whether each block's last BatchNorm scale starts at 0, as in WSL
    remat: tuple[bool, ...] = (False,) * 4
    unroll: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"], train: bool) -> Float32[Array, "B D"]:
        """Maps normalised images (B, H, W, 3) to features, float32 (B, 2048)."""
        conv = functools.partial(layers.GroupConv, form=self.group_conv, dtype=self.dtype)
        norm = functools.partial(BatchNorm, self.norm_groups, dtype=self.dtype)
        start = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
        last_norm = functools.partial(norm, scale_init=start)
        depths, groups, group = self.parameters
        x = conv(STEM_WIDTH, 7, 2, name="stem_conv")(images)
        x = norm(name="stem_norm")(x, train, relu=True)
        x = layers.max_pool(x)
        for index, depth in enumerate(depths):
            block = functools.partial(
                Bottleneck,
                inner=groups * group * 2**index,
                width=STEM_WIDTH * EXPANSION * 2**index,
                groups=groups,
                norm=norm,
                last_norm=last_norm,
                conv=conv,
            )
            stage = Stage(
                block,
                depth,
                stride=1 if index == 0 else 2,
                remat=self.remat[index],
                unroll=self.unroll,
                name=f"stage{index + 1}",
            )
            x = stage(x, train)
        return jnp.mean(x, (1, 2), dtype=jnp.float32)


def build(name: str, **fields: Any) -> ResNeXt:
    """The network called `name`, one of PARAMETERS, with other fields of ResNeXt as given."""
    return ResNeXt(PARAMETERS[name], **fields)


def from_config(config: Config, platform: str) -> ResNeXt:
    """The network called config.model.name; see convnet.options."""
    return build(config.model.name, **options(config, platform))
