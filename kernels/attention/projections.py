"""The kernels of the attention half that multiply tokens by weights, and what all its matrix-product kernels share.

Blocks are whole rows of an image as they lie in HBM, some images a grid step; weights stay in VMEM while they fit.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import dropout as drop
from kernels.attention import tiling
from kernels.attention.heads import narrow
from kernels.attention.tiling import Static
from kernels.launch import call, dot, vmem_limit
from kernels.layer_norm.tpu import normalise

F32 = jnp.float32


class Step:
    """What the kernels share: shapes, tiles, block specs by name, and the launch."""

    def __init__(self, step: str, b: int, x, k: int, static: Static):
        """b: images that are worked on, of x [B, T, D], from image scalars[2] on."""
        self.step, self.static, self.dtype = step, static, x.dtype
        self.b, (_, self.t, self.d) = b, x.shape
        self.k, self.shape = k, (b, self.t, self.d, k)
        self.tiles = tiling.tiles(step, self.shape, static.launch.device, x.dtype)
        self.device = static.launch.device
        self.images, self.rows = self.tiles.images, self.tiles.rows
        self.batch = self.b // self.images, pl.cdiv(self.t, self.rows)
        assert self.t == self.rows or self.images == 1
        self.columns = self.tiles.columns
        parts, of_d = tiling.STEPS[step]
        self.weights = parts // self.tiles.sections, (self.d if of_d else k) // self.columns
        self.resident = self.weights == (1, 1)
        self.sums = step in tiling.WEIGHTS  # the batch is then the inner loop

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

    def __call__(self, kernel, arrays, in_specs, out_specs, out_shapes, *, scratch=(), aliases=None, products, moved):
        grid = (*self.weights, *self.batch) if self.sums else (*self.batch, *self.weights)
        return call(
            kernel,
            launch=self.static.launch,
            name=f"attention_{self.step}",
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shapes=out_shapes,
            semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            cost=tiling.cost(self.shape, self.dtype, products=products, arrays=moved),
            scratch=scratch,
            prefetch=1,
            aliases=aliases,
            vmem_bytes=vmem_limit(self.device, self.tiles.needs),
        )(*arrays)

    # Inside a kernel:

    def load(self, ref, i):
        """ref[i] as float32 [rows, .], rows beyond the last token zero."""
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
        row = scalars[1] + (image * self.images + i) * self.t + tile * self.rows
        row = row + lax.broadcasted_iota(jnp.int32, (value.shape[0], 1), 0)
        column = first_column + lax.broadcasted_iota(jnp.int32, (1, value.shape[1]), 1)
        keep = drop.keep(drop.row_hash(scalars[0], row), column, self.static.rate)
        return jnp.where(keep, value * (1.0 / (1.0 - self.static.rate)), 0.0)

    def first(self):
        """Whether this step is the first of the inner two grid dimensions."""
        return (pl.program_id(2) == 0) & (pl.program_id(3) == 0)


def project(scalars, x, norm_scale, norm_bias, w, bias, b: int, static: Static):
    """qkv [3, b, T, K] of b images of x [B, T, D]; w [3, D, K], bias [3, 1, K]."""
    s = Step("project", b, x, w.shape[2], static)

    def kernel(_, x_ref, scale_ref, bias_ref, w_ref, b_ref, out_ref, *z_ref):
        def z(i):
            return narrow(normalise(x_ref[i].astype(F32))[0] * scale_ref[...] + bias_ref[...], x.dtype, s.device)

        if not s.resident:

            @pl.when(s.first())
            def _():
                for i in range(s.images):
                    z_ref[0][i] = z(i)

        for i in range(s.images):
            zi = z(i) if s.resident else z_ref[0][i]
            for c in range(s.tiles.sections):
                out_ref[c, i] = (dot(zi, w_ref[c], s.device) + b_ref[c]).astype(out_ref.dtype)

    z_dtype = x.dtype if s.device.bf16_matmul else F32
    return s(
        kernel,
        (scalars, x, norm_scale, norm_bias, w, bias),
        [
            s.tokens(s.d, whole=True),
            s.whole(1, s.d),
            s.whole(1, s.d),
            s.weight(s.tiles.sections, s.d, s.columns, section=0, column=2),
            s.weight(s.tiles.sections, 1, s.columns, section=0, column=2),
        ],
        [s.sections()],
        [((3, s.b, s.t, s.k), x.dtype)],
        scratch=[] if s.resident else [pltpu.VMEM((s.images, s.rows, s.d), z_dtype)],
        products=3,
        moved=4,
    )[0]


def output(scalars, o, x, w, bias, static: Static, into=None):
    """share x + dropout(o w + share bias) [B, T, D], of the images of o [b, T, K]; w [K, D], bias [1, D]. into: [B, T, D], the
    other images of the result."""
    s = Step("output", o.shape[0], x, w.shape[0], static)

    def kernel(scalars_ref, o_ref, x_ref, w_ref, b_ref, *refs):
        out_ref = refs[-1]
        for i in range(s.images):
            y = dot(o_ref[i], w_ref[...], s.device) + static.residual_scale * b_ref[...]
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


def output_gradient(scalars, dy, w, b: int, static: Static):
    """do [b, T, K], the gradient of o; dy [B, T, D], w [D, K] (the output projection, transposed)."""
    s = Step("output_gradient", b, dy, w.shape[1], static)

    def kernel(scalars_ref, dy_ref, w_ref, out_ref, *scratch):
        def masked(i):
            return narrow(s.drop(dy_ref[i].astype(F32), scalars_ref, i), dy.dtype, s.device)

        if not s.resident:

            @pl.when(s.first())
            def _():
                for i in range(s.images):
                    scratch[0][i] = masked(i)

        for i in range(s.images):
            out_ref[i] = dot(masked(i) if s.resident else scratch[0][i], w_ref[...], s.device).astype(out_ref.dtype)

    return s(
        kernel,
        (scalars, dy, w),
        [s.tokens(s.d, whole=True), s.weight(s.d, s.columns, column=1)],
        [s.tile()],
        [((s.b, s.t, s.k), dy.dtype)],
        scratch=[] if s.resident else [pltpu.VMEM((s.images, s.rows, s.d), dy.dtype if s.device.bf16_matmul else F32)],
        products=1,
        moved=2,
    )[0]
