"""The product that ends a half block, bias and residual in its epilogue, and its gradients."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.hopper.epilogue import Epilogue
from kernels.hopper.product import product
from kernels.launch import vary_alike


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _closing(scale: float, h, w, bias, x):
    return product(h, w, bias, x, e=Epilogue(bias=True, residual=scale))[0]


def _backward(scale: float, kept, g):
    h, w, bias = kept
    dw = jnp.einsum("mk,md->kd", h, g, preferred_element_type=w.dtype)  # over all rows: in w's dtype
    return g @ w.astype(g.dtype).T, dw, sums(g, bias), (scale * g.astype(jnp.float32)).astype(g.dtype)


def sums(g, like):
    """Over the rows of g, in float32: the gradient of a bias."""
    return g.astype(jnp.float32).sum(0).astype(like.dtype)


_closing.defvjp(lambda scale, h, w, bias, x: (_closing(scale, h, w, bias, x), (h, w, bias)), _backward)


def closing(h, w, bias, x, *, residual_scale: float):
    """h @ w + bias + residual_scale * x for rows h [M, K] and x [M, D] in bfloat16, w [K, D], bias [D]."""
    return _closing(residual_scale, *vary_alike(h, w, bias, x))
