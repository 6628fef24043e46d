"""Stages of equal blocks, scanned and rematerialised: what the two families share."""

from collections.abc import Callable

import flax.linen as nn
import jax


class Stage(nn.Module):
    """`depth` residual blocks, of which the first changes stride and width and the rest are equal.

    The equal blocks run as one `lax.scan` over stacked parameters, so that compile time does not
    grow with depth. `unroll` unrolls it (0: whole) without changing the parameters' structure.
    With `remat` the activations inside each block are computed again in the backward pass.
    """

    block: Callable[..., nn.Module]  # (stride, name=...) -> module of (x, train)
    depth: int
    stride: int
    remat: bool = False
    unroll: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (B, H, W, C) to (B, H / stride, W / stride, width)."""

        def apply(block: nn.Module, carry: jax.Array) -> tuple[jax.Array, None]:
            return block(carry, train), None

        alone = scanned = apply
        if self.remat:
            # Outside a loop XLA would find the two forward passes equal and keep the activations.
            alone = nn.remat(apply, prevent_cse=True)
            scanned = nn.remat(apply, prevent_cse=self.unroll != 1)
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
