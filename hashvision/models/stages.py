"""Stages of equal blocks, scanned and rematerialised: what the two families share."""

from collections.abc import Callable

import flax.linen as nn
import jax

from hashvision.models.layers import KEPT


class Stage(nn.Module):
    """`depth` residual blocks, of which the first changes stride and width and the rest are equal.

    The equal blocks run as one `lax.scan` over stacked parameters, so that compile time does not
    grow with depth. `unroll` unrolls it (0: whole) without changing the parameters' structure.
    With `remat` the activations inside each block are computed again in the backward pass. Without,
    a loop keeps what convolutions compute and the statistics (layers.KEPT), and computes again what
    lies between them: storing that for later takes longer on TPU, and twice the memory. Outside a
    loop XLA weighs that by itself.
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
