"""Products on Hopper GPUs with what follows them in the epilogue, in Pallas Mosaic GPU.

    out = epilogue(x @ w)       x [M, K], w [K, N], out [M, N] bfloat16; sums and epilogue in float32

A block of threads stays on its multiprocessor and takes one tile of the result after the other. One warpgroup loads (TMA) slices
of x and w into a ring of shared memory, two multiply (wgmma), and they take turns: while one is in the epilogue of its tile, the
tensor cores work for the other. Two neighbouring blocks (a cluster) take tiles below each other and share the slices of w.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import dropout as drop
from kernels.attention.hopper import parts
from kernels.attention.hopper.parts import COLUMNS, PARAMS, along, load, transposed
from kernels.attention.hopper.plan import PROCESSORS
from kernels.hopper.epilogue import Epilogue
from kernels.hopper.plan import DEEP, Tiles, tiles
from kernels.launch import vary_alike

COMPUTE = 2
ROWS = 64  # of a wgmma, and of what goes in or out at a time
LOADER, MULTIPLIER = 24, 240  # registers a thread
_SWIZZLE, _TILED = plgpu.SwizzleTransform(128), plgpu.TilingTransform((8, DEEP))


def _pair(shape, dtype):
    """Scratch under two names, as `attention.hopper.parts.buffer`."""
    flat = plgpu.SMEM(shape, dtype, transforms=(_SWIZZLE,))
    return plgpu.RefUnion(flat, plgpu.SMEM(shape, dtype, transforms=(_TILED, _SWIZZLE)))


class _Block:
    """A block of threads and its tiles of the result: what its warpgroups share, `load` of one of them and `multiply` of two."""

    def __init__(self, refs, e: Epilogue, t: Tiles, turned: bool):
        self.e, self.t, self.turned, refs = e, t, turned, list(refs)

        def following(there: bool) -> Any:
            return refs.pop(0) if there else None

        self.x, self.w = refs.pop(0), refs.pop(0)
        self.bias, self.beside = following(e.bias), following(e.beside)
        self.hashed, self.columns = following(bool(e.dropout)), following(bool(e.dropout))
        self.outputs = [refs.pop(0) for _ in range(e.outputs)]
        self.sums = following(e.sums)
        x_s, self.w_s, given, made, self.ready, self.free, self.arrived = refs
        (self.x_flat, self.x_tiled), (self.given_flat, self.given), (self.made_flat, self.made) = x_s, given, made
        (m, _), n = self.x.shape, self.outputs[0].shape[1]
        self.steps, self.across = self.x.shape[1] // DEEP, n // t.columns
        self.cluster, self.half, self.warpgroup = (lax.axis_index(name) for name in ("cluster", "half", "warpgroup"))
        self.clusters = PROCESSORS // t.cluster
        tiles = pl.cdiv(m, t.rows * t.cluster) * self.across
        self.count = (tiles - self.cluster + self.clusters - 1) // self.clusters  # tiles of this block
        self.mine = t.rows if t.alternate else t.rows // COMPUTE  # rows of a tile that a warpgroup multiplies
        # of a tile, one after the other
        self.pieces = [(r, c) for c in range(0, t.columns, DEEP) for r in range(0, self.mine, ROWS)]
        self.by_ring = e.beside and not t.given
        self.each = self.steps + (t.columns // DEEP if self.by_ring else 0)  # slots of the ring that a tile takes

    def place(self, i):
        """(first row, first column) of the block's i-th tile."""
        tile = self.cluster + i * self.clusters
        return (tile // self.across * self.t.cluster + self.half) * self.t.rows, lax.rem(tile, self.across) * self.t.columns

    def load(self):
        t, steps, each = self.t, self.steps, self.each
        plgpu.set_max_registers(LOADER, action="decrease")

        @pl.loop(0, self.count)
        def _tile(i):
            row, column = self.place(i)
            columns = pl.ds(column, t.columns)
            who = lax.rem(i, COMPUTE) * t.stages if t.alternate else 0

            @pl.loop(0, steps)
            def _step(k):
                slot, there = self.taken(i * each + k, who)
                deep = pl.ds(k * DEEP, DEEP)
                plgpu.copy_gmem_to_smem(self.x.at[pl.ds(row, t.rows), deep], self.x_flat.at[slot], there)
                if self.turned:  # what is summed over runs on from one matrix of w to the next, or the columns do
                    group, deep = k * DEEP // self.w.shape[2], pl.ds(lax.rem(k * DEEP, self.w.shape[2]), DEEP)
                    part = self.w.at[group, columns, deep]
                else:
                    part = self.w.at[column // self.w.shape[2], deep, pl.ds(lax.rem(column, self.w.shape[2]), t.columns)]
                plgpu.copy_gmem_to_smem(part, self.w_s.at[slot], there, collective_axes="half" if t.cluster > 1 else None)

            for k in range(steps, each):  # in the place of x what stands beside the tile, in two copies, as the barrier counts
                slot, there = self.taken(i * each + k, who)
                for r in (0, t.rows // 2):
                    part = self.beside.at[pl.ds(row + r, t.rows // 2), pl.ds(column + (k - steps) * DEEP, DEEP)]
                    plgpu.copy_gmem_to_smem(part, self.x_flat.at[slot, pl.ds(r, t.rows // 2)], there)

        # the neighbouring block signals barriers in this block's memory: this block stays until it has
        for back in range(t.stages, 0, -1):
            step = self.count * each - back
            pl.when(step >= 0)(lambda step=step: plgpu.barrier_wait(self.free.at[lax.rem(step, t.stages)]))

    def taken(self, step, who):
        """(the slot of the ring that a step takes, once it is free, its barrier)."""
        slot = lax.rem(step, self.t.stages)
        pl.when(step >= self.t.stages)(lambda: plgpu.barrier_wait(self.free.at[slot]))
        return slot, self.ready.at[who + slot]

    def multiply(self):
        t = self.t
        plgpu.set_max_registers(MULTIPLIER, action="increase")
        who = self.warpgroup * t.stages if t.alternate else 0

        @pl.loop(self.warpgroup if t.alternate else 0, self.count, step=COMPUTE if t.alternate else 1)
        def _tile(tile):
            row, column = self.place(tile)
            row = row if t.alternate else row + self.warpgroup * self.mine
            for i in range(min(t.given, len(self.pieces))) if self.e.beside else ():
                self.fetch(i, row, column)
            sums = pl.run_scoped(partial(self.run, tile, who), plgpu.WGMMAAccumulatorRef((self.mine, t.columns), jnp.float32))
            if len(self.pieces) * self.e.outputs % t.made:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.finish(sums, row, column, tile, who)

        plgpu.wait_smem_to_gmem(0)

    def run(self, tile, who, sums):
        """The product of a tile."""
        t, steps, each, free = self.t, self.steps, self.each, self.free

        @pl.loop(0, steps)
        def _step(k):
            slot = lax.rem(tile * each + k, t.stages)
            plgpu.barrier_wait(self.ready.at[who + slot])
            x = self.x_tiled.at[slot] if t.alternate else self.x_tiled.at[slot, pl.ds(self.warpgroup * self.mine, self.mine)]
            w = self.w_s.at[slot]
            plgpu.wgmma(sums, x, transposed(w) if self.turned else w)
            plgpu.wgmma_wait(1)
            pl.when(k > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(tile * each + k - 1, t.stages)]))

        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(free.at[lax.rem(tile * each + steps - 1, t.stages)])
        return sums[...]

    def fetch(self, i: int, row, column):
        """A piece of what stands beside the tile from `row` and `column` on."""
        slot, (r, c) = i % self.t.given, self.pieces[i]
        there = self.arrived.at[self.warpgroup * self.t.given + slot]
        source = self.beside.at[pl.ds(row + r, ROWS), pl.ds(column + c, DEEP)]
        plgpu.copy_gmem_to_smem(source, self.given_flat.at[self.warpgroup, slot], there)

    def finish(self, sums, row, column, tile, who):
        """The epilogue of a tile, piece by piece, and what it makes on its way out."""
        e, t, warpgroup, by_ring = self.e, self.t, self.warpgroup, self.by_ring
        written, bias, beside, mask, numbers = 0, None, None, None, None
        total: Any = None  # sums over rows of the first output

        def of_columns(ref, c):
            return load(ref.at[pl.ds(column + c, DEEP)], COLUMNS, optimized=False)

        of_rows = range(0, self.mine, ROWS) if e.dropout else ()
        hashed = {r: load(self.hashed.at[pl.ds(row + r, ROWS)], parts.ROWS, optimized=False) for r in of_rows}
        for i, (r, c) in enumerate(self.pieces):
            y = sums[r : r + ROWS, c : c + DEEP]
            if e.bias and r == 0:
                bias = along(of_columns(self.bias, c), y, 1)
            slot: Any = lax.rem(tile * self.each + self.steps + c // DEEP, t.stages) if by_ring else None
            if by_ring:
                if r == 0:
                    plgpu.barrier_wait(self.ready.at[who + slot])
                there = self.x_tiled.at[slot, pl.ds(r if t.alternate else warpgroup * self.mine + r, ROWS)]
                beside = load(there, plgpu.Layout.WGMMA).astype(jnp.float32)
            elif e.beside:
                plgpu.barrier_wait(self.arrived.at[warpgroup * t.given + i % t.given])
                beside = load(self.given.at[warpgroup, i % t.given], plgpu.Layout.WGMMA).astype(jnp.float32)
            if e.dropout:
                numbers = of_columns(self.columns, c) if r == 0 else numbers
                mask = drop.keep(along(hashed[r], y, 0), along(numbers, y, 1), e.dropout)
            values = e(y, bias, beside, mask)
            if e.sums:
                more = parts.column_sums(values[0])
                total = more if r == 0 else total + more
                if r + ROWS == self.mine:
                    self.sums[row // self.mine, (column + c) // DEEP] = total
            for ref, value in zip(self.outputs, values, strict=True):
                own = written % t.made
                plgpu.wait_smem_to_gmem(t.made - 1, wait_read_only=True)
                self.made.at[warpgroup, own][...] = value.astype(ref.dtype)
                plgpu.commit_smem()
                if by_ring and ref is self.outputs[0] and r + ROWS == self.mine:  # all threads have met, and so have read it
                    plgpu.barrier_arrive(self.free.at[slot])
                plgpu.copy_smem_to_gmem(self.made_flat.at[warpgroup, own], ref.at[pl.ds(row + r, ROWS), pl.ds(column + c, DEEP)])
                written += 1
            if e.beside and not by_ring and i + t.given < len(self.pieces):
                self.fetch(i + t.given, row, column)


def _kernel(*refs, e: Epilogue, t: Tiles, turned: bool):
    block = _Block(refs, e, t, turned)
    pl.when(block.warpgroup == COMPUTE)(block.load)
    pl.when(block.warpgroup < COMPUTE)(block.multiply)


def product(x, w, bias=None, beside=None, mask=None, *, e: Epilogue, turned: bool = False, t: Tiles | None = None) -> tuple:
    """What `e` makes of x [M, K] @ w [K, N] in x's dtype, bfloat16: arrays [M, N]; and sums [N] float32 where e.sums.

    w may be [G, K, n], G matrices whose columns stand beside each other, N = G n. bias [N] where e.bias, beside [M, N] like x where
    e.beside, mask where e.dropout: `kernels.dropout.vectors` of [M, N]. turned: the product is with w's transpose; w is [N, K], or
    [G, N, k], K = G k. w is rounded to x's dtype. t: the tiles, by default those of the table. `plan.refuses` says what is not
    taken.
    """
    w = (w if w.ndim == 3 else w[None]).astype(x.dtype)
    rest = [] if bias is None else [bias.reshape(-1).astype(jnp.float32)]
    t = t or tiles(x.shape[1], w.shape[1 if turned else 2], e.kind)  # columns of what a tile lies in
    if mask is not None:  # rows are read as whole tiles, behind the last one, too
        hashed, columns = mask
        mask = jnp.pad(hashed, (0, -hashed.shape[0] % (t.rows * t.cluster))), columns
    arrays = vary_alike(x, w, *rest, *([beside] if e.beside else []), *(mask or ()))
    out = _product(*arrays, e=e, t=t, turned=turned)
    return vary_alike(*out, x)[:-1]


@partial(jax.jit, static_argnames=("e", "t", "turned"))
def _product(x, w, *rest, e: Epilogue, t: Tiles, turned: bool):
    m, n = x.shape[0], w.shape[1] if turned else w.shape[0] * w.shape[2]
    out = jax.ShapeDtypeStruct((m, n), x.dtype)
    w_shape = (t.stages, t.columns, DEEP) if turned else (t.stages, DEEP, t.columns)
    of_strips = -(-m // (t.rows * t.cluster)) * t.cluster * (1 if t.alternate else COMPUTE), n // DEEP, parts.WARPS * DEEP
    sums = [jax.ShapeDtypeStruct(of_strips, jnp.float32)] * e.sums
    free: dict[str, Any] = {"num_arrivals": 1 if t.alternate else COMPUTE, "num_barriers": t.stages}
    made = plgpu.kernel(
        partial(_kernel, e=e, t=t, turned=turned),
        out_type=(*((out,) * e.outputs), *sums),
        scratch_types=[
            _pair((t.stages, t.rows, DEEP), x.dtype),
            plgpu.SMEM(w_shape, x.dtype, transforms=(_TILED, _SWIZZLE)),
            _pair((COMPUTE, t.given, ROWS, DEEP) if e.beside and t.given else (COMPUTE, 1, 8, DEEP), x.dtype),
            _pair((COMPUTE, t.made, ROWS, DEEP), x.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=t.stages * (COMPUTE if t.alternate else 1)),
            plgpu.ClusterBarrier(collective_axes=("half",), **free) if t.cluster > 1 else plgpu.Barrier(**free),
            plgpu.Barrier(num_barriers=COMPUTE * max(t.given, 1)),
        ],
        grid=(PROCESSORS // t.cluster,),
        grid_names=("cluster",),
        cluster=(t.cluster,),
        cluster_names=("half",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        kernel_name="product_hopper",
        compiler_params=PARAMS,
    )(x, w, *rest)
    if not e.sums:
        return made
    *made, strips = made
    return *made, strips.reshape(-1, n // DEEP, parts.WARPS, DEEP).sum((0, 2)).reshape(n)
