"""What the forward and the backward kernels of the patch embedding share: the walk over an image, its patches, their launches."""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import body
from kernels.body import operand_dtype
from kernels.device import LANES, SUBLANES
from kernels.launch import Launch
from kernels.patch_embed.plan import Plan, Shape
from kernels.vmem import round_up


@dataclass(frozen=True, kw_only=True)
class Static:
    """The static side of a call."""

    shape: Shape
    plan: Plan
    rate: float
    launch: Launch
    dtype: jnp.dtype


def dot(a, b, static: Static, contract: tuple[int, int]):
    """a . b over the given axes, accumulated in float32, of values that are cast to what the MXU takes."""
    dtype = operand_dtype(static.dtype, static.launch.device)
    return body.dot(a.astype(dtype), b.astype(dtype), static.dtype, contract)


def upscale(static: Static) -> float:
    return 1.0 / (1.0 - static.rate)


def kept(static: Static, scalars_ref, example, tile, width: int):
    """bool [T, width]: the elements of one example that dropout keeps, in one tile of D."""
    t = static.shape.tokens
    rows, columns = scalars_ref[1] + example * t + body.iota(t, 0), tile * width + body.iota(width, 1)
    return body.kept(scalars_ref[0], rows, columns, static.rate)


def each_group(t: Plan, visit) -> None:
    """visit([(image, row), ...]) over the rows of patches of a block, t.group in flight, each in its own slot of scratch."""
    total, group = t.images * t.rows, t.group

    def at(index):
        return divmod(index, t.rows) if isinstance(index, int) else (lax.div(index, t.rows), lax.rem(index, t.rows))

    def several(step, carry):
        visit([at(step * group + slot) for slot in range(group)])
        return carry

    lax.fori_loop(0, total // group, several, 0)
    if total % group:
        visit([at(total - total % group + slot) for slot in range(total % group)])


def place(s: Shape, image, row):
    """Where the patches of a row start in the padded scratch: a multiple of 8."""
    q = round_up(s.columns, SUBLANES)
    start = (image * s.rows + row) * q
    return start if isinstance(start, int) else pl.multiple_of(start, SUBLANES)


def moves(s: Shape, t: Plan):
    """(image, token, row of the padded scratch) of each row of patches: static, so the token may stand at any offset."""
    q = round_up(s.columns, SUBLANES)
    for image in range(t.images):
        for row in range(s.rows):
            yield image, s.first + row * s.columns, (image * s.rows + row) * q


def patchify(static: Static, t: Plan, chunk, planes_ref, order_ref, rows_ref, transposed_ref, padded_ref):
    """The patches of a block of the image into the padded scratch."""
    s = static.shape
    p, q, side, deep = s.patch, round_up(s.columns, SUBLANES), s.side, round_up(s.side, SUBLANES)
    stack = 1 if order_ref is None else side_by_side(s)

    def move(where):
        for slot, (image, row) in enumerate(where):
            for c in range(s.channels):
                rows_ref[slot * deep + c * p : slot * deep + (c + 1) * p, :] = planes_ref[image, c, row].astype(jnp.float32)
        for first in range(0, len(where), stack):
            height = (min(stack, len(where) - first) - 1) * deep + side
            rows = rows_ref[first * deep : first * deep + height, :]
            transposed = rows.T if order_ref is None else dot(order_ref[...], rows, static, (1, 1))
            transposed_ref[first // stack, :, :height] = transposed
        for slot, (image, row) in enumerate(where):
            start = place(s, image, chunk * t.rows + row)
            lanes = slice(slot % stack * deep, slot % stack * deep + side)
            for j in range(p):
                if order_ref is None:
                    column = transposed_ref.at[slot][pl.ds(j, s.columns, stride=p), :]
                else:
                    column = transposed_ref[slot // stack, j * q : j * q + s.columns, lanes]
                padded_ref[pl.ds(start, s.columns), j * side : (j + 1) * side] = column

    each_group(t, move)


def to_tokens(s: Shape, t: Plan, padded_ref, patches_ref):
    """Patches from the padded scratch to their tokens' rows; zero for the class token and for the rows that fill the tile."""
    filled = patches_ref.shape[1]
    for image in range(t.images):
        if s.first:
            patches_ref[image, 0:1, :] = jnp.zeros((1, s.contracted), jnp.float32)
        if filled > s.tokens:
            patches_ref[image, s.tokens : filled, :] = jnp.zeros((filled - s.tokens, s.contracted), jnp.float32)
    for image, token, row in moves(s, t):
        patches_ref[image, token : token + s.columns, :] = padded_ref[row : row + s.columns, :]


def side_by_side(s: Shape) -> int:
    """Rows of patches that lie side by side in the lanes of one reordering product."""
    return max(1, LANES // round_up(s.side, SUBLANES))


def scratch(static: Static, t: Plan):
    s = static.shape
    q, deep = round_up(s.columns, SUBLANES), round_up(s.side, SUBLANES)
    if t.strided_loads:
        transposed = (t.group, s.patch * s.columns, s.side)
    else:
        transposed = (-(-t.group // side_by_side(s)), s.patch * q, side_by_side(s) * deep)
    return [
        pltpu.VMEM((t.group * deep, s.patch * s.columns), jnp.float32),
        pltpu.VMEM(transposed, jnp.float32),
        pltpu.VMEM((t.images * s.rows * q, s.contracted), jnp.float32),
        pltpu.VMEM((t.images, round_up(s.tokens, SUBLANES), s.contracted), jnp.float32),
    ]


def with_order(kernel, static: Static, t: Plan):
    """(kernel body, extra inputs, their specs): where loads cannot gather, a matrix from lanes (column, j) to rows (j, column).

    Its product transposes and reorders at once, with the pixels as the MXU's transposed operand. It is 0/1: exact for what the
    MXU takes exactly, and it rounds float32 as the product that follows does.
    """
    s = static.shape
    if t.strided_loads:
        return lambda scalars, planes, *refs: kernel(static, t, scalars, planes, None, *refs), (), ()
    q = round_up(s.columns, SUBLANES)
    j, column = np.divmod(np.arange(s.patch * q), q)
    source = np.where(column < s.columns, column * s.patch + j, -1).astype(np.int32)
    order = (jnp.arange(s.patch * s.columns, dtype=jnp.int32) == source[:, None]).astype(jnp.float32)
    spec = pl.BlockSpec(order.shape, lambda d, b, r, _: (0, 0), pipeline_mode=pl.Buffered(1))
    return partial(kernel, static, t), (order,), (spec,)


def planes_spec(s: Shape, t: Plan):
    return pl.BlockSpec((t.images, s.channels, t.rows, s.patch, s.patch * s.columns), lambda d, b, r, _: (b, 0, r, 0, 0))


def grid(s: Shape, t: Plan) -> tuple[int, int, int]:
    return s.width // t.width, s.batch // t.images, s.rows // t.rows


def operand(weight, static: Static):
    """The weights as the MXU takes them: rounded to the op's dtype, in float32 again where Mosaic takes no bfloat16."""
    return weight.astype(static.dtype).astype(operand_dtype(static.dtype, static.launch.device))
