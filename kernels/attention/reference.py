"""The attention half of a block, paper Eq. 2 and appendix A: the specification of the op, and the path without kernels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import dropout as drop
from kernels.layer_norm.reference import EPS, layer_norm


class AttentionWeights(NamedTuple):
    """Parameters of the attention half on one device, which holds N of the model's heads of width H. All float32 in a model."""

    norm_scale: jax.Array  # [D]
    norm_bias: jax.Array  # [D]
    qkv_kernel: jax.Array  # [3, D, N*H]: queries, keys, values
    qkv_bias: jax.Array  # [3, N*H]
    out_kernel: jax.Array  # [N*H, D]
    out_bias: jax.Array  # [D]


def attention_half(
    x, weights: AttentionWeights, *, num_heads, dropout=None, residual_scale=1.0, tokens=None, eps=EPS, turn=None
):  # fmt: skip
    """residual_scale * x + dropout(MSA(LN(x)) @ out_kernel + residual_scale * out_bias): the attention half of a block.

    x [B, T, D] float32 or bfloat16; num_heads: N, the heads on this device. residual_scale: 1 / (devices of the model axis), by
    which residual and output bias are multiplied: the sum over those devices of what each returns, which the caller takes, is then
    the whole half block, with residual and bias counted once; and dropout too, since the devices drop the same elements.
    tokens: how many of x's T rows are tokens, by default all; the rows behind them are padding that no token attends to.
    eps: of LN. turn: (q, k, v [3, B, T, N*H], not rounded yet) -> the same, between the projections and the products, of entries
    such as `rotary/`; None for none.
    Accumulates in float32; the softmax is float32; probabilities and projections are rounded to x's dtype.
    Returns [B, T, D] in x's dtype.
    """
    norm_scale, norm_bias, w_qkv, b_qkv, w_out, b_out = weights
    b, t, _ = x.shape
    acc_dtype = jnp.promote_types(x.dtype, jnp.float32)
    w_qkv, w_out = w_qkv.astype(x.dtype), w_out.astype(x.dtype)
    z = layer_norm(x, norm_scale, norm_bias, eps=eps)
    qkv = jnp.einsum("btd,cdk->cbtk", z, w_qkv, preferred_element_type=acc_dtype) + b_qkv[:, None, None]
    qkv = qkv if turn is None else turn(qkv)
    q, k, v = qkv.astype(x.dtype).reshape(3, b, t, num_heads, -1)
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=acc_dtype) * q.shape[-1] ** -0.5
    if tokens is not None:
        logits = jnp.where(jnp.arange(t) < tokens, logits, -jnp.inf)
    probs = jax.nn.softmax(logits).astype(x.dtype)
    o = jnp.einsum("bnts,bsnh->btnh", probs, v, preferred_element_type=acc_dtype).astype(x.dtype)
    y = jnp.einsum("btk,kd->btd", o.reshape(b, t, -1), w_out, preferred_element_type=acc_dtype) + residual_scale * b_out
    return (residual_scale * x.astype(acc_dtype) + drop.apply(y, dropout, drop.ATTENTION_OUT, tokens=tokens)).astype(x.dtype)
