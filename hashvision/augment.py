"""What happens to uint8 crops on the device, inside the jitted step: flips and normalisation."""

import jax
import jax.numpy as jnp

# ImageNet's channel means and deviations, in units of the 0..1 range, as both families' authors
# normalise (and every weight file published since).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalize(images: jax.Array) -> jax.Array:
    """Maps uint8 (..., 3) in 0..255 to float32 of about zero mean and unit variance."""
    scale = 255.0 * jnp.array(STD, jnp.float32)
    return (images.astype(jnp.float32) - 255.0 * jnp.array(MEAN, jnp.float32)) / scale


def flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Mirrors each photo left to right with probability one half.

    Args:
      images: (B, H, W, 3).
      keys: uint32 (B, 2), keyed by (seed, epoch, record), so that the same photo at the same place
        of a run is mirrored alike on any number of devices.

    Returns:
      (B, H, W, 3).
    """
    draw = jax.vmap(lambda key: jax.random.bernoulli(jax.random.wrap_key_data(key)))(keys)
    return jnp.where(draw[:, None, None, None], images[:, :, ::-1], images)
