"""The forward pass of the attention half on float32 rows in VMEM, for v2 and v3: one kernel, an image a grid step.

    z = LN(x);  q, k, v = z qkv_kernel + qkv_bias;  o = softmax(q k^T / sqrt(H)) v;  out = s x + dropout(o out_kernel + s out_bias)

with s = residual_scale. It is for cores whose VMEM holds the weights and one image's projections. All of it is one straight line of
code, so that the compiler may fill the latencies of one product with another. What makes it fast:
- Everything in VMEM is float32. A store that packs bfloat16 halts the MXU between products: projecting 200 rows takes 13.8k cycles
  into bfloat16 and 11.1k into float32, of 10.8k that the MXU needs. x and out change their dtype by integer arithmetic (body.py).
- An image is R rows, T rounded up to 8, in the order of `float32_rows.unpacked`: products, LN and softmax do not depend on it.
  Keys are padded once more to whole columns of lanes. With everything in whole registers there is one mask: the logits of keys that
  do not exist.
- A head is multiplied in the whole 128-lane columns that it touches, and what it contributes is masked to its own lanes. The keys
  are transposed once for the heads that share their columns. Rows of keys are whole, and every head of a step is unrolled.

`core` is attention by itself on the same rows, where the fused kernel does not fit.
"""

import math
from functools import reduce

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.general.core import core_cost
from kernels.attention.general.forward import Static
from kernels.attention.tiling import Float32Core, Head, heads_of
from kernels.body import F32, dot
from kernels.device import LANES, SUBLANES
from kernels.float32_rows import PIECE, column_slices, drop, packed, pieces, token, token_at, unpacked
from kernels.launch import Launch, call
from kernels.layer_norm.tpu import normalise
from kernels.vmem import round_up


def pad_rows(value, size: int):
    """Zero rows behind value [rows, columns], up to `size` rows."""
    missing = size - value.shape[0]
    return jnp.concatenate([value, jnp.zeros((missing, value.shape[1]), F32)]) if missing else value


# ---- softmax attention


class ByColumns:
    """Arrays of the columns of a head, made once for the heads that touch the same columns."""

    def __init__(self, make):
        self.make, self.found = make, {}

    def __getitem__(self, head: Head):
        columns = head.lo, head.hi
        if columns not in self.found:
            self.found[columns] = self.make(slice(*columns))
        return self.found[columns]


def own_rows(value, head: Head):
    """value [columns of the head, n] with zeros in the rows that are not the head's own."""
    before, own, after = head.first - head.lo, slice(head.first - head.lo, head.last - head.lo), head.hi - head.last
    rows = [jnp.zeros((before, value.shape[1]), F32), value[own], jnp.zeros((after, value.shape[1]), F32)]
    return jnp.concatenate([part for part in rows if part.shape[0]])


def gather(found: dict, head: Head, value):
    """Puts the head's own lanes of `value` into the columns it touches; lanes that no head has had yet hold anything."""
    for lo, hi in head.columns():
        part = value[:, lo - head.lo : hi - head.lo]
        if (lo, hi) in found and (head.first > lo or head.last < hi):
            lane = lo + lax.broadcasted_iota(jnp.int32, (1, hi - lo), 1)
            part = jnp.where((lane >= head.first) & (lane < head.last), part, found[lo, hi])
        found[lo, hi] = part


def attend(run: list[Head], q, k, v, into, *, t: int, tokens: int, factor: float, dtype) -> None:
    """Writes what a run of heads attends to into its columns: q, k, into [R, K], v [S, K] refs, zeros in v behind R; into may be q.
    tokens: of the t rows, the first ones.

    2**(factor q k) are the probabilities before they are divided by their sum.
    """
    keys = v.shape[0]
    by_rows = ByColumns(lambda columns: pad_rows(k[:, columns], keys))
    sums: dict = {}
    for head in run:
        columns = slice(head.lo, head.hi)
        queries, own = q[:, columns], head.mask(by_rows[head])
        s = [dot(queries, own[c : c + LANES], dtype, (1, 1)) for c in range(0, keys, LANES)]
        if tokens < keys:
            lane = keys - LANES + lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
            s[-1] = jnp.where(token_at(lane, t, dtype) < tokens, s[-1], -jnp.inf)
        top = reduce(jnp.maximum, s).max(1, keepdims=True)
        p = [jnp.exp2((tile - top) * factor) for tile in s]
        norm = reduce(jnp.add, p).sum(1, keepdims=True)
        o = reduce(jnp.add, [dot(tile, v[c * LANES : (c + 1) * LANES, columns], dtype) for c, tile in enumerate(p)])
        gather(sums, head, o * (1.0 / norm))
    for (lo, hi), value in sums.items():
        into[:, lo:hi] = value


# ---- the fused kernel


class _Kept:
    """q, k, v and o of an image on their way from scratch memory to HBM [B, R, K]."""

    def __init__(self, hbm, semaphores, q, k, v, o):
        self.hbm, self.semaphores, self.image, rows = hbm, semaphores, pl.program_id(0), q.shape[0]
        self.sources = q, k, v.at[pl.ds(0, rows)], o

    def _copy(self, n: int):
        return pltpu.make_async_copy(self.sources[n], self.hbm[n].at[self.image], self.semaphores.at[n])

    def send(self, *numbers: int):
        for n in numbers:
            self._copy(n).start()

    def wait(self, *numbers: int):
        for n in numbers:
            self._copy(n).wait()


def _fused_kernel(refs, static: Static, factor: float):
    """refs: scalars, then x, norm scale and bias, the four weights, out; scratch z [R, D], q, k [R, K], v [S, K]. If they are
    kept, q, k, v and o follow out, in HBM, and semaphores the scratch."""
    scalars, x, scale, bias, w_qkv, b_qkv, w_out, b_out, out, *refs = refs
    (z, q, k, v), kept = refs[-5:-1] if static.plan.keep else refs, None
    if static.plan.keep:
        kept = _Kept(refs[:4], refs[-1], q, k, v, z)
    # q is on its way to HBM while the heads attend; a wait for it among them spills half a megabyte more than v3 has
    o, result = (z, k) if kept else (q, z)
    (_, t, d), dtype, lanes = x.shape, x.dtype, w_out.shape[0]
    tokens = static.tokens or t
    padded, keys = z.shape[0], v.shape[0]
    runs = heads_of(lanes, lanes // static.num_heads)
    for a, n in pieces(t, PIECE):
        normal, _ = normalise(unpacked(x[0, a : a + n]), static.eps)
        z[a : a + n] = normal * scale[...] + bias[...]
    if padded > t:
        z[t:] = jnp.zeros((padded - t, d), F32)
    if keys > padded:
        v[padded:] = jnp.zeros((keys - padded, lanes), F32)

    def project(section: int, target, run):
        columns = slice(run[0].lo, run[-1].hi)
        for part in column_slices(columns.stop - columns.start):
            at = slice(columns.start + part.start, columns.start + part.stop)
            target[:padded, at] = dot(z[...], w_qkv[section, :, at], dtype) + b_qkv[section, :, at]

    for run in runs:
        for section, target in enumerate((q, k, v)):
            project(section, target, run)
    if kept:
        kept.send(0, 1, 2)
    for run in runs:
        attend(run, q, k, v, o, t=t, tokens=tokens, factor=factor, dtype=dtype)
    if kept:
        kept.send(3)
        kept.wait(0, 1, 2)

    for part in column_slices(d):
        result[:, part] = dot(o[...], w_out[:, part], dtype) + static.residual_scale * b_out[:, part]
    for a, n in pieces(t, PIECE):
        row = pl.program_id(0) * tokens + token(a, n, dtype)
        y = drop(result[a : a + n], scalars, row, static.rate)
        out[0, a : a + n] = packed(static.residual_scale * unpacked(x[0, a : a + n]) + y, dtype)
    if kept:
        kept.wait(3)


def fused(scalars, x, norm, w_qkv, b_qkv, w_out, b_out, static: Static):
    """The half block of x [B, T, D]; norm: scale and bias [1, D]; weights as operands. scalars: dropout key and first row.

    Returns (out, *(q, k, v, o if static.plan.keep)), these float32 [B, R, K].
    """
    keep = static.plan.keep
    b, t, d = x.shape
    k = w_out.shape[0]
    padded, keys = round_up(t, SUBLANES), round_up(t, LANES)
    factor = static.width**-0.5 * math.log2(math.e)

    def whole(*block):
        return pl.BlockSpec(block, lambda i, _: (0,) * len(block), pipeline_mode=pl.Buffered(1))

    image = pl.BlockSpec((1, t, d), lambda i, _: (i, 0, 0))
    return call(
        lambda *refs: _fused_kernel(refs, static, factor),
        launch=static.launch,
        name="attention_forward",
        grid=(b,),
        in_specs=[image, whole(1, d), whole(1, d), whole(3, d, k), whole(3, 1, k), whole(k, d), whole(1, d)],
        out_specs=[image, *[pl.BlockSpec(memory_space=pl.ANY)] * (4 * keep)],
        out_shapes=[(x.shape, x.dtype), *[((b, padded, k), F32)] * (4 * keep)],
        semantics=("parallel",),
        cost=pl.CostEstimate(
            flops=2 * b * t * (4 * d + 2 * t) * k,
            transcendentals=b * static.num_heads * t * t,
            bytes_accessed=2 * b * t * d * x.dtype.itemsize + 16 * d * k + 16 * b * padded * k * keep,
        ),
        scratch=[
            pltpu.VMEM((padded, d), F32),
            *[pltpu.VMEM((r, k), F32) for r in (padded, padded, keys)],
            *[pltpu.SemaphoreType.DMA((4,))] * keep,
        ],
        prefetch=1,
    )(scalars, x, *norm, w_qkv, b_qkv, w_out, b_out)


# ---- attention by itself


def unpack_into(target, ref, t: int) -> None:
    """Rows [T, lanes] of an array into float32 scratch, zeros behind them."""
    for a, n in pieces(t, PIECE):
        target[a : a + n] = unpacked(ref[a : a + n])
    if t < target.shape[0]:
        target[t:] = jnp.zeros((target.shape[0] - t, target.shape[1]), F32)


def pack_into(ref, source, t: int) -> None:
    """The reverse of `unpack_into`."""
    for a, n in pieces(t, PIECE):
        ref[a : a + n] = packed(source[a : a + n], ref.dtype)


def core(tiles: Float32Core, qkv, *, num_heads: int, width: int, launch: Launch, tokens: int | None = None):
    """o [B, T, K] of qkv [3, B, T, K] in any float dtype, float32 in VMEM; width: of a head, whose lanes may be padded. tokens: of
    the T rows; the others are no keys."""
    _, b, t, k = qkv.shape
    lanes, factor = tiles.lanes, width**-0.5 * math.log2(math.e)
    padded, keys = round_up(t, SUBLANES), round_up(t, LANES)

    def kernel(q_ref, k_ref, v_ref, out, q, k_rows, v):
        for ref, target in ((q_ref, q), (k_ref, k_rows), (v_ref, v)):
            unpack_into(target, ref.at[0, 0], t)
        for run in heads_of(lanes, k // num_heads):
            attend(run, q, k_rows, v, q, t=t, tokens=tokens or t, factor=factor, dtype=qkv.dtype)
        pack_into(out.at[0], q, t)

    return call(
        kernel,
        launch=launch,
        name="attention_core_forward",
        grid=(b, k // lanes),
        in_specs=[pl.BlockSpec((1, 1, t, lanes), lambda i, g, c=c: (c, i, 0, g)) for c in range(3)],
        out_specs=[pl.BlockSpec((1, t, lanes), lambda i, g: (i, 0, g))],
        out_shapes=[((b, t, k), qkv.dtype)],
        semantics=("parallel", "parallel"),
        cost=core_cost(b, t, k, num_heads, qkv.dtype.itemsize, backward=False),
        scratch=[pltpu.VMEM((r, lanes), F32) for r in (padded, padded, keys)],
    )(qkv, qkv, qkv)[0]
