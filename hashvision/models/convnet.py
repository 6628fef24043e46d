"""The parts that the convolutional families share: options, and stages of residual blocks."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hashvision.config import Config
from hashvision.errors import UserError
from hashvision.models.layers import GROUP_CONV_FORMS, KEPT
from hashvision.models.norm import Groups

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def options(config: Config, platform: str) -> dict[str, Any]:
    """The fields of RegNetY and ResNeXt that a config sets.

    Args:
      config: of the run.
      platform: "cpu", "tpu" or "gpu"; chooses the form of grouped convolutions if
        model.group_conv is "auto".

    Raises:
      UserError: the photos do not divide into groups of model.norm_photos.
    """
    model = config.model
    form = model.group_conv
    if form == "auto":
        form = GROUP_CONV_FORMS.get(platform, "native")
    return {
        "dtype": DTYPES[model.dtype],
        "group_conv": form,
        "norm_groups": norm_groups(config),
        "zero_scale": model.zero_scale,
        "remat": model.remat,
        "unroll": model.unroll,
    }


def norm_groups(config: Config) -> Groups | None:
    """BatchNorm's groups of the photos that the network sees at a time; None: a single group.

    Raises:
      UserError: the photos do not divide into groups of model.norm_photos.
    """
    photos, parts = config.model.norm_photos, config.accumulate
    part = config.batch_size // parts
    if photos == 0 and parts > 1:
        raise UserError(
            f"model.norm_photos=0 makes BatchNorm use the statistics of all {config.batch_size:,}"
            f" photos of a step, but accumulate={parts} shows it {part:,} at a time; set"
            f" --config.model.norm_photos={part}, or a divisor of that, or --config.accumulate=1."
        )
    if photos and part % photos:
        fits = max(n for n in range(1, min(photos, part) + 1) if part % n == 0)
        raise UserError(
            f"model.norm_photos={photos} does not divide the {part:,} photos that the network sees"
            f" at a time (batch_size={config.batch_size}, accumulate={parts}); set"
            f" --config.model.norm_photos={fits}, or 0 for all photos of a step."
        )
    return None if photos in (0, part) else Groups(photos, part // photos)


class Stage(nn.Module):
    """`depth` residual blocks; the first one changes stride and width, and the others are equal.

    The equal blocks run as one `lax.scan` over stacked parameters, so that compile time does not
    grow with depth. `unroll` is the number of blocks per iteration (0: all); it does not change the
    structure of the parameters. With `remat` the backward pass computes the activations inside each
    block again. Without it, a loop stores the outputs of convolutions and the statistics
    (layers.KEPT) and computes the rest again: storing that too takes longer on TPU, and twice the
    memory. Outside a loop XLA makes this choice itself.
    """

    block: Callable[..., nn.Module]  # (stride, name=...) -> module of (x, train)
    depth: int
    stride: int
    remat: bool = False
    unroll: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B _ _ D"]:
        """Maps (B, H, W, C) to (B, H / stride, W / stride, width)."""

        def apply(block: nn.Module, carry: jax.Array) -> tuple[jax.Array, None]:
            return block(carry, train), None

        alone = scanned = apply
        if self.remat:
            # Outside a loop XLA would merge the two equal forward passes and keep the activations.
            alone = nn.remat(apply, prevent_cse=True)
            scanned = nn.remat(apply, prevent_cse=self.unroll != 1)
        elif self.unroll:
            kept = jax.checkpoint_policies.save_only_these_names(KEPT)
            scanned = nn.remat(apply, prevent_cse=False, policy=kept)
        x, _ = alone(self.block(self.stride, name="first"), x)
        if self.depth > 1:
            scan = nn.scan(
                scanned,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=self.depth - 1,
                unroll=self.unroll or self.depth - 1,
            )
            x, _ = scan(self.block(1, name="rest"), x)
        return x
