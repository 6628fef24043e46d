"""The projection head that SwAV and SEER put on a trunk."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from hashvision.models import layers
from hashvision.models.norm import BatchNorm, Groups

# The initializer of torch.nn.Linear, and so of the authors' heads: uniform in +-1 / sqrt(inputs).
linear_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class ProjectionHead(nn.Module):
    """Fully connected layers with ReLU between them, and with BatchNorm before each ReLU if `norm`.

    SwAV: widths (2048, 128) with BatchNorm; SEER: (8192, 8192, 256) without.
    """

    widths: tuple[int, ...]
    norm: bool
    norm_groups: Groups | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "B D"], train: bool) -> Float32[Array, "B E"]:
        """Maps features (B, D) to embeddings, float32 (B, widths[-1])."""
        x = features
        for number, width in enumerate(self.widths):
            if number:
                if self.norm:
                    norm = BatchNorm(self.norm_groups, dtype=self.dtype, name=f"norm{number}")
                    x = norm(x, train, relu=True)
                else:
                    x = nn.relu(x)
            x = layers.Dense(width, self.dtype, linear_uniform, name=f"dense{number + 1}")(x)
        return x.astype(jnp.float32)
