"""Which kernels run the attention half, and how they are cut into grid steps: plain arithmetic, no arrays.

There are two formulations, each with a forward and a backward file:
- general: matrix products around a core of softmax attention, on arrays as they lie in HBM;
- float32, for v2 and v3, whose MXU is fed float32 and which stall where bfloat16 is packed: forward one fused kernel, if weights
  and an image fit VMEM together; else, and backward, a chain of kernels on float32 rows, while whole rows of keys fit.

`plan` chooses and returns everything that was chosen, as data; an op takes it as `plan=`.
"""

from dataclasses import dataclass
from functools import cache

from kernels import by_xla, parts
from kernels.attention.float32.tiles import (
    RowTiles,
    flat_gradient_tiles,
    flat_product_tiles,
    flat_sum_tiles,
    forward_core,
    output_tiles,
    project_tiles,
)
from kernels.attention.packed.tiles import PackedCore, packed_core
from kernels.attention.tiling import (
    STEPS,
    CoreTiles,
    FlatTiles,
    Float32Core,
    ProductTiles,
    RelativeTiles,
    Shape,
    core_tiles,
    float32_core,
    fused_bytes,
    head_lanes,
    product_tiles,
    shared_core,
)
from kernels.by_xla import ByXLA
from kernels.device import SUBLANES, Device
from kernels.vmem import padded_bytes, round_up

# Tokens at a time through the chains of kernels; between those of ViT-B/16 lie 6 kB a token forward, at most 16 kB backward.
FORWARD_ROWS = 65536
BACKWARD_ROWS = 24576
# Of a float32 chain forward: somewhat more than half as many, so that 128 images of ViT-H/14, of 264 rows, are one part.
_FLOAT32_SHARE = 17 / 32


@dataclass(frozen=True, kw_only=True)
class GeneralForward:
    """project, core and output on `images` images at a time."""

    images: int
    project: ProductTiles
    core: CoreTiles | RelativeTiles | Float32Core
    output: ProductTiles


@dataclass(frozen=True, kw_only=True)
class FusedForward:
    """One kernel, an image a grid step; `needs` bytes of VMEM, of all there is."""

    needs: int


@dataclass(frozen=True, kw_only=True)
class Float32Forward:
    """The chain on float32 rows, on `images` images at a time."""

    images: int
    project: RowTiles
    core: Float32Core
    output: RowTiles


@dataclass(frozen=True, kw_only=True)
class GeneralBackward:
    """The forward products again, the gradient of the core, and four products, on `images` images at a time."""

    images: int
    project: ProductTiles
    output_gradient: ProductTiles
    core: CoreTiles | RelativeTiles
    output_weights: ProductTiles
    projection_weights: ProductTiles
    input_gradient: ProductTiles


@dataclass(frozen=True, kw_only=True)
class Float32Backward:
    """The chain on flat float32 rows, on `images` images at a time."""

    images: int
    project: FlatTiles
    output_gradient: FlatTiles
    core: Float32Core
    output_weights: FlatTiles
    projection_weights: FlatTiles
    input_gradient: FlatTiles


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A pass that nothing fits; `reason` is the error of who asks for it."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Packed(ByXLA):
    """A pass whose norm and products are XLA's, around the packed core."""

    core: PackedCore


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Of the attention half. head_lanes: of a head in the arrays, H or more; the weights are padded with zeros to it. keep: the
    forward pass leaves q, k, v and (keeps_o) o for the backward pass, which takes the batch whole. narrow: the forward pass on
    heads as they are, in the place of `forward`, where the backward pass has to pad them."""

    head_lanes: int
    forward: FusedForward | Float32Forward | GeneralForward | ByXLA
    backward: Float32Backward | GeneralBackward | Refused | ByXLA
    keep: bool = False
    narrow: Float32Forward | None = None

    @property
    def keeps_o(self) -> bool:
        return self.float32 == isinstance(self.backward, Float32Backward)

    @property
    def float32(self) -> bool:
        """Whether the forward pass has its q, k, v and o in float32 rows, as the float32 backward pass takes them."""
        return isinstance(self.forward, FusedForward | Float32Forward)

    def kept_bytes(self, shape: Shape) -> int:
        """The HBM that q, k, v and o take for a call, with the padding of their layout: float32 rows where the forward pass has
        them so; q, k and v alone between kernels of different forms."""
        size = 4 if self.float32 else shape.itemsize
        return (4 if self.keeps_o else 3) * shape.b * padded_bytes(shape.t, shape.n * self.head_lanes, size)


@dataclass(frozen=True, kw_only=True)
class CorePlan:
    """Of attention by itself, between the projections."""

    forward: CoreTiles | Float32Core
    backward: CoreTiles | Float32Core | Refused


@cache
def plan(
    shape: Shape,
    device: Device,
    *,
    forward_rows: int = FORWARD_ROWS,
    backward_rows: int = BACKWARD_ROWS,
    keep: bool = False,
) -> Plan:
    """The plan of the attention half. NotImplementedError where no tiles fit the forward pass.

    forward_rows, backward_rows: most tokens at a time through a chain of kernels (a float32 chain takes half as many). keep: with
    `Plan.keep`; NotImplementedError where the fused kernel cannot.
    """
    lanes, core = head_lanes(shape, device), float32_core(shape, device)
    if lanes != shape.h and (core := core or shared_core(shape, device)):
        lanes = shape.h
    s = shape._replace(h=lanes)
    core = core if lanes == shape.h else float32_core(s, device)
    if keep:
        forward_rows = backward_rows = 2 * shape.b * shape.t
    forward = _forward(s, device, forward_rows, core)
    backward = _or_refused(lambda: _backward(s, device, backward_rows, core))
    if keep and isinstance(backward, Refused):
        raise NotImplementedError(backward.reason)
    if keep and isinstance(forward, FusedForward) and s.d != s.k:  # whose scratch for z then holds o, and that for k the result
        raise NotImplementedError(f"attention half: the fused kernel keeps q, k, v and o of heads as wide as x; {s.k} is not {s.d}")
    narrow = _float32_forward(shape, device, forward_rows) if lanes != shape.h and not keep else None
    return Plan(head_lanes=lanes, forward=forward, backward=backward, keep=keep, narrow=narrow)


@cache
def choose(shape: Shape, device: Device, *, keep: bool = False) -> Plan:
    """`plan`, with the passes left to XLA where it is ahead by the one count (LOG.md, 2026-11-27, has the table). keep: as in
    `plan`, and NotImplementedError too where a pass would be XLA's."""
    return by_xla.choose(plan, shape, device, keep=keep, few=few_tokens)


def few_tokens(s: Shape, device: Device) -> tuple[ByXLA | None, ByXLA | None]:
    """The forward and the backward pass where images have few tokens; packed, but for a batch that does not fill a grid step, and
    heads that are no whole registers."""
    forward, backward = by_xla.few_tokens(s.t)
    core = packed_core(s, device)
    if not core:
        return forward, backward
    packed = Packed(core=core, reason=f"images of {s.t} tokens: products of many rows, and many images a step of the core")
    return forward and packed, backward and packed


@cache
def core_plan(shape: Shape, device: Device) -> CorePlan:
    """The plan of attention by itself; D does not matter. NotImplementedError where no tiles fit the forward pass."""
    float32 = float32_core(shape, device)
    backward = float32 or _or_refused(lambda: core_tiles(shape, device, backward=True))
    return CorePlan(forward=float32 or core_tiles(shape, device, backward=False), backward=backward)


def _or_refused(choose):
    """What `choose` finds, or why nothing fits."""
    try:
        return choose()
    except NotImplementedError as error:
        return Refused(reason=str(error))


def _float32_forward(s: Shape, device: Device, rows: int) -> Float32Forward | None:
    if device.bf16_matmul or s.h % SUBLANES:
        return None
    part = s._replace(b=s.b // parts.count(s.b, s.t, int(rows * _FLOAT32_SHARE)))
    project, core, output = project_tiles(part, device), forward_core(part, device), output_tiles(part, device)
    if project and core and output:
        return Float32Forward(images=part.b, project=project, core=core, output=output)
    return None


def _forward(s: Shape, device: Device, rows: int, core: Float32Core | None) -> FusedForward | Float32Forward | GeneralForward:
    if (needs := fused_bytes(s, device)) is not None and needs <= device.vmem_bytes:
        return FusedForward(needs=needs)
    if core and (found := _float32_forward(s, device, rows)):  # whose rows the backward pass has, too
        return found
    own = core if core and not core.shared else None
    return general_forward(s, device, rows, core=(lambda part: own) if own else None)


def _backward(s: Shape, device: Device, rows: int, core: Float32Core | None) -> Float32Backward | GeneralBackward:
    if not core:
        return general_backward(s, device, rows)
    images = s.b // parts.count(s.b, s.t, rows // 2)
    m = images * round_up(s.t, SUBLANES)
    return Float32Backward(
        images=images,
        project=flat_product_tiles(m, 1, s.d, s.k, device),
        output_gradient=flat_product_tiles(m, 1, s.d, s.k, device),
        core=core,
        output_weights=flat_gradient_tiles(m, s.k, s.d, device),
        projection_weights=flat_gradient_tiles(m, s.d, s.k, device),
        input_gradient=flat_sum_tiles(m, 3, s.k, s.d, device),
    )


def general_forward(s: Shape, device: Device, rows: int = FORWARD_ROWS, *, core=None, product=product_tiles) -> GeneralForward:
    """The forward pass of the general form, on at most `rows` tokens at a time. core: (shape of a part) -> the tiles of its core,
    None for those of `core_tiles`. product: (step, shape, device) -> those of a product. NotImplementedError where nothing fits."""
    part = s._replace(b=s.b // parts.count(s.b, s.t, rows))
    tiles = {step: product(step, part, device) for step in ("project", "output")}
    return GeneralForward(images=part.b, core=core(part) if core else core_tiles(part, device, backward=False), **tiles)


def general_backward(s: Shape, device: Device, rows: int = BACKWARD_ROWS, *, core=None, product=product_tiles) -> GeneralBackward:
    """The backward pass of the general form; arguments as of `general_forward`."""
    part = s._replace(b=s.b // parts.count(s.b, s.t, rows))
    tiles = {step: product(step, part, device) for step in STEPS if step != "output"}
    return GeneralBackward(images=part.b, core=core(part) if core else core_tiles(part, device, backward=True), **tiles)
