"""The MLP half of a block on a GPU: XLA's products, rounded to x's dtype where they are made; `kernels/attention/gpu.py` says why.

On Hopper it is of our kernels (`hopper.py`), where `kernels.hopper.plan.refuses` says nothing.

The backward pass keeps x, its rows' statistics and the hidden layer's product, and computes what is elementwise again.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels import dropout as drop
from kernels.attention.gpu import KEPT, again, dropped, product, rounded
from kernels.hopper.plan import refuses
from kernels.launch import vary_alike
from kernels.layer_norm.gpu import layer_norm
from kernels.layer_norm.reference import EPS
from kernels.mlp.reference import GELUS, MLPWeights
from kernels.settings import own


def mlp_half(x, weights: MLPWeights, *, gelu="tanh", dropout=None, residual_scale=1.0, tokens=None, eps=EPS):
    """As `reference.mlp_half`: the same arguments, the same result to rounding. tokens: as in the attention half."""
    norm_scale, norm_bias, w_in, b_in, w_out, b_out = weights
    b, t, d = x.shape
    tokens = tokens or t
    acc_dtype = jnp.promote_types(x.dtype, jnp.float32)
    if refuses(x.dtype, d, w_in.shape[1]) is None:
        from kernels.mlp import hopper  # Mosaic GPU takes a third of a second to import

        options = {"gelu": gelu, "dropout": dropout, "residual_scale": residual_scale, "tokens": tokens, "eps": eps}
        return hopper.mlp_half(x, weights, **options)

    @again
    def project(x, norm_scale, norm_bias, w_in):
        return checkpoint_name(product(layer_norm(x, norm_scale, norm_bias, eps=eps), w_in), KEPT)

    @again
    def close(x, a, b_in, w_out, b_out):
        h = _gelu(_plus(acc_dtype, *vary_alike(a, b_in)), gelu)
        h = dropped(h, t, dropout, drop.MLP_HIDDEN, tokens, 0 if dropout is None else dropout.column).astype(x.dtype)
        y = product(h, w_out).astype(acc_dtype) + residual_scale * b_out
        return rounded(residual_scale * x.astype(acc_dtype) + dropped(y, t, dropout, drop.MLP_OUT, tokens), x.dtype)

    x = x.reshape(b * t, d)
    return close(x, project(x, norm_scale, norm_bias, w_in), b_in, w_out, b_out).reshape(b, t, d)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _plus(acc_dtype, a, bias):
    return a.astype(acc_dtype) + bias


def _plus_backward(acc_dtype, kept, g):
    # the bias's gradient is the sum of the product's, read as that is rounded: else XLA writes it once more, in float32
    g = rounded(g, kept.dtype)
    return g, g.astype(acc_dtype).sum(0)


_plus.defvjp(own(lambda acc_dtype, a, bias: (_plus(acc_dtype, a, bias), jnp.zeros((), a.dtype))), own(_plus_backward))


def _gelu(x, form: str):
    if form != "tanh":
        return GELUS[form](x)
    # (1 + tanh(u)) / 2 is the logistic function of 2u: an exponential, where tanh is a quotient of polynomials
    return x * jax.nn.sigmoid((8 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3))
