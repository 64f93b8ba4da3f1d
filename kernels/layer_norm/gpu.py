"""Layer normalisation for the half blocks on a GPU, on rows [M, D]: the reference's values, with a backward pass for XLA to fuse.

    n = (x - mean) r      z = n scale + bias      dx = r (dn - mean(dn) - n mean(dn n)),  dn = dz scale

The mean and r = 1 / sqrt(var + eps) of each row are kept for the backward pass, 8 bytes a row: from them n is elementwise, and the
sums over all rows (dscale, dbias) read x and dz once. Derived by autodiff, they pass through a float32 array as large as x.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kernels.hopper.plan import STATISTICS as STATISTICS
from kernels.launch import vary_alike
from kernels.layer_norm.reference import EPS
from kernels.settings import own


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer_norm(eps, x, scale, bias):
    return forward(eps, x, scale, bias)[0]


def normalised(x, mean, r, scale, bias):
    """z of rows whose statistics are known, in x's dtype."""
    return ((x.astype(mean.dtype) - mean) * r * scale + bias).astype(x.dtype)


def forward(eps, x, scale, bias):
    """(z, what `backward` needs)."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = checkpoint_name(x32.mean(-1, keepdims=True), STATISTICS)
    r = checkpoint_name(lax.rsqrt(jnp.square(x32 - mean).mean(-1, keepdims=True) + eps), STATISTICS)
    return normalised(x, mean, r, scale, bias), (x, mean, r, scale)


def backward(_, kept, g, beside=None):
    """(dx, dscale, dbias) for z's gradient g; beside: a gradient of x's that dx is added to before it is rounded."""
    x, mean, r, scale = kept
    g = g.astype(mean.dtype)
    n, dn = (x.astype(mean.dtype) - mean) * r, g * scale
    dx = r * (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True))
    dx = dx if beside is None else dx + beside
    return dx.astype(x.dtype), (g * n).sum(0), g.sum(0)


_layer_norm.defvjp(own(forward), own(backward))


def layer_norm(x, scale, bias, *, eps: float = EPS):
    """As `reference.layer_norm`, of rows [M, D]."""
    return _layer_norm(eps, *vary_alike(x, scale, bias))
