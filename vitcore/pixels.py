"""Pixels as a model wants them, made of bytes on the device: inside the compiled step, where they cost one elementwise pass."""

import jax
import jax.numpy as jnp

from vitcore.normalisation import HALF, Pixels, normalise


def to_unit(images: jax.Array, wanted: Pixels = HALF) -> jax.Array:
    """uint8 0..255 to float32 in [-1, 1]: what the host would have made of them, to 1.2e-7 (a device may fuse the two roundings).

    Floats are in [-1, 1] already. wanted: what a model wants of either, where it is not that.
    """
    if images.dtype == jnp.uint8:
        images = jnp.clip(images.astype(jnp.float32) * jnp.float32(2 / 255) - 1, -1, 1)
    return normalise(images, wanted)
