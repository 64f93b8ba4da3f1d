"""Stochastic depth: a half block is left out of an image's residual stream by chance (Huang et al., arXiv:1603.09382).

    z' = z + m MSA(LN(z))     z = z' + m MLP(LN(z'))     m = 0 with probability p, else 1 / (1 - p), one for an image and a half

p rises linearly from 0 in the first block to `ViTConfig.drop_path` in the last, as in DeiT and timm. m is a hash of (key of the
layer, half, the image's global index), as the dropout masks are (`kernels/dropout.py`): the same on any mesh, in the forward and
the backward pass. The kernels compute a half block with its residual in one; here they are asked for what it adds alone
(residual_scale 0), and XLA adds the two: three passes over the tokens more a half block, forward and backward. A left-out half is
computed all the same, for the batch is one array.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels import dropout as drop

ATTENTION, MLP = 0x68E31DA4, 0x3FB5A4C7  # one a half, of the kind of `kernels.dropout`'s


class DropPath(NamedTuple):
    """rate: p of the layer, a float32 scalar. key: int32 scalar, of the layer. image: int32 scalar, the global index of the first
    image. sequences: as which an image goes through the half block, one after the other in its batch axis."""

    rate: Any
    key: Any
    image: Any
    sequences: int = 1

    def multiplier(self, half: int, count: int):
        """m of `count` sequences, float32 [count, 1, 1]."""
        images = jnp.asarray(self.image, jnp.int32) + jnp.arange(count, dtype=jnp.int32) // jnp.int32(self.sequences)
        threshold = jnp.round(self.rate * 2**24).astype(jnp.int32)
        stays = drop.keep_above(drop.row_hash(drop.site_key(self.key, half), images), jnp.int32(0), threshold)
        return jnp.where(stays, 1 / (1 - self.rate), 0.0).astype(jnp.float32).reshape(count, 1, 1)


def rates(config) -> np.ndarray:
    """p of each layer, float32 [L]."""
    return np.linspace(0, config.drop_path, config.depth, dtype=np.float32)
