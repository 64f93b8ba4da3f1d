"""The MLP half of a block, paper Eq. 3 and appendix A: the specification of the op, and the path without kernels."""

import jax
import jax.numpy as jnp

from kernels import dropout as drop
from kernels.layer_norm.reference import layer_norm


def mlp_half(x, norm_scale, norm_bias, w_in, b_in, w_out, b_out, *, gelu="tanh", dropout=None, share=1.0):
    """share * x + dropout(dropout(GELU(LN(x) @ w_in + b_in)) @ w_out + share * b_out), summed over a model axis by the caller.

    x [B, T, D] float32 or bfloat16; norm_scale, norm_bias [D]; w_in [D, F], b_in [F], w_out [F, D], b_out [D]; F is this
    device's part of the hidden width, whose first global column is dropout.column. share: as in the attention half.
    gelu: "tanh" (the release) or "erf" (exact). Accumulates in float32; hidden values are rounded to x's dtype.
    Returns [B, T, D] in x's dtype.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    w_in, w_out = w_in.astype(x.dtype), w_out.astype(x.dtype)
    z = layer_norm(x, norm_scale, norm_bias)
    a = jnp.einsum("btd,df->btf", z, w_in, preferred_element_type=wide) + b_in
    h = jax.nn.gelu(a, approximate=gelu == "tanh")
    h = drop.apply(h, dropout, drop.MLP_HIDDEN, column=0 if dropout is None else dropout.column).astype(x.dtype)
    y = jnp.einsum("btf,fd->btd", h, w_out, preferred_element_type=wide) + share * b_out
    return (share * x.astype(wide) + drop.apply(y, dropout, drop.MLP_OUT)).astype(x.dtype)
