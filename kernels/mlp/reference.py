"""The MLP half of a block, paper Eq. 3 and appendix A, and a gated one: the ops' specification, and the path without kernels."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import dropout as drop
from kernels.layer_norm.reference import EPS, layer_norm

# a times the logistic function of so many a: CLIP's GELU, and SiLU
LOGISTIC = {"quick": 1.702, "silu": 1.0}
# "tanh" (the release), "erf" (exact), "quick" (CLIP's), "silu" (of a gated MLP: SwiGLU)
GELUS = {
    "tanh": partial(jax.nn.gelu, approximate=True),
    "erf": partial(jax.nn.gelu, approximate=False),
    "quick": lambda a: a * jax.nn.sigmoid(LOGISTIC["quick"] * a),
    "silu": lambda a: a * jax.nn.sigmoid(a),
}


class MLPWeights(NamedTuple):
    """Parameters of the MLP half on one device, which holds F of the model's hidden values. All float32 in a model."""

    norm_scale: jax.Array  # [D]
    norm_bias: jax.Array  # [D]
    in_kernel: jax.Array  # [D, F]
    in_bias: jax.Array  # [F]
    out_kernel: jax.Array  # [F, D]
    out_bias: jax.Array  # [D]


class GatedWeights(NamedTuple):
    """Parameters of a gated MLP half on one device, which holds F of the model's hidden values. All float32 in a model."""

    norm_scale: jax.Array  # [D]
    norm_bias: jax.Array  # [D]
    in_kernel: jax.Array  # [2, D, F]: what GELU is taken of, and what its result is multiplied by
    in_bias: jax.Array  # [2, F]
    out_kernel: jax.Array  # [F, D]
    out_bias: jax.Array  # [D]


def mlp_half(x, weights: MLPWeights, *, gelu="tanh", dropout=None, residual_scale=1.0, tokens=None, eps=EPS):
    """residual_scale * x + dropout(dropout(GELU(LN(x) @ in_kernel + in_bias)) @ out_kernel + residual_scale * out_bias).

    x [B, T, D] float32 or bfloat16. F is this device's part of the hidden width, whose first global column is dropout.column.
    residual_scale, tokens, eps: as in the attention half; the caller sums the result over the devices of a model axis.
    gelu: a name of `GELUS`. Accumulates in float32; hidden values are rounded to x's dtype.
    Returns [B, T, D] in x's dtype.
    """

    def hidden(z, w_in, b_in, acc_dtype):
        return GELUS[gelu](jnp.einsum("btd,df->btf", z, w_in, preferred_element_type=acc_dtype) + b_in)

    return _half(hidden, x, weights, dropout=dropout, residual_scale=residual_scale, tokens=tokens, eps=eps)


def gated_half(x, weights: GatedWeights, *, gelu="silu", dropout=None, residual_scale=1.0, tokens=None, eps=EPS):
    """`mlp_half` with hidden values GELU(a) * b, where a, b = LN(x) @ in_kernel + in_bias; with SiLU, SwiGLU (arXiv:2002.05202).

    Arguments and meaning there; weights.in_kernel and in_bias hold both projections. Returns [B, T, D] in x's dtype.
    """

    def hidden(z, w_in, b_in, acc_dtype):
        a, b = jnp.einsum("btd,cdf->cbtf", z, w_in, preferred_element_type=acc_dtype) + b_in[:, None, None]
        return GELUS[gelu](a) * b

    return _half(hidden, x, weights, dropout=dropout, residual_scale=residual_scale, tokens=tokens, eps=eps)


def _half(hidden, x, weights, *, dropout, residual_scale, tokens, eps):
    """An MLP half. hidden: (LN(x), in_kernel in x's dtype, in_bias, dtype of sums) -> hidden values [B, T, F] before dropout."""
    norm_scale, norm_bias, w_in, b_in, w_out, b_out = weights
    acc_dtype = jnp.promote_types(x.dtype, jnp.float32)
    w_in, w_out = w_in.astype(x.dtype), w_out.astype(x.dtype)
    h = hidden(layer_norm(x, norm_scale, norm_bias, eps=eps), w_in, b_in, acc_dtype)
    column = 0 if dropout is None else dropout.column
    h = drop.apply(h, dropout, drop.MLP_HIDDEN, column, tokens=tokens).astype(x.dtype)
    y = jnp.einsum("btf,fd->btd", h, w_out, preferred_element_type=acc_dtype) + residual_scale * b_out
    return (residual_scale * x.astype(acc_dtype) + drop.apply(y, dropout, drop.MLP_OUT, tokens=tokens)).astype(x.dtype)
