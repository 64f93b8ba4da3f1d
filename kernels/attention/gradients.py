"""The kernels of the attention half that end in a gradient: of its input with LN, and of its two weights."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.heads import narrow
from kernels.attention.projections import Step
from kernels.attention.tiling import Static
from kernels.launch import dot
from kernels.layer_norm.tpu import normalise

F32 = jnp.float32


def input_gradient(scalars, x, norm_scale, dqkv, dy, w, static: Static):
    """dx in the place of dy [B, T, D], for the images of dqkv [3, b, T, K], and the gradients of norm_scale and norm_bias, both [D]
    float32; w [3, K, D] (the projections, transposed)."""
    s = Step("input_gradient", dqkv.shape[1], x, w.shape[1], static)
    last = s.weights[0] * s.weights[1] - 1

    def kernel(_, x_ref, scale_ref, dqkv_ref, dy_ref, w_ref, dx_ref, sums_ref, *acc_ref):
        def part(i):
            return sum(dot(dqkv_ref[c, i], w_ref[c], s.device) for c in range(s.tiles.sections))

        def finish(dzs):
            sums = [jnp.zeros((1, s.d), F32)] * 2
            for i, dz in enumerate(dzs):
                if s.t % s.rows:
                    row = pl.program_id(1) * s.rows + lax.broadcasted_iota(jnp.int32, (s.rows, 1), 0)
                    dz = jnp.where(row < s.t, dz, 0.0)
                xhat, inverse = normalise(s.load(x_ref, i))
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

        @pl.when(step == last)
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
            s.weight(s.tiles.sections, s.columns, s.d, section=0, column=1),
        ],
        [s.tokens(s.d, whole=True), s.spec((1, 2, s.d), lambda i, j, c, n: (i * s.batch[1] + j, 0, 0))],
        [(x.shape, x.dtype), ((steps, 2, s.d), F32)],
        scratch=[] if s.resident else [pltpu.VMEM((s.images, s.rows, s.d), F32)],
        aliases={4: 0},  # a block of dy is read before that of dx is written
        products=3,
        moved=6,
    )
    return dx, *sums.sum(0)


def _accumulate(s: Step, ref, index, a, g):
    """ref[index] += a^T g, 256 columns at a time: a [rows, D], g [rows, columns], as operands."""
    width = 256 if s.columns % 256 == 0 else s.columns
    for n in range(0, s.columns, width):
        ref[(*index, slice(None), slice(n, n + width))] += dot(a, g[:, n : n + width], s.device, contract=(0, 0))


def output_weights(scalars, o, dy, static: Static):
    """Gradients of w_out [K, D] and b_out [1, D], float32, summed over the images of o [b, T, K]; dy [B, T, D]."""
    s = Step("output_weights", o.shape[0], dy, o.shape[2], static)

    def kernel(scalars_ref, o_ref, dy_ref, dw_ref, db_ref):
        @pl.when(s.first())
        def _():
            dw_ref[...] = jnp.zeros_like(dw_ref)
            db_ref[...] = jnp.zeros_like(db_ref)

        for i in range(s.images):
            g = s.drop(s.load(dy_ref, i), scalars_ref, i, pl.program_id(1) * s.columns)
            db_ref[...] += static.residual_scale * g.sum(0, keepdims=True)
            a = narrow(s.load(o_ref, i), dy.dtype, s.device)
            _accumulate(s, dw_ref, (), a, narrow(g, dy.dtype, s.device))

    return s(
        kernel,
        (scalars, o, dy),
        [s.tokens(s.k), s.tile(whole=True)],
        [s.weight(s.k, s.columns, column=1), s.weight(1, s.columns, column=1)],
        [((s.k, s.d), F32), ((1, s.d), F32)],
        products=1,
        moved=2,
    )


def projection_weights(scalars, x, norm_scale, norm_bias, dqkv, static: Static):
    """Gradients of w_qkv [3, D, K] and b_qkv [3, 1, K], float32, summed over the images of dqkv [3, b, T, K]; LN(x) is computed
    again."""
    s = Step("projection_weights", dqkv.shape[1], x, dqkv.shape[3], static)

    def kernel(_, x_ref, scale_ref, bias_ref, dqkv_ref, dw_ref, db_ref):
        @pl.when(s.first())
        def _():
            dw_ref[...] = jnp.zeros_like(dw_ref)
            db_ref[...] = jnp.zeros_like(db_ref)

        for i in range(s.images):
            z = narrow(normalise(s.load(x_ref, i))[0] * scale_ref[...] + bias_ref[...], x.dtype, s.device)
            for c in range(s.tiles.sections):
                g = s.load(dqkv_ref.at[c], i)
                db_ref[c] += g.sum(0, keepdims=True)
                _accumulate(s, dw_ref, (c,), z, narrow(g, x.dtype, s.device))

    return s(
        kernel,
        (scalars, x, norm_scale, norm_bias, dqkv),
        [s.tokens(s.d, whole=True), s.whole(1, s.d), s.whole(1, s.d), s.sections()],
        [
            s.weight(s.tiles.sections, s.d, s.columns, section=0, column=2),
            s.weight(s.tiles.sections, 1, s.columns, section=0, column=2),
        ],
        [((3, s.d, s.k), F32), ((3, 1, s.k), F32)],
        products=3,
        moved=4,
    )
