"""The MLP half of a block (paper Eq. 3) as two TPU kernels; `reference.py` beside this file is the specification.

    forward     z = LN(x),  a = z W1 + b1,  h = drop(GELU(a)),  y = share x + drop(h W2 + share b2)
    backward    g = drop(dy),  dh = drop(g W2'),  da = dh GELU'(a)
                dW2 = h' g,  db2 = share sum g,  dW1 = z' da,  db1 = sum da,  dx = share dy + LN_back(da W1')

x [B, T, D] is seen as [R, D] rows (free where T is a multiple of 8, a copy by XLA elsewhere). The hidden values [R, F] live only in VMEM,
one tile of rows times one tile of F at a time; backward starts from x again, so x and the weights are all that is saved. Matrix
operands are in x's dtype (float32 on v2 and v3, whose MXU rounds them itself), sums and everything between in float32.

The grid of both kernels is (row tiles, hidden tiles), rows outermost. Where VMEM holds both weights (v5 and later) they stay in it and
HBM sees each array once; elsewhere hidden tiles of them are streamed, and in the backward pass so are the sums dW1 and dW2, by
hand: read, added to and written back while the neighbouring tiles are computed. The row tiles are large enough for that not to matter.

The backward kernel works on transposes, hidden rows and token columns: z and g are transposed once a row tile, dz back once, and the
five products a hidden tile needs then take their operands as they lie or, where the MXU loads them transposed anyway, nearly so.
GELU: Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import dropout as drop
from kernels.device import LANES, Device
from kernels.launch import Launch, call, vary_alike
from kernels.layer_norm.tpu import normalise, normalise_back

_CHUNK = 128  # rows normalised and transposed at a time: one square of the transpose unit
_ONES = 16  # rows of ones under z': their product with da is db1, without a reduction over lanes; one bfloat16 tile
_SPAN = 128  # hidden values per token recomputed at a time
_ROW_TILES = (1024, 768, 640, 512, 384, 256, 128)
_HIDDEN_TILES = (512, 384, 256, 128)
_VMEM_SHARE = 0.85  # the rest is the compiler's: spilled registers, masks, copies of odd operands


class Shape(NamedTuple):
    """What the tiles depend on. itemsize: bytes of an element of x."""

    r: int
    d: int
    f: int
    itemsize: int


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Of one kernel. rows, hidden: a grid step's part of R and F. resident: the whole weights (and their gradients) stay in VMEM."""

    rows: int
    hidden: int
    resident: bool


@dataclass(frozen=True, kw_only=True)
class Tiles:
    forward: Tiling
    backward: Tiling


def _vmem(shape: Shape, device: Device, t: Tiling, *, backward: bool) -> int:
    """Bytes of VMEM a kernel takes: blocks (two of each that streams), scratch, and the float32 hidden tiles it has in flight."""
    d, operand = -(-shape.d // LANES) * LANES, shape.itemsize if device.bf16_matmul else 4
    hidden = -(-t.hidden // LANES) * LANES
    whole = -(-shape.f // t.hidden) * hidden
    weights = 2 * d * operand * (whole if t.resident else 2 * hidden)
    if backward:
        sums = 2 * d * 4 * (whole if t.resident else 2 * hidden)
        return t.rows * d * (6 * shape.itemsize + 2 * operand + 4) + weights + sums + t.rows * hidden * 4 * 5 + 6 * d * 4 * _CHUNK
    return t.rows * d * (4 * shape.itemsize + operand + 4) + weights + t.rows * hidden * 4 * 3


def _limit(shape: Shape, device: Device, t: Tiling, *, backward: bool) -> int:
    """The kernel's VMEM limit: all of a small VMEM; of a large one what it needs, the rest is XLA's to keep neighbours' arrays in."""
    return min(device.vmem_bytes, max(16 * 2**20, int(_vmem(shape, device, t, backward=backward) / _VMEM_SHARE)))


def tiles(shape: Shape, device: Device) -> Tiles:
    """The only choice of tiles. NotImplementedError, with the reason, where no tiling fits the device.

    Resident weights first, then many rows (each row tile reads the weights once), then wide hidden tiles.
    """
    hidden = [h for h in _HIDDEN_TILES if shape.f % h == 0] or [shape.f]
    rows = [m for m in _ROW_TILES if m <= shape.r] or [_ROW_TILES[-1]]

    def first(backward):
        for resident in (True, False):
            for m in rows:
                if resident and m > 512:
                    continue  # longer tiles gain nothing once the weights stay
                for h in hidden:
                    t = Tiling(rows=m, hidden=h, resident=resident)
                    if not resident and (shape.f == h or (m < 256 <= shape.r)):
                        continue
                    if _vmem(shape, device, t, backward=backward) <= _VMEM_SHARE * device.vmem_bytes:
                        return t
        raise NotImplementedError(
            f"mlp_half: no tiling of D={shape.d}, F={shape.f} fits the {device.vmem_bytes >> 20} MiB of VMEM of {device.name}; "
            "a hidden width that is a multiple of 128 can be tiled, or use the reference"
        )

    return Tiles(forward=first(False), backward=first(True))


def cost(shape: Shape, t: Tiling, *, backward: bool) -> pl.CostEstimate:
    """FLOPs, transcendentals and bytes of HBM traffic of one pass."""
    r, d, f, itemsize = shape
    passes = 1 if t.resident else -(-r // t.rows)
    weights = 2 * d * f * (itemsize * passes + (4 * (2 * passes - 1) if backward else 0))
    products = 5 if backward else 2
    return pl.CostEstimate(
        flops=products * 2 * r * d * f, transcendentals=r * f, bytes_accessed=(3 if backward else 2) * r * d * itemsize + weights
    )


@dataclass(frozen=True, kw_only=True)
class _Spec:
    """Everything static: the static argument of the custom_vjp."""

    launch: Launch
    gelu: str
    rate: float
    share: float


# --- pieces of kernel bodies ---------------------------------------------------------------------------------------------------------


def _dot(a, b, x_dtype, contract=(1, 0)):
    """As `launch.dot`, but the operands are already what the MXU takes; bfloat16 models are one pass even where they lie in float32."""
    precision = lax.Precision.DEFAULT if x_dtype == jnp.bfloat16 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _gelu(a, kind):
    """GELU(a) and what its slope needs, float32."""
    if kind == "tanh":
        t = jnp.tanh(math.sqrt(2 / math.pi) * a * (1 + 0.044715 * a * a))
        return 0.5 * a * (1 + t), t
    phi = 0.5 * (1 + lax.erf(a * math.sqrt(0.5)))
    return a * phi, phi


def _gelu_slope(a, t, kind):
    """dGELU/da at a, where t is what `_gelu` returned beside the value."""
    if kind == "tanh":
        return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * (math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * a * a))
    return t + a * jnp.exp(-0.5 * a * a) * (1 / math.sqrt(2 * math.pi))


def _keep(scalars, site, shape, rows_axis, first_row, first_column, rate):
    """The dropout mask of a block whose rows run along rows_axis. scalars: hidden key, output key, global row, global column."""
    columns_axis = 1 - rows_axis
    vector = lambda axis, n: lax.broadcasted_iota(jnp.int32, tuple(n if i == axis else 1 for i in range(2)), axis)  # noqa: E731
    rows = scalars[2] + first_row + vector(rows_axis, shape[rows_axis])
    columns = first_column + vector(columns_axis, shape[columns_axis])
    return drop.keep(drop.row_hash(scalars[site], rows), columns, rate)


def _columns(ref, j, t: Tiling):
    """Hidden tile j of a [D, F] block, all of which is there if the weights are resident."""
    return ref[:, pl.ds(pl.multiple_of(j * t.hidden, t.hidden), t.hidden)] if t.resident and ref.shape[1] > t.hidden else ref[...]


def _rows(ref, j, t: Tiling):
    return ref[pl.ds(pl.multiple_of(j * t.hidden, t.hidden), t.hidden)] if t.resident and ref.shape[0] > t.hidden else ref[...]


def _loop(count, stride, body):
    """body(first) for first = 0, stride, 2 stride ...: a loop, so that the registers of one turn are free for the next."""
    if count == 1:
        body(0)
    else:
        lax.fori_loop(0, count, lambda c, _: body(c * stride), None)


def _chunks(rows, body):
    """body(first row) for every chunk of a row tile."""
    _loop(rows // _CHUNK, _CHUNK, lambda r: body(pl.multiple_of(r, _CHUNK)))


# --- forward -------------------------------------------------------------------------------------------------------------------------


def _forward_kernel(scalars, x, scale, bias, w_in, b_in, w_out, b_out, y, z, acc, *, spec: _Spec, t: Tiling):
    """One row tile times one hidden tile. z [rows, D] the normalised rows, acc [rows, D] float32 the sum over hidden tiles."""
    i, j = pl.program_id(0), pl.program_id(1)
    keep_scale = 1 / (1 - spec.rate)

    @pl.when(j == 0)
    def _():
        def chunk(r):
            at = pl.ds(r, _CHUNK)
            n, _ = normalise(x[at].astype(jnp.float32))
            z[at] = (n * scale[...] + bias[...]).astype(z.dtype)
            acc[at] = jnp.broadcast_to(spec.share * b_out[...], (_CHUNK, acc.shape[1]))

        _chunks(t.rows, chunk)

    a = _dot(z[...], _columns(w_in, j, t), x.dtype) + b_in[0]
    h, _ = _gelu(a, spec.gelu)
    if spec.rate:
        mask = _keep(scalars, 0, h.shape, 0, i * t.rows, scalars[3] + j * t.hidden, spec.rate)
        h = jnp.where(mask, h * keep_scale, 0.0)
    acc[...] += _dot(h.astype(z.dtype), _rows(w_out, j, t), x.dtype)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        def chunk(r):
            at = pl.ds(r, _CHUNK)
            out = acc[at]
            if spec.rate:
                out = jnp.where(_keep(scalars, 1, out.shape, 0, i * t.rows + r, 0, spec.rate), out * keep_scale, 0.0)
            y[at] = (spec.share * x[at].astype(jnp.float32) + out).astype(y.dtype)

        _chunks(t.rows, chunk)


class _Operands(NamedTuple):
    """The arrays as the kernels take them: rows flat and at least one tile of them, weights in the MXU's dtype, vectors as [1, D]."""

    x: jax.Array
    scale: jax.Array
    bias: jax.Array
    w_in: jax.Array
    w_out: jax.Array


def _flat(x):
    x = x.reshape(-1, x.shape[-1])
    return jnp.pad(x, ((0, max(0, _CHUNK - x.shape[0])), (0, 0)))  # fewer rows than the smallest tile: some kilobytes at most


def _operands(spec, x, scale, bias, w_in, w_out) -> _Operands:
    dtype = x.dtype if spec.launch.device.bf16_matmul else jnp.float32
    vector = lambda v: v[None].astype(jnp.float32)  # noqa: E731
    return _Operands(_flat(x), vector(scale), vector(bias), w_in.astype(dtype), w_out.astype(dtype))


def _weight_specs(t: Tiling, d, f):
    if t.resident:
        once = pl.Buffered(1)
        return (
            pl.BlockSpec((d, f), lambda i, j, _: (0, 0), pipeline_mode=once),
            pl.BlockSpec((f, d), lambda i, j, _: (0, 0), pipeline_mode=once),
        )
    return pl.BlockSpec((d, t.hidden), lambda i, j, _: (0, j)), pl.BlockSpec((t.hidden, d), lambda i, j, _: (j, 0))


def _shape(x, w_in) -> Shape:
    return Shape(x.size // x.shape[-1], x.shape[-1], w_in.shape[1], x.dtype.itemsize)


def _forward(spec: _Spec, scalars, x, scale, bias, w_in, b_in, w_out, b_out):
    shape = _shape(x, w_in)
    t = tiles(shape, spec.launch.device).forward
    ops = _operands(spec, x, scale, bias, w_in, w_out)
    d, f, tiles_f = shape.d, shape.f, shape.f // t.hidden
    row, vector = pl.BlockSpec((t.rows, d), lambda i, j, _: (i, 0)), pl.BlockSpec((1, d), lambda i, j, _: (0, 0))
    w_in_spec, w_out_spec = _weight_specs(t, d, f)
    (y,) = call(
        partial(_forward_kernel, spec=spec, t=t),
        launch=spec.launch,
        name="mlp_half_forward",
        grid=(pl.cdiv(shape.r, t.rows), tiles_f),
        in_specs=[
            row,
            vector,
            vector,
            w_in_spec,
            pl.BlockSpec((1, 1, t.hidden), lambda i, j, _: (j, 0, 0)),
            w_out_spec,
            vector,
        ],
        out_specs=[row],
        out_shapes=[(ops.x.shape, x.dtype)],
        semantics=("parallel", "arbitrary"),
        cost=cost(shape, t, backward=False),
        vmem_bytes=_limit(shape, spec.launch.device, t, backward=False),
        scratch=[pltpu.VMEM((t.rows, d), ops.w_in.dtype), pltpu.VMEM((t.rows, d), jnp.float32)],
        prefetch=1,
    )(
        scalars,
        ops.x,
        ops.scale,
        ops.bias,
        ops.w_in,
        b_in.astype(jnp.float32).reshape(tiles_f, 1, t.hidden),
        ops.w_out,
        b_out[None].astype(jnp.float32),
    )
    # Named inside the rule, so that a rematerialisation policy can choose to keep them.
    y = checkpoint_name(y[: shape.r].reshape(x.shape), "mlp_half_out")
    return y, (scalars, checkpoint_name(x, "mlp_half_in"), scale, bias, w_in, b_in, w_out, b_out)


# --- backward ------------------------------------------------------------------------------------------------------------------------


class _Sums:
    """The float32 sums of dW1 and dW2, hidden tile by hidden tile; kernel-side only.

    Resident: slot j is hidden tile j, written to HBM during the last row tile. Streamed: two slots take turns; a tile's earlier sum is
    fetched one step ahead, and the new one written back behind the step, both while the MXU works.
    """

    def __init__(self, hbm, slots, semaphores, t: Tiling, i, j):
        self.hbm, self.slots, self.t, self.i, self.j = hbm, slots, t, i, j
        self.loads, self.stores = semaphores.at[0], semaphores.at[1]
        self.rows, self.tiles = pl.num_programs(0), pl.num_programs(1)
        self.step = i * self.tiles + j
        self.slot = j if t.resident else lax.rem(self.step, 2)

    def _copies(self, j, slot, *, load):
        at = pl.ds(pl.multiple_of(j * self.t.hidden, self.t.hidden), self.t.hidden)
        pairs = ((self.slots[0].at[slot], self.hbm[0].at[:, at]), (self.slots[1].at[slot], self.hbm[1].at[at]))
        semaphores = self.loads if load else self.stores
        for k, (vmem, hbm) in enumerate(pairs):
            source, target = (hbm, vmem) if load else (vmem, hbm)
            yield pltpu.make_async_copy(source, target, semaphores.at[0 if self.t.resident else slot, k])

    def prefetch(self):
        """Frees the other slot and starts to fetch the next step's sums into it. Anywhere between two adds."""
        if self.t.resident:
            return

        @pl.when(self.step > 0)
        def _():
            for copy in self._copies(lax.rem(self.j + self.tiles - 1, self.tiles), 1 - self.slot, load=False):
                copy.wait()

        follows = self.j + 1 < self.tiles

        @pl.when(jnp.where(follows, self.i > 0, self.i + 1 < self.rows))
        def _():
            for copy in self._copies(jnp.where(follows, self.j + 1, 0), 1 - self.slot, load=True):
                copy.start()

    def slots_ready(self):
        """The two slots of this step, holding the sums of the row tiles before this one."""

        @pl.when(self.i == 0)
        def _():
            for slots in self.slots:
                slots[self.slot] = jnp.zeros(slots.shape[1:], slots.dtype)

        if not self.t.resident:

            @pl.when(self.i > 0)
            def _():
                for copy in self._copies(self.j, self.slot, load=True):
                    copy.wait()

        return self.slots[0].at[self.slot], self.slots[1].at[self.slot]

    def send(self):
        """Sends the sums to HBM where they are due, and at the end of the grid waits for the last of them."""
        last = self.i + 1 == self.rows

        @pl.when(last if self.t.resident else True)
        def _():
            for copy in self._copies(self.j, self.slot, load=False):
                copy.start()

        @pl.when(last & (self.j + 1 == self.tiles))
        def _():
            for j in range(self.slots[0].shape[0] if self.t.resident else 1):
                for copy in self._copies(j if self.t.resident else self.j, j if self.t.resident else self.slot, load=False):
                    copy.wait()


def _backward_kernel(
    scalars, x, dy, scale, bias, w_in, w_in_t, b_in, w_out, dx, dw_in, dw_out, db_in, db_out, dscale, dbias, zt, gt, dzt, ht, dat, slots_in, slots_out, sems,
    *, spec: _Spec, t: Tiling, r_total: int,
):  # fmt: skip
    """One row tile times one hidden tile. zt [D+, rows] and gt [D, rows] are z' (ones below) and g', dzt [D, rows] the float32 sum of dz'.

    dw_in, dw_out are in HBM. db_in [F/hidden, 1, hidden], db_out, dscale, dbias [1, D] gather in place over the whole grid.
    """
    i, j = pl.program_id(0), pl.program_id(1)
    d = dzt.shape[0]
    keep_scale = 1 / (1 - spec.rate)
    sums = _Sums((dw_in, dw_out), (slots_in, slots_out), sems, t, i, j)

    def valid(r):  # rows beyond the array hold anything at all, NaN included: nothing of them may reach a sum
        return i * t.rows + r + lax.broadcasted_iota(jnp.int32, (_CHUNK, 1), 0) < r_total

    @pl.when((i == 0) & (j == 0))
    def _():
        for ref in (db_in, db_out, dscale, dbias):
            ref[...] = jnp.zeros_like(ref)
        zt[d:] = jnp.ones_like(zt[d:])

    @pl.when(j == 0)
    def _():
        def chunk(r):
            at = pl.ds(r, _CHUNK)
            n, _ = normalise(jnp.where(valid(r), x[at].astype(jnp.float32), 0.0))
            g = jnp.where(valid(r), dy[at].astype(jnp.float32), 0.0)
            if spec.rate:
                g = jnp.where(_keep(scalars, 1, g.shape, 0, i * t.rows + r, 0, spec.rate), g * keep_scale, 0.0)
            db_out[...] += spec.share * jnp.sum(g, axis=0, keepdims=True)
            zt[:d, at] = (n * scale[...] + bias[...]).T.astype(zt.dtype)
            gt[:, at] = g.T.astype(gt.dtype)
            dzt[:, at] = jnp.zeros((d, _CHUNK), jnp.float32)

        _chunks(t.rows, chunk)

    first, span = (j * t.hidden if t.resident else 0), min(t.hidden, _SPAN)

    def hidden(k):
        """Stage one, a span of the hidden tile: recompute a and h, and from dh their gradients; only h and da are kept."""
        at = pl.ds(pl.multiple_of(k, span), span)
        of = pl.ds(pl.multiple_of(first + k, span), span)
        a = _dot(w_in_t[of], zt[:d], x.dtype) + b_in[0, at]
        h, saved = _gelu(a, spec.gelu)
        da = _dot(w_out[of], gt[...], x.dtype) * _gelu_slope(a, saved, spec.gelu)
        if spec.rate:
            mask = _keep(scalars, 0, h.shape, 1, i * t.rows, scalars[3] + j * t.hidden + k, spec.rate)
            h, da = jnp.where(mask, h * keep_scale, 0.0), jnp.where(mask, da * keep_scale, 0.0)
        ht[at], dat[at] = h.astype(ht.dtype), da.astype(dat.dtype)

    _loop(t.hidden // span, span, hidden)
    sums.prefetch()
    dzt[...] += _dot(_columns(w_in, j, t), dat[...], x.dtype)
    into_in, into_out = sums.slots_ready()
    into_in[...] += _dot(zt[:d], dat[...], x.dtype, (1, 1))
    db_in[j] += _dot(zt[d:], dat[...], x.dtype, (1, 1))[zt.shape[0]-d-1 :]
    into_out[...] += _dot(ht[...], gt[...], x.dtype, (1, 1))
    sums.send()

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        def chunk(r):
            at = pl.ds(r, _CHUNK)
            n, rsd = normalise(jnp.where(valid(r), x[at].astype(jnp.float32), 0.0))
            dz = dzt[:, at].T
            dscale[...] += jnp.sum(dz * n, axis=0, keepdims=True)
            dbias[...] += jnp.sum(dz, axis=0, keepdims=True)
            dx[at] = (spec.share * dy[at].astype(jnp.float32) + normalise_back(dz * scale[...], n, rsd)).astype(dx.dtype)

        _chunks(t.rows, chunk)


def _backward(spec: _Spec, saved, dy):
    scalars, x, scale, bias, w_in, b_in, w_out, b_out = saved
    shape = _shape(x, w_in)
    t = tiles(shape, spec.launch.device).backward
    ops = _operands(spec, x, scale, bias, w_in, w_out)
    d, f, tiles_f = shape.d, shape.f, shape.f // t.hidden
    row, vector = pl.BlockSpec((t.rows, d), lambda i, j, _: (i, 0)), pl.BlockSpec((1, d), lambda i, j, _: (0, 0))
    w_in_spec, w_out_spec = _weight_specs(t, d, f)
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    slots = tiles_f if t.resident else 2
    dtype = ops.w_in.dtype
    dx, dw_in, dw_out, db_in, db_out, dscale, dbias = call(
        partial(_backward_kernel, spec=spec, t=t, r_total=shape.r),
        launch=spec.launch,
        name="mlp_half_backward",
        grid=(pl.cdiv(shape.r, t.rows), tiles_f),
        in_specs=[row, row, vector, vector, w_in_spec, w_out_spec, pl.BlockSpec((1, t.hidden, 1), lambda i, j, _: (j, 0, 0)), w_out_spec],
        out_specs=[row, in_hbm, in_hbm, pl.BlockSpec((tiles_f, 1, t.hidden), lambda i, j, _: (0, 0, 0)), vector, vector, vector],
        out_shapes=[
            (ops.x.shape, x.dtype),
            ((d, f), jnp.float32),
            ((f, d), jnp.float32),
            ((tiles_f, 1, t.hidden), jnp.float32),
            *[((1, d), jnp.float32)] * 3,
        ],
        semantics=("arbitrary", "arbitrary"),
        cost=cost(shape, t, backward=True),
        vmem_bytes=_limit(shape, spec.launch.device, t, backward=True),
        scratch=[
            pltpu.VMEM((-(-d // _ONES) * _ONES + _ONES, t.rows), dtype),
            pltpu.VMEM((d, t.rows), dtype),
            pltpu.VMEM((d, t.rows), jnp.float32),
            pltpu.VMEM((t.hidden, t.rows), dtype),
            pltpu.VMEM((t.hidden, t.rows), dtype),
            pltpu.VMEM((slots, d, t.hidden), jnp.float32),
            pltpu.VMEM((slots, t.hidden, d), jnp.float32),
            pltpu.SemaphoreType.DMA((2, 2, 2)),
        ],
        prefetch=1,
    )(
        scalars,
        ops.x,
        _flat(dy),
        ops.scale,
        ops.bias,
        ops.w_in,
        ops.w_in.T,
        b_in.astype(jnp.float32).reshape(tiles_f, t.hidden, 1),
        ops.w_out,
    )
    found = (dscale[0], dbias[0], dw_in, db_in.reshape(f), dw_out, db_out[0])
    found = [a.astype(b.dtype) for a, b in zip(found, (scale, bias, w_in, b_in, w_out, b_out), strict=True)]
    return None, dx[: shape.r].reshape(x.shape), *found


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp_half(spec, scalars, x, scale, bias, w_in, b_in, w_out, b_out):
    return _forward(spec, scalars, x, scale, bias, w_in, b_in, w_out, b_out)[0]


_mlp_half.defvjp(_forward, _backward)


def _check(x, norm_scale, norm_bias, w_in, b_in, w_out, b_out, gelu, dropout):
    if x.ndim != 3 or x.size == 0:
        raise ValueError(f"x has shape {x.shape}; mlp_half needs [B, T, D] with at least one row")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"x is {x.dtype}; the kernel takes float32 or bfloat16: cast it, or use the reference")
    d, f = x.shape[-1], w_in.shape[-1]
    needed = {"norm_scale": (d,), "norm_bias": (d,), "w_in": (d, f), "b_in": (f,), "w_out": (f, d), "b_out": (d,)}
    given = dict(zip(needed, (norm_scale, norm_bias, w_in, b_in, w_out, b_out), strict=True))
    for name, a in given.items():
        if a.shape != needed[name]:
            raise ValueError(f"{name} has shape {a.shape}; x of shape {x.shape} and w_in of shape {w_in.shape} need {needed[name]}")
    if gelu not in ("tanh", "erf"):
        raise ValueError(f"gelu={gelu!r}; known: 'tanh', 'erf'")
    if dropout is not None and not 0.0 <= dropout.rate < 1.0:
        raise ValueError(f"dropout.rate is {dropout.rate}; it must be in [0, 1)")


def mlp_half(x, norm_scale, norm_bias, w_in, b_in, w_out, b_out, *, gelu="tanh", dropout=None, share=1.0, launch: Launch):
    """The MLP half of a block, as `reference.mlp_half` (shapes and meaning there), in one kernel forward and one backward.

    launch: where the kernels run. Differentiable in every array. ValueError for input the op does not take; NotImplementedError for
    widths that no tiling fits on the device.
    """
    _check(x, norm_scale, norm_bias, w_in, b_in, w_out, b_out, gelu, dropout)
    rate = 0.0 if dropout is None else float(dropout.rate)
    scalars = jnp.zeros(4, jnp.int32)
    if dropout is not None and rate:
        sites = (drop.site_key(dropout.key, drop.MLP_HIDDEN), drop.site_key(dropout.key, drop.MLP_OUT))
        scalars = jnp.stack([jnp.asarray(s, jnp.int32) for s in (*sites, dropout.row, dropout.column)])
    spec = _Spec(launch=launch, gelu=gelu, rate=rate, share=float(share))
    arrays = vary_alike(scalars, x, norm_scale, norm_bias, w_in, b_in, w_out, b_out)
    return _mlp_half(spec, *arrays)
