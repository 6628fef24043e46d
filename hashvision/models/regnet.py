"""RegNetY (Radosavovic et al. 2020, arXiv 2003.13678), from 200MF to SEER's 10B parameters."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from hashvision.config import Config
from hashvision.models import layers
from hashvision.models.convnet import Stage, options
from hashvision.models.norm import BatchNorm, Groups

STEM_WIDTH = 32
SQUEEZE_RATIO = 0.25  # of the block's input width


class RegNetParameters(NamedTuple):
    """The five numbers that generate a RegNet (section 3.3)."""

    depth: int  # number of blocks
    w0: int  # width of the first block before quantisation
    wa: float  # slope of the width over the block index
    wm: float  # ratio of neighbouring quantised widths
    group: int  # group width


# Up to 32GF from the paper's table 7; 64GF and above from SEER's released configs.
PARAMETERS = {
    "regnety_200mf": RegNetParameters(13, 24, 36.44, 2.49, 8),
    "regnety_400mf": RegNetParameters(16, 48, 27.89, 2.09, 8),
    "regnety_800mf": RegNetParameters(14, 56, 38.84, 2.4, 16),
    "regnety_1.6gf": RegNetParameters(27, 48, 20.71, 2.65, 24),
    "regnety_3.2gf": RegNetParameters(21, 80, 42.63, 2.66, 24),
    "regnety_8gf": RegNetParameters(17, 192, 76.82, 2.19, 56),
    "regnety_16gf": RegNetParameters(18, 200, 106.23, 2.48, 112),
    "regnety_32gf": RegNetParameters(20, 232, 115.89, 2.53, 232),
    "regnety_64gf": RegNetParameters(20, 352, 147.48, 2.4, 328),
    "regnety_128gf": RegNetParameters(27, 456, 160.83, 2.52, 264),
    "regnety_256gf": RegNetParameters(27, 640, 230.83, 2.53, 373),
    "regnety_10b": RegNetParameters(27, 1744, 620.83, 2.52, 1010),
}


def stage_shapes(parameters: RegNetParameters) -> list[tuple[int, int, int]]:
    """(width, depth, group width) of each stage.

    Section 3.3, equations 2 to 4: the width u_j = w0 + wa * j of block j is quantised to
    w0 * wm^round(s_j) with s_j = log_wm(u_j / w0), and rounded to a multiple of 8. Blocks of equal
    width form a stage, whose width is then rounded to a multiple of the group width.
    """
    depth, w0, wa, wm, group = parameters
    exponents = np.round(np.log((w0 + wa * np.arange(depth)) / w0) / np.log(wm))
    widths = (np.round(w0 * wm**exponents / 8) * 8).astype(int)
    shapes = []
    for width in np.unique(widths):
        stage_group = min(group, int(width))
        whole = int(round(width / stage_group)) * stage_group
        shapes.append((whole, int(np.sum(widths == width)), stage_group))
    return shapes


class YBlock(nn.Module):
    """The Y block: 1x1, grouped 3x3, squeeze-and-excitation, 1x1, with a bottleneck ratio of 1."""

    stride: int
    width: int
    group: int
    norm: Any
    last_norm: Any
    conv: Any
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], train: bool
    ) -> Float[Array, "B _ _ {self.width}"]:
        """Maps (B, H, W, C) to (B, H / stride, W / stride, width)."""
        y = self.conv(self.width, 1, name="conv1")(x)
        y = self.norm(name="norm1")(y, train, relu=True)
        groups = self.width // self.group
        y = self.conv(self.width, 3, stride=self.stride, groups=groups, name="conv2")(y)
        y = self.norm(name="norm2")(y, train, relu=True)
        hidden = round(SQUEEZE_RATIO * x.shape[-1])
        y = layers.SqueezeExcite(hidden, self.dtype, name="squeeze_excite")(y)
        y = self.conv(self.width, 1, name="conv3")(y)
        y = self.last_norm(name="norm3")(y, train)
        if x.shape != y.shape:
            x = self.conv(self.width, 1, stride=self.stride, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_norm")(x, train)
        return nn.relu(x + y)


class RegNetY(nn.Module):
    """The trunk: stem, four stages, global average pooling."""

    parameters: RegNetParameters
    group_conv: str = "blocks"
    norm_groups: Groups | None = None  # BatchNorm's groups of photos; None: a single group
    zero_scale: bool = False  # whether each block's last BatchNorm scale starts at 0 (not RegNet's)
    remat: tuple[bool, ...] = (False,) * 4
    unroll: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"], train: bool) -> Float32[Array, "B D"]:
        """Maps normalised images (B, H, W, 3) to features, float32 (B, width of the last stage)."""
        conv = functools.partial(layers.GroupConv, form=self.group_conv, dtype=self.dtype)
        norm = functools.partial(BatchNorm, self.norm_groups, dtype=self.dtype)
        start = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
        last_norm = functools.partial(norm, scale_init=start)
        x = conv(STEM_WIDTH, 3, 2, name="stem_conv")(images)
        x = norm(name="stem_norm")(x, train, relu=True)
        for index, (width, depth, group) in enumerate(stage_shapes(self.parameters)):
            block = functools.partial(
                YBlock,
                width=width,
                group=group,
                norm=norm,
                last_norm=last_norm,
                conv=conv,
                dtype=self.dtype,
            )
            stage = Stage(
                block,
                depth,
                stride=2,
                remat=self.remat[index],
                unroll=self.unroll,
                name=f"stage{index + 1}",
            )
            x = stage(x, train)
        return jnp.mean(x, (1, 2), dtype=jnp.float32)


def build(name: str, **fields: Any) -> RegNetY:
    """The network called `name`, one of PARAMETERS, with other fields of RegNetY as given."""
    return RegNetY(PARAMETERS[name], **fields)


def from_config(config: Config, platform: str) -> RegNetY:
    """The network called config.model.name; see convnet.options."""
    return build(config.model.name, **options(config, platform))
