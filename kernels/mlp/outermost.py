"""The backward pass of the MLP half with hidden tiles outermost, for v2 and v3 where `backward.py` has room for few rows a step.

There each row tile streams both weights and their float32 sums through HBM, 157 MB for ViT-H/14, which takes longer than its
products. Here a hidden tile's weights and sums stay in VMEM while all rows stream by, 128 a step, and what is summed over hidden
tiles in HBM is dz: F/hidden times the rows instead of rows/128 times the weights. Three kernels; the equations stand in `tpu.py`:

    z = LN(x),  g = drop(dy)                                                  prepare, of float32_rows.py
    dz, dW1, dW2, db1, db2                                                    this file's
    dx = share dy + LN_back(dz),  and the sums for norm_scale and norm_bias   finish, likewise

z, g and dz are float32 rows, each image padded to whole registers, in the order of `float32_rows.unpacked`. The
products stand so that nothing of [rows, D] is transposed: hidden values lie along the rows, tokens along the lanes,

    a' = W1' z',  dh' = W2 g',  dW1' += da' z,  dW2 += h' g,  dz += da W1'

W1' is transposed once a hidden tile, dW1' back once, and da' a step.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.body import F32, dot, dropout, iota
from kernels.device import LANES, SUBLANES
from kernels.float32_rows import finish, prepare, token_at
from kernels.launch import call
from kernels.mlp.body import gelu, gelu_slope, keep, sum_by_tile
from kernels.mlp.plan import Outermost, Shape, half_of

_COLUMNS = 256  # of dz in one product


class _Refs(NamedTuple):
    """The kernel's arrays, in its order.

    z, g [128, D]; b_in [1, hidden, 1]; w_out [hidden, D]. w_in [D, F], dz [rows, D], dw_in and dw_out are in HBM. db_in [hidden,
    128] gathers over rows by row modulo 128, db_out [8, D] modulo 8. w_in_t [hidden, D] is W1', of_in and of_out [hidden, D] the
    sums dW1' and dW2; held [>= 2 hidden, 128] h' and da', or pieces of W1 on their way; da [128, hidden]; slots [2, 128, D] dz.
    """

    scalars: Any
    z: Any
    g: Any
    b_in: Any
    w_out: Any
    w_in: Any
    dz: Any
    dw_in: Any
    dw_out: Any
    db_in: Any
    db_out: Any
    w_in_t: Any
    of_in: Any
    of_out: Any
    held: Any
    da: Any
    slots: Any
    semaphores: Any


class _Rows:
    """The sums dz, two slots of 128 rows in turns: a step fetches its own when it begins, and needs it when it ends."""

    def __init__(self, refs: _Refs, step, i):
        self.refs, self.step, self.i, self.slot = refs, step, i, lax.rem(step, 2)

    def _copy(self, slot, i, *, load: bool):
        vmem, semaphores = self.refs.slots.at[slot], self.refs.semaphores
        hbm = self.refs.dz.at[pl.ds(pl.multiple_of(i * LANES, LANES), LANES)]
        if load:
            return pltpu.make_async_copy(hbm, vmem, semaphores.at[0, slot])
        return pltpu.make_async_copy(vmem, hbm, semaphores.at[1, slot])

    def fetch(self, first):
        """Begins to fetch this step's sums over the hidden tiles before this one, if it is not the first."""

        @pl.when(self.step >= 2)
        def _():
            # for the copy of two steps before, which used this slot; a wait needs its size alone
            self._copy(self.slot, self.i, load=False).wait()

        @pl.when(jnp.logical_not(first))
        def _():
            self._copy(self.slot, self.i, load=True).start()

    def ready(self, first):
        @pl.when(jnp.logical_not(first))
        def _():
            self._copy(self.slot, self.i, load=True).wait()

        return self.refs.slots.at[self.slot]

    def send(self, last):
        self._copy(self.slot, self.i, load=False).start()

        @pl.when(last)
        def _():
            for slot in range(2):
                self._copy(slot, self.i, load=False).wait()


def _kernel(*arrays, spec, t: Outermost, shape: Shape, padded: int):
    """One hidden tile times 128 rows. padded: rows of an image."""
    refs = _Refs(*arrays)
    j, i = pl.program_id(0), pl.program_id(1)
    tiles, steps, total = pl.num_programs(0), pl.num_programs(1), shape.b * padded
    rows = _Rows(refs, j * steps + i, i)
    dtype = jnp.bfloat16 if shape.itemsize == 2 else F32
    parts = range(0, t.hidden, LANES)

    @pl.when((j == 0) & (i == 0))
    def _():
        refs.db_out[...] = jnp.zeros_like(refs.db_out)

    if total % LANES:  # rows behind the last one hold anything at all, NaN included

        @pl.when(i == steps - 1)
        def _():
            exist = iota(LANES, 0) < total % LANES
            refs.z[...], refs.g[...] = jnp.where(exist, refs.z[...], 0.0), jnp.where(exist, refs.g[...], 0.0)

    rows.fetch(j == 0)

    @pl.when(i == 0)
    def _():
        _begin(refs, t, j)

    @pl.when(j == 0)
    def _():
        refs.db_out[...] += spec.residual_scale * sum_by_tile(refs.g[...])

    for k in parts:
        part, after = pl.ds(k, LANES), pl.ds(t.hidden + k, LANES)
        a = dot(refs.w_in_t[part], refs.z[...], dtype, (1, 1)) + refs.b_in[0, part]
        h, p = gelu(a, spec.gelu)
        da = dot(refs.w_out[part], refs.g[...], dtype, (1, 1)) * gelu_slope(a, h, p, spec.gelu)
        if spec.rate:
            columns = refs.scalars[3] + j * t.hidden + k + iota(LANES, 0)
            mask = keep(refs.scalars, 0, _global_rows(spec, shape, padded, i, dtype), columns, spec.rate)
            h, da = dropout(h, mask, spec.rate), dropout(da, mask, spec.rate)
        refs.held[part], refs.held[after], refs.da[:, part] = h, da, da.T
        refs.db_in[part] += da
    for k in parts:
        part, after = pl.ds(k, LANES), pl.ds(t.hidden + k, LANES)
        refs.of_in[part] = jnp.where(i == 0, 0.0, refs.of_in[part]) + dot(refs.held[after], refs.z[...], dtype)
        refs.of_out[part] = jnp.where(i == 0, 0.0, refs.of_out[part]) + dot(refs.held[part], refs.g[...], dtype)
    into = rows.ready(j == 0)
    into[...] = jnp.where(j == 0, 0.0, into[...]) + dot(refs.da[...], refs.w_in_t[...], dtype)
    rows.send((j == tiles - 1) & (i == steps - 1))

    @pl.when(i == steps - 1)
    def _():
        _end(refs, t, j)


class _Turns:
    """Pieces of a hidden tile's columns of W1 or dW1 on their way between HBM and `held`, whose two halves take turns: while one
    is transposed, the other is copied."""

    def __init__(self, refs: _Refs, hbm, t: Outermost, j, *, load: bool):
        d = refs.w_in.shape[0]
        half = half_of(d)
        self.refs, self.hbm, self.half, self.first, self.load = refs, hbm, half, j * t.hidden, load
        self.pieces = [(k, row, min(half, d - row)) for k in range(0, t.hidden, LANES) for row in range(0, d, half)]

    def vmem(self, n: int):
        return self.refs.held.at[pl.ds(n % 2 * self.half, self.pieces[n][2])]

    def copy(self, n: int):
        k, row, size = self.pieces[n]
        hbm = self.hbm.at[pl.ds(row, size), pl.ds(pl.multiple_of(self.first + k, LANES), LANES)]
        ends = (hbm, self.vmem(n)) if self.load else (self.vmem(n), hbm)
        return pltpu.make_async_copy(*ends, self.refs.semaphores.at[0, 2 + n % 2])


def _begin(refs: _Refs, t: Outermost, j):
    """W1' of a hidden tile, from its columns of W1; the sums begin."""
    turns = _Turns(refs, refs.w_in, t, j, load=True)
    turns.copy(0).start()
    for n, (k, row, size) in enumerate(turns.pieces):
        if n + 1 < len(turns.pieces):
            turns.copy(n + 1).start()
        turns.copy(n).wait()
        refs.w_in_t[k : k + LANES, row : row + size] = turns.vmem(n)[...].T
    refs.db_in[...] = jnp.zeros_like(refs.db_in)


def _end(refs: _Refs, t: Outermost, j):
    """The sums of a hidden tile to HBM, those of W1 turned back."""
    first = pl.multiple_of(j * t.hidden, LANES)
    out = pltpu.make_async_copy(refs.of_out, refs.dw_out.at[pl.ds(first, t.hidden)], refs.semaphores.at[1, 2])
    out.start()
    turns = _Turns(refs, refs.dw_in, t, j, load=False)
    for n, (k, row, size) in enumerate(turns.pieces):
        if n >= 2:
            turns.copy(n - 2).wait()
        turns.vmem(n)[...] = refs.of_in[k : k + LANES, row : row + size].T
        turns.copy(n).start()
    for n in range(len(turns.pieces) - 2, len(turns.pieces)):
        turns.copy(n).wait()
    out.wait()


def _global_rows(spec, shape: Shape, padded: int, i, dtype):
    """int32 [1, 128]: the rows of a step, counted over the tokens of all images; in the padding anything."""
    first = lax.div(i * LANES, padded)
    place = i * LANES - first * padded + iota(LANES, 1)
    passed = sum((place >= k * padded).astype(jnp.int32) for k in range(1, LANES // padded + 2))
    return (first + passed) * (spec.tokens or shape.t) + token_at(place - passed * padded, shape.t, dtype)


def backward(spec, t: Outermost, scalars, x, dy, scale, bias, w_in, b_in, w_out, *, into):
    """(dx, the gradients of the parameters in float32, in their order) of x and dy [B, T, D]; weights float32. into: where
    dW1 and dW2 belong, or None; the whole array is returned then."""
    b, tokens, d = x.shape
    shape = Shape(b, tokens, d, w_in.shape[1], x.dtype.itemsize)
    of_rows = jnp.stack([scalars[1], scalars[2], jnp.int32(0)])
    norm = scale.reshape(1, -1).astype(F32), bias.reshape(1, -1).astype(F32)
    z, g = prepare(of_rows, x, dy, norm, b, spec, "mlp_half_prepare_backward")
    dz, dw_in, dw_out, db_in, db_out = _products(spec, t, shape, scalars, z, g, w_in, b_in, w_out, into)
    dx, dscale, dbias = finish(of_rows, x, dy, dz[: b * z.shape[1]].reshape(z.shape), norm[0], spec, "mlp_half_finish_backward")
    return dx, (dscale, dbias, dw_in, db_in.sum(1), dw_out, db_out.sum(0))


def _products(spec, t: Outermost, shape: Shape, scalars, z, g, w_in, b_in, w_out, into):
    (b, padded, d), f = z.shape, shape.f
    steps, tiles = pl.cdiv(b * padded, LANES), f // t.hidden
    rows = pl.BlockSpec((LANES, d), lambda j, i, _: (i, 0))
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)

    def kernel(*arrays):
        _kernel(*arrays, spec=spec, t=t, shape=shape, padded=padded)

    square, tile = pltpu.VMEM((t.hidden, d), F32), (t.hidden, d)
    return call(
        kernel,
        launch=spec.launch.within(t.needs),
        name="mlp_half_backward",
        grid=(tiles, steps),
        in_specs=[
            rows,
            rows,
            pl.BlockSpec((1, t.hidden, 1), lambda j, i, _: (j, 0, 0), pipeline_mode=pl.Buffered(1)),
            pl.BlockSpec(tile, lambda j, i, _: (j, 0), pipeline_mode=pl.Buffered(1)),
            in_hbm,
        ],
        out_specs=[
            in_hbm,
            in_hbm,
            in_hbm,
            pl.BlockSpec((t.hidden, LANES), lambda j, i, _: (j, 0), pipeline_mode=pl.Buffered(1)),
            pl.BlockSpec((SUBLANES, d), lambda j, i, _: (0, 0)),
        ],
        out_shapes=[
            ((steps * LANES, d), F32),
            into[0] or ((d, f), F32),
            into[1] or ((f, d), F32),
            ((f, LANES), F32),
            ((SUBLANES, d), F32),
        ],
        semantics=("arbitrary", "arbitrary"),
        cost=t.cost(shape),
        scratch=[
            square,
            square,
            square,
            pltpu.VMEM((2 * max(t.hidden, half_of(d)), LANES), F32),
            pltpu.VMEM((LANES, t.hidden), F32),
            pltpu.VMEM((2, LANES, d), F32),
            pltpu.SemaphoreType.DMA((2, 4)),
        ],
        prefetch=1,
    )(scalars, z.reshape(-1, d), g.reshape(-1, d), b_in.astype(F32).reshape(tiles, t.hidden, 1), w_out, w_in)
