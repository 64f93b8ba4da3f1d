"""Patch embedding straight from bytes on a Hopper GPU, in Pallas Mosaic GPU: paper Eq. 1, pixels to [-1, 1] inside.

    token = (byte - 128) @ V + a[t],    V = 2/255 W,    a = [cls; bias + 1/2 sum(V), ...] + position       (2/255 byte - 1 = pixel)
    dW = 1/255 sum (2 byte - 255) g,    da = sum over images g                                  g = masked gradient, sums in float32

A byte less 128 is a bfloat16 exactly, and so is 2 byte - 255: pixels are not rounded. images [B, Y, X, C] uint8, W [P, P, C, D]
float32, a [T, D] float32, tokens [B, T, D] bfloat16. Bytes: the images and W once for each tile of 128 columns of D, mostly out of
L2, and the tokens once; the patches never exist in memory.

Two warpgroups multiply, each a tile of 128 tokens of its own, and two load for them: while one makes its operand or is in its
epilogue, the tensor cores work for the other. (Within one of them they cannot: ptxas lets no wgmma run while registers of the next
are written.) A slice is some rows of pixels of all rows of patches that a tile's tokens lie in; each thread takes the bytes of its
tokens out of it, four at a time, and makes bfloat16 of them, which wgmma takes from registers. The rows of V are in the order of
that. A patch's row of pixels of 42 bytes is taken as 48, the last of which are the next patch's, and meet rows of zeros in V. A
class token's bytes are 128, and so are a row of padding's.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from kernels import dropout as drop
from kernels.attention.hopper import parts
from kernels.attention.hopper.parts import COLUMNS as OF_COLUMNS
from kernels.attention.hopper.parts import PARAMS, along, load
from kernels.attention.hopper.plan import PROCESSORS
from kernels.hopper.masks import Drops, dropped, masked, split
from kernels.launch import vary_alike
from kernels.patch_embed.hopper_plan import COLUMNS, MADE, ROWS, UNIT, Plan, Shape, plan
from kernels.settings import own

COMPUTE = 2
PIECE = 64  # rows and columns of what goes out at a time
LOADER, MULTIPLIER = 24, 232  # registers a thread
MAGIC = 0x4B000000  # 2^23 as a float32: with a byte in its last bits, 2^23 + byte
ABSENT = -1  # in place of a token's place in a slice, where it has no patch
ZEROS = 0x80808080 - 2**32  # four bytes of 128, as int32


@dataclass(frozen=True)
class Form:
    """What is static of a call; hashable."""

    shape: Shape
    plan: Plan
    drops: Drops | None


def places(s: Shape, p: Plan) -> np.ndarray:
    """int32 [B * T, padded to whole tiles]: where in a slice the first byte of each row's patch is; ABSENT where it has none."""
    count = -(-s.batch * s.tokens // (ROWS * p.cluster)) * ROWS * p.cluster
    band, column, token = _bands(np.arange(count), s)
    first, _, _ = _bands(np.arange(0, count, ROWS), s)
    found = (band - np.repeat(first, ROWS)) * (p.lines * s.line) + column * s.run
    absent = (token < s.first) | (token >= s.end) | (np.arange(count) >= s.batch * s.tokens)
    return np.where(absent, ABSENT, found).astype(np.int32)


def _bands(rows, s: Shape):
    """(row of patches of all images, column, token of its image) of rows of the result; a class token is at the patch behind it."""
    image, token = rows // s.tokens, rows % s.tokens
    patch = token - s.first
    patch = patch * (patch >= 0)
    return image * s.rows + patch // s.columns, patch % s.columns, token


def weights(kernel, s: Shape, p: Plan):
    """V [P * padded, D] bfloat16 of W [P, P, C, D], its rows in the order in which threads take bytes."""
    v = (kernel.astype(jnp.float32) * jnp.float32(2 / 255)).astype(jnp.bfloat16).reshape(s.patch, s.run, s.width)
    v = jnp.pad(v, ((0, 0), (0, s.padded - s.run), (0, 0)))
    # of a row of pixels each of four threads has a part, of which it takes four bytes for a wgmma, two for each half of its 16
    v = v.reshape(s.patch, 4, s.padded // UNIT, 2, 2, s.width).transpose(0, 2, 3, 1, 4, 5)
    return v.reshape(s.patch * s.padded, s.width)


def _i32(n: int):
    return mgpu.c(n, ir.IntegerType.get_signless(32))


def _floats(word, shift: int):
    """Two bytes of a word from this bit on, less 128, as two bfloat16."""
    f32, bf16 = ir.F32Type.get(), ir.BF16Type.get()
    values = []
    for bit in (shift, shift + 8):
        byte = arith.andi(arith.shrui(word, _i32(bit)) if bit else word, _i32(255))
        whole = arith.bitcast(f32, arith.ori(byte, _i32(MAGIC)))
        values.append(arith.subf(whole, mgpu.c(float(2**23 + 128), f32)))
    pair = vector.from_elements(ir.VectorType.get((2,), f32), values)
    return arith.truncf(ir.VectorType.get((2,), bf16), pair)


def operand(slice_ref, where, count: int, s: Shape):
    """[ROWS, 16 * count] bfloat16 of a slice in shared memory; where: `places`, as parts.ROWS."""
    layout, whole = plgpu.Layout.WGMMA, s.run % 4 == 0
    steps = s.padded // UNIT

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), parts.ROWS),
        return_type=plgpu.ShapeDtypeStruct((ROWS, UNIT * count), jnp.bfloat16, layout=layout),
    )
    def run(_, ref, where):
        i8, i16, i32 = (ir.IntegerType.get_signless(n) for n in (8, 16, 32))
        mlir_layout = mgpu.FragmentedArray.splat(mgpu.c(0, i32), (ROWS, UNIT * count), mgpu.WGMMA_LAYOUT, is_signed=True).layout
        registers = np.empty(mlir_layout.registers_shape((ROWS, UNIT * count)), dtype=object)
        lane = arith.remui(mgpu.utils.thread_idx(), _i32(4))
        start = mgpu.utils.memref_ptr(ref)
        own = registers.reshape(ROWS // 64, 2 * count, 2)  # 64 rows, eight columns, eight rows
        for (tile, half), place in zip(np.ndindex(ROWS // 64, 2), where.registers.flat, strict=True):
            if isinstance(place.type, ir.VectorType):
                place = vector.extract(place, [], [0])
            absent = arith.cmpi(arith.CmpIPredicate.slt, place, _i32(0))
            at = arith.addi(arith.maxsi(place, _i32(0)), arith.muli(lane, _i32(s.padded // 4)))
            base = mgpu.utils.getelementptr(start, [at], i8)
            for i in range(count):
                line, step = divmod(i, steps)
                offset = line * s.line + 4 * step
                if whole:
                    word = llvm.load(i32, mgpu.utils.getelementptr(base, [offset], i8), alignment=4)
                else:
                    low, high = (
                        arith.extui(i32, llvm.load(i16, mgpu.utils.getelementptr(base, [offset + n], i8), alignment=2))
                        for n in (0, 2)
                    )
                    word = arith.ori(low, arith.shli(high, _i32(16)))
                word = arith.select(absent, _i32(ZEROS), word)
                own[tile, 2 * i, half], own[tile, 2 * i + 1, half] = _floats(word, 0), _floats(word, 16)
        mgpu.utils.warpgroup_barrier()  # behind it one thread frees the slice for all of them: every thread has read it
        return mgpu.FragmentedArray(_registers=registers, _layout=mlir_layout, _is_signed=None)

    return run(slice_ref, where)  # pyright: ignore[reportCallIssue]  (the decorator gives the context)


class _Block:
    """A block of threads and its tiles of the result: what its warpgroups share, `load` of two of them and `multiply` of two, which
    have slices of their own and take turns."""

    def __init__(self, refs, f: Form):
        self.shape, self.plan, self.rate = s, p, rate = f.shape, f.plan, 0.0 if f.drops is None else f.drops.rate
        refs = list(refs)
        self.images, self.v, self.added, self.places = refs[:4]
        self.hashed: Any = refs[4] if rate else None
        self.columns: Any = refs[5] if rate else None
        self.out, self.image_s, self.v_s, (self.made_flat, self.made), self.ready, self.free = refs[6 if rate else 4 :]
        m, n = self.out.shape
        self.steps, self.deep, self.across = s.patch // p.lines, p.lines * s.padded, n // COLUMNS
        self.cluster, self.half, self.warpgroup = (lax.axis_index(name) for name in ("cluster", "half", "warpgroup"))
        self.clusters = PROCESSORS // p.cluster
        # tiles of this block
        count = (pl.cdiv(m, ROWS * p.cluster) * self.across - self.cluster + self.clusters - 1) // self.clusters
        self.mine = lax.rem(self.warpgroup, COMPUTE)  # a warpgroup that multiplies, and its loader
        self.own = self.mine * p.stages
        self.turns = (count - self.mine + COMPUTE - 1) // COMPUTE

    def place(self, i):
        """(first row, first column) of the block's i-th tile."""
        tile = self.cluster + i * self.clusters
        return (tile // self.across * self.plan.cluster + self.half) * ROWS, lax.rem(tile, self.across) * COLUMNS

    def load(self):
        s, p, steps, free = self.shape, self.plan, self.steps, self.free
        plgpu.set_max_registers(LOADER, action="decrease")

        @pl.loop(0, self.turns)
        def _tile(i):
            row, column = self.place(self.mine + i * COMPUTE)
            token = lax.rem(row, s.tokens)
            band = row // s.tokens * s.rows + jnp.maximum(token - s.first, 0) // s.columns

            @pl.loop(0, steps)
            def _step(k):
                step = i * steps + k
                slot = self.own + lax.rem(step, p.stages)
                pl.when(step >= p.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                there = self.ready.at[slot]
                plgpu.copy_gmem_to_smem(self.images.at[pl.ds(band, p.bands), k], self.image_s.at[slot], there)
                part = self.v.at[pl.ds(k * self.deep, self.deep), pl.ds(column, COLUMNS)]
                plgpu.copy_gmem_to_smem(part, self.v_s.at[slot], there, collective_axes="half" if p.cluster > 1 else None)

        # the neighbouring block signals barriers in this block's memory: this block stays until it has
        for back in range(p.stages, 0, -1):
            step = self.turns * steps - back
            pl.when(step >= 0)(lambda step=step: plgpu.barrier_wait(free.at[self.own + lax.rem(step, p.stages)]))

    def multiply(self):
        plgpu.set_max_registers(MULTIPLIER, action="increase")

        @pl.loop(0, self.turns)
        def _tile(turn):
            row, column = self.place(self.mine + turn * COMPUTE)
            sums = pl.run_scoped(partial(self.run, turn, row), plgpu.WGMMAAccumulatorRef((ROWS, COLUMNS), jnp.float32))
            self.finish(sums, row, column)

        plgpu.wait_smem_to_gmem(0)

    def run(self, turn, row, sums):
        """The product of a tile."""
        where = load(self.places.at[pl.ds(row, ROWS)], parts.ROWS, optimized=False)

        @pl.loop(0, self.steps)
        def _step(k):
            slot = self.own + lax.rem(turn * self.steps + k, self.plan.stages)
            plgpu.barrier_wait(self.ready.at[slot])
            plgpu.wgmma(sums, operand(self.image_s.at[slot], where, self.deep // UNIT, self.shape), self.v_s.at[slot])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(self.free.at[slot])

        return sums[...]

    def finish(self, sums, row, column):
        """What is added to a tile, its dropout, and its way out."""
        pieces, rate = [(r, c) for c in range(0, COLUMNS, PIECE) for r in range(0, ROWS, PIECE)], self.rate
        if len(pieces) % MADE:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i, (r, c) in enumerate(pieces):
            rows, columns = pl.ds(row + r, PIECE), pl.ds(column + c, PIECE)
            y = sums[r : r + PIECE, c : c + PIECE]
            added = self.added.at[pl.ds(lax.rem(row + r, self.shape.tokens), PIECE), columns]
            y = y + load(added, plgpu.Layout.WGMMA, optimized=False)
            if rate:
                hashed = load(self.hashed.at[rows], parts.ROWS, optimized=False)
                numbers = load(self.columns.at[columns], OF_COLUMNS, optimized=False)
                mask = drop.keep(along(hashed, y, 0), along(numbers, y, 1), rate)
                y = jnp.where(mask, y * (1.0 / (1.0 - rate)), 0.0)
            plgpu.wait_smem_to_gmem(MADE - 1, wait_read_only=True)
            self.made.at[self.mine, i % MADE][...] = y.astype(self.out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self.made_flat.at[self.mine, i % MADE], self.out.at[rows, columns])


def _kernel(*refs, f: Form):
    block = _Block(refs, f)
    pl.when(block.warpgroup >= COMPUTE)(block.load)
    pl.when(block.warpgroup < COMPUTE)(block.multiply)


@partial(jax.jit, static_argnames="f")
def _tokens(f: Form, images, v, added, *mask):
    """Rows [B * T, D] bfloat16 of images [B, Y, X, C] uint8, V and a."""
    s, p = f.shape, f.plan
    images = images.reshape(s.batch * s.rows, s.patch // p.lines, p.lines * s.line // p.box, p.box)
    added = jnp.concatenate([added] * (1 + -(-PIECE // s.tokens)))[: s.tokens + PIECE]  # 64 rows from any token on
    arrays = vary_alike(images, v, added, jnp.asarray(places(s, p)), *mask)
    swizzle = plgpu.SwizzleTransform(p.swizzle)
    wide = (plgpu.TilingTransform((8, p.swizzle // 2)), swizzle)
    out_swizzle = plgpu.SwizzleTransform(128)
    made = (COMPUTE, MADE, PIECE, PIECE)
    (out,) = plgpu.kernel(
        partial(_kernel, f=f),
        out_type=(jax.ShapeDtypeStruct((s.batch * s.tokens, s.width), jnp.bfloat16),),
        scratch_types=[
            plgpu.SMEM((COMPUTE * p.stages, p.bands, p.lines * s.line // p.box, p.box), jnp.uint8),
            plgpu.SMEM((COMPUTE * p.stages, p.lines * s.padded, COLUMNS), jnp.bfloat16, transforms=wide),
            plgpu.RefUnion(
                plgpu.SMEM(made, jnp.bfloat16, transforms=(out_swizzle,)),
                plgpu.SMEM(made, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, PIECE)), out_swizzle)),
            ),
            plgpu.Barrier(num_arrivals=2, num_barriers=p.stages * COMPUTE),
            plgpu.ClusterBarrier(collective_axes=("half",), num_arrivals=1, num_barriers=COMPUTE * p.stages)
            if p.cluster > 1
            else plgpu.Barrier(num_arrivals=1, num_barriers=COMPUTE * p.stages),
        ],
        grid=(PROCESSORS // p.cluster,),
        grid_names=("cluster",),
        cluster=(p.cluster,),
        cluster_names=("half",),
        num_threads=2 * COMPUTE,
        thread_name="warpgroup",
        kernel_name="patch_embed_hopper",
        compiler_params=PARAMS,
    )(*arrays)
    return out


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _embed(f: Form, images, kernel, added, place):
    """images [B, Y, X, C] uint8, kernel [P, P, C, D], added [T, D] float32 -> tokens [B, T, D] bfloat16."""
    s = f.shape
    v = weights(kernel, s, f.plan)
    half = 0.5 * v.astype(jnp.float32).sum(0)
    row = jnp.arange(s.tokens)[:, None]
    added = added + jnp.where((row >= s.first) & (row < s.end), half, 0.0)
    mask, _ = masked(f.drops, place, (s.batch * s.tokens, s.width), drop.EMBEDDING)
    if mask is not None:  # rows are read as whole tiles, behind the last one, too
        hashed, columns = mask
        mask = jnp.pad(hashed, (0, -hashed.shape[0] % (ROWS * f.plan.cluster))), columns
    images, v, added, *mask = vary_alike(images, v, added, *(mask or ()))
    out = vary_alike(_tokens(f, images, v, added, *mask), images)[0]
    return out.reshape(s.batch, s.tokens, s.width)


def _forward(f: Form, images, kernel, added, place):
    return _embed(f, images, kernel, added, place), (images, kernel, added, place)


def _backward(f: Form, kept, g):
    images, kernel, added, place = kept
    s = f.shape
    # in float32 until it is an operand: sums over images of what was rounded behind the mask would be off by that
    wide = dropped(f.drops, place, g.reshape(-1, s.width).astype(jnp.float32), drop.EMBEDDING)
    da, g = wide.reshape(s.batch, s.tokens, -1).sum(0), wide.astype(g.dtype)
    x = images.reshape(s.batch, s.rows, s.patch, s.columns, s.run).swapaxes(2, 3).reshape(s.batch, -1, s.patch * s.run)
    x = (2 * x.astype(jnp.int32) - 255).astype(g.dtype)  # exactly
    x = jnp.pad(x, ((0, 0), (s.first, s.tokens - s.end), (0, 0))).reshape(g.shape[0], -1)  # so that g need not be cut
    dw = jnp.einsum("mk,md->kd", x, g, preferred_element_type=jnp.float32) * jnp.float32(1 / 255)
    return None, dw.reshape(kernel.shape).astype(kernel.dtype), da.astype(added.dtype), None


_embed.defvjp(own(_forward), own(_backward))


def patch_embed(images, kernel, bias, cls, position, *, dropout=None, shape: Shape):
    """As `kernels.patch_embed.reference.patch_embed`, for uint8 images that `hopper_plan.refuses` does not refuse, to bfloat16."""
    s, chosen = shape, plan(shape)
    assert chosen is not None
    drops, place = split(dropout, s.tokens, s.end)
    added = jnp.broadcast_to(bias.astype(jnp.float32), (s.rows * s.columns, s.width))
    if cls is not None:
        added = jnp.concatenate([cls.astype(jnp.float32)[None], added])
    if position is not None:
        added = added + position.astype(jnp.float32)
    added = jnp.pad(added, ((0, s.tokens - s.end), (0, 0)))
    images, kernel, added, *place = vary_alike(images, kernel, added, *place)
    return _embed(Form(s, chosen, drops), images, kernel, added, tuple(place))
