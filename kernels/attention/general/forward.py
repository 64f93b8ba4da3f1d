"""The forward pass of the attention half as three kernels, on arrays as they lie in HBM: project, core, output.

    qkv = LN(x) qkv_kernel + qkv_bias
    o   = softmax(q k^T / sqrt(H)) v, head by head
    out = s x + dropout(o out_kernel + s out_bias)

with s = residual_scale. Blocks are whole rows of an image, some images a grid step; weights stay in VMEM while they fit.

Layout. The projections are one array [3, B, T, K], K = N * H: the product of LN(x) with qkv_kernel [3, D, K] as it stands. The core
takes it three times through three index maps, and writes o as [B, T, K]: no transpose, no split, no padding in HBM. A block is
exactly T rows; in VMEM the heads lie side by side in the lanes, and a head is worked on in the whole 128-lane columns that it
touches: its queries are masked to its own lanes, so that the products with the columns of k are the head's alone (the MXU would
pad a width of 64 to 128 anyway). So every head width and every number of heads takes one path, a head across a column border
(width 80) included.

The core takes a tile of queries at a time: logits = q k^T, p = exp(logits - max), o = (p v) / sum(p). While T keys fit, the softmax
sees whole rows; beyond, it is the online softmax over chunks of keys (Milakov and Gimelshein 2018). Probabilities never leave VMEM.
HBM traffic of the core: 4 arrays of B * T * K. Paper: Eq. 2 and appendix A.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.plan import Plan
from kernels.attention.tiling import STEPS, WEIGHTS, CoreTiles, Head, ProductTiles, heads_of
from kernels.body import F32, cast_dot, dropout, iota, kept, operand, operand_dtype, staggered, sweep
from kernels.device import SUBLANES
from kernels.launch import Launch, call
from kernels.layer_norm.tpu import normalise


@dataclass(frozen=True, kw_only=True)
class Static:
    """Everything about a call that is no array."""

    num_heads: int
    width: int  # of a head, H; the arrays may hold more lanes a head, the rest zero
    rate: float  # of dropout
    residual_scale: float
    eps: float  # of LN
    launch: Launch
    plan: Plan
    tokens: int | None = None  # of the T rows of an image; the others are padding, which no token sees


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


class Step:
    """What the matrix-product kernels of both passes share: shapes, tiles, block specs by name, and the launch."""

    def __init__(self, step: str, tiles: ProductTiles, b: int, x, k: int, static: Static):
        """b: images that are worked on, of x [B, T, D], from image scalars[2] on."""
        self.step, self.static, self.dtype, self.device = step, static, x.dtype, static.launch.device
        self.b, (_, self.t, self.d), self.k = b, x.shape, k
        self.tiles, self.images, self.rows, self.columns = tiles, tiles.images, tiles.rows, tiles.columns
        self.batch = self.b // self.images, pl.cdiv(self.t, self.rows)
        assert self.t == self.rows or self.images == 1
        sections, of_d = STEPS[step]
        self.weights = sections // tiles.sections, (self.d if of_d else k) // self.columns
        self.resident = self.weights == (1, 1)
        self.sums = step in WEIGHTS  # the batch is then the inner loop

    def spec(self, block, index, once=False, whole=False):
        """A block whose index map is written in (image, row, section, column), whatever the order of the grid. whole: of an array
        of all images, not of those that are worked on."""

        def at(*grid):
            *place, scalars = grid
            c, n, i, j = place if self.sums else (*place[2:], *place[:2])
            return index(i + lax.div(scalars[2], self.images) if whole else i, j, c, n)

        return pl.BlockSpec(block, at, pipeline_mode=pl.Buffered(1) if once else None)

    def tokens(self, width, whole=False):
        """All of [B, T, width]'s columns."""
        return self.spec((self.images, self.rows, width), lambda i, j, c, n: (i, j, 0), whole=whole)

    def tile(self, whole=False):
        """The current columns of [B, T, .]."""
        return self.spec((self.images, self.rows, self.columns), lambda i, j, c, n: (i, j, n), whole=whole)

    def sections(self):
        """The current sections and columns of [3, B, T, K]."""
        return self.spec((self.tiles.sections, self.images, self.rows, self.columns), lambda i, j, c, n: (c, i, j, n))

    def whole(self, *shape):
        return self.spec(shape, lambda i, j, c, n: (0,) * len(shape))

    def weight(self, *block, section=None, column=None):
        """A block of a weight or its gradient: `section` and `column` name the axes that move with the grid."""

        def index(i, j, c, n):
            return tuple(c if a == section else n if a == column else 0 for a in range(len(block)))

        return self.spec(block, index, once=self.resident)

    def cost(self, products: int, moved: int) -> pl.CostEstimate:
        """`products` matrix products of b*T rows, D and K, `moved` arrays of b*T*max(D, K) through HBM."""
        tokens, weight = self.b * self.t, self.d * self.k
        return pl.CostEstimate(
            flops=products * 2 * tokens * weight,
            transcendentals=tokens,
            bytes_accessed=moved * tokens * max(self.d, self.k) * self.dtype.itemsize + products * weight * 4,
        )

    def __call__(self, kernel, arrays, in_specs, out_specs, out_shapes, *, scratch=(), aliases=None, products, moved):
        return call(
            kernel,
            launch=self.static.launch.within(self.tiles.needs),
            name=f"attention_{self.step}",
            grid=(*self.weights, *self.batch) if self.sums else (*self.batch, *self.weights),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shapes=out_shapes,
            semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            cost=self.cost(products, moved),
            scratch=scratch,
            prefetch=1,
            aliases=aliases,
        )(*arrays)

    def load(self, ref, i):
        """Rows of image i of a block in float32, those behind the last token zero: for what is summed over rows."""
        value = ref[i].astype(F32)
        if self.t % self.rows == 0:
            return value
        row = pl.program_id(3 if self.sums else 1) * self.rows + lax.broadcasted_iota(jnp.int32, (self.rows, 1), 0)
        return jnp.where(row < self.t, value, 0.0)

    def drop(self, value, scalars, i, first_column: jax.Array | int = 0):
        """Dropout of [rows, columns] float32 of image i of the block; its own transpose, so also the gradient's."""
        if self.static.rate == 0.0:
            return value
        image, tile = (pl.program_id(a) for a in ((2, 3) if self.sums else (0, 1)))
        row = scalars[1] + (image * self.images + i) * (self.static.tokens or self.t) + tile * self.rows
        rows, columns = row + iota(value.shape[0], 0), first_column + iota(value.shape[1], 1)
        return dropout(value, kept(scalars[0], rows, columns, self.static.rate), self.static.rate)

    def first(self):
        """Whether this step is the first of the inner two grid dimensions."""
        return (pl.program_id(2) == 0) & (pl.program_id(3) == 0)

    def operands(self, make, scratch):
        """i -> make(i), an operand of image i that all columns of the weights need: made once, where the weights are streamed."""
        if self.resident:
            return make

        @pl.when(self.first())
        def _():
            for i in range(self.images):
                scratch[0][i] = make(i)

        return lambda i: scratch[0][i]

    def operand_scratch(self):
        """The scratch of `operands`."""
        shape = self.images, self.rows, self.d
        return [] if self.resident else [pltpu.VMEM(shape, operand_dtype(self.dtype, self.device))]


def project(tiles: ProductTiles, scalars, x, norm, w, bias, b: int, static: Static):
    """qkv [3, b, T, K] of b images of x [B, T, D]; norm: scale and bias [1, D]; w [3, D, K], bias [3, 1, K]."""
    s = Step("project", tiles, b, x, w.shape[2], static)

    def kernel(_, x_ref, scale_ref, bias_ref, w_ref, b_ref, out_ref, *scratch):
        def normalised(i):
            return operand(normalise(x_ref[i].astype(F32), static.eps)[0] * scale_ref[...] + bias_ref[...], x.dtype, s.device)

        z = s.operands(normalised, scratch)
        for i in range(s.images):
            zi = z(i)
            for c in range(s.tiles.sections):
                out_ref[c, i] = (cast_dot(zi, w_ref[c], s.device) + b_ref[c]).astype(out_ref.dtype)

    return s(
        kernel,
        (scalars, x, *norm, w, bias),
        [
            s.tokens(s.d, whole=True),
            s.whole(1, s.d),
            s.whole(1, s.d),
            s.weight(s.tiles.sections, s.d, s.columns, section=0, column=2),
            s.weight(s.tiles.sections, 1, s.columns, section=0, column=2),
        ],
        [s.sections()],
        [((3, s.b, s.t, s.k), x.dtype)],
        scratch=s.operand_scratch(),
        products=3,
        moved=4,
    )[0]


def output(tiles: ProductTiles, scalars, o, x, w, bias, static: Static, into=None):
    """s x + dropout(o w + s bias) [B, T, D], of the images of o [b, T, K]; w [K, D], bias [1, D]. into: [B, T, D], the other images
    of the result."""
    s = Step("output", tiles, o.shape[0], x, w.shape[0], static)

    def kernel(scalars_ref, o_ref, x_ref, w_ref, b_ref, *refs):
        out_ref = refs[-1]
        for i in range(s.images):
            y = cast_dot(o_ref[i], w_ref[...], s.device) + static.residual_scale * b_ref[...]
            y = s.drop(y, scalars_ref, i, pl.program_id(3) * s.columns)
            out_ref[i] = (static.residual_scale * x_ref[i].astype(F32) + y).astype(out_ref.dtype)

    rest = [] if into is None else [into]
    return s(
        kernel,
        (scalars, o, x, w, bias, *rest),
        [
            s.tokens(s.k),
            s.tile(whole=True),
            s.weight(s.k, s.columns, column=1),
            s.weight(1, s.columns, column=1),
            *[pl.BlockSpec(memory_space=pl.ANY) for _ in rest],
        ],
        [s.tile(whole=True)],
        [(x.shape, x.dtype)],
        aliases={5: 0} if rest else None,
        products=1,
        moved=3,
    )[0]


# ---- the core


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
        sweep(self.images, 1, lambda i, _: self.image(i))

    def image(self, i):
        if self.t.lags:
            self.interleaved(i)
            return
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

    def interleaved(self, i):
        """All heads of an image, whole rows of keys: the logits of one head are made before the softmax of the one before it."""
        heads, sums = [head for run in heads_of(self.lanes, self.h) for head in run], Sums()
        made: dict = {}

        def logits(n):
            q = operand(heads[n].mask(self.q[0, i, :, heads[n].lo : heads[n].hi]), self.o.dtype, self.device)
            made[n] = self.attend(i, heads[n], q, 0, self.total)

        def softmax(n):
            s, v = made[n]
            made[n] = *self.softmax(s, v), v

        def weighted(n):
            p, inverse, v = made.pop(n)
            sums.add(heads[n], heads[n].mask(cast_dot(p, v, self.device) * inverse))
            sums.store(self.o, (i, slice(None)), self.o.dtype, before=heads[n + 1].lo if n + 1 < len(heads) else self.lanes)

        staggered(len(heads), (logits, softmax, weighted), self.t.lags)

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


def over_chunks(total: int, size: int, chunk, carry):
    """carry = chunk(start, length, carry) over the keys, whole chunks in a loop and then the shorter rest."""
    full = total // size
    carry = lax.fori_loop(0, full, lambda c, carry: chunk(pl.multiple_of(c * size, size), size, carry), carry)
    return chunk(full * size, total % size, carry) if total % size else carry


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
