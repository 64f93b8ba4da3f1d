"""The attention half of a block, paper Eq. 2 and appendix A: the specification of the op, and the path without kernels."""

import jax
import jax.numpy as jnp

from kernels import dropout as drop
from kernels.layer_norm.reference import layer_norm


def attention_half(x, norm_scale, norm_bias, w_qkv, b_qkv, w_out, b_out, *, num_heads, dropout=None, share=1.0):
    """share * x + dropout(MSA(LN(x)) @ w_out + share * b_out), the sum over the devices of a model axis still to be taken.

    x [B, T, D] float32 or bfloat16; norm_scale, norm_bias [D]; w_qkv [3, D, N*H], b_qkv [3, N*H], w_out [N*H, D], b_out [D];
    N = num_heads is the number of heads on this device. share = 1 / (devices of the model axis): the sum of what the devices
    return is then the whole half block, residual and bias counted once, and since they drop the same elements, dropout too.
    Accumulates in float32; the softmax is float32; probabilities and projections are rounded to x's dtype.
    Returns [B, T, D] in x's dtype.
    """
    b, t, _ = x.shape
    wide = jnp.promote_types(x.dtype, jnp.float32)
    w_qkv, w_out = w_qkv.astype(x.dtype), w_out.astype(x.dtype)
    z = layer_norm(x, norm_scale, norm_bias)
    qkv = jnp.einsum("btd,cdk->cbtk", z, w_qkv, preferred_element_type=wide) + b_qkv[:, None, None]
    q, k, v = qkv.astype(x.dtype).reshape(3, b, t, num_heads, -1)
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    probs = jax.nn.softmax(logits).astype(x.dtype)
    o = jnp.einsum("bnts,bsnh->btnh", probs, v, preferred_element_type=wide).astype(x.dtype)
    y = jnp.einsum("btk,kd->btd", o.reshape(b, t, -1), w_out, preferred_element_type=wide) + share * b_out
    return (share * x.astype(wide) + drop.apply(y, dropout, drop.ATTENTION_OUT)).astype(x.dtype)
