"""The attention half of a block on a Hopper GPU, of our kernels: LN, q, k and v as one product, the core, the closing product.

q, k, v lie beside each other in one array [B, T, 3 N, 64], as the product makes them, and so do their gradients. Kept for the
backward pass are x, its rows' statistics, that array and the heads' output. `kernels/attention/gpu.py` says which biases are added
where.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kernels.attention.hopper.backward import backward
from kernels.attention.hopper.forward import forward
from kernels.attention.hopper.plan import HEAD
from kernels.attention.reference import AttentionWeights
from kernels.hopper.epilogue import Epilogue
from kernels.hopper.plan import KEPT, STATISTICS
from kernels.hopper.product import product
from kernels.launch import vary_alike
from kernels.layer_norm import rows
from kernels.settings import own


@dataclass(frozen=True)
class Form:
    """What is static of a half block, on rows [B * T, D]."""

    batch: int
    tokens: int
    residual_scale: float
    eps: float


def _projected(f: Form, x, w: AttentionWeights):
    z, mean, r = rows.forward(x, w.norm_scale, w.norm_bias, eps=f.eps)
    bias = w.qkv_bias.at[1:].set(0.0)
    (qkv,) = product(z, w.qkv_kernel, bias, e=Epilogue(bias=True))
    return qkv, mean, r


def _heads(f: Form, a):
    return a.reshape(f.batch, -1, a.shape[-1] // HEAD, HEAD)


def _core(f: Form, qkv):
    q = _heads(f, qkv)
    (o,) = vary_alike(forward(q, q, q, f.tokens, q.shape[2] // 3), qkv)[:1]
    return o.reshape(qkv.shape[0], -1)


def _close(f: Form, x, o, w: AttentionWeights):
    bias = f.residual_scale * w.out_bias + jnp.matmul(w.qkv_bias[2], w.out_kernel, precision=lax.Precision.HIGHEST)
    return product(o, w.out_kernel, bias, x, e=Epilogue(bias=True, residual=f.residual_scale))[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _half(f: Form, x, w: AttentionWeights):
    return _close(f, x, _core(f, _projected(f, x, w)[0]), w)


def _forward(f: Form, x, w: AttentionWeights):
    qkv, mean, r = _projected(f, x, w)
    mean, r = (checkpoint_name(a, STATISTICS) for a in (mean, r))
    qkv = checkpoint_name(qkv, KEPT)
    o = checkpoint_name(_core(f, qkv), KEPT)
    return _close(f, x, o, w), (x, mean, r, qkv, o, w)


def _backward(f: Form, kept, g):
    x, mean, r, qkv, o, w = kept
    do = g @ w.out_kernel.astype(g.dtype).T
    q = _heads(f, qkv)
    (d,) = vary_alike(*backward(q, q, q, _heads(f, do), f.tokens), qkv)[:1]
    d = d.reshape(qkv.shape)
    (dz,) = product(d, w.qkv_kernel, e=Epilogue(), turned=True)
    dx, z, d_scale, d_bias = rows.backward(x, dz, g, mean, r, w.norm_scale, w.norm_bias, beside=f.residual_scale)
    dw = jnp.einsum("md,me->de", z, d, preferred_element_type=w.qkv_kernel.dtype)
    dw = dw.reshape(x.shape[1], 3, -1).transpose(1, 0, 2)
    sums = g.astype(jnp.float32).sum(0)
    d_out = jnp.einsum("mk,md->kd", o, g, preferred_element_type=w.out_kernel.dtype) + jnp.outer(w.qkv_bias[2], sums)
    dv_bias = jnp.matmul(w.out_kernel, sums, precision=lax.Precision.HIGHEST)
    dq_bias = d[:, : dv_bias.shape[0]].astype(jnp.float32).sum(0)
    d_qkv_bias = jnp.stack((dq_bias, jnp.zeros_like(dq_bias), dv_bias))
    grads = AttentionWeights(d_scale, d_bias, dw, d_qkv_bias, d_out, f.residual_scale * sums)
    return dx, jax.tree.map(lambda a, like: a.astype(like.dtype), grads, w)


_half.defvjp(own(_forward), own(_backward))


def attention_half(x, weights: AttentionWeights, *, tokens: int, residual_scale: float, eps: float):
    """As `kernels.attention.reference.attention_half` without dropout, with heads of 64 and x [B, T, D] in bfloat16."""
    x, *arrays = vary_alike(x, *weights)
    f = Form(x.shape[0], tokens, residual_scale, eps)
    return jnp.reshape(_half(f, x.reshape(-1, x.shape[-1]), AttentionWeights(*arrays)), x.shape)
