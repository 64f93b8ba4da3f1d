"""The forward pass of the attention half on float32 rows as three kernels, for v2 and v3, where the fused kernel does not fit VMEM.

    project     q, k, v = LN(x) qkv_kernel + qkv_bias
    core        o = softmax(q k^T / sqrt(H)) v, head by head
    output      out = s x + dropout(o out_kernel + s out_bias)

with s = residual_scale. Between them every image has R rows, T rounded up to 8, in the order of `float32_rows.unpacked`, as in the
backward pass, which takes them as they are if they are kept. Float32 costs twice the HBM's bytes of bfloat16, beside products that
take longer, and saves what stops the MXU: packing what is stored, unpacking what is loaded.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.float32.forward import attend
from kernels.attention.float32.tiles import RowTiles
from kernels.attention.general.core import core_cost
from kernels.attention.general.forward import Static
from kernels.attention.tiling import Float32Core, heads_of
from kernels.body import F32, dot
from kernels.device import LANES, SUBLANES
from kernels.float32_rows import PIECE, column_slices, drop, packed, pieces, token, unpacked
from kernels.launch import call
from kernels.layer_norm.tpu import normalise
from kernels.vmem import round_up


def _block(i, scalars, images: int, whole: bool):
    """Which block of images of x is the i-th of those to be worked on. whole: all are, which the compiler then knows."""
    return i if whole else lax.div(scalars[2], images) + i


def project(tiles: RowTiles, scalars, x, norm, w, bias, b: int, static: Static):
    """q, k, v [3, b, R, K] float32 of b images of x [B, T, D], from image scalars[2] on; norm: scale and bias [1, D]; w [3, D, K],
    bias [3, 1, K]."""
    (_, t, d), k, n, columns = x.shape, w.shape[2], tiles.images, tiles.columns
    rows, across = round_up(t, SUBLANES), k // columns

    def kernel(_, x_ref, scale, shift, w_ref, b_ref, out, z):
        @pl.when(pl.program_id(1) == 0)
        def _():
            for i in range(n):
                for a, count in pieces(t, PIECE):
                    normal, _ = normalise(unpacked(x_ref[i, a : a + count]), static.eps)
                    z[i * rows + a : i * rows + a + count] = normal * scale[...] + shift[...]
                if rows > t:
                    z[i * rows + t : (i + 1) * rows] = jnp.zeros((rows - t, d), F32)

        for part in column_slices(columns):
            value = dot(z[...], w_ref[0, :, part], x.dtype) + b_ref[0, :, part]
            out[0, :, :, part] = value.reshape(n, rows, -1)

    def section(*block):
        return pl.BlockSpec((1, *block), lambda i, j, s: (lax.div(j, across), 0, lax.rem(j, across)))

    vector = pl.BlockSpec((1, d), lambda i, j, s: (0, 0))
    return call(
        kernel,
        launch=static.launch,
        name="attention_project",
        grid=(b // n, 3 * across),
        in_specs=[
            pl.BlockSpec((n, t, d), lambda i, j, s: (_block(i, s, n, x.shape[0] == b), 0, 0)),
            vector,
            vector,
            section(d, columns),
            section(1, columns),
        ],
        out_specs=[pl.BlockSpec((1, n, rows, columns), lambda i, j, s: (lax.div(j, across), i, 0, lax.rem(j, across)))],
        out_shapes=[((3, b, rows, k), F32)],
        semantics=("parallel", "arbitrary"),
        cost=pl.CostEstimate(
            flops=6 * b * t * d * k,
            transcendentals=b * t,
            bytes_accessed=b * t * d * x.dtype.itemsize + 12 * b * t * k + b // n * 12 * d * k,
        ),
        scratch=[pltpu.VMEM((n * rows, d), F32)],
        prefetch=1,
    )(scalars, x, *norm, w, bias)[0]


def core(tiles: Float32Core, qkv, t: int, dtype, static: Static):
    """o [b, R, K] of q, k, v [3, b, R, K], float32, of whose rows t are an image's. dtype: of x."""
    _, b, rows, k = qkv.shape
    lanes, factor, keys = tiles.lanes, static.width**-0.5 * math.log2(math.e), round_up(t, LANES)
    padded = keys > rows

    def kernel(q, k_ref, v_ref, out, *scratch):
        v = v_ref.at[0, 0]
        if padded:
            (target,) = scratch
            target[:rows], target[rows:] = v[...], jnp.zeros((keys - rows, lanes), F32)
            v = target
        for run in heads_of(lanes, k // static.num_heads):
            attend(run, q.at[0, 0], k_ref.at[0, 0], v, out.at[0], t=t, tokens=static.tokens or t, factor=factor, dtype=dtype)

    return call(
        kernel,
        launch=static.launch,
        name="attention_core_forward",
        grid=(b, k // lanes),
        in_specs=[pl.BlockSpec((1, 1, rows, lanes), lambda i, g, c=c: (c, i, 0, g)) for c in range(3)],
        out_specs=[pl.BlockSpec((1, rows, lanes), lambda i, g: (i, 0, g))],
        out_shapes=[((b, rows, k), F32)],
        semantics=("parallel", "parallel"),
        cost=core_cost(b, t, k, static.num_heads, 4, backward=False),
        scratch=[pltpu.VMEM((keys, lanes), F32)] * padded,
    )(qkv, qkv, qkv)[0]


def output(tiles: RowTiles, scalars, o, x, w, bias, static: Static, into=None):
    """s x + dropout(o w + s bias) [B, T, D] of the images of o [b, R, K], which are those of x from image scalars[2] on; w [K, D],
    bias [1, D]. into: [B, T, D], the other images of the result."""
    (b, rows, k), (_, t, d), n, columns = o.shape, x.shape, tiles.images, tiles.columns
    share = static.residual_scale

    def kernel(scalars, o_ref, x_ref, w_ref, b_ref, *refs):
        out, result = refs[-2:]
        for part in column_slices(columns):
            result[:, part] = dot(o_ref[...].reshape(n * rows, k), w_ref[:, part], x.dtype) + share * b_ref[:, part]
        for i in range(n):
            image = (pl.program_id(1) * n + i) * (static.tokens or t)
            for a, count in pieces(t, PIECE):
                value = result[i * rows + a : i * rows + a + count]
                y = drop(value, scalars, image + token(a, count, x.dtype), static.rate, pl.program_id(0) * columns)
                out[i, a : a + count] = packed(share * unpacked(x_ref[i, a : a + count]) + y, x.dtype)

    tile = pl.BlockSpec((n, t, columns), lambda j, i, s: (_block(i, s, n, x.shape[0] == b), 0, j))
    rest = [] if into is None else [into]
    return call(
        kernel,
        launch=static.launch,
        name="attention_output",
        grid=(d // columns, b // n),
        in_specs=[
            pl.BlockSpec((n, rows, k), lambda j, i, s: (i, 0, 0)),
            tile,
            pl.BlockSpec((k, columns), lambda j, i, s: (0, j), pipeline_mode=pl.Buffered(1)),
            pl.BlockSpec((1, columns), lambda j, i, s: (0, j)),
            *[pl.BlockSpec(memory_space=pl.ANY) for _ in rest],
        ],
        out_specs=[tile],
        out_shapes=[(x.shape, x.dtype)],
        semantics=("parallel", "parallel"),
        cost=pl.CostEstimate(
            flops=2 * b * t * d * k,
            transcendentals=0,
            bytes_accessed=4 * b * t * k * (d // columns) + 2 * b * t * d * x.dtype.itemsize + 4 * d * k,
        ),
        scratch=[pltpu.VMEM((n * rows, columns), F32)],
        prefetch=1,
        aliases={5: 0} if rest else None,
    )(scalars, o, x, w, bias, *rest)[0]
