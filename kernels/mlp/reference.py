"""The MLP half of a block, paper Eq. 3 and appendix A: the specification of the op, and the path without kernels."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import dropout as drop
from kernels.layer_norm.reference import EPS, layer_norm

QUICK = 1.702  # of CLIP's GELU
# "tanh" (the release), "erf" (exact), "quick" (CLIP's: a times the logistic function of 1.702 a)
GELUS = {
    "tanh": partial(jax.nn.gelu, approximate=True),
    "erf": partial(jax.nn.gelu, approximate=False),
    "quick": lambda a: a * jax.nn.sigmoid(QUICK * a),
}


class MLPWeights(NamedTuple):
    """Parameters of the MLP half on one device, which holds F of the model's hidden values. All float32 in a model."""

    norm_scale: jax.Array  # [D]
    norm_bias: jax.Array  # [D]
    in_kernel: jax.Array  # [D, F]
    in_bias: jax.Array  # [F]
    out_kernel: jax.Array  # [F, D]
    out_bias: jax.Array  # [D]


def mlp_half(x, weights: MLPWeights, *, gelu="tanh", dropout=None, residual_scale=1.0, tokens=None, eps=EPS):
    """residual_scale * x + dropout(dropout(GELU(LN(x) @ in_kernel + in_bias)) @ out_kernel + residual_scale * out_bias).

    x [B, T, D] float32 or bfloat16. F is this device's part of the hidden width, whose first global column is dropout.column.
    residual_scale, tokens, eps: as in the attention half; the caller sums the result over the devices of a model axis.
    gelu: a name of `GELUS`. Accumulates in float32; hidden values are rounded to x's dtype.
    Returns [B, T, D] in x's dtype.
    """
    norm_scale, norm_bias, w_in, b_in, w_out, b_out = weights
    acc_dtype = jnp.promote_types(x.dtype, jnp.float32)
    w_in, w_out = w_in.astype(x.dtype), w_out.astype(x.dtype)
    z = layer_norm(x, norm_scale, norm_bias, eps=eps)
    a = jnp.einsum("btd,df->btf", z, w_in, preferred_element_type=acc_dtype) + b_in
    h = GELUS[gelu](a)
    column = 0 if dropout is None else dropout.column
    h = drop.apply(h, dropout, drop.MLP_HIDDEN, column, tokens=tokens).astype(x.dtype)
    y = jnp.einsum("btf,fd->btd", h, w_out, preferred_element_type=acc_dtype) + residual_scale * b_out
    return (residual_scale * x.astype(acc_dtype) + drop.apply(y, dropout, drop.MLP_OUT, tokens=tokens)).astype(x.dtype)
