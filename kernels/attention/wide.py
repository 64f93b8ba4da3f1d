"""Kernels on flat float32 rows: what the backward half is made of on v2 and v3, where float32 feeds the MXU without a pause.

Between the kernels every image has R rows, T rounded up to 8, in the order of rows.py; so [B, R, .] is [B R, .] without a copy, and
a product over all rows of the batch pads nothing. Rows behind T hold zeros in z and g, and nothing else reads them.

    prepare     z = LN(x), g = dropout(dy)
    multiply    products with a weight: z w_qkv + b_qkv,  g w_out^T,  dqkv w_qkv^T
    gradients   of weights: a^T g and the column sums of g
    finish      dx = share dy + LN'(dz), with the sums for norm_scale and norm_bias

What the MXU rounds, it rounds to bfloat16, as the reference does; nothing is rounded in between.
"""

from functools import reduce

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import dropout as drop
from kernels.attention import rows
from kernels.attention.heads import round_up
from kernels.device import LANES, SUBLANES, Device
from kernels.launch import Launch, call
from kernels.layer_norm.tpu import normalise, normalise_back

F32 = jnp.float32
PIECE = 64  # rows normalised at a time
COLUMNS = 256  # of a weight in one product
SPILLS = 3 * 2**20  # VMEM left to the compiler


def product(a, b, dtype):
    """a @ b in float32; where the arrays are bfloat16, in one pass of the MXU, which rounds the operands by itself."""
    precision = lax.Precision.DEFAULT if dtype == jnp.bfloat16 else None
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=F32)


def parts(total: int, size: int = COLUMNS) -> list[slice]:
    """0 .. total in slices of `size` and a shorter last one."""
    return [slice(c, min(c + size, total)) for c in range(0, total, size)]


def together(combine, values):
    """The values combined two by two, in order; nothing else is added, as `sum` would."""
    return reduce(combine, values)


def undrop(value, scalars, row, rate: float):
    """Dropout of [rows, D] float32 whose int32 [rows, 1] global rows, less the first, are `row`."""
    if not rate:
        return value
    column = lax.broadcasted_iota(jnp.int32, (1, value.shape[1]), 1)
    keep = drop.keep(drop.row_hash(scalars[0], scalars[1] + row), column, rate)
    return jnp.where(keep, value * (1.0 / (1.0 - rate)), 0.0)


def _images(t: int, d: int):
    """Block specs of one image of [B, T, D], from image scalars[2] on, of [b, R, D] and of a vector [1, D]."""
    return (
        pl.BlockSpec((1, t, d), lambda i, scalars: (scalars[2] + i, 0, 0)),
        pl.BlockSpec((1, round_up(t, SUBLANES), d), lambda i, _: (i, 0, 0)),
        pl.BlockSpec((1, d), lambda i, _: (0, 0)),
    )


def _cost(b: int, t: int, d: int, arrays: int) -> pl.CostEstimate:
    return pl.CostEstimate(flops=8 * b * t * d, transcendentals=b * t, bytes_accessed=4 * arrays * b * t * d)


def prepare(scalars, x, dy, norm_scale, norm_bias, b: int, *, rate: float, launch: Launch):
    """z = LN(x) and g = dropout(dy) of b images, both [b, R, D] float32 with zeros behind row T."""
    _, t, d = x.shape
    padded = round_up(t, SUBLANES)
    image, wide, vector = _images(t, d)

    def kernel(scalars, x, dy, scale, bias, z, g):
        for a, n in rows.pieces(t, PIECE):
            normal, _ = normalise(rows.widen(x[0, a : a + n]))
            z[0, a : a + n] = normal * scale[...] + bias[...]
            row = pl.program_id(0) * t + rows.token(a, n, x.dtype)
            g[0, a : a + n] = undrop(rows.widen(dy[0, a : a + n]), scalars, row, rate)
        if padded > t:
            z[0, t:] = g[0, t:] = jnp.zeros((padded - t, d), F32)

    return call(
        kernel,
        launch=launch,
        name="attention_prepare_backward",
        grid=(b,),
        in_specs=[image, image, vector, vector],
        out_specs=[wide, wide],
        out_shapes=[((b, padded, d), F32)] * 2,
        semantics=("parallel",),
        cost=_cost(b, t, d, 3),
        prefetch=1,
    )(scalars, x, dy, norm_scale, norm_bias)


def finish(scalars, x, dy, dz, norm_scale, *, residual_scale: float, launch: Launch):
    """dx in the place of dy [B, T, D], for the images of dz [b, R, D], and those of norm_scale and norm_bias [D] float32."""
    b, (_, t, d) = dz.shape[0], x.shape
    image, wide, vector = _images(t, d)

    def kernel(_, x, dy, dz, scale, dx, sums):
        of_scale, of_bias = jnp.zeros((1, d), F32), jnp.zeros((1, d), F32)
        for a, n in rows.pieces(t, PIECE):
            normal, inverse = normalise(rows.widen(x[0, a : a + n]))
            u = dz[0, a : a + n]
            of_scale, of_bias = of_scale + (u * normal).sum(0, keepdims=True), of_bias + u.sum(0, keepdims=True)
            back = normalise_back(u * scale[...], normal, inverse)
            dx[0, a : a + n] = rows.narrow(residual_scale * rows.widen(dy[0, a : a + n]) + back, x.dtype)
        sums[0] = jnp.concatenate([of_scale, of_bias])

    dx, sums = call(
        kernel,
        launch=launch,
        name="attention_finish_backward",
        grid=(b,),
        in_specs=[image, image, wide, vector],
        out_specs=[image, pl.BlockSpec((1, 2, d), lambda i, _: (i, 0, 0))],
        out_shapes=[(x.shape, x.dtype), ((b, 2, d), F32)],
        semantics=("parallel",),
        cost=_cost(b, t, d, 3),
        prefetch=1,
        aliases={2: 0},
    )(scalars, x, dy, dz, norm_scale)
    return dx, *sums.sum(0)


def _tile(total: int, choices, bytes_of, device: Device) -> tuple[int, ...]:
    """The first choice that fits VMEM."""
    found = next((c for c in choices if bytes_of(*c) + SPILLS <= device.vmem_bytes), None)
    if found is None:
        raise NotImplementedError(f"attention half: products of {total} values do not fit the VMEM of a {device.name}")
    return found


def _widths(columns: int) -> list[int]:
    return [c for c in range(columns, 0, -1) if columns % c == 0 and (c == columns or c % LANES == 0)]


def _lengths(total: int) -> list[int]:
    """Rows a step, the preferred first: what divides the rows of the batch, else what wastes little at the end."""
    return [r for r in (640, 512, 384, 256, LANES) if total % r == 0] + [r for r in (512, 256, LANES) if r < total] or [total]


def multiply(arrays, w, bias=None, *, dtype, name: str, launch: Launch):
    """sum_s arrays[s] w[s] (+ bias): arrays of [M, I], w [S, I, J], bias [1, J] -> [M, J], all float32.

    One array a product, not one [S, M, I]: a block of several sections would be as many transfers.
    """
    (m, i), (s, _, j) = arrays[0].shape, w.shape

    def bytes_of(columns, length):
        return 4 * (s * i * columns + 2 * length * (s * i + columns))

    # Weights change seldom and are not prefetched: the room they leave is worth more, since `arrays` are read once a column tile.
    choices = [(c, r) for c in _widths(j) for r in _lengths(m)]
    columns, length = _tile(s * i * j, choices, bytes_of, launch.device)

    def kernel(*refs):
        (*inputs, w), bias, out = (refs[:-1], None, refs[-1]) if bias_spec is None else (refs[:-2], *refs[-2:])
        for part in parts(columns):
            value = together(jnp.add, [product(a[...], w[q, :, part], dtype) for q, a in enumerate(inputs)])
            out[:, part] = value if bias is None else value + bias[:, part]

    bias_spec = None if bias is None else pl.BlockSpec((1, columns), lambda c, r: (0, c))
    weights = pl.BlockSpec((s, i, columns), lambda c, r: (0, 0, c), pipeline_mode=pl.Buffered(1))
    return call(
        kernel,
        launch=launch,
        name=name,
        grid=(j // columns, pl.cdiv(m, length)),
        in_specs=[
            *[pl.BlockSpec((length, i), lambda c, r: (r, 0))] * s,
            weights,
            *([] if bias_spec is None else [bias_spec]),
        ],
        out_specs=[pl.BlockSpec((length, columns), lambda c, r: (r, c))],
        out_shapes=[((m, j), F32)],
        semantics=("parallel", "parallel"),
        cost=pl.CostEstimate(flops=2 * m * i * j * s, transcendentals=0, bytes_accessed=4 * m * (s * i + j)),
    )(*arrays, w, *([] if bias is None else [bias]))[0]


def gradients(a, g, *, dtype, name: str, launch: Launch):
    """dw [I, J] = a^T g and the column sums [1, J] of g: a [M, I], g [M, J], all float32."""
    (m, i), j = a.shape, g.shape[1]
    lengths = _lengths(m)

    def bytes_of(columns, length):
        return 4 * (2 * i * columns + 2 * length * (i + columns) + i * length)

    columns, length = _tile(i * j, [(c, r) for c in _widths(j) for r in lengths], bytes_of, launch.device)

    def kernel(a, g, dw, db, turned):
        @pl.when(pl.program_id(1) == 0)
        def _():
            dw[...] = jnp.zeros_like(dw)
            db[...] = jnp.zeros_like(db)

        def existing(value):
            if m % length == 0:
                return value
            row = pl.program_id(1) * length + lax.broadcasted_iota(jnp.int32, (length, 1), 0)
            return jnp.where(row < m, value, 0.0)

        turned[...] = existing(a[...]).T
        for part in parts(columns):
            value = existing(g[:, part])
            db[:, part] += value.sum(0, keepdims=True)
            dw[:, part] += product(turned[...], value, dtype)

    return call(
        kernel,
        launch=launch,
        name=name,
        grid=(j // columns, pl.cdiv(m, length)),
        in_specs=[
            pl.BlockSpec((length, i), lambda c, r: (r, 0)),
            pl.BlockSpec((length, columns), lambda c, r: (r, c)),
        ],
        out_specs=[pl.BlockSpec((i, columns), lambda c, r: (0, c)), pl.BlockSpec((1, columns), lambda c, r: (0, c))],
        out_shapes=[((i, j), F32), ((1, j), F32)],
        semantics=("parallel", "arbitrary"),
        cost=pl.CostEstimate(flops=2 * m * i * j, transcendentals=0, bytes_accessed=4 * m * (i + j)),
        scratch=[pltpu.VMEM((i, length), F32)],
    )(a, g)
