"""The backward pass of the attention half on float32 rows, for v2 and v3, where float32 feeds the MXU without a pause.

Between the kernels every image has R rows, T rounded up to 8, in the order of `float32_forward.unpacked`; so [B, R, .] is [B R, .]
without a copy, and a product over all rows of the batch pads nothing. Rows behind T hold zeros in z and g, and nothing reads the
others. From x and dy alone, with s = residual_scale:

    z = LN(x),  g = dropout(dy)                                               prepare
    q, k, v = z qkv_kernel + qkv_bias;  do = g out_kernel^T                   product
    dq, dk, dv, o                                                             core
    d out_kernel = o^T g,  d qkv_kernel = z^T dqkv,  sums of g and of dqkv    weight_gradient
    dz = dqkv qkv_kernel^T                                                    product
    dx = s dy + LN'(dz), with the sums for norm_scale and norm_bias           finish

The forward kernel may have kept q, k, v and o (`Plan.keep`); then they are not made again.
What the MXU rounds, it rounds to bfloat16, as the reference does; nothing is rounded in between. The core works on transposed
logits, as in `general/core_backward.py`.
"""

import math
from functools import partial, reduce
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.float32.forward import (
    PIECE,
    ByColumns,
    column_slices,
    drop,
    gather,
    pack_into,
    packed,
    pad_rows,
    pieces,
    token,
    token_at,
    unpack_into,
    unpacked,
)
from kernels.attention.general.core import core_cost
from kernels.attention.general.forward import Static
from kernels.attention.plan import Float32Backward
from kernels.attention.tiling import FlatTiles, Float32Core, heads_of
from kernels.body import F32, PACKED_ROWS, dot, staggered
from kernels.device import LANES, SUBLANES
from kernels.launch import Launch, call
from kernels.layer_norm.tpu import normalise, normalise_back
from kernels.stacked import Stacked, section
from kernels.vmem import round_up


def _images(b: int, t: int, d: int, static: Static):
    """`call` for a kernel that takes b images one by one, and block specs of one image of [B, T, D], from image scalars[2] on, of
    [b, R, D] and of a vector [1, D]."""
    cost = pl.CostEstimate(flops=8 * b * t * d, transcendentals=b * t, bytes_accessed=12 * b * t * d)
    return (
        partial(call, launch=static.launch, grid=(b,), semantics=("parallel",), cost=cost, prefetch=1),
        pl.BlockSpec((1, t, d), lambda i, scalars: (scalars[2] + i, 0, 0)),
        pl.BlockSpec((1, round_up(t, SUBLANES), d), lambda i, _: (i, 0, 0)),
        pl.BlockSpec((1, d), lambda i, _: (0, 0)),
    )


def prepare(scalars, x, dy, norm, b: int, static: Static):
    """z = LN(x) and g = dropout(dy) of b images, both [b, R, D] float32 with zeros behind row T."""
    _, t, d = x.shape
    padded = round_up(t, SUBLANES)
    launch, image, rows, vector = _images(b, t, d, static)

    def kernel(scalars, x, dy, scale, bias, z, g):
        for a, n in pieces(t, PIECE):
            normal, _ = normalise(unpacked(x[0, a : a + n]), static.eps)
            z[0, a : a + n] = normal * scale[...] + bias[...]
            row = pl.program_id(0) * (static.tokens or t) + token(a, n, x.dtype)
            g[0, a : a + n] = drop(unpacked(dy[0, a : a + n]), scalars, row, static.rate)
        if padded > t:
            z[0, t:] = g[0, t:] = jnp.zeros((padded - t, d), F32)

    return launch(
        kernel,
        name="attention_prepare_backward",
        in_specs=[image, image, vector, vector],
        out_specs=[rows, rows],
        out_shapes=[((b, padded, d), F32)] * 2,
    )(scalars, x, dy, *norm)


def finish(scalars, x, dy, dz, norm_scale, static: Static):
    """dx in the place of dy [B, T, D], for the images of dz [b, R, D], and those of norm_scale and norm_bias [D] float32."""
    b, (_, t, d) = dz.shape[0], x.shape
    launch, image, rows, vector = _images(b, t, d, static)

    def kernel(_, x, dy, dz, scale, dx, sums):
        of_scale, of_bias = jnp.zeros((1, d), F32), jnp.zeros((1, d), F32)
        for a, n in pieces(t, PIECE):
            normal, inverse = normalise(unpacked(x[0, a : a + n]), static.eps)
            u = dz[0, a : a + n]
            of_scale, of_bias = of_scale + (u * normal).sum(0, keepdims=True), of_bias + u.sum(0, keepdims=True)
            back = normalise_back(u * scale[...], normal, inverse)
            dx[0, a : a + n] = packed(static.residual_scale * unpacked(dy[0, a : a + n]) + back, x.dtype)
        sums[0] = jnp.concatenate([of_scale, of_bias])

    dx, sums = launch(
        kernel,
        name="attention_finish_backward",
        in_specs=[image, image, rows, vector],
        out_specs=[image, pl.BlockSpec((1, 2, d), lambda i, _: (i, 0, 0))],
        out_shapes=[(x.shape, x.dtype), ((b, 2, d), F32)],
        aliases={2: 0},
    )(scalars, x, dy, dz, norm_scale)
    return dx, *sums.sum(0)


def product(t: FlatTiles, arrays, w, bias=None, *, dtype, name: str, launch: Launch, by_rows: bool = False):
    """sum_s arrays[s] w[s] (+ bias): arrays of [M, I], w [S, I, J], bias [1, J] -> [M, J], all float32. by_rows: w is [S, J, I]
    instead, as it lies, and the MXU's load transposes it.

    One array a product, not one [S, M, I]: a block of several sections would be as many transfers.
    """
    (m, i), s, j = arrays[0].shape, w.shape[0], w.shape[1 if by_rows else 2]

    def kernel(*refs):
        inputs, w, biases, out = refs[:s], refs[s], refs[s + 1 : -1], refs[-1]
        for part in column_slices(t.columns):
            if by_rows:
                products = [dot(a[...], w[q, part], dtype, (1, 1)) for q, a in enumerate(inputs)]
            else:
                products = [dot(a[...], w[q, :, part], dtype) for q, a in enumerate(inputs)]
            out[:, part] = reduce(jnp.add, [*products, *(bias[:, part] for bias in biases)])

    biases = [] if bias is None else [bias]
    return call(
        kernel,
        launch=launch,
        name=name,
        grid=(j // t.columns, pl.cdiv(m, t.rows)),
        in_specs=[
            *[pl.BlockSpec((t.rows, i), lambda c, r: (r, 0))] * s,
            pl.BlockSpec((s, t.columns, i), lambda c, r: (0, c, 0), pipeline_mode=pl.Buffered(1))
            if by_rows
            else pl.BlockSpec((s, i, t.columns), lambda c, r: (0, 0, c), pipeline_mode=pl.Buffered(1)),
            *[pl.BlockSpec((1, t.columns), lambda c, r: (0, c))] * len(biases),
        ],
        out_specs=[pl.BlockSpec((t.rows, t.columns), lambda c, r: (r, c))],
        out_shapes=[((m, j), F32)],
        semantics=("parallel", "parallel"),
        cost=pl.CostEstimate(flops=2 * m * i * j * s, transcendentals=0, bytes_accessed=4 * m * (s * i + j)),
    )(*arrays, w, *biases)[0]


def weight_gradient(t: FlatTiles, a, g, *, dtype, name: str, launch: Launch, into=None):
    """dw [I, J] = a^T g and the column sums [1, J] of g: a [M, I], g [M, J], all float32. into: where dw belongs, a `Stacked`;
    returned is its whole array then."""
    (m, i), j = a.shape, g.shape[1]

    def kernel(a, g, dw, db, transposed):
        @pl.when(pl.program_id(1) == 0)
        def _():
            dw[...] = jnp.zeros_like(dw)
            db[...] = jnp.zeros_like(db)

        def existing(value):
            if m % t.rows == 0:
                return value
            row = pl.program_id(1) * t.rows + lax.broadcasted_iota(jnp.int32, (t.rows, 1), 0)
            return jnp.where(row < m, value, 0.0)

        transposed[...] = existing(a[...]).T
        for part in column_slices(t.columns):
            value = existing(g[:, part])
            db[:, part] += value.sum(0, keepdims=True)
            dw[:, part] += dot(transposed[...], value, dtype)

    return call(
        kernel,
        launch=launch,
        name=name,
        grid=(j // t.columns, pl.cdiv(m, t.rows)),
        in_specs=[
            pl.BlockSpec((t.rows, i), lambda c, r: (r, 0)),
            pl.BlockSpec((t.rows, t.columns), lambda c, r: (r, c)),
        ],
        out_specs=[pl.BlockSpec((i, t.columns), lambda c, r: (0, c)), pl.BlockSpec((1, t.columns), lambda c, r: (0, c))],
        out_shapes=[into or ((i, j), F32), ((1, j), F32)],
        semantics=("parallel", "arbitrary"),
        cost=pl.CostEstimate(flops=2 * m * i * j, transcendentals=0, bytes_accessed=4 * m * (i + j)),
        scratch=[pltpu.VMEM((i, t.rows), F32)],
    )(a, g)


# ---- the core


def _differentiate(lanes: int, width: int, lags, arrays, out, *, t: int, tokens: int, scale: float, dtype) -> None:
    """From q, k, v, do to dq, dk, dv (and o, with a fourth ref in `out`) of all heads; refs [R, lanes], do zero behind T.
    width: of a head. tokens: of the t rows, the first ones. lags: of `Float32Core`."""
    q, k, v, do = arrays
    rows = q.shape[0]
    # rows of keys that are all tokens, in whatever order the rows of their tile are
    keys, whole = round_up(rows, LANES), min(tokens // PACKED_ROWS * PACKED_ROWS if t > tokens else t // SUBLANES * SUBLANES, rows)
    queries, outputs = (ByColumns(lambda c, ref=ref: pad_rows(ref[:, c], keys)) for ref in (q, do))
    transposed_q, transposed_do = (ByColumns(lambda c, ref=ref: pad_rows(ref[:, c], keys).T) for ref in (q, do))
    sums: list[dict] = [{} for _ in out]
    heads, made = [head for run in heads_of(lanes, width) for head in run], {}

    def logits(n):
        head = heads[n]
        columns = slice(head.lo, head.hi)
        key, value = k[:, columns], v[:, columns]
        s, dp = dot(head.mask(key), transposed_q[head], dtype), dot(head.mask(value), transposed_do[head], dtype)
        made[n] = key, value, s, dp

    def softmax(n):
        key, value, s, dp = made[n]
        if whole < rows:
            row = whole + lax.broadcasted_iota(jnp.int32, (rows - whole, 1), 0)
            last = jnp.where(token_at(row, t, dtype) < tokens, s[whole:], -jnp.inf)
            s = jnp.concatenate([s[:whole], last]) if whole else last
        p = jnp.exp2((s - s.max(0, keepdims=True)) * (scale * math.log2(math.e)))
        p = p * (1.0 / p.sum(0, keepdims=True))
        made[n] = key, value, p, p * (dp - (p * dp).sum(0, keepdims=True))

    def gradients(n):
        head, (key, value, p, ds) = heads[n], made.pop(n)
        dk, dv = dot(ds, queries[head], dtype) * scale, dot(p, outputs[head], dtype)
        dq = dot(pad_rows(ds, keys).T[:rows], pad_rows(key, keys), dtype) * scale
        found = [dq, dk, dv]
        if len(out) == 4:
            found.append(dot(pad_rows(p, keys).T[:rows], pad_rows(value, keys), dtype))
        following = heads[n + 1].lo if n + 1 < len(heads) else lanes
        for ref, total, part in zip(out, sums, found, strict=True):
            gather(total, head, part)
            for lo, hi in [column for column in total if column[1] <= following]:
                ref[:, lo:hi] = total.pop((lo, hi))

    staggered(len(heads), (logits, softmax, gradients), lags)


def _half_core(tiles: Float32Core, qkv, do, t: int, dtype, static: Static, *, with_o: bool):
    """dq, dk, dv (and o) of do and q, k, v, all [B, R, K] float32; the first t rows are tokens, and do is zero behind them. qkv may
    be one array [3, B, R, K], or [3, B, T, K] of any float dtype, whose rows become float32 in VMEM."""
    b, padded, k = do.shape
    lanes, n, one = tiles.lanes, static.num_heads, not isinstance(qkv, (list, tuple))
    packed_rows = one and (qkv.dtype, qkv.shape[2]) != (F32, padded)

    def kernel(*refs):
        given = [ref.at[0, 0] if len(ref.shape) == 4 and not packed_rows else ref.at[0] for ref in refs[:4]]
        out = [ref.at[0] for ref in refs[4 : 4 + results]]
        if packed_rows:
            for ref, target in zip(given[:3], refs[4 + results :], strict=True):
                unpack_into(target, ref.at[0], t)
            given[:3] = refs[4 + results :]
        _differentiate(lanes, k // n, tiles.lags, given, out, t=t, tokens=static.tokens or t, scale=static.width**-0.5, dtype=dtype)

    rows = pl.BlockSpec((1, padded, lanes), lambda i, g: (i, 0, g))
    sections = [pl.BlockSpec((1, 1, t if packed_rows else padded, lanes), lambda i, g, c=c: (c, i, 0, g)) for c in range(3)]
    results = 3 + with_o
    flops, exponentials = 2 * (5 + with_o) * b * t * t * k, b * n * t * t
    return call(
        kernel,
        launch=static.launch,
        name="attention_core_backward",
        grid=(b, k // lanes),
        in_specs=[*(sections if one else [rows] * 3), rows],
        out_specs=[rows] * results,
        out_shapes=[((b, padded, k), F32)] * results,
        semantics=("parallel", "parallel"),
        cost=pl.CostEstimate(flops=flops, transcendentals=exponentials, bytes_accessed=4 * (4 + results) * b * padded * k),
        scratch=[pltpu.VMEM((padded, lanes), F32)] * (3 * packed_rows),
    )(*((qkv,) * 3 if one else qkv), do)


def core(tiles: Float32Core, qkv, do, *, num_heads: int, width: int, launch: Launch):
    """dqkv of qkv [3, B, T, K] and do [B, T, K]: attention by itself, arrays of any float dtype, float32 in VMEM."""
    _, b, t, k = qkv.shape
    lanes, padded = tiles.lanes, round_up(t, SUBLANES)

    def kernel(q_ref, k_ref, v_ref, do_ref, out, *scratch):
        arrays, found = scratch[:4], scratch[4:]
        for ref, target in zip((q_ref.at[0, 0], k_ref.at[0, 0], v_ref.at[0, 0], do_ref.at[0]), arrays, strict=True):
            unpack_into(target, ref, t)
        _differentiate(lanes, k // num_heads, tiles.lags, arrays, found, t=t, tokens=t, scale=width**-0.5, dtype=qkv.dtype)
        for c, source in enumerate(found):
            pack_into(out.at[c, 0], source, t)

    section = [pl.BlockSpec((1, 1, t, lanes), lambda i, g, c=c: (c, i, 0, g)) for c in range(3)]
    return call(
        kernel,
        launch=launch,
        name="attention_core_backward",
        grid=(b, k // lanes),
        in_specs=[*section, pl.BlockSpec((1, t, lanes), lambda i, g: (i, 0, g))],
        out_specs=[pl.BlockSpec((3, 1, t, lanes), lambda i, g: (0, i, 0, g))],
        out_shapes=[(qkv.shape, qkv.dtype)],
        semantics=("parallel", "parallel"),
        cost=core_cost(b, t, k, num_heads, qkv.dtype.itemsize, backward=True),
        scratch=[pltpu.VMEM((padded, lanes), F32)] * 7,
    )(qkv, qkv, qkv, do)[0]


# ---- the half


def backward(plan: Float32Backward, scalars, x, weights, dy, static: Static, into, kept=None):
    """dy with dx in its place for plan.images images, from image scalars[2] on, and the gradients of the weights over them.

    weights: as rows and operands, in the order of `AttentionWeights`. into: where the gradient of each belongs, or None; the whole
    array is returned then. kept: q, k, v and o [B, R, K] float32, or qkv [3, B, R, K] and o; of other rows qkv [3, B, T, K] alone.
    """
    norm_scale, norm_bias, w_qkv, b_qkv, w_out, _ = weights
    b, (_, t, d) = plan.images, x.shape
    z, g = prepare(scalars, x, dy, (norm_scale, norm_bias), b, static)
    padded, k = z.shape[1], w_out.shape[0]

    def flat(value) -> Any:
        return value.reshape(b * padded, value.shape[-1])

    multiply: Any = partial(product, dtype=x.dtype, launch=static.launch)
    gradient: Any = partial(weight_gradient, dtype=x.dtype, launch=static.launch)
    if kept is None:
        made = (multiply(plan.project, [flat(z)], section(w_qkv, c), b_qkv[c], name="attention_project") for c in range(3))
        qkv = [a.reshape(b, padded, k) for a in made]
    else:
        qkv = kept[:3] if len(kept) == 4 else kept[0]
    do = multiply(plan.output_gradient, [flat(g)], section(w_out, None), name="attention_output_gradient", by_rows=True)
    o = () if kept is None or len(kept) == 1 else kept[-1:]
    *dqkv, o = map(flat, (*_half_core(plan.core, qkv, do.reshape(b, padded, k), t, x.dtype, static, with_o=not o), *o))
    dw_out, db_out = gradient(plan.output_weights, o, flat(g), name="attention_output_weights", into=into[4])
    dw_qkv, db_qkv = _projection_gradients(partial(gradient, plan.projection_weights, flat(z)), dqkv, into[2])
    dz = multiply(plan.input_gradient, dqkv, w_qkv, name="attention_input_gradient", by_rows=True)
    dx, dscale, dbias = finish(scalars, x, dy, dz.reshape(b, padded, d), norm_scale, static)
    return dx, (dscale[None], dbias[None], dw_qkv, jnp.stack(db_qkv), dw_out, static.residual_scale * db_out)


def _projection_gradients(gradient, dqkv, into: Stacked | None):
    """(dw [3, D, K], or the whole array into which it was written, [db [1, K]] * 3) of gradient(dq, ...), one section at a time."""
    weights, biases = [], []
    for c, g in enumerate(dqkv):
        place = None if into is None else into._replace(at=jnp.append(into.at, jnp.int32(c)))
        dw, db = gradient(g, name="attention_projection_weights", into=place)
        into = None if into is None else into._replace(array=dw)
        weights.append(dw)
        biases.append(db)
    return (jnp.stack(weights) if into is None else into.array), biases
