"""The backward pass of the attention half on float32 rows, for v2 and v3, where float32 feeds the MXU without a pause.

Between the kernels every image has R rows, T rounded up to 8, in the order of `float32_rows.unpacked`; so [B, R, .] is [B R, .]
without a copy, and a product over all rows of the batch pads nothing. Rows behind T hold zeros in z and g, and nothing reads the
others. From x and dy alone, with s = residual_scale:

    z = LN(x),  g = dropout(dy)                                               prepare, of float32_rows.py
    q, k, v = z qkv_kernel + qkv_bias;  do = g out_kernel^T                   product
    dq, dk, dv, o                                                             core
    d out_kernel = o^T g,  d qkv_kernel = z^T dqkv,  sums of g and of dqkv    weight_gradient
    dz = dqkv qkv_kernel^T                                                    product
    dx = s dy + LN'(dz), with the sums for norm_scale and norm_bias           finish, likewise

The forward kernel may have kept q, k, v and o (`Plan.keep`); then they are not made again.
What the MXU rounds, it rounds to bfloat16, as the reference does; nothing is rounded in between. The core: `core_backward.py`.
"""

from functools import partial, reduce
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.float32.core_backward import half_core
from kernels.attention.general.forward import Static
from kernels.attention.plan import Float32Backward
from kernels.attention.tiling import FlatTiles
from kernels.body import F32, dot
from kernels.float32_rows import column_slices, finish, prepare
from kernels.launch import Launch, call
from kernels.stacked import Stacked, section


def product(t: FlatTiles, arrays, w, bias=None, *, dtype, name: str, launch: Launch, by_rows: bool = False, onto=None):
    """sum_s arrays[s] w[s] (+ bias) (+ onto): arrays of [M, I], w [S, I, J], bias [1, J] -> [M, J], all float32. by_rows: w is
    [S, J, I] instead, as it lies, and the MXU's load transposes it. onto: [M, J], in whose place the result is.

    One array a product, not one [S, M, I]: a block of several sections would be as many transfers.
    """
    (m, i), s, j = arrays[0].shape, w.shape[0], w.shape[1 if by_rows else 2]

    def kernel(*refs):
        *refs, out = refs
        *refs, before = refs if onto is not None else (*refs, None)
        (*inputs, w), bias = (refs, None) if bias_spec is None else (refs[:-1], refs[-1])
        for part in column_slices(t.columns):
            if by_rows:
                products = [dot(a[...], w[q, part], dtype, (1, 1)) for q, a in enumerate(inputs)]
            else:
                products = [dot(a[...], w[q, :, part], dtype) for q, a in enumerate(inputs)]
            value = reduce(jnp.add, products if before is None else [before[:, part], *products])
            out[:, part] = value if bias is None else value + bias[:, part]

    bias_spec = None if bias is None else pl.BlockSpec((1, t.columns), lambda c, r: (0, c))
    tile = pl.BlockSpec((t.rows, t.columns), lambda c, r: (r, c))
    rest = [] if onto is None else [onto]
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
            *([] if bias_spec is None else [bias_spec]),
            *[tile for _ in rest],
        ],
        out_specs=[tile],
        out_shapes=[((m, j), F32)],
        semantics=("parallel", "parallel"),
        cost=pl.CostEstimate(flops=2 * m * i * j * s, transcendentals=0, bytes_accessed=4 * m * (s * i + j + len(rest) * j)),
        aliases={s + 1 + (bias is not None): 0} if rest else None,
    )(*arrays, w, *([] if bias is None else [bias]), *rest)[0]


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


# ---- the half


def backward(plan: Float32Backward, scalars, x, weights, dy, static: Static, into, kept=None):
    """dy with dx in its place for plan.images images, from image scalars[2] on, and the gradients of the weights over them.

    weights: as rows and operands, in the order of `AttentionWeights`. into: where the gradient of each belongs, or None; the whole
    array is returned then. kept: q, k, v and o [B, R, K] float32, or qkv [3, B, R, K] and o; of other rows qkv [3, B, T, K] alone.
    """
    norm_scale, norm_bias, w_qkv, b_qkv, w_out, _ = weights
    b, (_, t, d) = plan.images, x.shape
    z, g = prepare(scalars, x, dy, (norm_scale, norm_bias), b, static, "attention_prepare_backward")
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
    *dqkv, o = map(flat, (*half_core(plan.core, qkv, do.reshape(b, padded, k), t, x.dtype, static, with_o=not o), *o))
    dw_out, db_out = gradient(plan.output_weights, o, flat(g), name="attention_output_weights", into=into[4])
    dw_qkv, db_qkv = _projection_gradients(partial(gradient, plan.projection_weights, flat(z)), dqkv, into[2])
    summed = partial(multiply, plan.input_gradient, name="attention_input_gradient", by_rows=True)
    if plan.input_gradient.apart:
        dz = summed(dqkv[:1], section(w_qkv, 0))
        for c in (1, 2):
            dz = summed(dqkv[c : c + 1], section(w_qkv, c), onto=dz)
    else:
        dz = summed(dqkv, w_qkv)
    dz = dz.reshape(b, padded, d)
    dx, dscale, dbias = finish(scalars, x, dy, dz, norm_scale, static, "attention_finish_backward")
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
