"""Layer normalisation as the paper uses it (Eq. 2-4): the specification of the op."""

import jax.numpy as jnp
from jax import lax

EPS = 1e-6  # of the release, and of timm; other models have another


def layer_norm(x, scale, bias, *, eps: float = EPS):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, computed in float32.

    x [..., D], scale and bias [D] -> [..., D] in x's dtype.
    """
    acc_dtype = jnp.promote_types(x.dtype, jnp.float32)
    z = x.astype(acc_dtype)
    z = z - z.mean(-1, keepdims=True)
    z = z * lax.rsqrt(jnp.square(z).mean(-1, keepdims=True) + eps)
    return (z * scale + bias).astype(x.dtype)
