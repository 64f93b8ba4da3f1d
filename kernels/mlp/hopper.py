"""The MLP half of a block on a Hopper GPU: two products of ours whose epilogues take what stands between and behind them.

Forward, bias and GELU are the first one's epilogue, bias and residual the second one's. Kept are x, its rows' statistics and what
GELU is taken of; backward, GELU's slope is in the epilogue of the gradient's product with out_kernel, which makes besides the
hidden values again and the sums that are the gradient of in_bias. Dropout of hidden values is in the same two epilogues, that of
the result in the second product's; its mask is made again from the hash, and backward it is a pass over the result's gradient.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels import dropout as drop
from kernels.hopper.epilogue import Epilogue
from kernels.hopper.masks import Drops, dropped, masked, split
from kernels.hopper.plan import KEPT, STATISTICS
from kernels.hopper.product import product
from kernels.launch import vary_alike
from kernels.layer_norm import rows
from kernels.mlp.reference import MLPWeights
from kernels.settings import own


@dataclass(frozen=True)
class Form:
    """What is static of a half block."""

    gelu: str
    residual_scale: float
    eps: float
    drops: Drops | None = None


def _hidden(f: Form, x, w: MLPWeights, place, *, keep: bool):
    z, mean, r = rows.forward(x, w.norm_scale, w.norm_bias, eps=f.eps)
    mask, rate = masked(f.drops, place, (x.shape[0], w.in_bias.size), drop.MLP_HIDDEN)
    e = Epilogue(bias=True, gelu=f.gelu, keep=keep, dropout=rate)
    return product(z, w.in_kernel, w.in_bias, mask=mask, e=e), mean, r


def _close(f: Form, h, x, w: MLPWeights, place):
    mask, rate = masked(f.drops, place, x.shape, drop.MLP_OUT)
    e = Epilogue(bias=True, residual=f.residual_scale, dropout=rate)
    return product(h, w.out_kernel, f.residual_scale * w.out_bias, x, mask, e=e)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _half(f: Form, x, w: MLPWeights, place):
    ((h,), _, _) = _hidden(f, x, w, place, keep=False)
    return _close(f, h, x, w, place)


def _forward(f: Form, x, w: MLPWeights, place):
    (h, a), mean, r = _hidden(f, x, w, place, keep=True)
    a, mean, r = checkpoint_name(a, KEPT), checkpoint_name(mean, STATISTICS), checkpoint_name(r, STATISTICS)
    return _close(f, h, x, w, place), (x, mean, r, a, w, place)


def _backward(f: Form, kept, g):
    x, mean, r, a, w, place = kept
    dy = dropped(f.drops, place, g, drop.MLP_OUT)
    mask, rate = masked(f.drops, place, a.shape, drop.MLP_HIDDEN)
    e = Epilogue(slope=f.gelu, dropout=rate, sums=True)
    da, h, d_in_bias = product(dy, w.out_kernel, beside=a, mask=mask, e=e, turned=True)
    dz = da @ w.in_kernel.astype(x.dtype).T
    dx, z, d_scale, d_bias, g_sums = rows.backward(x, dz, g, mean, r, w.norm_scale, w.norm_bias, beside=f.residual_scale)
    d_in = jnp.einsum("md,mf->df", z, da, preferred_element_type=w.in_kernel.dtype)  # over all rows: not rounded to x's dtype
    d_out = jnp.einsum("mf,md->fd", h, dy, preferred_element_type=w.out_kernel.dtype)
    d_out_bias = f.residual_scale * (g_sums if f.drops is None else dy.astype(jnp.float32).sum(0))
    grads = MLPWeights(d_scale, d_bias, d_in, d_in_bias, d_out, d_out_bias)
    return dx, jax.tree.map(lambda a, like: a.astype(like.dtype), grads, w), None


_half.defvjp(own(_forward), own(_backward))


def mlp_half(x, weights: MLPWeights, *, gelu: str, dropout=None, residual_scale: float, tokens: int | None = None, eps: float):
    """As `kernels.mlp.reference.mlp_half`, for x [B, T, D] in bfloat16."""
    drops, place = split(dropout, x.shape[1], tokens)
    x, *arrays = vary_alike(x, *weights, *place)
    n, f = len(weights), Form(gelu, residual_scale, eps, drops)
    return jnp.reshape(_half(f, x.reshape(-1, x.shape[-1]), MLPWeights(*arrays[:n]), tuple(arrays[n:])), x.shape)
