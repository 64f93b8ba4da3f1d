"""Layer normalisation as TPU kernels, forward and backward; `reference.py` beside this file is the specification.

    forward     c = x - mean(x),  r = 1 / sqrt(mean(c^2) + eps),  n = c r,  z = n scale + bias     (over the last axis, of D)
    backward    u = dz scale,  dx = r (u - mean(u) - n mean(u n)),  dscale = sum dz n,  dbias = sum dz  (sums over all rows)

x [..., D] is seen as [R, D] rows. Bytes moved: forward x once in, z once out; backward x and dz in, dx out. Nothing but x is
saved: mean and r are recomputed. All arithmetic is float32. Ba et al. 2016, arXiv:1607.06450; where the paper uses it: Eq. 2-4.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.launch import Launch, call, vary_alike
from kernels.layer_norm.plan import Plan
from kernels.layer_norm.plan import plan as choose
from kernels.layer_norm.reference import EPS
from kernels.settings import own


def cost(shape: tuple[int, int], itemsize: int, *, backward: bool) -> pl.CostEstimate:
    """FLOPs and bytes of one pass over [R, D]."""
    r, d = shape
    return pl.CostEstimate(
        flops=(14 if backward else 8) * r * d, transcendentals=r, bytes_accessed=(3 if backward else 2) * r * d * itemsize
    )


def normalise(x, eps: float):
    """x [R, D] float32 -> n [R, D], r [R, 1]: the normalised rows and the reciprocals of their deviations. For kernel bodies."""
    c = x - jnp.mean(x, axis=-1, keepdims=True)
    r = lax.rsqrt(jnp.mean(c * c, axis=-1, keepdims=True) + eps)
    return c * r, r


def normalise_back(u, n, r):
    """Gradient of x from u = dz * scale [R, D] and what `normalise` returned. For kernel bodies."""
    return r * (u - jnp.mean(u, axis=-1, keepdims=True) - n * jnp.mean(u * n, axis=-1, keepdims=True))


def _forward_kernel(x, scale, bias, z, *, eps):
    n, _ = normalise(x[...].astype(jnp.float32), eps)
    z[...] = (n * scale[...] + bias[...]).astype(z.dtype)


def _backward_kernel(x, dz, scale, dx, dscale, dbias, *, r_total, eps):
    """The sums over rows gather in the two [1, D] outputs, which stay in VMEM while the grid runs over the row blocks."""
    i, rows = pl.program_id(0), x.shape[0]

    @pl.when(i == 0)
    def _():
        dscale[...] = jnp.zeros_like(dscale)
        dbias[...] = jnp.zeros_like(dbias)

    # Rows beyond the array hold anything at all, NaN included: they must not reach the sums.
    valid = i * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0) < r_total
    n, r = normalise(jnp.where(valid, x[...].astype(jnp.float32), 0.0), eps)
    g = jnp.where(valid, dz[...].astype(jnp.float32), 0.0)
    dx[...] = normalise_back(g * scale[...], n, r).astype(dx.dtype)
    dscale[...] += jnp.sum(g * n, axis=0, keepdims=True)
    dbias[...] += jnp.sum(g, axis=0, keepdims=True)


def _specs(rows, d):
    return pl.BlockSpec((rows, d), lambda i: (i, 0)), pl.BlockSpec((1, d), lambda i: (0, 0))


def _pad(x, rows):
    return jnp.pad(x, ((0, max(0, rows - x.shape[0])), (0, 0)))  # only fewer rows than one tile of 16 are ever padded


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _layer_norm(launch, plan, eps, x, scale, bias):
    return _forward(launch, plan, eps, x, scale, bias)[0]


def _forward(launch, plan: Plan, eps, x, scale, bias):
    r, d = x.shape
    rows = plan.rows
    row, vector = _specs(rows, d)
    padded = _pad(x, rows)
    (z,) = call(
        partial(_forward_kernel, eps=eps),
        launch=launch.within(plan.needs),
        name="layer_norm_forward",
        grid=(pl.cdiv(r, rows),),
        in_specs=[row, vector, vector],
        out_specs=[row],
        out_shapes=[(padded.shape, x.dtype)],
        semantics=("parallel",),
        cost=cost(x.shape, x.dtype.itemsize, backward=False),
    )(padded, scale[None].astype(jnp.float32), bias[None].astype(jnp.float32))
    return z[:r], (x, scale, bias)


def _backward(launch, plan: Plan, eps, saved, dz):
    x, scale, bias = saved
    r, d = x.shape
    rows = plan.rows
    row, vector = _specs(rows, d)
    padded = _pad(x, rows)
    dx, dscale, dbias = call(
        partial(_backward_kernel, r_total=r, eps=eps),
        launch=launch.within(plan.needs),
        name="layer_norm_backward",
        grid=(pl.cdiv(r, rows),),
        in_specs=[row, row, vector],
        out_specs=[row, vector, vector],
        out_shapes=[(padded.shape, x.dtype), ((1, d), jnp.float32), ((1, d), jnp.float32)],
        semantics=("arbitrary",),
        cost=cost(x.shape, x.dtype.itemsize, backward=True),
    )(padded, _pad(dz, rows), scale[None].astype(jnp.float32))
    return dx[:r], dscale[0].astype(scale.dtype), dbias[0].astype(bias.dtype)


_layer_norm.defvjp(own(_forward), own(_backward))


def layer_norm(x, scale, bias, *, eps: float = EPS, launch: Launch, plan: Plan | None = None):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, as `reference.layer_norm`, in one kernel each way.

    x [..., D] float32 or bfloat16, scale and bias [D] -> [..., D] in x's dtype. ValueError for other shapes or dtypes.
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"x is {x.dtype}; the kernel takes float32 or bfloat16: cast it, or use the reference")
    d = x.shape[-1]
    for name, a in (("scale", scale), ("bias", bias)):
        if a.shape != (d,):
            raise ValueError(f"{name} has shape {a.shape}; x of shape {x.shape} needs ({d},)")
    if x.size == 0:
        raise ValueError(f"x has shape {x.shape}: there is no row to normalise")
    x, scale, bias = vary_alike(x, scale, bias)
    rows = x.reshape(-1, d)
    y: Any = _layer_norm(
        launch, plan or choose(rows.shape, launch.device), float(eps), rows, scale, bias
    )  # Any: pyright cannot see through custom_vjp
    return y.reshape(x.shape)
