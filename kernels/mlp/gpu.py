"""The MLP half of a block on a GPU: XLA's products, rounded to x's dtype where they are made; `kernels/attention/gpu.py` says why.

The backward pass keeps x and the hidden layer's product, in x's dtype, and computes what is elementwise again.
"""

import jax
import jax.numpy as jnp

from kernels import dropout as drop
from kernels.attention.gpu import again, product
from kernels.layer_norm.reference import layer_norm


def mlp_half(x, norm_scale, norm_bias, w_in, b_in, w_out, b_out, *, gelu="tanh", dropout=None, share=1.0):
    """As `reference.mlp_half`: the same arguments, the same result to rounding."""
    wide = jnp.promote_types(x.dtype, jnp.float32)

    @again
    def project(x, norm_scale, norm_bias, w_in):
        return product(layer_norm(x, norm_scale, norm_bias), w_in)

    @again
    def close(x, a, b_in, w_out, b_out):
        h = jax.nn.gelu(a.astype(wide) + b_in, approximate=gelu == "tanh")
        h = drop.apply(h, dropout, drop.MLP_HIDDEN, column=0 if dropout is None else dropout.column).astype(x.dtype)
        y = product(h, w_out).astype(wide) + share * b_out
        return (share * x.astype(wide) + drop.apply(y, dropout, drop.MLP_OUT)).astype(x.dtype)

    return close(x, project(x, norm_scale, norm_bias, w_in), b_in, w_out, b_out)
