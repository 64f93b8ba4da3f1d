"""The attention half of a block of few tokens: norm and products by XLA, the packed core between them.

A product of few rows an image is one of many rows to XLA, which fuses norm, bias, residual and dropout with it and needs no
padding; what it lacks is the core (`core.py`). All else is plain jax.numpy, as `kernels/attention/reference.py` has it, and
differentiated as such.
"""

import jax.numpy as jnp

from kernels import dropout as drop
from kernels.attention.packed.core import Static, core
from kernels.attention.packed.tiles import PackedCore
from kernels.attention.reference import AttentionWeights
from kernels.body import operand_dtype
from kernels.launch import Launch
from kernels.layer_norm.reference import EPS, layer_norm


def attention_half(
    x, weights: AttentionWeights, *, num_heads, tiles: PackedCore, launch: Launch, dropout=None, residual_scale=1.0, tokens=None,
    eps=EPS,
):  # fmt: skip
    """`reference.attention_half` (arguments and meaning there) with a packed core, cut as `tiles` says.

    q, k, v and o are in x's dtype; in float32 where the MXU takes nothing else and rounds them itself.
    """
    norm_scale, norm_bias, w_qkv, b_qkv, w_out, b_out = weights
    acc_dtype = jnp.promote_types(x.dtype, jnp.float32)
    w_qkv, w_out = w_qkv.astype(x.dtype), w_out.astype(x.dtype)
    z = layer_norm(x, norm_scale, norm_bias, eps=eps)
    qkv = jnp.einsum("btd,cdk->cbtk", z, w_qkv, preferred_element_type=acc_dtype) + b_qkv[:, None, None]
    static = Static(tiles=tiles, num_heads=num_heads, tokens=tokens or x.shape[1], dtype=x.dtype, launch=launch)
    qkv = qkv.astype(operand_dtype(x.dtype, launch.device))
    o = jnp.swapaxes(core(static, qkv.swapaxes(1, 2)), 0, 1).astype(x.dtype)
    y = jnp.einsum("btk,kd->btd", o, w_out, preferred_element_type=acc_dtype) + residual_scale * b_out
    return (residual_scale * x.astype(acc_dtype) + drop.apply(y, dropout, drop.ATTENTION_OUT, tokens=tokens)).astype(x.dtype)
