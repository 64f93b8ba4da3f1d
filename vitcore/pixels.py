"""Pixels as a model wants them, made of bytes on the device: inside the compiled step, where they cost one elementwise pass."""

import jax
import jax.numpy as jnp

from kernels.patch_embed import reference
from vitcore.normalisation import HALF, Pixels, normalise


def to_unit(images: jax.Array, wanted: Pixels = HALF) -> jax.Array:
    """uint8 0..255 to float32 in [-1, 1]: what the host would have made of them, to 1.2e-7 (a device may fuse the two roundings).

    Floats are in [-1, 1] already. wanted: what a model wants of either, where it is not that.
    """
    if images.dtype == jnp.uint8:
        images = reference.to_unit(images)
    return normalise(images, wanted)


def for_model(images: jax.Array, wanted: Pixels = HALF) -> jax.Array:
    """Images as a model's own functions (`vitcore.model.forward`) take them: `to_unit`, but that bytes which a model wants in
    [-1, 1] stay bytes, since some stems read those."""
    return images if images.dtype == jnp.uint8 and wanted == HALF else to_unit(images, wanted)
