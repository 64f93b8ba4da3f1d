"""The attention half of a block on a Hopper GPU, of our kernels: LN, q, k and v as one product, the core, the closing product.

Where the core is ours, q, k, v lie beside each other in one array [B, T, 3 N, H], as the product makes them, and so do their
gradients. cuDNN takes them apart: where ours does not take the shape, three products stand before it. Kept for the backward pass
are x, its rows' statistics, q, k, v, the heads' output and cuDNN's statistics. Where the core is ours, biases of queries and values
are in the first product's epilogue; around another's, `kernels/attention/gpu.py` says which are added where. Dropout is in the
closing product's epilogue; backward it is a pass over the result's gradient.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kernels import dropout as drop
from kernels.attention.hopper.backward import backward
from kernels.attention.hopper.forward import forward
from kernels.attention.library import attend
from kernels.attention.reference import AttentionWeights
from kernels.hopper.epilogue import Epilogue
from kernels.hopper.masks import Drops, dropped, masked, split
from kernels.hopper.plan import KEPT, STATISTICS
from kernels.hopper.product import product
from kernels.launch import vary_alike
from kernels.layer_norm import rows
from kernels.settings import own


@dataclass(frozen=True)
class Form:
    """What is static of a half block, on rows [B * T, D]. by: whose the core is."""

    batch: int
    heads: int
    tokens: int
    residual_scale: float
    eps: float
    by: Literal["hopper", "cudnn", "xla"]
    drops: Drops | None


def _biases(w: AttentionWeights):
    """Of q, k, v: a key's shifts all logits of a query alike, which softmax undoes."""
    return jnp.where(jnp.arange(3)[:, None] == 1, 0.0, w.qkv_bias)


def _projected(f: Form, x, w: AttentionWeights):
    """(q, k, v in one array, or the three of them), and the statistics of x's rows."""
    z, mean, r = rows.forward(x, w.norm_scale, w.norm_bias, eps=f.eps)
    if f.by == "hopper":
        qkv = product(z, w.qkv_kernel, _biases(w), e=Epilogue(bias=True))
    else:
        (q,) = product(z, w.qkv_kernel[0], w.qkv_bias[0], e=Epilogue(bias=True))
        qkv = q, *(z @ kernel.astype(z.dtype) for kernel in w.qkv_kernel[1:])
    return qkv, mean, r


def _heads(f: Form, a, heads: int):
    return a.reshape(f.batch, -1, heads, a.shape[-1] // heads)


def _core(f: Form, *qkv):
    """The heads' output [B * T, K]."""
    if f.by == "hopper":
        q = _heads(f, qkv[0], 3 * f.heads)
        (o,) = vary_alike(forward(q, q, q, f.tokens, f.heads), qkv[0])[:1]
    else:
        q, k, v = (_heads(f, a, f.heads) for a in qkv)
        o = attend(q, k, v, f.tokens, f.by)
    return o.reshape(qkv[0].shape[0], -1)


def _close(f: Form, x, o, w: AttentionWeights, place):
    bias = f.residual_scale * w.out_bias
    if f.by != "hopper":  # values have no bias yet: it goes through the product as it is, since probabilities sum to one
        bias = bias + jnp.matmul(w.qkv_bias[2], w.out_kernel, precision=lax.Precision.HIGHEST)
    mask, rate = masked(f.drops, place, x.shape, drop.ATTENTION_OUT)
    return product(o, w.out_kernel, bias, x, mask, e=Epilogue(bias=True, residual=f.residual_scale, dropout=rate))[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _half(f: Form, x, w: AttentionWeights, place):
    return _close(f, x, _core(f, *_projected(f, x, w)[0]), w, place)


def _forward(f: Form, x, w: AttentionWeights, place):
    qkv, mean, r = _projected(f, x, w)
    mean, r = (checkpoint_name(a, STATISTICS) for a in (mean, r))
    qkv = checkpoint_name(qkv, KEPT)
    if f.by == "hopper":
        o, pull = checkpoint_name(_core(f, *qkv), KEPT), None
    else:  # cuDNN's output is kept with its statistics: named besides, it would be kept twice
        o, pull = jax.vjp(partial(_core, f), *qkv)
    return _close(f, x, o, w, place), (x, mean, r, qkv if pull is None else None, pull, o, w, place)


def _core_backward(f: Form, qkv, pull, do):
    """Gradients of what `_projected` makes."""
    if pull is not None:
        return pull(do)
    q = _heads(f, qkv[0], 3 * f.heads)
    (d,) = vary_alike(*backward(q, q, q, _heads(f, do, f.heads), f.tokens), qkv[0])[:1]
    return (d.reshape(qkv[0].shape),)


def _backward(f: Form, kept, g):
    x, mean, r, qkv, pull, o, w, place = kept
    dy = dropped(f.drops, place, g, drop.ATTENTION_OUT)
    d = _core_backward(f, qkv, pull, dy @ w.out_kernel.astype(g.dtype).T)
    if pull is None:
        (dz,) = product(d[0], w.qkv_kernel, e=Epilogue(), turned=True)
    else:
        dz = sum(a @ kernel.astype(a.dtype).T for a, kernel in zip(d, w.qkv_kernel, strict=True))
    dx, z, d_scale, d_bias, sums = rows.backward(x, dz, g, mean, r, w.norm_scale, w.norm_bias, beside=f.residual_scale)
    dw = [jnp.einsum("md,me->de", z, a, preferred_element_type=w.qkv_kernel.dtype) for a in d]
    dw = dw[0].reshape(x.shape[1], 3, -1).transpose(1, 0, 2) if pull is None else jnp.stack(dw)
    sums = sums if f.drops is None else dy.astype(jnp.float32).sum(0)
    d_out = jnp.einsum("mk,md->kd", o, dy, preferred_element_type=w.out_kernel.dtype)
    if f.by != "hopper":
        d_out = d_out + jnp.outer(w.qkv_bias[2], sums)
    dv_bias = jnp.matmul(w.out_kernel, sums, precision=lax.Precision.HIGHEST)
    dq_bias = d[0][:, : dv_bias.shape[0]].astype(jnp.float32).sum(0)
    d_qkv_bias = jnp.stack((dq_bias, jnp.zeros_like(dq_bias), dv_bias))
    grads = AttentionWeights(d_scale, d_bias, dw, d_qkv_bias, d_out, f.residual_scale * sums)
    return dx, jax.tree.map(lambda a, like: a.astype(like.dtype), grads, w), None


_half.defvjp(own(_forward), own(_backward))


def attention_half(
    x, weights: AttentionWeights, *, num_heads: int, by, dropout=None, tokens: int, residual_scale: float, eps: float
):
    """As `kernels.attention.reference.attention_half`, for x [B, T, D] in bfloat16. by: what attends, as `gpu.implementation` says;
    "hopper" takes heads of 64, "cudnn" an even T."""
    drops, place = split(dropout, x.shape[1], tokens)
    x, *arrays = vary_alike(x, *weights, *place)
    n, f = len(weights), Form(x.shape[0], num_heads, tokens, residual_scale, eps, by, drops)
    return jnp.reshape(_half(f, x.reshape(-1, x.shape[-1]), AttentionWeights(*arrays[:n]), tuple(arrays[n:])), x.shape)
