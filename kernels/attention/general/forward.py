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
(width 80) included. The core: `core.py`. Paper: Eq. 2 and appendix A.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.plan import Plan
from kernels.attention.tiling import STEPS, WEIGHTS, ProductTiles
from kernels.body import F32, cast_dot, dropout, iota, kept, operand, operand_dtype
from kernels.device import LANES
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


def project(tiles: ProductTiles, scalars, x, norm, w, bias, b: int, static: Static, turned: Any = None):
    """qkv [3, b, T, K] of b images of x [B, T, D]; norm: scale and bias [1, D]; w [3, D, K], bias [3, 1, K]. turned: a
    `rotary.turning.Turned`, what becomes of q and k in float32; None for nothing."""
    s, tables = Step("project", tiles, b, x, w.shape[2], static), turned.tables if turned else ()

    def kernel(_, x_ref, scale_ref, bias_ref, w_ref, b_ref, *refs):
        rows, (out_ref, *scratch) = refs[: len(tables)], refs[len(tables) :]

        def normalised(i):
            return operand(normalise(x_ref[i].astype(F32), static.eps)[0] * scale_ref[...] + bias_ref[...], x.dtype, s.device)

        z = s.operands(normalised, scratch)
        for i in range(s.images):
            zi = z(i)
            for c in range(s.tiles.sections):
                y = cast_dot(zi, w_ref[c], s.device) + b_ref[c]
                y = turned.of_section(y, c, s.tiles.sections, rows) if turned else y
                out_ref[c, i] = y.astype(out_ref.dtype)

    return s(
        kernel,
        (scalars, x, *norm, w, bias, *tables),
        [
            s.tokens(s.d, whole=True),
            *[s.whole(1, s.d)] * 2,
            *[s.weight(s.tiles.sections, n, s.columns, section=0, column=2) for n in (s.d, 1)],
            *[s.spec((s.rows, LANES), lambda i, j, c, n: (j, 0)) for _ in tables],
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
