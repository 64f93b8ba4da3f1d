"""The backward pass of the attention half on arrays as they lie in HBM; `forward.py` has the forward pass and the layout.

From x and dy alone: `project` makes qkv again, and with g the masked dy, s = residual_scale

    do = g out_kernel^T                                                   output_gradient
    dqkv, o                                                               core
    d out_kernel = o^T g,  d out_bias = s sum g                           output_weights
    d qkv_kernel = LN(x)^T dqkv,  d qkv_bias = sum dqkv                   projection_weights
    dx = s dy + LN'(dqkv qkv_kernel^T), sums for norm_scale, norm_bias    input_gradient

The core: `core_backward.py`. Everything between the products is float32; their operands are rounded to the dtype of the arrays,
where the reference rounds them too.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.general.forward import Static, Step
from kernels.attention.tiling import ProductTiles
from kernels.body import F32, cast_dot, operand
from kernels.layer_norm.tpu import normalise


def output_gradient(tiles: ProductTiles, scalars, dy, w, b: int, static: Static):
    """do [b, T, K], the gradient of o; dy [B, T, D], w [K, D], the output projection as it lies: the MXU's load transposes it."""
    s = Step("output_gradient", tiles, b, dy, w.shape[0], static)

    def kernel(scalars_ref, dy_ref, w_ref, out_ref, *scratch):
        g = s.operands(lambda i: operand(s.drop(dy_ref[i].astype(F32), scalars_ref, i), dy.dtype, s.device), scratch)
        for i in range(s.images):
            out_ref[i] = cast_dot(g(i), w_ref[...], s.device, contract=(1, 1)).astype(out_ref.dtype)

    return s(
        kernel,
        (scalars, dy, w),
        [s.tokens(s.d, whole=True), s.weight(s.columns, s.d, column=0)],
        [s.tile()],
        [((s.b, s.t, s.k), dy.dtype)],
        scratch=s.operand_scratch(),
        products=1,
        moved=2,
    )[0]


def input_gradient(tiles: ProductTiles, scalars, x, norm_scale, dqkv, dy, w, static: Static):
    """dx in the place of dy [B, T, D], for the images of dqkv [3, b, T, K], and the gradients of norm_scale and norm_bias, both [D]
    float32; w [3, D, K], the projections as they lie."""
    s = Step("input_gradient", tiles, dqkv.shape[1], x, w.shape[2], static)

    def kernel(_, x_ref, scale_ref, dqkv_ref, dy_ref, w_ref, dx_ref, sums_ref, *acc_ref):
        def part(i):
            return sum(cast_dot(dqkv_ref[c, i], w_ref[c], s.device, contract=(1, 1)) for c in range(s.tiles.sections))

        def finish(dzs):
            sums = [jnp.zeros((1, s.d), F32)] * 2
            for i, dz in enumerate(dzs):
                if s.t % s.rows:
                    row = pl.program_id(1) * s.rows + lax.broadcasted_iota(jnp.int32, (s.rows, 1), 0)
                    dz = jnp.where(row < s.t, dz, 0.0)
                xhat, inverse = normalise(s.load(x_ref, i), static.eps)
                sums = [sums[0] + (dz * xhat).sum(0, keepdims=True), sums[1] + dz.sum(0, keepdims=True)]
                dz = dz * scale_ref[...]
                dz = dz - dz.mean(-1, keepdims=True) - xhat * (dz * xhat).mean(-1, keepdims=True)
                dx_ref[i] = (static.residual_scale * dy_ref[i].astype(F32) + inverse * dz).astype(dx_ref.dtype)
            sums_ref[0] = jnp.concatenate(sums)

        if s.resident:
            finish(part(i) for i in range(s.images))
            return
        step = pl.program_id(2) * s.weights[1] + pl.program_id(3)
        for i in range(s.images):
            before = jnp.where(step == 0, 0.0, acc_ref[0][i])  # the first sum meets uninitialised memory
            acc_ref[0][i] = before + part(i)

        @pl.when(step == s.weights[0] * s.weights[1] - 1)
        def _():
            finish(acc_ref[0][i] for i in range(s.images))

    steps = s.batch[0] * s.batch[1]
    dx, sums = s(
        kernel,
        (scalars, x, norm_scale, dqkv, dy, w),
        [
            s.tokens(s.d, whole=True),
            s.whole(1, s.d),
            s.sections(),
            s.tokens(s.d, whole=True),
            s.weight(s.tiles.sections, s.d, s.columns, section=0, column=2),
        ],
        [s.tokens(s.d, whole=True), s.spec((1, 2, s.d), lambda i, j, c, n: (i * s.batch[1] + j, 0, 0))],
        [(x.shape, x.dtype), ((steps, 2, s.d), F32)],
        scratch=[] if s.resident else [pltpu.VMEM((s.images, s.rows, s.d), F32)],
        aliases={4: 0},  # a block of dy is read before that of dx is written
        products=3,
        moved=6,
    )
    return dx, *sums.sum(0)


def _clear(s: Step, *refs):
    """Zero sums, at the first of the steps that add to them."""

    @pl.when(s.first())
    def _():
        for ref in refs:
            ref[...] = jnp.zeros_like(ref)


def _accumulate(s: Step, ref, index, a, g):
    """ref[index] += a^T g, 256 columns at a time: a [rows, D], g [rows, columns], as operands."""
    width = 256 if s.columns % 256 == 0 else s.columns
    for n in range(0, s.columns, width):
        ref[(*index, slice(None), slice(n, n + width))] += cast_dot(a, g[:, n : n + width], s.device, contract=(0, 0))


def output_weights(tiles: ProductTiles, scalars, o, dy, static: Static, into=None):
    """Gradients of out_kernel [K, D] and out_bias [1, D], float32, summed over the images of o [b, T, K]; dy [B, T, D]. into: where
    the first belongs, a `Stacked`; returned is its whole array then."""
    s = Step("output_weights", tiles, o.shape[0], dy, o.shape[2], static)

    def kernel(scalars_ref, o_ref, dy_ref, dw_ref, db_ref):
        _clear(s, dw_ref, db_ref)
        for i in range(s.images):
            g = s.drop(s.load(dy_ref, i), scalars_ref, i, pl.program_id(1) * s.columns)
            db_ref[...] += static.residual_scale * g.sum(0, keepdims=True)
            a = operand(s.load(o_ref, i), dy.dtype, s.device)
            _accumulate(s, dw_ref, (), a, operand(g, dy.dtype, s.device))

    return s(
        kernel,
        (scalars, o, dy),
        [s.tokens(s.k), s.tile(whole=True)],
        [s.weight(s.k, s.columns, column=1), s.weight(1, s.columns, column=1)],
        [into or ((s.k, s.d), F32), ((1, s.d), F32)],
        products=1,
        moved=2,
    )


def projection_weights(tiles: ProductTiles, scalars, x, norm, dqkv, static: Static, into=None):
    """Gradients of qkv_kernel [3, D, K] and qkv_bias [3, 1, K], float32, summed over the images of dqkv [3, b, T, K]; LN(x) is
    computed again. into: as of `output_weights`."""
    s = Step("projection_weights", tiles, dqkv.shape[1], x, dqkv.shape[3], static)

    def kernel(_, x_ref, scale_ref, bias_ref, dqkv_ref, dw_ref, db_ref):
        _clear(s, dw_ref, db_ref)
        for i in range(s.images):
            z = operand(normalise(s.load(x_ref, i), static.eps)[0] * scale_ref[...] + bias_ref[...], x.dtype, s.device)
            for c in range(s.tiles.sections):
                g = s.load(dqkv_ref.at[c], i)
                db_ref[c] += g.sum(0, keepdims=True)
                _accumulate(s, dw_ref, (c,), z, operand(g, x.dtype, s.device))

    return s(
        kernel,
        (scalars, x, *norm, dqkv),
        [s.tokens(s.d, whole=True), s.whole(1, s.d), s.whole(1, s.d), s.sections()],
        [
            s.weight(s.tiles.sections, s.d, s.columns, section=0, column=2),
            s.weight(s.tiles.sections, 1, s.columns, section=0, column=2),
        ],
        [into or ((3, s.d, s.k), F32), ((3, 1, s.k), F32)],
        products=3,
        moved=4,
    )
