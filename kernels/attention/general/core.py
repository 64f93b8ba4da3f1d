"""Softmax attention itself, between the products of `forward.py`, which describes how heads lie in the lanes.

The core takes a tile of queries at a time: logits = q k^T, p = exp(logits - max), o = (p v) / sum(p). While T keys fit, the softmax
sees whole rows; beyond, it is the online softmax over chunks of keys (Milakov and Gimelshein 2018). Probabilities never leave VMEM.
HBM traffic of the core: 4 arrays of B * T * K.

The heads of a step are unrolled, and their code is interleaved (`CoreTiles.lags`): head by head, the softmax waits for the MXU and
the MXU for the softmax, and the compiler does not find out of it.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.attention.tiling import CoreTiles, Head, heads_of
from kernels.body import F32, cast_dot, operand, over_chunks, staggered, sweep
from kernels.device import SUBLANES
from kernels.launch import Launch, call


class Sums(dict):
    """Sums over heads, one a column of lanes; values, not memory."""

    def add(self, head: Head, value):
        for lo, hi in head.columns():
            part = value[:, lo - head.lo : hi - head.lo]
            self[lo, hi] = self[lo, hi] + part if (lo, hi) in self else part

    def store(self, ref, at: tuple, dtype, before: int | None = None):
        """Writes each column to ref[*at, column]; before: those that end there or earlier, which are done with."""
        done = [column for column in self if before is None or column[1] <= before]
        for lo, hi in done:
            ref[(*at, slice(lo, hi))] = self.pop((lo, hi)).astype(dtype)


def core_cost(b: int, t: int, k: int, num_heads: int, itemsize: int, *, backward: bool) -> pl.CostEstimate:
    """FLOPs of the products (2 forward; 6 backward, two of them recomputation), exponentials, HBM bytes."""
    products, arrays = (6, 8) if backward else (2, 4)
    return pl.CostEstimate(
        flops=products * 2 * b * t * t * k,
        transcendentals=b * num_heads * t * t,
        bytes_accessed=arrays * b * t * k * itemsize,
    )


class _Core:
    """The body of the core: a grid step, whole images of a block of heads. Refs q, k, v [1, images, T, lanes]; o without the 1."""

    def __init__(self, refs, t: CoreTiles, h: int, scale: float, device, tokens: int | None):
        self.q, self.k, self.v, self.o = refs
        self.images, self.total, self.lanes = self.o.shape
        self.tokens = tokens or self.total
        self.t, self.h, self.device = t, h, device
        self.factor = scale * math.log2(math.e)  # exp(x / sqrt(H)) = 2**(factor x), one multiplication either way

    def run(self):
        if self.t.lags:
            sweep(self.images, self.t.turns, lambda first, _: self.interleaved(first))
        else:
            sweep(self.images, 1, lambda i, _: self.image(i))

    def image(self, i):
        for run in heads_of(self.lanes, self.h):

            def tile(start, size, run=run):
                sums, shared = Sums(), {}
                for head in run:
                    q = head.mask(self.q[0, i, pl.ds(start, size), head.lo : head.hi])
                    q = operand(q, self.o.dtype, self.device)
                    o = self.whole(i, head, q, shared) if self.t.keys == self.total else self.online(i, head, q)
                    sums.add(head, head.mask(o))

                sums.store(self.o, (i, pl.ds(start, size)), self.o.dtype)

            sweep(self.total, self.t.queries, tile)

    def interleaved(self, first):
        """All heads of `turns` images, whole rows of keys: the logits of one head are made before the softmax of the one before
        it."""
        heads, sums = [head for run in heads_of(self.lanes, self.h) for head in run], Sums()
        borders = [*[head.lo for head in heads[1:]], self.lanes]
        made: dict = {}

        def place(n):
            """(image, head) of the n-th turn."""
            return first + n // len(heads), heads[n % len(heads)]

        def logits(n):
            i, head = place(n)
            q = operand(head.mask(self.q[0, i, :, head.lo : head.hi]), self.o.dtype, self.device)
            made[n] = self.attend(i, head, q, 0, self.total)

        def softmax(n):
            s, v = made[n]
            made[n] = *self.softmax(s, v), v

        def weighted(n):
            (i, head), (p, inverse, v) = place(n), made.pop(n)
            sums.add(head, head.mask(cast_dot(p, v, self.device) * inverse))
            sums.store(self.o, (i, slice(None)), self.o.dtype, before=borders[n % len(heads)])

        staggered(self.t.turns * len(heads), (logits, softmax, weighted), self.t.lags)

    def attend(self, i, head, q, start, size):
        """One chunk of keys: logits [Tq, S] and values [S, columns]."""
        keys = pl.ds(start, size)
        k, v = self.k[0, i, keys, head.lo : head.hi], self.v[0, i, keys, head.lo : head.hi]
        return self.existing(cast_dot(q, k, self.device, contract=(1, 1)), start), v

    def existing(self, s, start):
        """Logits of keys from `start` on, those of padding -inf."""
        if self.tokens == self.total:
            return s
        return jnp.where(start + lax.broadcasted_iota(jnp.int32, (1, s.shape[1]), 1) < self.tokens, s, -jnp.inf)

    def whole(self, i, head, q, shared):
        """o of all keys at once. shared: keys and values of the columns that heads have in common."""
        if self.device.bf16_matmul or self.total < SUBLANES:
            s, v = self.attend(i, head, q, 0, self.total)
        else:  # cast and transposed once for the heads of a column: 8 % fewer cycles on v3 (on v6e 18 % more)
            columns = slice(head.lo, head.hi)
            if (head.lo, head.hi) not in shared:
                k, v = self.k[0, i, :, columns].astype(F32), self.v[0, i, :, columns].astype(F32)
                shared[head.lo, head.hi] = k.T, v
            k, v = shared[head.lo, head.hi]
            s = self.existing(cast_dot(q, k, self.device), 0)
        p, inverse = self.softmax(s, v)
        return cast_dot(p, v, self.device) * inverse

    def softmax(self, s, v):
        """(exp of whole rows of logits, as an operand beside v; 1 / their sums)."""
        p = jnp.exp2((s - s.max(1, keepdims=True)) * self.factor)
        return operand(p, v.dtype, self.device), 1.0 / p.sum(1, keepdims=True)

    def online(self, i, head, q):
        """o by the online softmax over chunks of keys."""

        def chunk(start, size, carry):
            m, norm, acc = carry
            s, v = self.attend(i, head, q, start, size)
            new = jnp.maximum(m, s.max(1, keepdims=True))
            p, shrink = jnp.exp2((s - new) * self.factor), jnp.exp2((m - new) * self.factor)
            o = cast_dot(operand(p, v.dtype, self.device), v, self.device)
            return new, norm * shrink + p.sum(1, keepdims=True), acc * shrink + o

        zeros = jnp.zeros((q.shape[0], 1), F32)
        _, norm, acc = over_chunks(self.total, self.t.keys, chunk, (zeros - jnp.inf, zeros, jnp.zeros(q.shape, F32)))
        return acc * (1.0 / norm)


def core(tiles: CoreTiles, qkv, *, num_heads: int, width: int, launch: Launch, tokens: int | None = None):
    """o [B, T, K] of qkv [3, B, T, K]; width: of a head, whose lanes may be padded. tokens: of the T rows; others are no keys."""
    _, b, total, k = qkv.shape
    section = [pl.BlockSpec((1, tiles.images, total, tiles.lanes), lambda i, g, c=c: (c, i, 0, g)) for c in range(3)]

    def kernel(*refs):
        _Core(refs, tiles, k // num_heads, width**-0.5, launch.device, tokens).run()

    return call(
        kernel,
        launch=launch.within(tiles.needs),
        name="attention_core_forward",
        grid=(b // tiles.images, k // tiles.lanes),
        in_specs=section,
        out_specs=[pl.BlockSpec((tiles.images, total, tiles.lanes), lambda i, g: (i, 0, g))],
        out_shapes=[((b, total, k), qkv.dtype)],
        semantics=("parallel", "parallel"),
        cost=core_cost(b, total, k, num_heads, qkv.dtype.itemsize, backward=False),
    )(qkv, qkv, qkv)[0]
