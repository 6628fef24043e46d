"""A Vision Transformer (Dosovitskiy et al. 2021) as a new family of trunks: all that one takes.

A sketch for tests, which shows that the product needs one new file and one line in models.FAMILIES.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hashvision.config import Config
from hashvision.models import convnet


class ViTParameters(NamedTuple):
    """Table 1 of the paper; S is that of DeiT (Touvron et al. 2021, table 1)."""

    patch: int
    width: int
    depth: int
    heads: int


PARAMETERS = {
    "vit_s16": ViTParameters(16, 384, 12, 6),
    "vit_toy": ViTParameters(8, 32, 2, 2),
}


class Block(nn.Module):
    heads: int
    drop: float  # probability that a photo skips the block in training
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        width = x.shape[-1]
        for inner in (self.attention, self.mlp):
            y = inner(nn.LayerNorm(dtype=self.dtype)(x), width)
            skip = nn.Dropout(self.drop, broadcast_dims=(1, 2), deterministic=not train)
            x = x + skip(y)
        return x

    def attention(self, x: jax.Array, width: int) -> jax.Array:
        return nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(x)

    def mlp(self, x: jax.Array, width: int) -> jax.Array:
        hidden = nn.gelu(nn.Dense(4 * width, dtype=self.dtype)(x))
        return nn.Dense(width, dtype=self.dtype)(hidden)


class ViT(nn.Module):
    parameters: ViTParameters
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        patch, width, depth, heads = self.parameters
        x = nn.Conv(width, (patch, patch), (patch, patch), dtype=self.dtype)(images)
        x = x.reshape(x.shape[0], -1, width)
        position = self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = x + position.astype(self.dtype)
        for _ in range(depth):
            x = Block(heads, 0.1, self.dtype)(x, train)
        return jnp.mean(nn.LayerNorm(dtype=self.dtype)(x), 1, dtype=jnp.float32)


def build(name: str, **fields: Any) -> ViT:
    return ViT(PARAMETERS[name], **fields)


def from_config(config: Config, platform: str) -> ViT:
    """The network called config.model.name; only model.dtype is one of its options."""
    return build(config.model.name, dtype=convnet.DTYPES[config.model.dtype])
