"""How the MLP half is cut into grid steps on each TPU generation, and what that costs: plain arithmetic, no arrays.

A kernel sees x [B, T, D] either as it is, some whole images (or a part of one) a step, or flat, as one image of B*T rows. Flat is a
free view where T is a multiple of the 8 rows of an HBM tile, else a copy by XLA of every array that passes, as dear on v5e as
a quarter of the forward kernel. Not flat, every image is padded in VMEM to whole register tiles, and the rows of a backward
step to whole squares of 128. `plan` weighs one against the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from jax.experimental import pallas as pl

from kernels import by_xla, parts
from kernels.by_xla import ByXLA
from kernels.device import LANES, SUBLANES, Device, MiB
from kernels.vmem import round_up

_ROWS = (2048, 1664, 1536, 1280, 1024, 896, 768, 640, 512, 384, 256, 128)  # most rows of a step, those of the padding included
# by backward: there, 512 gains 2 % on v6e and ran out of VMEM on v5e
_HIDDEN = {False: (1024, 768, 512, 384, 256, 128), True: (256, 128)}
_SPANS_VMEM = 128 * MiB  # of the generations where they were counted, v5e and v6e
_SPAN = 256  # hidden values of a backward step's span, where it takes two
_STEP_CYCLES = 600  # what a grid step costs beside its products: filling and draining the pipelines, the sums' read-modify-write
_CAST_CYCLES = (
    6  # what Mosaic's cast of a register takes more than integer arithmetic, where bfloat16 is unpacked (kernels/body.py)
)
# XLA's unaligned reshape moves its bytes this much slower than the memory could (v5e: 1.93k cycles an image of B/16)
_COPY_BYTES = 1.6
BACKWARD_ROWS = 24576  # at a time through the backward kernels where copies of their rows lie in HBM
STREAMED_ROWS = 256  # of a backward step: with fewer, streaming the weights and their sums takes longer than the products
_VMEM_SHARE = 0.8  # the rest is the compiler's: spilled registers, masks, copies of odd operands
_KEEP_SHARES = {False: 0.82, True: 0.91}  # by backward, with `keep`: the body that reads it has fewer values in flight
_SHORT_KEEP_SHARES = {False: 0.88, True: 0.955}  # the same of streamed tiles of at most _SHORT rows, tried at 512 rows of 1,024
_SHORT = 512
# Forward, of streamed tiles of at most _SHORT rows in v2's and v3's order: 384 rows and 256 hidden values of 1,280 columns compile.
_STREAMED_SHARE = 0.88
_OUTERMOST = (512, 256, 128)  # hidden values of a tile: with fewer, dz passes through the HBM more often
_OUTERMOST_SHARE = 0.96  # of VMEM: the body has 128 x 128 values in flight, few of which are spilled


class Shape(NamedTuple):
    """What the tiles depend on: B, T, D, this device's F, and the bytes of an element of x."""

    b: int
    t: int
    d: int
    f: int
    itemsize: int

    @property
    def rows(self) -> int:
        return self.b * self.t


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Of one kernel. A grid step takes `rows` rows of each of `images` images and `hidden` of the F hidden values.

    flat: x is taken as one image of B*T rows. stride: from one image to the next in VMEM, rows rounded up to whole register tiles.
    unpack: bfloat16 rows are unpacked and packed by integer arithmetic (`kernels/body.py`); the height is a multiple of 16.
    resident: the weights (and the sums of their gradients) stay in VMEM as a whole; otherwise they are streamed, tile by tile.
    keep: the forward kernel also writes the hidden values before their GELU, and the backward kernel reads them instead of making
    them again. Both then take the same rows a step, in the same places of VMEM.
    spans: of a backward kernel's hidden tile; several are unrolled, and the products of one stand beside the GELU of the next, for
    which the MXU waits otherwise.
    roomy: of resident weights, where VMEM is plenty and a device is one core: the weights come a hidden tile at a time while the
    first row tile is worked on (`arriving.py`), and a backward kernel's normalised rows stay till the end of their tile.
    shared: of a flat backward kernel, dx is written over dy in VMEM and goes to HBM from there: a block less, a wait more.
    """

    flat: bool
    images: int
    rows: int
    stride: int
    hidden: int
    resident: bool
    unpack: bool = False
    keep: bool = False
    shared: bool = False
    roomy: bool = False
    spans: int = 1
    needs: int = 0  # bytes of VMEM

    @property
    def height(self) -> int:
        """Rows of a step in VMEM."""
        return self.images * self.stride

    def whole(self, images: int, rows: int) -> bool:
        """Whether all rows of all steps exist, of so many images and rows of each; those up to the stride too, which lie in VMEM
        behind an image's and which nobody writes."""
        return images % self.images == 0 and rows % self.rows == 0 and self.stride == self.rows

    @property
    def columns(self) -> int:
        """The same where rows lie along the lanes: whole squares of 128."""
        return round_up(self.height, LANES)

    def view(self, shape: Shape) -> tuple[int, int]:
        """Images and rows of each as the kernel sees x."""
        return (1, shape.rows) if self.flat else (shape.b, shape.t)

    def grid(self, shape: Shape) -> tuple[int, int]:
        """(row tiles, hidden tiles)."""
        images, rows = self.view(shape)
        return pl.cdiv(images, self.images) * pl.cdiv(rows, self.rows), shape.f // self.hidden

    def kept(self, shape: Shape) -> tuple[int, int, int]:
        """The shape of what `keep` writes: rows as they lie in VMEM, those of the padding included."""
        return self.grid(shape)[0], self.height, shape.f


@dataclass(frozen=True, kw_only=True)
class Outermost:
    """Of a backward kernel with hidden tiles outermost (`outermost.py`). A grid step takes 128 rows and `hidden` of the F hidden
    values, whose weights and sums stay in VMEM until all rows are through."""

    hidden: int
    needs: int = 0  # bytes of VMEM

    def cost(self, shape: Shape) -> pl.CostEstimate:
        """FLOPs, transcendentals and bytes of HBM traffic of the products."""
        tiles = shape.f // self.hidden
        return pl.CostEstimate(
            flops=10 * shape.rows * shape.d * shape.f,
            transcendentals=shape.rows * shape.f,
            bytes_accessed=16 * tiles * shape.rows * shape.d + 16 * shape.d * shape.f,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Of both kernels. backward_images: at a time through the backward kernel, a divisor of B; None: all of them."""

    forward: Tiling | ByXLA
    backward: Tiling | Outermost | ByXLA
    backward_images: int | None = None

    @property
    def rounds(self) -> bool:
        """Whether both kernels take weights of any dtype, and round them as they arrive."""
        return all(isinstance(t, Tiling) and t.roomy for t in (self.forward, self.backward))


def vmem_bytes(shape: Shape, device: Device, t: Tiling, *, backward: bool) -> int:
    """VMEM a kernel takes: blocks (two of each that streams), scratch, and the float32 hidden tiles it has in flight."""
    d, hidden = round_up(shape.d, LANES), round_up(t.hidden, LANES)
    operand = shape.itemsize if device.bf16_matmul else 4
    whole = shape.f // t.hidden * hidden
    block = t.images * round_up(t.rows, 16) * d * shape.itemsize
    weights = d * operand * (whole if t.resident else 2 * hidden)
    kept = 2 * round_up(t.height, 16) * hidden * shape.itemsize if t.keep else 0
    kept += 2 * d * hidden * 4 if t.roomy and operand < 4 else 0  # a tile of both weights, as they arrive
    if not backward:
        return 4 * block + t.height * d * (operand + 4) + 2 * weights + 3 * t.height * hidden * 4 + kept
    natural = 0 if t.keep or t.stride % LANES == 0 else t.columns * d * 4
    sums = 2 * d * 4 * (whole if t.resident else 3 * hidden)
    scratch = t.columns * (d * (2 * operand + 4) + hidden * 2 * operand) + natural
    blocks = (6 if t.resident else 2 if t.shared else 3) * block
    flying = 2 * t.columns * hidden * 4 if t.spans > 1 else 0
    scratch += t.columns * (d + LANES) * 4 if t.roomy else 0
    return blocks + 2 * weights + sums + scratch + t.columns * LANES * 4 * 2 + 2 * d * LANES * 4 + kept + flying


def _products(t: Tiling, backward: bool) -> int:
    return (4 if t.keep else 5) if backward else 2


def cost(shape: Shape, t: Tiling, *, backward: bool) -> pl.CostEstimate:
    """FLOPs, transcendentals and bytes of HBM traffic of one pass; recomputed products count."""
    passes = 1 if t.resident else t.grid(shape)[0]
    weights = 2 * shape.d * shape.f
    moved = weights * shape.itemsize * passes + (weights * 4 * (2 * passes - 1) if backward else 0)
    moved += shape.rows * shape.f * shape.itemsize if t.keep else 0
    return pl.CostEstimate(
        flops=_products(t, backward) * 2 * shape.rows * shape.d * shape.f,
        transcendentals=shape.rows * shape.f,
        bytes_accessed=int((3 if backward else 2) * shape.rows * shape.d * shape.itemsize + moved),
    )


def _candidates(shape: Shape, device: Device, backward: bool) -> Iterator[Tiling]:
    tile = SUBLANES if shape.itemsize == 4 or not device.bf16_matmul else 2 * SUBLANES
    hidden = [h for h in _HIDDEN[backward] if shape.f % h == 0] or [shape.f]
    heights = set()
    for flat in (True, False):
        images, rows = (1, shape.rows) if flat else (shape.b, shape.t)
        for most in _ROWS:
            if round_up(rows, tile) <= most:
                for stride in {round_up(rows, tile), round_up(rows, 16)}:
                    heights.add((flat, min(images, max(1, most // stride)), rows, stride))
                    heights.add((flat, min(images, max(1, most // stride // 2 * 2)), rows, stride))
            elif flat:
                heights.add((flat, 1, most, most))
            else:
                part = round_up(-(-rows // -(-rows // most)), 2 * SUBLANES)
                heights.add((flat, 1, part, part))
    for flat, images, rows, stride in sorted(heights, reverse=True):
        for h in hidden:
            for resident in (True, False) if shape.f // h > 2 else (True,):  # three slots take turns
                unpack = shape.itemsize == 2 and not device.bf16_matmul
                if unpack and backward:
                    unpack = rows % 16 == 0
                elif unpack and images * stride % 16:
                    continue
                t = Tiling(flat=flat, images=images, rows=rows, stride=stride, hidden=h, resident=resident, unpack=unpack)
                yield t
                if backward and resident and h == _SPAN and shape.f % (2 * h) == 0 and device.vmem_bytes >= _SPANS_VMEM:
                    two = replace(t, hidden=2 * h, spans=2)  # four gain 1 % more, in three times the compiler's time
                    # v5e was counted where half the VMEM is enough, and ran out with hidden tiles of 512 elsewhere
                    if device.mxu > LANES or vmem_bytes(shape, device, two, backward=True) <= device.vmem_bytes // 2:
                        yield two
                # Other generations have the VMEM to do without. A copy is of whole tiles of 8 rows.
                if backward and flat and unpack and not resident and shape.rows % rows % SUBLANES == 0:
                    yield replace(t, shared=True)


def _cycles(shape: Shape, device: Device, t: Tiling, *, backward: bool) -> float:
    """Estimate of one pass, XLA's copies included: the measure by which tilings are compared."""
    row_tiles, hidden_tiles = t.grid(shape)
    height = t.columns if backward else t.height
    products = _products(t, backward) * 2 * height * shape.d * shape.f / device.flops_per_cycle
    moved = cost(shape, t, backward=backward).bytes_accessed / row_tiles
    if not device.bf16_matmul and shape.itemsize == 2:  # whose weights are float32
        moved += 2 * shape.d * shape.f * 2 / (row_tiles if t.resident else 1)
    moved /= device.hbm_bytes_per_cycle
    copied = 0.0
    if t.flat and shape.t % SUBLANES:
        arrays = 3 if backward and not t.keep else 2  # the copy of x is kept too
        copied = arrays * 2 * shape.rows * shape.d * shape.itemsize * _COPY_BYTES / device.hbm_bytes_per_cycle
    if t.keep and not t.unpack and shape.itemsize == 2 and not device.bf16_matmul:
        products += _CAST_CYCLES * height * (3 * shape.d + shape.f) / (SUBLANES * LANES)
    if t.shared:  # the copy of dx is waited for
        copied += shape.rows * shape.d * shape.itemsize / device.hbm_bytes_per_cycle
    return row_tiles * (max(products, moved) + hidden_tiles * _STEP_CYCLES + _STEP_CYCLES) + copied


def _fitting(shape: Shape, device: Device, *, backward: bool, keep: bool = False) -> list[Tiling]:
    """The tilings that fit the VMEM. NotImplementedError, with the reason, where none does."""
    plenty = device.vmem_bytes >= _SPANS_VMEM and (keep or not backward)
    candidates = (replace(t, keep=keep, roomy=plenty and t.resident) for t in _candidates(shape, device, backward))
    counted = (replace(t, needs=vmem_bytes(shape, device, t, backward=backward)) for t in candidates)

    def share(t: Tiling) -> float:
        short = t.unpack and t.flat and not t.resident and t.rows <= _SHORT and t.hidden <= 256 and t.shared == backward
        if not keep:
            return _STREAMED_SHARE if short and not backward else _VMEM_SHARE
        return (_SHORT_KEEP_SHARES if short else _KEEP_SHARES)[backward]

    fitting = [t for t in counted if t.needs <= share(t) * device.vmem_bytes]
    if not fitting:
        raise NotImplementedError(
            f"mlp_half: no tiling of D={shape.d}, F={shape.f} fits the {device.vmem_bytes // MiB} MiB VMEM of {device.name}; a "
            "hidden width that is a multiple of 128 can be tiled, or use the reference"
        )
    return fitting


@cache
def plan(shape: Shape, device: Device, *, keep: bool = False) -> Plan:
    """The only choice of tiles: of those that fit the VMEM, the ones of the fewest estimated cycles.

    keep: both kernels with `Tiling.keep`, which share their rows. NotImplementedError, with the reason, where none fits.
    """
    if keep:
        return _keeping(shape, device)

    def best(shape, backward):
        return min(_fitting(shape, device, backward=backward), key=lambda t: _cycles(shape, device, t, backward=backward))

    forward, backward, images = best(shape, False), best(shape, True), shape.b
    if backward.flat and shape.t % SUBLANES:  # copies of x and dy, of a part of the batch at a time
        images = shape.b // parts.count(shape.b, shape.t, BACKWARD_ROWS)
        backward = best(shape._replace(b=images), True)
    return Plan(forward=forward, backward=backward, backward_images=images)


def half_of(d: int) -> int:
    """Of D rows of W1, those that are turned at a time where hidden tiles are outermost: whole columns of lanes once turned."""
    return round_up(-(-d // 2), LANES)


def outermost(shape: Shape, device: Device) -> Outermost | None:
    """The tiles of the backward pass with hidden tiles outermost; None where they do not fit, or on cores that it is not for."""
    if device.bf16_matmul or shape.d % LANES or shape.b * round_up(shape.t, SUBLANES) <= LANES:
        return None
    for hidden in _OUTERMOST:
        matrices, rows = 4 * hidden * shape.d, 6 * LANES * shape.d  # two weights, two sums; z and g twice, and dz
        held = (2 * max(hidden, half_of(shape.d)) + 3 * hidden) * LANES + 2 * SUBLANES * shape.d
        needs = 4 * (matrices + rows + held)
        if shape.f % hidden == 0 and needs <= _OUTERMOST_SHARE * device.vmem_bytes:
            return Outermost(hidden=hidden, needs=needs)
    return None


def _keeping(shape: Shape, device: Device) -> Plan:
    """The fastest pair of kernels that take the same rows a step."""
    if shape.f % LANES:
        raise NotImplementedError(f"mlp_half: keep takes a hidden width that is a multiple of {LANES}; this device has {shape.f}")
    best: list[dict[tuple, tuple[float, Tiling]]] = [{}, {}]
    for backward, found in enumerate(best):
        for t in _fitting(shape, device, backward=bool(backward), keep=True):
            rows, cycles = (t.flat, t.images, t.rows, t.stride), _cycles(shape, device, t, backward=bool(backward))
            if rows not in found or cycles < found[rows][0]:
                found[rows] = cycles, t
    both = [(forward[0] + best[1][rows][0], forward[1], best[1][rows][1]) for rows, forward in best[0].items() if rows in best[1]]
    if not both:
        raise NotImplementedError(f"mlp_half: no rows of D={shape.d}, F={shape.f} fit both kernels of {device.name} with keep")
    _, forward, backward = min(both, key=lambda pair: pair[0])
    return Plan(forward=forward, backward=backward, backward_images=shape.b)


@cache
def choose(shape: Shape, device: Device, *, keep: bool = False) -> Plan:
    """`plan`, with the passes left to XLA where it is ahead by the one count (LOG.md, 2026-11-27, has the table). keep: as in
    `plan`, and NotImplementedError too where a pass would be XLA's."""

    def beyond(chosen: Plan) -> Plan:
        t = chosen.backward
        if not isinstance(t, Tiling) or t.resident or t.columns >= STREAMED_ROWS:
            return chosen
        if shape.itemsize == 2 and (found := outermost(shape, device)):
            if keep:
                raise NotImplementedError("mlp_half: nothing is kept where hidden tiles are outermost")
            images = shape.b // parts.count(shape.b, shape.t, BACKWARD_ROWS)  # what lies between the three kernels is float32
            return replace(chosen, backward=found, backward_images=images)
        short = ByXLA(reason=f"weights streamed for {t.height} rows at a time, which the memory's rate bounds")
        return replace(chosen, backward=short)

    return by_xla.choose(plan, shape, device, keep=keep, beyond=beyond)
