"""The gradient of softmax attention itself, between the products of `backward.py`.

The core recomputes the probabilities p (Dao et al. 2022) and works on the transpose, logits' = k q^T, so that the sums of the
softmax run over sublanes and only dq and o need a transposed product:

    dv = p' do,  dp' = v do^T,  ds' = p' * (dp' - sum_s(p' * dp')),  dk = ds' q / sqrt(H),  dq = ds'^T k / sqrt(H)

Its grid step holds whole images; or, for tokens too many for that (`streamed` tiles), the tiles of queries are the innermost
dimension of the grid, and a group of heads' keys, values and their gradients stay in VMEM while it runs. Everything between the
products is float32; their operands are rounded to the dtype of the arrays, where the reference rounds them too. HBM traffic of the
core: 8 arrays of B * T * K.
"""

import math
from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.general.core import Sums, core_cost
from kernels.attention.tiling import CoreTiles, heads_of
from kernels.body import F32, cast_dot, operand, over_chunks, staggered, sweep
from kernels.device import Device
from kernels.launch import Launch, call


class _Core:
    """The body of the core: one grid step. Refs [images, rows, lanes]; the rows of q, do, dq and o are one tile where tiles are
    streamed; o may be None. scratch: float32 sums of dk and dv, where several tiles of queries or chunks of keys add to them."""

    def __init__(self, inputs, outputs, scratch, t: CoreTiles, h: int, scale: float, device: Device, tokens: int | None):
        self.q, self.k, self.v, self.do = inputs
        self.dq, self.dk, self.dv, self.o = outputs
        self.scratch, self.t, self.h, self.scale, self.device = scratch, t, h, scale, device
        self.images, self.total, self.lanes = self.k.shape
        self.tokens = tokens or self.total
        self.dtype, self.factor = self.do.dtype, scale * math.log2(math.e)

    def run(self):
        if self.t.lags:
            sweep(self.images, self.t.turns, lambda first, _: self.interleaved(first))
        else:
            sweep(self.images, 1, lambda i, _: self.image(i))

    def image(self, i):
        begins = (pl.program_id(2) == 0) if self.t.streamed else True
        ends = (pl.program_id(2) == pl.num_programs(2) - 1) if self.t.streamed else True

        @pl.when(begins)
        def _():
            for ref in self.scratch:
                ref[...] = jnp.zeros_like(ref)

        for run in heads_of(self.lanes, self.h):
            dks, dvs = Sums(), Sums()
            tile = partial(self.tile, i, run, partial(self.emit, dks, dvs))
            if self.t.streamed:
                tile(0, self.t.queries)
            else:
                sweep(self.total, self.t.queries, tile)
            for ref, sums in ((self.dk, dks), (self.dv, dvs)):
                sums.store(ref, (i, slice(None)), self.dtype)

        @pl.when(ends)
        def _():
            for ref, source in zip((self.dk, self.dv), self.scratch, strict=False):
                ref[i] = source[...].astype(self.dtype)

    def emit(self, dks, dvs, head, start, size, dk, dv):
        """Adds dk and dv of a chunk of keys to the sums over tiles of queries and heads of a column."""
        if self.scratch:
            self.scratch[0][pl.ds(start, size), head.lo : head.hi] += dk
            self.scratch[1][pl.ds(start, size), head.lo : head.hi] += dv
        else:
            dks.add(head, dk)
            dvs.add(head, dv)

    def tile(self, i, run, emit, start, size):
        """A tile of queries with all heads of a run."""
        dqs, os, shared, rows = Sums(), Sums(), {}, pl.ds(start, size)
        for head in run:
            columns = slice(head.lo, head.hi)
            q = operand(self.existing(head.mask(self.q[i, rows, columns])), self.dtype, self.device)
            do = operand(self.existing(head.mask(self.do[i, rows, columns])), self.dtype, self.device)
            dq, o = (self.whole if self.t.keys == self.total else self.online)(i, head, q, do, emit, shared)
            dqs.add(head, head.mask(dq))
            os.add(head, head.mask(o))
        for ref, sums in ((self.dq, dqs), (self.o, os)):
            if ref is not None:
                sums.store(ref, (i, rows), self.dtype)

    def existing(self, value):
        """Queries of a streamed tile, zero behind the last token: what they add to dk and dv is then zero."""
        if not self.t.streamed or self.total % self.t.queries == 0:
            return value
        row = pl.program_id(2) * self.t.queries + lax.broadcasted_iota(jnp.int32, (self.t.queries, 1), 0)
        return jnp.where(row < self.total, value, 0.0)

    def products(self, i, head, q, do, start, size, shared):
        """Transposed logits and their gradient before the softmax [S, Tq] of one chunk of keys, the keys and the values."""
        keys = pl.ds(start, size)
        k, v = self.k[i, keys, head.lo : head.hi], self.v[i, keys, head.lo : head.hi]
        if not self.device.bf16_matmul and size == self.total:  # cast once for the heads of a column
            k, v = shared.setdefault((head.lo, head.hi), (k.astype(F32), v.astype(F32)))
        s = cast_dot(k, q, self.device, contract=(1, 1))
        if self.tokens < self.total:
            s = jnp.where(start + lax.broadcasted_iota(jnp.int32, (size, 1), 0) < self.tokens, s, -jnp.inf)
        return s, cast_dot(v, do, self.device, contract=(1, 1)), k, v

    def softmax(self, s):
        """Of whole transposed rows."""
        p = jnp.exp2((s - s.max(0, keepdims=True)) * self.factor)
        return p * (1.0 / p.sum(0, keepdims=True))

    def gradients(self, p, ds, q, do, k, v):
        """dk, dv [S, columns], and dq, o [Tq, columns] of one chunk of keys."""
        dq = cast_dot(ds, k, self.device, contract=(0, 0)) * self.scale
        o = dq if self.o is None else cast_dot(p, v, self.device, contract=(0, 0))
        return cast_dot(ds, q, self.device) * self.scale, cast_dot(p, do, self.device), dq, o

    def interleaved(self, first):
        """All heads of `turns` images, whole rows of keys: the logits of one head are made before the softmax of the one before it,
        so that the MXU works on them meanwhile. In the order of `whole` the two wait for each other, head by head."""
        heads = [head for run in heads_of(self.lanes, self.h) for head in run]
        borders = [*[head.lo for head in heads[1:]], self.lanes]
        refs = [(ref, Sums()) for ref in (self.dq, self.dk, self.dv, self.o) if ref is not None]
        shared: list[dict] = [{} for _ in range(self.t.turns)]
        made: dict = {}

        def place(n):
            """(image, head) of the n-th turn."""
            return first + n // len(heads), heads[n % len(heads)]

        def logits(n):
            i, head = place(n)
            columns = slice(head.lo, head.hi)
            q, do = (operand(head.mask(ref[i, :, columns]), self.dtype, self.device) for ref in (self.q, self.do))
            made[n] = q, do, *self.products(i, head, q, do, 0, self.total, shared[n // len(heads)])

        def softmax(n):
            q, do, s, dp, k, v = made[n]
            p = self.softmax(s)
            ds = operand(p * (dp - (p * dp).sum(0, keepdims=True)), self.dtype, self.device)
            made[n] = operand(p, self.dtype, self.device), ds, q, do, k, v

        def gradients(n):
            i, head = place(n)
            dk, dv, dq, o = self.gradients(*made.pop(n))
            for (_, sums), value in zip(refs, (head.mask(dq), dk, dv, head.mask(o)), strict=False):
                sums.add(head, value)
            for ref, sums in refs:
                sums.store(ref, (i, slice(None)), self.dtype, before=borders[n % len(heads)])

        staggered(self.t.turns * len(heads), (logits, softmax, gradients), self.t.lags)

    def whole(self, i, head, q, do, emit, shared):
        s, dp, k, v = self.products(i, head, q, do, 0, self.total, shared)
        p = self.softmax(s)
        ds = operand(p * (dp - (p * dp).sum(0, keepdims=True)), self.dtype, self.device)
        dk, dv, dq, o = self.gradients(operand(p, self.dtype, self.device), ds, q, do, k, v)
        emit(head, 0, self.total, dk, dv)
        return dq, o

    def online(self, i, head, q, do, emit, shared):
        """Twice over the keys: first the softmax's maximum, sum and delta of each query, then the gradients."""

        def measure(start, size, carry):
            m, norm, delta = carry
            s, dp, _, _ = self.products(i, head, q, do, start, size, shared)
            new = jnp.maximum(m, s.max(0, keepdims=True))
            p, shrink = jnp.exp2((s - new) * self.factor), jnp.exp2((m - new) * self.factor)
            return new, norm * shrink + p.sum(0, keepdims=True), delta * shrink + (p * dp).sum(0, keepdims=True)

        zeros = jnp.zeros((1, q.shape[0]), F32)
        m, norm, delta = over_chunks(self.total, self.t.keys, measure, (zeros - jnp.inf, zeros, zeros))
        inverse = 1.0 / norm

        def differentiate(start, size, carry):
            s, dp, k, v = self.products(i, head, q, do, start, size, shared)
            p = jnp.exp2((s - m) * self.factor) * inverse
            ds = operand(p * (dp - delta * inverse), self.dtype, self.device)
            dk, dv, dq, o = self.gradients(operand(p, self.dtype, self.device), ds, q, do, k, v)
            emit(head, start, size, dk, dv)
            return carry[0] + dq, carry[1] + o

        return over_chunks(self.total, self.t.keys, differentiate, (jnp.zeros(q.shape, F32),) * 2)


def core(t: CoreTiles, qkv, do, *, num_heads: int, width: int, launch: Launch, with_o: bool, tokens=None):
    """dqkv [3, B, T, K] (and with_o: o) of qkv [3, B, T, K] and do [B, T, K]; width: of a head, whose lanes may be padded. tokens:
    of the T rows; the others are no keys."""
    _, b, total, k = qkv.shape
    several = (t.queries, t.keys) != (total, total)
    queries, once = (t.queries, pl.Buffered(1)) if t.streamed else (total, None)

    def tile(i, g, j=0):
        return i, j, g

    rows = pl.BlockSpec((t.images, queries, t.lanes), tile)
    of_q = pl.BlockSpec((1, t.images, queries, t.lanes), lambda *at: (0, *tile(*at)))
    of_k, of_v = (
        pl.BlockSpec((1, t.images, total, t.lanes), lambda i, g, *_, c=c: (c, i, 0, g), pipeline_mode=once) for c in (1, 2)
    )
    both = pl.BlockSpec((2, t.images, total, t.lanes), lambda i, g, *_: (0, i, 0, g))
    packed = pl.BlockSpec((3, t.images, total, t.lanes), lambda i, g: (0, i, 0, g))

    def kernel(q, k_ref, v, do_ref, *rest):
        dq, dk, dv = (rest[0], rest[1].at[0], rest[1].at[1]) if t.streamed else (rest[0].at[c] for c in range(3))
        o, scratch = (rest[1 + t.streamed], rest[2 + t.streamed :]) if with_o else (None, rest[1 + t.streamed :])
        inputs = q.at[0], k_ref.at[0], v.at[0], do_ref
        _Core(inputs, (dq, dk, dv, o), scratch, t, k // num_heads, width**-0.5, launch.device, tokens).run()

    one = (do.shape, qkv.dtype)
    out_specs, out_shapes = (
        ([rows, both], [one, ((2, *do.shape), qkv.dtype)]) if t.streamed else ([packed], [(qkv.shape, qkv.dtype)])
    )
    found = call(
        kernel,
        launch=launch.within(t.needs),
        name="attention_core_backward",
        grid=(b // t.images, k // t.lanes, *([pl.cdiv(total, t.queries)] * t.streamed)),
        in_specs=[of_q, of_k, of_v, rows],
        out_specs=[*out_specs, *([rows] * with_o)],
        out_shapes=[*out_shapes, *([one] * with_o)],
        semantics=("parallel", "parallel", *(["arbitrary"] * t.streamed)),
        cost=core_cost(b, total, k, num_heads, qkv.dtype.itemsize, backward=True),
        scratch=[pltpu.VMEM((total, t.lanes), F32)] * (2 * several),
    )(qkv, qkv, qkv, do)
    if not t.streamed:
        return found
    dq, dkdv, *o = found
    return jnp.concatenate([dq[None], dkdv]), *o
