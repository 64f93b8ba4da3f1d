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


def _kernel(*refs, e: Epilogue, t: Tiles, turned: bool):
    refs = list(refs)
    x_ref, w_ref = refs[:2]
    del refs[:2]
    bias_ref: Any = refs.pop(0) if e.bias else None
    beside_ref: Any = refs.pop(0) if e.beside else None
    hashed_ref: Any = refs.pop(0) if e.dropout else None
    columns_ref: Any = refs.pop(0) if e.dropout else None
    out_refs = [refs.pop(0) for _ in range(e.outputs)]
    sums_ref: Any = refs.pop(0) if e.sums else None
    (x_flat, x_tiled), w_s, (given_flat, given), (made_flat, made), ready, free, arrived = refs
    (m, _), n = x_ref.shape, out_refs[0].shape[1]
    steps, across = x_ref.shape[1] // DEEP, n // t.columns
    cluster, half, warpgroup = lax.axis_index("cluster"), lax.axis_index("half"), lax.axis_index("warpgroup")
    clusters = PROCESSORS // t.cluster
    count = (pl.cdiv(m, t.rows * t.cluster) * across - cluster + clusters - 1) // clusters  # tiles of this block
    mine = t.rows if t.alternate else t.rows // COMPUTE  # rows of a tile that a warpgroup multiplies
    pieces = [(r, c) for c in range(0, t.columns, DEEP) for r in range(0, mine, ROWS)]  # of a tile, one after the other
    by_ring = e.beside and not t.given
    each = steps + (t.columns // DEEP if by_ring else 0)  # slots of the ring that a tile takes

    def place(i):
        tile = cluster + i * clusters
        return (tile // across * t.cluster + half) * t.rows, lax.rem(tile, across) * t.columns

    @pl.when(warpgroup == COMPUTE)
    def _load():
        plgpu.set_max_registers(LOADER, action="decrease")

        def taken(step, who):
            slot = lax.rem(step, t.stages)
            pl.when(step >= t.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            return slot, ready.at[who + slot]

        @pl.loop(0, count)
        def _tile(i):
            row, column = place(i)
            columns = pl.ds(column, t.columns)
            who = lax.rem(i, COMPUTE) * t.stages if t.alternate else 0

            @pl.loop(0, steps)
            def _step(k):
                slot, there = taken(i * each + k, who)
                deep = pl.ds(k * DEEP, DEEP)
                plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(row, t.rows), deep], x_flat.at[slot], there)
                if turned:  # what is summed over runs on from one matrix of w to the next, or the columns do
                    group, deep = k * DEEP // w_ref.shape[2], pl.ds(lax.rem(k * DEEP, w_ref.shape[2]), DEEP)
                    part = w_ref.at[group, columns, deep]
                else:
                    part = w_ref.at[column // w_ref.shape[2], deep, pl.ds(lax.rem(column, w_ref.shape[2]), t.columns)]
                plgpu.copy_gmem_to_smem(part, w_s.at[slot], there, collective_axes="half" if t.cluster > 1 else None)

            for k in range(steps, each):  # in the place of x what stands beside the tile, in two copies, as the barrier counts
                slot, there = taken(i * each + k, who)
                for r in (0, t.rows // 2):
                    part = beside_ref.at[pl.ds(row + r, t.rows // 2), pl.ds(column + (k - steps) * DEEP, DEEP)]
                    plgpu.copy_gmem_to_smem(part, x_flat.at[slot, pl.ds(r, t.rows // 2)], there)

        # the neighbour arrives at the barriers here: not gone before it is done
        for back in range(t.stages, 0, -1):
            step = count * each - back
            pl.when(step >= 0)(lambda step=step: plgpu.barrier_wait(free.at[lax.rem(step, t.stages)]))

    @pl.when(warpgroup < COMPUTE)
    def _multiply():
        plgpu.set_max_registers(MULTIPLIER, action="increase")
        who = warpgroup * t.stages if t.alternate else 0

        def run(tile, sums):
            @pl.loop(0, steps)
            def _step(k):
                slot = lax.rem(tile * each + k, t.stages)
                plgpu.barrier_wait(ready.at[who + slot])
                x = x_tiled.at[slot] if t.alternate else x_tiled.at[slot, pl.ds(warpgroup * mine, mine)]
                w = w_s.at[slot]
                plgpu.wgmma(sums, x, transposed(w) if turned else w)
                plgpu.wgmma_wait(1)
                pl.when(k > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(tile * each + k - 1, t.stages)]))

            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free.at[lax.rem(tile * each + steps - 1, t.stages)])
            return sums[...]

        @pl.loop(warpgroup if t.alternate else 0, count, step=COMPUTE if t.alternate else 1)
        def _tile(tile):
            row, column = place(tile)
            row = row if t.alternate else row + warpgroup * mine

            def where(piece):
                return pl.ds(row + piece[0], ROWS), pl.ds(column + piece[1], DEEP)

            def fetch(i):
                there = arrived.at[warpgroup * t.given + i % t.given]
                plgpu.copy_gmem_to_smem(beside_ref.at[where(pieces[i])], given_flat.at[warpgroup, i % t.given], there)

            for i in range(min(t.given, len(pieces))) if e.beside else ():
                fetch(i)

            sums = pl.run_scoped(partial(run, tile), plgpu.WGMMAAccumulatorRef((mine, t.columns), jnp.float32))
            if len(pieces) * e.outputs % t.made:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            written, bias, beside, mask, numbers = 0, None, None, None, None
            total: Any = None  # sums over rows of the first output

            def of_columns(ref, c):
                return load(ref.at[where((0, c))[1]], COLUMNS, optimized=False)

            hashed = {
                r: load(hashed_ref.at[where((r, 0))[0]], parts.ROWS, optimized=False) for r in range(0, mine, ROWS) if e.dropout
            }
            for i, (r, c) in enumerate(pieces):
                y = sums[r : r + ROWS, c : c + DEEP]
                if e.bias and r == 0:
                    bias = along(of_columns(bias_ref, c), y, 1)
                slot: Any = lax.rem(tile * each + steps + c // DEEP, t.stages) if by_ring else None
                if by_ring:
                    if r == 0:
                        plgpu.barrier_wait(ready.at[who + slot])
                    there = x_tiled.at[slot, pl.ds(r if t.alternate else warpgroup * mine + r, ROWS)]
                    beside = load(there, plgpu.Layout.WGMMA).astype(jnp.float32)
                elif e.beside:
                    plgpu.barrier_wait(arrived.at[warpgroup * t.given + i % t.given])
                    beside = load(given.at[warpgroup, i % t.given], plgpu.Layout.WGMMA).astype(jnp.float32)
                if e.dropout:
                    numbers = of_columns(columns_ref, c) if r == 0 else numbers
                    mask = drop.keep(along(hashed[r], y, 0), along(numbers, y, 1), e.dropout)
                values = e(y, bias, beside, mask)
                if e.sums:
                    more = parts.column_sums(values[0])
                    total = more if r == 0 else total + more
                    if r + ROWS == mine:
                        sums_ref[row // mine, (column + c) // DEEP] = total
                for ref, value in zip(out_refs, values, strict=True):
                    own = written % t.made
                    plgpu.wait_smem_to_gmem(t.made - 1, wait_read_only=True)
                    made.at[warpgroup, own][...] = value.astype(ref.dtype)
                    plgpu.commit_smem()
                    if by_ring and ref is out_refs[0] and r + ROWS == mine:  # all threads have met, and so have read it
                        plgpu.barrier_arrive(free.at[slot])
                    plgpu.copy_smem_to_gmem(made_flat.at[warpgroup, own], ref.at[where((r, c))])
                    written += 1
                if e.beside and not by_ring and i + t.given < len(pieces):
                    fetch(i + t.given)

        plgpu.wait_smem_to_gmem(0)


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
