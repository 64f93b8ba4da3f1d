"""The attention half of a block as Pallas TPU kernels; `reference.py` in this folder is the specification.

    z = LN(x);  q, k, v = z w_qkv + b_qkv;  o = attention(q, k, v);  out = share x + dropout(o w_out + share b_out)

Forward, three kernels: LN and projections (`project`); softmax attention (core.py); output projection, dropout and residual
(`output`). Each streams images through weights that stay in VMEM while they fit, and through tiles of weights where they do not.
The arrays between them, [3, B, T, K] and [B, T, K], pass through HBM while the MXU works: on v3, 7.5k cycles of traffic an image of
ViT-B/16 beside 27k of products. Nothing is padded, transposed or split there; blocks are whole rows of an image.

Backward saves x alone. With dy' the masked dy it recomputes the projections (`project`), then

    do = dy' w_out^T              `output_gradient`
    dqkv, o                       core.py
    dx = share dy + LN'(dqkv w_qkv^T)    `input_gradient`, with the sums for norm_scale and norm_bias
    dw_out = o^T dy', db_out      `output_weights`
    dw_qkv = z^T dqkv, db_qkv     `projection_weights`: z recomputed, sums over the batch stay in VMEM

Operands are rounded where the reference rounds them; sums, LN and softmax are float32, as are the gradients of the parameters.
Generations whose Mosaic takes no bfloat16 operands get weights rounded to bfloat16 and widened: nothing is cast in the loops.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import dropout as drop
from kernels.attention import core, fused, wide, wide_core
from kernels.attention.heads import divisor, narrow
from kernels.device import LANES, Device
from kernels.launch import Launch, call, dot, vary_alike
from kernels.layer_norm.reference import EPS

F32 = jnp.float32
ROWS = 400  # rows a grid step: the start of a step and the LN of its first image are paid once
LONG = 640  # an image of more tokens is cut into tiles of this many rows
CHUNK_ROWS = 49152  # tokens at a time through the chain of kernels: at most 0.7 GB of ViT-B/16 lie between them


@dataclass(frozen=True, kw_only=True)
class HalfTiles:
    """images, rows (T: all) and columns of the weights a grid step; sections of w_qkv (3 or 1) a step."""

    images: int
    rows: int
    columns: int
    sections: int = 1


@dataclass(frozen=True, kw_only=True)
class _Static:
    num_heads: int
    width: int  # of a head, H; the arrays may hold more lanes a head, the rest zero
    rate: float
    share: float
    launch: Launch


# The six matrix-product kernels: how many sections of weights they have, and whether the columns of their weights are D (or K).
_STEPS = {
    "project": (3, False),
    "output": (1, True),
    "output_gradient": (1, False),
    "input_gradient": (3, False),
    "output_weights": (1, True),
    "projection_weights": (3, False),
}
_WEIGHTS = ("output_weights", "projection_weights")  # these sum over the batch


def tiles(step: str, shape: tuple[int, int, int, int], device: Device, dtype) -> HalfTiles:
    """Tiles of one of the `_STEPS` for shape (B, T, D, K).

    Weights, or the sums for their gradients, resident in VMEM if they fit, several images a step; else column tiles of them, and as
    many images as hide their transfer. NotImplementedError where not even 128 rows and 128 columns fit.
    """
    b, t, d, k = shape
    size = jnp.dtype(dtype).itemsize
    wide = 2 if device.bf16_matmul and size == 2 else 4  # bytes of a weight and of a cast activation
    parts, of_d = _STEPS[step]
    full = d if of_d else k

    def bytes_of(images, rows, n, sections):
        """Weights, pipelined blocks of tokens (twice), scratch, and the temporaries of one image."""
        one = -(-rows // 16) * 16
        r, m = images * one, sections * n
        w = m * (1 if (n, sections) == (full, parts) else 2)
        return {
            "project": w * d * wide + 2 * r * size * (d + m) + r * d * wide + 4 * one * (2 * d + 2 * n),
            "output": w * k * wide + 2 * r * size * (k + 2 * n) + 4 * one * (k + 3 * n),
            "output_gradient": w * d * wide + 2 * r * size * (d + n) + r * d * wide + 4 * one * (2 * d + n),
            "input_gradient": w * d * wide + 2 * r * size * (3 * d + m) + r * d * 4 + 4 * one * (6 * d + n),
            "output_weights": w * k * 4 + 2 * r * size * (k + n) + 4 * one * (k + 3 * n) + 4 * k * 256,
            "projection_weights": w * d * 4 + 2 * r * size * (d + m) + 4 * one * (4 * d + 256) + 4 * d * 256,
        }[step]

    widths = [c for c in range(full - 1, 0, -1) if full % c == 0 and c % LANES == 0]
    lengths = [t] * (t <= LONG) + [rows for rows in (512, 256, 128) if rows < t]
    together = [n for n in range(min(b, max(1, ROWS // t)), 0, -1) if b % n == 0]
    for weights in ([(full, parts)], [(c, 1) for c in (full, *widths)]):
        for rows in lengths:
            for images in together if rows == t else [1]:
                for columns, sections in weights:
                    if bytes_of(images, rows, columns, sections) <= 0.92 * device.vmem_bytes:
                        return HalfTiles(images=images, rows=rows, columns=columns, sections=sections)
    raise NotImplementedError(
        f"attention half, {step}: 128 tokens of width {d} with {min((full, *widths))} columns of the weights do not fit the "
        f"{device.vmem_bytes >> 20} MiB of VMEM of a {device.name}. Split the heads over a model axis, or use the reference ops."
    )


def cost(shape: tuple[int, int, int, int], dtype, *, products: int, arrays: int) -> pl.CostEstimate:
    """`products` matrix products of B*T rows, D and K, `arrays` arrays of B*T*max(D, K) through HBM. shape (B, T, D, K)."""
    b, t, d, k = shape
    size = jnp.dtype(dtype).itemsize
    return pl.CostEstimate(
        flops=products * 2 * b * t * d * k,
        transcendentals=b * t,
        bytes_accessed=arrays * b * t * max(d, k) * size + products * d * k * 4,
    )


class _Call:
    """What the kernels share: shapes, tiles, block specs by name, and the launch."""

    def __init__(self, step: str, x_shape, k: int, dtype, static: _Static):
        self.step, self.static, self.dtype = step, static, dtype
        self.b, self.t, self.d = x_shape
        self.k, self.shape = k, (*x_shape, k)
        self.tiles = tiles(step, self.shape, static.launch.device, dtype)
        self.device = static.launch.device
        self.images, self.rows = self.tiles.images, self.tiles.rows
        self.batch = self.b // self.images, pl.cdiv(self.t, self.rows)
        assert self.t == self.rows or self.images == 1
        self.columns = self.tiles.columns
        parts, of_d = _STEPS[step]
        self.weights = parts // self.tiles.sections, (self.d if of_d else k) // self.columns
        self.resident = self.weights == (1, 1)
        self.sums = step in _WEIGHTS  # the batch is then the inner loop

    def _spec(self, block, index, once=False):
        """A block whose index map is written in (image, row, section, column), whatever the order of the grid."""
        order = (lambda c, n, i, j, *_: index(i, j, c, n)) if self.sums else (lambda i, j, c, n, *_: index(i, j, c, n))
        return pl.BlockSpec(block, order, pipeline_mode=pl.Buffered(1) if once else None)

    def tokens(self, width):
        """All of [B, T, width]'s columns."""
        return self._spec((self.images, self.rows, width), lambda i, j, c, n: (i, j, 0))

    def tile(self):
        """The current columns of [B, T, .]."""
        return self._spec((self.images, self.rows, self.columns), lambda i, j, c, n: (i, j, n))

    def sections(self):
        """The current sections and columns of [3, B, T, K]."""
        return self._spec((self.tiles.sections, self.images, self.rows, self.columns), lambda i, j, c, n: (c, i, j, n))

    def whole(self, *shape):
        return self._spec(shape, lambda i, j, c, n: (0,) * len(shape))

    def weight(self, *block, section=None, column=None):
        """A block of a weight or its gradient: `section` and `column` name the axes that move with the grid."""

        def index(i, j, c, n):
            return tuple(c if a == section else n if a == column else 0 for a in range(len(block)))

        return self._spec(block, index, once=self.resident)

    def __call__(self, kernel, arrays, in_specs, out_specs, out_shapes, *, scratch=(), products, moved):
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
            cost=cost(self.shape, self.dtype, products=products, arrays=moved),
            scratch=scratch,
            prefetch=1,
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


def _normalise(x):
    """(x - mean) / sqrt(var + eps) and 1 / sqrt(var + eps) over the last axis, float32."""
    x = x - x.mean(-1, keepdims=True)
    inverse = lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPS)
    return x * inverse, inverse


def _project(scalars, x, norm_scale, norm_bias, w, bias, static: _Static):
    """qkv [3, B, T, K] of x [B, T, D]; w [3, D, K], bias [3, 1, K]."""
    s = _Call("project", x.shape, w.shape[2], x.dtype, static)

    def kernel(_, x_ref, scale_ref, bias_ref, w_ref, b_ref, out_ref, *z_ref):
        def z(i):
            return narrow(_normalise(x_ref[i].astype(F32))[0] * scale_ref[...] + bias_ref[...], x.dtype, s.device)

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
            s.tokens(s.d),
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


def _output(scalars, o, x, w, bias, static: _Static):
    """share x + dropout(o w + share bias) [B, T, D]; o [B, T, K], w [K, D], bias [1, D]."""
    s = _Call("output", x.shape, w.shape[0], x.dtype, static)

    def kernel(scalars_ref, o_ref, x_ref, w_ref, b_ref, out_ref):
        for i in range(s.images):
            y = dot(o_ref[i], w_ref[...], s.device) + static.share * b_ref[...]
            y = s.drop(y, scalars_ref, i, pl.program_id(3) * s.columns)
            out_ref[i] = (static.share * x_ref[i].astype(F32) + y).astype(out_ref.dtype)

    return s(
        kernel,
        (scalars, o, x, w, bias),
        [s.tokens(s.k), s.tile(), s.weight(s.k, s.columns, column=1), s.weight(1, s.columns, column=1)],
        [s.tile()],
        [(x.shape, x.dtype)],
        products=1,
        moved=3,
    )[0]


def _output_gradient(scalars, dy, w, static: _Static):
    """do [B, T, K], the gradient of o; dy [B, T, D], w [D, K] (the output projection, transposed)."""
    s = _Call("output_gradient", dy.shape, w.shape[1], dy.dtype, static)

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
        [s.tokens(s.d), s.weight(s.d, s.columns, column=1)],
        [s.tile()],
        [((s.b, s.t, s.k), dy.dtype)],
        scratch=[] if s.resident else [pltpu.VMEM((s.images, s.rows, s.d), dy.dtype if s.device.bf16_matmul else F32)],
        products=1,
        moved=2,
    )[0]


def _input_gradient(scalars, x, norm_scale, dqkv, dy, w, static: _Static):
    """dx [B, T, D] and the gradients of norm_scale and norm_bias, both [D] float32; w [3, K, D] (the projections, transposed)."""
    s = _Call("input_gradient", x.shape, w.shape[1], x.dtype, static)
    last = s.weights[0] * s.weights[1] - 1

    def kernel(_, x_ref, scale_ref, dqkv_ref, dy_ref, w_ref, dx_ref, sums_ref, *acc_ref):
        def part(i):
            return sum(dot(dqkv_ref[c, i], w_ref[c], s.device) for c in range(s.tiles.sections))

        def finish(dzs):
            sums = [jnp.zeros((1, s.d), F32)] * 2
            for i, dz in enumerate(dzs):
                if s.t % s.rows:
                    row = pl.program_id(1) * s.rows + lax.broadcasted_iota(jnp.int32, (s.rows, 1), 0)
                    dz = jnp.where(row < s.t, dz, 0.0)
                xhat, inverse = _normalise(s.load(x_ref, i))
                sums = [sums[0] + (dz * xhat).sum(0, keepdims=True), sums[1] + dz.sum(0, keepdims=True)]
                dz = dz * scale_ref[...]
                dz = dz - dz.mean(-1, keepdims=True) - xhat * (dz * xhat).mean(-1, keepdims=True)
                dx_ref[i] = (static.share * dy_ref[i].astype(F32) + inverse * dz).astype(dx_ref.dtype)
            sums_ref[0] = jnp.concatenate(sums)

        if s.resident:
            finish(part(i) for i in range(s.images))
            return
        step = pl.program_id(2) * s.weights[1] + pl.program_id(3)
        for i in range(s.images):
            before = jnp.where(step == 0, 0.0, acc_ref[0][i])  # the first sum meets uninitialised memory
            acc_ref[0][i] = before + part(i)

        @pl.when(step == last)
        def _():
            finish(acc_ref[0][i] for i in range(s.images))

    steps = s.batch[0] * s.batch[1]
    dx, sums = s(
        kernel,
        (scalars, x, norm_scale, dqkv, dy, w),
        [
            s.tokens(s.d),
            s.whole(1, s.d),
            s.sections(),
            s.tokens(s.d),
            s.weight(s.tiles.sections, s.columns, s.d, section=0, column=1),
        ],
        [s.tokens(s.d), s._spec((1, 2, s.d), lambda i, j, c, n: (i * s.batch[1] + j, 0, 0))],
        [(x.shape, x.dtype), ((steps, 2, s.d), F32)],
        scratch=[] if s.resident else [pltpu.VMEM((s.images, s.rows, s.d), F32)],
        products=3,
        moved=6,
    )
    return dx, *sums.sum(0)


def _accumulate(s: _Call, ref, index, a, g):
    """ref[index] += a^T g, 256 columns at a time: a [rows, D], g [rows, columns], as operands."""
    width = 256 if s.columns % 256 == 0 else s.columns
    for n in range(0, s.columns, width):
        ref[(*index, slice(None), slice(n, n + width))] += dot(a, g[:, n : n + width], s.device, contract=(0, 0))


def _output_weights(scalars, o, dy, static: _Static):
    """Gradients of w_out [K, D] and b_out [1, D], float32, summed over the batch."""
    s = _Call("output_weights", dy.shape, o.shape[2], dy.dtype, static)

    def kernel(scalars_ref, o_ref, dy_ref, dw_ref, db_ref):
        @pl.when(s.first())
        def _():
            dw_ref[...] = jnp.zeros_like(dw_ref)
            db_ref[...] = jnp.zeros_like(db_ref)

        for i in range(s.images):
            g = s.drop(s.load(dy_ref, i), scalars_ref, i, pl.program_id(1) * s.columns)
            db_ref[...] += static.share * g.sum(0, keepdims=True)
            a = narrow(s.load(o_ref, i), dy.dtype, s.device)
            _accumulate(s, dw_ref, (), a, narrow(g, dy.dtype, s.device))

    return s(
        kernel,
        (scalars, o, dy),
        [s.tokens(s.k), s.tile()],
        [s.weight(s.k, s.columns, column=1), s.weight(1, s.columns, column=1)],
        [((s.k, s.d), F32), ((1, s.d), F32)],
        products=1,
        moved=2,
    )


def _projection_weights(scalars, x, norm_scale, norm_bias, dqkv, static: _Static):
    """Gradients of w_qkv [3, D, K] and b_qkv [3, 1, K], float32, summed over the batch; LN(x) is computed again."""
    s = _Call("projection_weights", x.shape, dqkv.shape[3], x.dtype, static)

    def kernel(_, x_ref, scale_ref, bias_ref, dqkv_ref, dw_ref, db_ref):
        @pl.when(s.first())
        def _():
            dw_ref[...] = jnp.zeros_like(dw_ref)
            db_ref[...] = jnp.zeros_like(db_ref)

        for i in range(s.images):
            z = narrow(_normalise(s.load(x_ref, i))[0] * scale_ref[...] + bias_ref[...], x.dtype, s.device)
            for c in range(s.tiles.sections):
                g = s.load(dqkv_ref.at[c], i)
                db_ref[c] += g.sum(0, keepdims=True)
                _accumulate(s, dw_ref, (c,), z, narrow(g, x.dtype, s.device))

    return s(
        kernel,
        (scalars, x, norm_scale, norm_bias, dqkv),
        [s.tokens(s.d), s.whole(1, s.d), s.whole(1, s.d), s.sections()],
        [
            s.weight(s.tiles.sections, s.d, s.columns, section=0, column=2),
            s.weight(s.tiles.sections, 1, s.columns, section=0, column=2),
        ],
        [((3, s.d, s.k), F32), ((3, 1, s.k), F32)],
        products=3,
        moved=4,
    )


def _operand(w, dtype, device: Device):
    """A weight as the products take it: rounded to the activations' dtype, wide again where Mosaic takes only float32."""
    w = w.astype(dtype)
    return w if device.bf16_matmul else w.astype(F32)


def _forward(scalars, x, weights, static: _Static):
    norm_scale, norm_bias, w_qkv, b_qkv, w_out, b_out = weights
    device = static.launch.device
    if _is_fused(x, w_out.shape[0], static):
        operands = _operand(w_qkv, x.dtype, device), b_qkv, _operand(w_out, x.dtype, device), b_out
        return fused.forward(
            scalars,
            x,
            norm_scale,
            norm_bias,
            *operands,
            num_heads=static.num_heads,
            width=static.width,
            rate=static.rate,
            share=static.share,
            launch=static.launch,
        )
    qkv = _project(scalars, x, norm_scale, norm_bias, _operand(w_qkv, x.dtype, device), b_qkv, static)
    o = core.forward(qkv, num_heads=static.num_heads, launch=static.launch, width=static.width)
    return _output(scalars, o, x, _operand(w_out, x.dtype, device), b_out, static)


def _backward_wide(scalars, x, weights, dy, static: _Static):
    """`_backward` on float32 rows."""
    norm_scale, norm_bias, w_qkv, b_qkv, w_out, _ = weights
    device, launch, (b, t, d) = static.launch.device, static.launch, x.shape
    w_qkv, w_out = _operand(w_qkv, x.dtype, device), _operand(w_out, x.dtype, device)
    z, g = wide.prepare(scalars, x, dy, norm_scale, norm_bias, rate=static.rate, launch=launch)
    padded, k = z.shape[1], w_out.shape[0]

    def flat(value):
        return value.reshape(b * padded, value.shape[-1])

    multiply = partial(wide.multiply, dtype=x.dtype, launch=launch)
    gradients = partial(wide.gradients, dtype=x.dtype, launch=launch)
    qkv = [multiply([flat(z)], w_qkv[c, None], b_qkv[c], name="attention_project") for c in range(3)]
    do = multiply([flat(g)], w_out.T[None], name="attention_output_gradient")
    *dqkv, o = wide_core.backward(
        *(a.reshape(b, padded, k) for a in (*qkv, do)),
        t=t,
        num_heads=static.num_heads,
        width=static.width,
        dtype=x.dtype,
        launch=launch,
    )
    dqkv = [flat(a) for a in dqkv]
    dw_out, db_out = gradients(flat(o), flat(g), name="attention_output_weights")
    dw_qkv, db_qkv = zip(*(gradients(flat(z), a, name="attention_projection_weights") for a in dqkv), strict=True)
    dz = multiply(dqkv, w_qkv.swapaxes(1, 2), name="attention_input_gradient")
    dx, dscale, dbias = wide.finish(x, dy, dz.reshape(b, padded, d), norm_scale, share=static.share, launch=launch)
    return dx, (dscale[None], dbias[None], jnp.stack(dw_qkv), jnp.stack(db_qkv), dw_out, static.share * db_out)


def _is_fused(x, k: int, static: _Static) -> bool:
    """Whether the forward half is one kernel."""
    return fused.fits((*x.shape, k), static.num_heads, static.launch.device, x.dtype)


def _is_wide(x, k: int, static: _Static) -> bool:
    """Whether the backward half takes the kernels on float32 rows."""
    return wide_core.takes(x.shape[1], static.num_heads, k // static.num_heads, static.launch.device)


def _backward(scalars, x, weights, dy, static: _Static):
    norm_scale, norm_bias, w_qkv, b_qkv, w_out, _ = weights
    device = static.launch.device
    if _is_wide(x, w_out.shape[0], static):
        return _backward_wide(scalars, x, weights, dy, static)
    w_qkv, w_out = _operand(w_qkv, x.dtype, device), _operand(w_out, x.dtype, device)
    qkv = _project(scalars, x, norm_scale, norm_bias, w_qkv, b_qkv, static)
    do = _output_gradient(scalars, dy, w_out.T, static)
    dqkv, o = core.backward(qkv, do, num_heads=static.num_heads, launch=static.launch, width=static.width, with_o=True)
    dw_out, db_out = _output_weights(scalars, o, dy, static)
    dw_qkv, db_qkv = _projection_weights(scalars, x, norm_scale, norm_bias, dqkv, static)
    dx, dscale, dbias = _input_gradient(scalars, x, norm_scale, dqkv, dy, w_qkv.swapaxes(1, 2), static)
    return dx, (dscale[None], dbias[None], dw_qkv, db_qkv, dw_out, db_out)


def _chunks(x, limit: int) -> int:
    """Into how many equal parts of at most `limit` tokens the batch is cut, so that what lies in HBM between kernels is bounded."""
    b, t, _ = x.shape
    n = b // divisor(b, limit // t)
    return n if b // n * t * 4 >= min(limit, b * t) else 1  # a batch without fitting divisors stays whole


def _cut(x, n: int):
    return x.reshape(n, -1, *x.shape[1:])


def _first_rows(scalars, n: int, rows: int):
    """[n, 2]: the scalars of each part, whose first rows are `rows` apart."""
    return scalars + jnp.stack([jnp.zeros(n, jnp.int32), jnp.arange(n, dtype=jnp.int32) * rows], axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(8,))
def _half(scalars, x, norm_scale, norm_bias, w_qkv, b_qkv, w_out, b_out, static: _Static):
    n = 1 if _is_fused(x, w_out.shape[0], static) else _chunks(x, CHUNK_ROWS)
    weights = norm_scale, norm_bias, w_qkv, b_qkv, w_out, b_out
    if n == 1:
        return _forward(scalars, x, weights, static)
    parts = _first_rows(scalars, n, x.shape[0] // n * x.shape[1]), _cut(x, n)
    return lax.map(lambda part: _forward(part[0], part[1], weights, static), parts).reshape(x.shape)


def _half_forward(scalars, x, *rest):
    *weights, static = rest
    y = checkpoint_name(_half(scalars, x, *weights, static), "attention_half")
    return y, (scalars, x, *weights)


def _half_backward(static: _Static, residuals, dy):
    scalars, x, *weights = residuals
    wide_bytes = 2 if _is_wide(x, weights[4].shape[0], static) else 1
    n = _chunks(x, CHUNK_ROWS // wide_bytes)
    if n == 1:
        dx, gradients = _backward(scalars, x, weights, dy, static)
    else:
        parts = _first_rows(scalars, n, x.shape[0] // n * x.shape[1]), _cut(x, n), _cut(dy, n)

        def step(sums, part):
            scalars, x, dy = part
            dx, gradients = _backward(scalars, x, weights, dy, static)
            return jax.tree.map(jnp.add, sums, gradients), dx

        shapes = jax.eval_shape(lambda s, x, dy: _backward(s, x, weights, dy, static)[1], *(p[0] for p in parts))
        zeros = vary_alike(scalars, *(jnp.zeros(s.shape, s.dtype) for s in shapes))[1:]
        gradients, dx = lax.scan(step, zeros, parts)
        dx = dx.reshape(x.shape)
    dtypes = (a.dtype for a in residuals[2:])
    return None, dx, *(g.astype(dtype) for g, dtype in zip(gradients, dtypes, strict=True))


_half.defvjp(_half_forward, _half_backward)


def attention_half(
    x, norm_scale, norm_bias, w_qkv, b_qkv, w_out, b_out, *, num_heads, dropout=None, share=1.0, launch: Launch
) -> Any:
    """share * x + dropout(MSA(LN(x)) @ w_out + share * b_out) -> [B, T, D]; arguments and meaning as in `reference.py`.

    launch: from `kernels.launch`. Differentiable in all arrays; saves x and the weights only. ValueError for shapes or dtypes that
    do not fit together; NotImplementedError for a shape that no tiles fit.
    """
    _check(x, norm_scale, norm_bias, w_qkv, b_qkv, w_out, b_out, num_heads)
    rate = 0.0 if dropout is None else float(dropout.rate)
    key, row = (0, 0) if dropout is None or rate == 0.0 else (drop.site_key(dropout.key, drop.ATTENTION_OUT), dropout.row)
    scalars = jnp.stack([jnp.asarray(key, jnp.int32), jnp.asarray(row, jnp.int32)])
    width = w_out.shape[0] // num_heads
    lanes = core.head_lanes((*x.shape[:2], num_heads, width), launch.device, x.dtype)
    w_qkv, b_qkv, w_out = (_widen(w, axis, width, lanes) for w, axis in ((w_qkv, 2), (b_qkv, 1), (w_out, 0)))
    arrays = x, norm_scale[None], norm_bias[None], w_qkv, b_qkv[:, None], w_out, b_out[None]
    static = _Static(num_heads=num_heads, width=width, rate=rate, share=float(share), launch=launch)
    return _half(*vary_alike(scalars, *arrays), static)


def _widen(w, axis: int, width: int, lanes: int):
    """A weight whose axis N*H becomes N*lanes, zeros after each head; differentiation cuts them off again."""
    if width == lanes:
        return w
    heads = w.reshape(*w.shape[:axis], -1, width, *w.shape[axis + 1 :])
    pads = [(0, lanes - width if a == axis + 1 else 0) for a in range(heads.ndim)]
    return jnp.pad(heads, pads).reshape(*w.shape[:axis], -1, *w.shape[axis + 1 :])


def _check(x, norm_scale, norm_bias, w_qkv, b_qkv, w_out, b_out, num_heads):
    if x.ndim != 3 or min(x.shape) < 1 or x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"attention_half: x is {x.dtype}{list(x.shape)}; required float32 or bfloat16 [B, T, D]")
    d, k = x.shape[2], w_out.shape[0] if w_out.ndim else 0
    if num_heads < 1 or k == 0 or k % num_heads:
        raise ValueError(f"attention_half: w_out has {k} rows; required N*H for num_heads = {num_heads}")
    arrays = {"norm_scale": norm_scale, "norm_bias": norm_bias, "w_qkv": w_qkv, "b_qkv": b_qkv, "w_out": w_out, "b_out": b_out}
    required = {"norm_scale": (d,), "norm_bias": (d,), "w_qkv": (3, d, k), "b_qkv": (3, k), "w_out": (k, d), "b_out": (d,)}
    for name, array in arrays.items():
        if array.shape != required[name]:
            raise ValueError(f"attention_half: {name} has shape {array.shape}; required {required[name]} beside x {x.shape}")
