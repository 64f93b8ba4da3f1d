"""The MLP half of a block on a Hopper GPU: two products whose epilogues (`kernels/hopper/`) take what stands between and behind them.

Forward, bias and GELU are the first one's epilogue, bias and residual the second one's. Kept are x, its rows' statistics and what
GELU is taken of; backward, GELU's slope is in the epilogue of the gradient's product with out_kernel, which makes the hidden
values again besides.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.attention.gpu import KEPT
from kernels.hopper.closing import sums
from kernels.hopper.epilogue import Epilogue
from kernels.hopper.product import product
from kernels.launch import vary_alike
from kernels.layer_norm import gpu as layer_norm
from kernels.mlp.reference import MLPWeights


@dataclass(frozen=True)
class Form:
    """What is static of a half block."""

    gelu: str
    residual_scale: float
    eps: float


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _half(f: Form, x, weights: MLPWeights):
    z, _ = layer_norm.forward(f.eps, x, weights.norm_scale, weights.norm_bias)
    (h,) = product(z, weights.in_kernel, weights.in_bias, e=Epilogue(bias=True, gelu=f.gelu))
    return _close(f, h, x, weights)


def _close(f: Form, h, x, weights: MLPWeights):
    return product(h, weights.out_kernel, f.residual_scale * weights.out_bias, x, e=Epilogue(bias=True, residual=f.residual_scale))[
        0
    ]


def _forward(f: Form, x, weights: MLPWeights):
    z, (_, mean, r, _) = layer_norm.forward(f.eps, x, weights.norm_scale, weights.norm_bias)
    h, a = product(z, weights.in_kernel, weights.in_bias, e=Epilogue(bias=True, gelu=f.gelu, keep=True))
    return _close(f, h, x, weights), (x, mean, r, checkpoint_name(a, KEPT), weights)


def _backward(f: Form, kept, g):
    x, mean, r, a, weights = kept
    da, h = product(g, weights.out_kernel, beside=a, e=Epilogue(slope=f.gelu), turned=True)
    d_out = jnp.einsum("mf,md->fd", h, g, preferred_element_type=weights.out_kernel.dtype)
    z = layer_norm.normalised(x, mean, r, weights.norm_scale, weights.norm_bias)
    d_in = jnp.einsum("md,mf->df", z, da, preferred_element_type=weights.in_kernel.dtype)
    dz = da @ weights.in_kernel.astype(x.dtype).T
    dx, d_scale, d_bias = layer_norm.backward(
        f.eps, (x, mean, r, weights.norm_scale), dz, beside=f.residual_scale * g.astype(jnp.float32)
    )
    d_out_bias = f.residual_scale * sums(g, weights.out_bias)
    return dx, MLPWeights(d_scale, d_bias, d_in, sums(da, weights.in_bias), d_out, d_out_bias)


_half.defvjp(_forward, _backward)


def mlp_half(x, weights: MLPWeights, *, gelu: str, residual_scale: float, eps: float):
    """As `kernels.mlp.reference.mlp_half` without dropout, of rows x [M, D] in bfloat16 and float32 weights."""
    x, *arrays = vary_alike(x, *weights)
    return _half(Form(gelu, residual_scale, eps), x, MLPWeights(*arrays))
