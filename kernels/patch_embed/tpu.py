"""Patch embedding on a TPU: images to tokens in one kernel, paper Eq. 1.

    forward     tokens[b, t] = dropout([0; patch[b, t]] @ W + a[t])       a = [cls; bias, bias, ...] + position, made outside
    backward    dW = sum_b [0; patch[b]]' g[b],   da = sum_b g[b],   dpatch[b] = (g[b] W')[1:]       g = masked cotangent

The image comes as planes [B, C, Y, X], which is how XLA lays out [B, Y, X, C] on a TPU for batches that are no multiple of 128
(three channels in the minor dimension would be padded to 128): the transpose in front of the kernel is then a relabelling. For
multiples of 128 XLA keeps the BATCH minor and the transpose is one copy of the image; give the argument
`Format(Layout((0, 3, 1, 2)), sharding)` and the copy moves into the transfer from the host.

Patchifying is a regrouping of lanes: X lanes are (column, j) and must become rows `column` with lanes j. In the kernel, the P
rows of a row of patches, all channels, are transposed ([C*P, X] -> [X, C*P]); a load with stride P then takes column j of every
patch, and the P loads side by side are the patches, contracted in the order (j, c, i). The weights are reordered to that, not the
image. Rows of patches are built at offsets that are multiples of 8 (a dynamic offset must be) and then moved to their token's
row.

Shapes: planes [B, C, R, P, X], R = Y/P rows of Q = X/P patches; W [K, D], K = P*C*P; a [T, D] float32; tokens [B, T, D].
Bytes: the image and W once for each tile of D (one tile but for the longest sequences in 16 MiB), the tokens once. Accumulates
in float32. The gradients of parameters and of the image are two kernels, so that XLA removes the second where nobody asks for it.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import dropout as drop
from kernels.device import LANES, SUBLANES, Device
from kernels.launch import Launch, call, vary_alike

# Rows of patches in flight: the transposes of one hide behind the loads and stores of the others. Interpreted, unrolling only
# lengthens the compilation; two still walk both the loop and its remainder.
_GROUP, _GROUP_INTERPRETED = 7, 2
# Rows that keep the MXU busy: small images share a grid step until they have as many tokens.
_ROWS_A_STEP = 256
_IMAGES_A_STEP = 16
# Share of VMEM that the blocks and scratch listed in `_bytes` may take; the compiler spills into the rest.
# The smallest tiles spill least.
_VMEM_SHARE, _VMEM_SHARE_OF_SMALLEST = 0.8, 0.88


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What an image and its weights measure. `tokens` counts the class token where there is one."""

    batch: int
    channels: int
    rows: int  # of patches
    columns: int
    patch: int
    width: int
    tokens: int
    itemsize: int

    @property
    def contracted(self) -> int:
        return self.patch * self.channels * self.patch

    @property
    def side(self) -> int:
        """Rows of pixels of a row of patches, all channels."""
        return self.channels * self.patch

    @property
    def first(self) -> int:
        """Token of the first patch: 1 after a class token, else 0."""
        return self.tokens - self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """images of a grid step, rows of patches of a block of the image, width of a tile of D, rows of patches in flight."""

    images: int
    rows: int
    width: int
    group: int


@dataclass(frozen=True, kw_only=True)
class _Static:
    """The static side of a call."""

    shape: Shape
    rate: float
    launch: Launch
    dtype: jnp.dtype


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _divisors(n: int) -> list[int]:
    return [d for d in range(n, 0, -1) if n % d == 0]


def _block(rows: int, lanes: int, itemsize: int) -> int:
    """Bytes of a two-dimensional block in VMEM, padded to tiles."""
    return _up(rows, SUBLANES * (4 // itemsize)) * _up(lanes, LANES) * itemsize


def _bytes(s: Shape, t: Tiles) -> int:
    """VMEM of the hungriest of the three kernels at tiles t: the parameters' gradient, or the image's."""
    long = s.patch * _up(s.columns, SUBLANES)
    image = 2 * t.images * s.channels * t.rows * _block(s.patch, long, s.itemsize)
    padded = t.images * s.rows * _block(_up(s.columns, SUBLANES), s.contracted, 4)
    patches = t.images * _block(s.tokens, s.contracted, 4)
    tokens = 2 * t.images * _block(s.tokens, t.width, s.itemsize)
    weight = 2 * _block(s.contracted, t.width, 4)
    added = 2 * _block(s.tokens, t.width, 4)
    turned = t.group * (_block(long, s.side, 4) + 2 * _block(s.side, long, 4)) + _block(long, long, 4)
    return image + padded + patches + tokens + weight + added + turned + t.images * _block(s.tokens, t.width, 4)


def tiles(s: Shape, device: Device) -> Tiles:
    """The tiles for a shape: all of D if it fits, then whole images, then as many images as fill the MXU.

    NotImplementedError where not even one row of patches at 128 columns of D fits the core's VMEM.
    """
    widths = [w for w in _divisors(s.width) if w % LANES == 0] or [s.width]
    budget = _VMEM_SHARE * device.vmem_bytes
    group = _GROUP_INTERPRETED if device.name == "cpu" else _GROUP

    def at(images: int, rows: int, width: int) -> Tiles:
        return Tiles(images=images, rows=rows, width=width, group=min(group, images * rows))

    # a block of fewer rows than fit in flight leaves the transposes exposed: narrower tiles of D come first
    for fewest in (min(group, s.rows), 1):
        for width in widths:
            for rows in (r for r in _divisors(s.rows) if r >= fewest):
                if _bytes(s, at(1, rows, width)) > budget:
                    continue
                room = min(_IMAGES_A_STEP, max(1, _ROWS_A_STEP // _up(s.tokens, SUBLANES)))
                return next(t for n in _divisors(s.batch) if n <= room and _bytes(s, t := at(n, rows, width)) <= budget)
    least = _bytes(s, at(1, 1, widths[-1]))
    if least <= _VMEM_SHARE_OF_SMALLEST * device.vmem_bytes:
        return at(1, 1, widths[-1])
    raise NotImplementedError(
        f"patch_embed: {s.tokens} tokens of {s.contracted} pixels take {least / 2**20:.0f} MiB of VMEM and a {device.name} core "
        f"has {device.vmem_bytes / 2**20:.0f}; use larger patches, smaller images, or the reference op"
    )


def cost(s: Shape, *, backward: bool = False) -> pl.CostEstimate:
    """FLOPs and bytes of one pass over the image: forward, or the gradient of the parameters (or of the image, the same)."""
    image = s.batch * s.channels * s.rows * s.columns * s.patch**2 * s.itemsize
    tokens = s.batch * s.tokens * s.width * s.itemsize
    parameters = (s.contracted + s.tokens) * s.width * 4
    flops = 2 * s.batch * s.rows * s.columns * s.contracted * s.width
    if backward:
        flops += s.batch * s.tokens * s.width
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=image + tokens + parameters)


# ---- kernel bodies


def _dot(a, b, static: _Static, contract: tuple[int, int]):
    """a . b over the given axes, accumulated in float32. Values of a bfloat16 op are exact in one MXU pass, in either dtype."""
    narrow = static.dtype == jnp.bfloat16
    operand = jnp.bfloat16 if narrow and static.launch.device.bf16_matmul else jnp.float32
    return lax.dot_general(
        a.astype(operand),
        b.astype(operand),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.DEFAULT if narrow else None,
        preferred_element_type=jnp.float32,
    )


def _scale(static: _Static) -> float:
    return 1.0 / (1.0 - static.rate)


def _keep(static: _Static, scalars_ref, example, tile, width: int):
    """bool [T, width]: the elements of one example that dropout keeps, in one tile of D."""
    t = static.shape.tokens
    rows = scalars_ref[1] + example * t + lax.broadcasted_iota(jnp.int32, (t, 1), 0)
    columns = tile * width + lax.broadcasted_iota(jnp.int32, (1, width), 1)
    return drop.keep(drop.row_hash(scalars_ref[0], rows), columns, static.rate)


def _each_group(t: Tiles, body) -> None:
    """body([(image, row), ...]) over the rows of patches of a block, t.group of them in flight, each in its own slot of scratch."""
    total, group = t.images * t.rows, t.group

    def at(index):
        return divmod(index, t.rows) if isinstance(index, int) else (lax.div(index, t.rows), lax.rem(index, t.rows))

    def several(step, carry):
        body([at(step * group + slot) for slot in range(group)])
        return carry

    lax.fori_loop(0, total // group, several, 0)
    if total % group:
        body([at(total - total % group + slot) for slot in range(total % group)])


def _place(s: Shape, image, row):
    """Where the patches of a row start in the padded scratch: a multiple of 8."""
    q = _up(s.columns, SUBLANES)
    start = (image * s.rows + row) * q
    return start if isinstance(start, int) else pl.multiple_of(start, SUBLANES)


def _moves(s: Shape, t: Tiles):
    """(image, token, row of the padded scratch) of each row of patches: static, so the token may stand at any offset."""
    q = _up(s.columns, SUBLANES)
    for image in range(t.images):
        for row in range(s.rows):
            yield image, s.first + row * s.columns, (image * s.rows + row) * q


def _patchify(static: _Static, t: Tiles, chunk, planes_ref, order_ref, rows_ref, turned_ref, padded_ref):
    """The patches of a block of the image into the padded scratch."""
    s = static.shape
    p, q, side, deep = s.patch, _up(s.columns, SUBLANES), s.side, _up(s.side, SUBLANES)
    stack = 1 if order_ref is None else _stack(s)

    def body(where):
        for slot, (image, row) in enumerate(where):
            for c in range(s.channels):
                rows_ref[slot * deep + c * p : slot * deep + (c + 1) * p, :] = planes_ref[image, c, row].astype(jnp.float32)
        for first in range(0, len(where), stack):
            height = (min(stack, len(where) - first) - 1) * deep + side
            rows = rows_ref[first * deep : first * deep + height, :]
            turned = rows.T if order_ref is None else _dot(order_ref[...], rows, static, (1, 1))
            turned_ref[first // stack, :, :height] = turned
        for slot, (image, row) in enumerate(where):
            start = _place(s, image, chunk * t.rows + row)
            lanes = slice(slot % stack * deep, slot % stack * deep + side)
            for j in range(p):
                if order_ref is None:
                    column = turned_ref.at[slot][pl.ds(j, s.columns, stride=p), :]
                else:
                    column = turned_ref[slot // stack, j * q : j * q + s.columns, lanes]
                padded_ref[pl.ds(start, s.columns), j * side : (j + 1) * side] = column

    _each_group(t, body)


def _to_tokens(s: Shape, t: Tiles, padded_ref, patches_ref):
    """Patches from the padded scratch to their tokens' rows; zero for the class token and for the rows that fill the tile."""
    filled = patches_ref.shape[1]
    for image in range(t.images):
        if s.first:
            patches_ref[image, 0:1, :] = jnp.zeros((1, s.contracted), jnp.float32)
        if filled > s.tokens:
            patches_ref[image, s.tokens : filled, :] = jnp.zeros((filled - s.tokens, s.contracted), jnp.float32)
    for image, token, row in _moves(s, t):
        patches_ref[image, token : token + s.columns, :] = padded_ref[row : row + s.columns, :]


def _forward(static, t, scalars_ref, planes_ref, order_ref, w_ref, a_ref, out_ref, rows_ref, turned_ref, padded_ref, patches_ref):
    s = static.shape
    tile, block, chunk = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    _patchify(static, t, chunk, planes_ref, order_ref, rows_ref, turned_ref, padded_ref)

    @pl.when(chunk == s.rows // t.rows - 1)
    def _():
        _to_tokens(s, t, padded_ref, patches_ref)
        for image in range(t.images):
            tokens = _dot(patches_ref[image], w_ref[...], static, (1, 0))[: s.tokens] + a_ref[...]
            if static.rate:
                keep = _keep(static, scalars_ref, block * t.images + image, tile, t.width)
                tokens = jnp.where(keep, tokens * _scale(static), 0.0)
            out_ref[image] = tokens.astype(out_ref.dtype)


def _parameters_backward(
    static, t, scalars_ref, planes_ref, order_ref, g_ref, dw_ref, da_ref, rows_ref, turned_ref, padded_ref, patches_ref
):
    s = static.shape
    tile, block, chunk = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    _patchify(static, t, chunk, planes_ref, order_ref, rows_ref, turned_ref, padded_ref)

    @pl.when((block == 0) & (chunk == 0))
    def _():
        dw_ref[...] = jnp.zeros_like(dw_ref)
        da_ref[...] = jnp.zeros_like(da_ref)

    @pl.when(chunk == s.rows // t.rows - 1)
    def _():
        _to_tokens(s, t, padded_ref, patches_ref)
        for image in range(t.images):
            g = g_ref[image].astype(jnp.float32)
            if static.rate:  # the factor 1 / (1 - rate) is applied to the sums, outside
                g = jnp.where(_keep(static, scalars_ref, block * t.images + image, tile, t.width), g, 0.0)
            da_ref[...] += g
            dw_ref[...] += _dot(patches_ref[image, : s.tokens, :], g, static, (0, 0))


def _unpatchify(s: Shape, t: Tiles, chunk, padded_ref, turned_ref, dplanes_ref):
    """The reverse of `_patchify`: a block of the image's gradient from the padded scratch."""
    p, side = s.patch, s.side

    def body(where):
        for slot, (image, row) in enumerate(where):
            start = _place(s, image, chunk * t.rows + row)
            for j in range(p):
                column = padded_ref[pl.ds(start, s.columns), j * side : (j + 1) * side]
                turned_ref.at[slot][pl.ds(j, s.columns, stride=p), :] = column
        for slot, (image, row) in enumerate(where):
            rows = turned_ref[slot].T
            for c in range(s.channels):
                dplanes_ref[image, c, row] = rows[c * p : (c + 1) * p, :].astype(dplanes_ref.dtype)

    _each_group(t, body)


def _image_backward(static, t, scalars_ref, g_ref, w_ref, dplanes_ref, turned_ref, padded_ref, patches_ref):
    """Grid (images, steps): the tiles of D, summed into dpatch, then the blocks of the image; the last tile is the first block."""
    s = static.shape
    block, step, summed = pl.program_id(0), pl.program_id(1), s.width // t.width

    @pl.when(step == 0)
    def _():
        patches_ref[...] = jnp.zeros_like(patches_ref)

    @pl.when(step < summed)
    def _():
        for image in range(t.images):
            g = g_ref[image].astype(jnp.float32)
            if static.rate:
                g = jnp.where(_keep(static, scalars_ref, block * t.images + image, step, t.width), g, 0.0)
            patches_ref[image, : s.tokens, :] += _dot(g, w_ref[...], static, (1, 1))

    @pl.when(step == summed - 1)
    def _():
        for image, token, row in _moves(s, t):
            padded_ref[row : row + s.columns, :] = patches_ref[image, token : token + s.columns, :] * _scale(static)

    @pl.when(step >= summed - 1)
    def _():
        _unpatchify(s, t, step - (summed - 1), padded_ref, turned_ref, dplanes_ref)


# ---- launches


def _gathers(device: Device) -> bool:
    """Whether loads with a stride over sublanes are one instruction; elsewhere Mosaic makes them of one load a row."""
    return device.name in ("v5e", "v5p", "v6e", "7x")


def _stack(s: Shape) -> int:
    """Rows of patches that lie side by side in the lanes of one reordering product."""
    return max(1, LANES // _up(s.side, SUBLANES))


def _scratch(static: _Static, t: Tiles):
    s = static.shape
    q, deep = _up(s.columns, SUBLANES), _up(s.side, SUBLANES)
    if _gathers(static.launch.device):
        turned = (t.group, s.patch * s.columns, s.side)
    else:
        turned = (-(-t.group // _stack(s)), s.patch * q, _stack(s) * deep)
    return [
        pltpu.VMEM((t.group * deep, s.patch * s.columns), jnp.float32),
        pltpu.VMEM(turned, jnp.float32),
        pltpu.VMEM((t.images * s.rows * q, s.contracted), jnp.float32),
        pltpu.VMEM((t.images, _up(s.tokens, SUBLANES), s.contracted), jnp.float32),
    ]


def _image_scratch(static: _Static, t: Tiles):
    s = static.shape
    _, _, padded, patches = _scratch(static, t)
    return [pltpu.VMEM((t.group, s.patch * s.columns, s.side), jnp.float32), padded, patches]


def _with_order(kernel, static: _Static, t: Tiles):
    """(kernel body, extra inputs, their specs): where loads cannot gather, a matrix from lanes (column, j) to rows (j, column).

    Its product transposes and reorders at once, with the pixels as the MXU's transposed operand. It is 0/1: exact for what the
    MXU takes exactly, and it rounds float32 as the product that follows does.
    """
    s = static.shape
    if _gathers(static.launch.device):
        return lambda scalars, planes, *refs: kernel(static, t, scalars, planes, None, *refs), (), ()
    q = _up(s.columns, SUBLANES)
    j, column = np.divmod(np.arange(s.patch * q), q)
    source = np.where(column < s.columns, column * s.patch + j, -1).astype(np.int32)
    order = (jnp.arange(s.patch * s.columns, dtype=jnp.int32) == source[:, None]).astype(jnp.float32)
    spec = pl.BlockSpec(order.shape, lambda d, b, r, _: (0, 0), pipeline_mode=pl.Buffered(1))
    return partial(kernel, static, t), (order,), (spec,)


def _planes_spec(s: Shape, t: Tiles):
    return pl.BlockSpec((t.images, s.channels, t.rows, s.patch, s.patch * s.columns), lambda d, b, r, _: (b, 0, r, 0, 0))


def _grid(s: Shape, t: Tiles) -> tuple[int, int, int]:
    return s.width // t.width, s.batch // t.images, s.rows // t.rows


def _weights(weight, static: _Static):
    """The weights as the MXU takes them: rounded to the op's dtype, in float32 again where Mosaic takes no bfloat16."""
    weight = weight.astype(static.dtype)
    return weight if static.launch.device.bf16_matmul else weight.astype(jnp.float32)


def _run_forward(static: _Static, planes, weight, added, scalars):
    s = static.shape
    t = tiles(s, static.launch.device)
    body, order, order_specs = _with_order(_forward, static, t)
    held = pl.Buffered(1)  # constant while the images go by: a second buffer would never fill
    (tokens,) = call(
        body,
        launch=static.launch,
        name="patch_embed",
        grid=_grid(s, t),
        prefetch=1,
        in_specs=[
            _planes_spec(s, t),
            *order_specs,
            pl.BlockSpec((s.contracted, t.width), lambda d, b, r, _: (0, d), pipeline_mode=held),
            pl.BlockSpec((s.tokens, t.width), lambda d, b, r, _: (0, d), pipeline_mode=held),
        ],
        out_specs=[pl.BlockSpec((t.images, s.tokens, t.width), lambda d, b, r, _: (b, 0, d))],
        out_shapes=[((s.batch, s.tokens, s.width), static.dtype)],
        semantics=("parallel", "parallel", "arbitrary"),
        cost=cost(s),
        scratch=_scratch(static, t),
    )(scalars, planes, *order, _weights(weight, static), added)
    return tokens


def _run_parameters(static: _Static, planes, g, scalars):
    s = static.shape
    t = tiles(s, static.launch.device)
    body, order, order_specs = _with_order(_parameters_backward, static, t)
    dw, da = call(
        body,
        launch=static.launch,
        name="patch_embed_backward",
        grid=_grid(s, t),
        prefetch=1,
        in_specs=[_planes_spec(s, t), *order_specs, pl.BlockSpec((t.images, s.tokens, t.width), lambda d, b, r, _: (b, 0, d))],
        out_specs=[
            pl.BlockSpec((s.contracted, t.width), lambda d, b, r, _: (0, d)),
            pl.BlockSpec((s.tokens, t.width), lambda d, b, r, _: (0, d)),
        ],
        out_shapes=[((s.contracted, s.width), jnp.float32), ((s.tokens, s.width), jnp.float32)],
        semantics=("parallel", "arbitrary", "arbitrary"),
        cost=cost(s, backward=True),
        scratch=_scratch(static, t),
    )(scalars, planes, *order, g)
    return dw, da


def _run_image(static: _Static, weight, g, scalars):
    s = static.shape
    t = tiles(s, static.launch.device)
    summed, blocks = s.width // t.width, s.rows // t.rows

    def tile(step):
        return jnp.minimum(step, summed - 1)

    def block(step):
        return jnp.maximum(step - (summed - 1), 0)

    long = s.patch * s.columns
    # v2 and v3 cannot store bfloat16 under a mask, which 14 rows of a tile need; XLA rounds it there
    dtype = static.dtype if static.launch.device.bf16_matmul else jnp.dtype(jnp.float32)
    (dplanes,) = call(
        partial(_image_backward, static, t),
        launch=static.launch,
        name="patch_embed_image_backward",
        grid=(s.batch // t.images, summed + blocks - 1),
        prefetch=1,
        in_specs=[
            pl.BlockSpec((t.images, s.tokens, t.width), lambda b, step, _: (b, 0, tile(step))),
            pl.BlockSpec((s.contracted, t.width), lambda b, step, _: (0, tile(step))),
        ],
        out_specs=[pl.BlockSpec((t.images, s.channels, t.rows, s.patch, long), lambda b, step, _: (b, 0, block(step), 0, 0))],
        out_shapes=[((s.batch, s.channels, s.rows, s.patch, long), dtype)],
        semantics=("parallel", "arbitrary"),
        cost=cost(s, backward=True),
        scratch=_image_scratch(static, t),
    )(scalars, g, _weights(weight, static))
    return dplanes.astype(static.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _embed(static: _Static, planes, weight, added, scalars):
    """planes [B, C, R, P, X], weight [K, D], added [T, D] float32, scalars int32 [2] -> tokens [B, T, D]."""
    return _run_forward(static, planes, weight, added, scalars)


def _embed_forward(static, planes, weight, added, scalars):
    return _run_forward(static, planes, weight, added, scalars), (planes, weight, scalars)


def _embed_backward(static, saved, g):
    planes, weight, scalars = saved
    dw, da = _run_parameters(static, planes, g, scalars)
    dplanes = _run_image(static, weight, g, scalars)
    scale = _scale(static)
    return dplanes, (dw * scale).astype(weight.dtype), da * scale, np.zeros(scalars.shape, jax.dtypes.float0)


_embed.defvjp(_embed_forward, _embed_backward)


# ---- the op


def _shape(images, kernel, bias, cls, position) -> Shape:
    """The Shape of a call. ValueError for arrays that do not fit together, NotImplementedError for a dtype without kernel."""
    if images.ndim != 4 or kernel.ndim != 4 or kernel.shape[0] != kernel.shape[1] or kernel.shape[2] != images.shape[3]:
        raise ValueError(
            f"patch_embed: images are [B, Y, X, C] and kernel [P, P, C, D]; got images {images.shape}, kernel {kernel.shape}"
        )
    (b, y, x, c), (p, _, _, d) = images.shape, kernel.shape
    if y % p or x % p or not (b and y and x):
        raise ValueError(
            f"patch_embed: patches of {p} do not tile images {images.shape}; Y and X must be positive multiples of {p}"
        )
    tokens = (y // p) * (x // p) + (cls is not None)
    wanted = {"bias": (bias, (d,)), "cls": (cls, (d,)), "position": (position, (tokens, d))}
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise ValueError(
                f"patch_embed: {name} must be {shape} for images {images.shape} and kernel {kernel.shape}; got {array.shape}"
            )
    if images.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            f"patch_embed: the kernel takes float32 and bfloat16 images, not {images.dtype}; use the reference op"
        )
    return Shape(batch=b, channels=c, rows=y // p, columns=x // p, patch=p, width=d, tokens=tokens, itemsize=images.dtype.itemsize)


def patch_embed(images, kernel, bias, cls, position, *, dropout: drop.Dropout | None = None, launch: Launch):
    """dropout([cls; patches @ kernel + bias] + position): images to tokens; `kernels.patch_embed.reference` on a TPU.

    images [B, Y, X, C] float32 or bfloat16; kernel [P, P, C, D]; bias [D]; cls [D] or None; position [T, D] or None.
    Differentiable in all of them. Returns [B, T, D] in the dtype of `images`. ValueError for shapes that do not fit together;
    NotImplementedError for a dtype, or a shape and device, that the kernel cannot take.
    """
    s = _shape(images, kernel, bias, cls, position)
    rate, scalars = 0.0, jnp.zeros(2, jnp.int32)
    if dropout is not None and dropout.rate > 0.0:
        rate = float(dropout.rate)
        scalars = jnp.stack([drop.site_key(dropout.key, drop.EMBEDDING), jnp.asarray(dropout.row, jnp.int32)])
    static = _Static(shape=s, rate=rate, launch=launch, dtype=images.dtype)
    tiles(s, launch.device)
    planes = images.transpose(0, 3, 1, 2).reshape(s.batch, s.channels, s.rows, s.patch, s.patch * s.columns)
    weight = kernel.transpose(1, 2, 0, 3).reshape(s.contracted, s.width)  # (j, c, i): the order in which patches are gathered
    added = jnp.broadcast_to(bias.astype(jnp.float32), (s.rows * s.columns, s.width))
    if cls is not None:
        added = jnp.concatenate([cls.astype(jnp.float32)[None], added])
    if position is not None:
        added = added + position.astype(jnp.float32)
    return _embed(static, *vary_alike(planes, weight, added, scalars))
