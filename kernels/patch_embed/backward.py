"""The backward kernels of the patch embedding, for the parameters and for the image; the equations stand in `tpu.py`."""

from functools import partial

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.launch import call
from kernels.patch_embed.body import (
    Static,
    dot,
    each_group,
    grid,
    kept,
    moves,
    operand,
    patchify,
    place,
    planes_spec,
    scratch,
    to_tokens,
    upscale,
    with_order,
)
from kernels.patch_embed.plan import Plan, Shape, cost


def _parameters_backward(
    static, t, scalars_ref, planes_ref, order_ref, g_ref, dw_ref, da_ref, rows_ref, transposed_ref, padded_ref, patches_ref
):
    s = static.shape
    tile, block, chunk = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    patchify(static, t, chunk, planes_ref, order_ref, rows_ref, transposed_ref, padded_ref)

    @pl.when((block == 0) & (chunk == 0))
    def _():
        dw_ref[...] = jnp.zeros_like(dw_ref)
        da_ref[...] = jnp.zeros_like(da_ref)

    @pl.when(chunk == s.rows // t.rows - 1)
    def _():
        to_tokens(s, t, padded_ref, patches_ref)
        for image in range(t.images):
            g = g_ref[image].astype(jnp.float32)
            if static.rate:  # the factor 1 / (1 - rate) is applied to the sums, outside
                g = jnp.where(kept(static, scalars_ref, block * t.images + image, tile, t.width), g, 0.0)
            da_ref[...] += g
            dw_ref[...] += dot(patches_ref[image, : s.tokens, :], g, static, (0, 0))


def _unpatchify(s: Shape, t: Plan, chunk, padded_ref, transposed_ref, dplanes_ref):
    """The reverse of `patchify`: a block of the image's gradient from the padded scratch."""
    p, side = s.patch, s.side

    def body(where):
        for slot, (image, row) in enumerate(where):
            start = place(s, image, chunk * t.rows + row)
            for j in range(p):
                column = padded_ref[pl.ds(start, s.columns), j * side : (j + 1) * side]
                transposed_ref.at[slot][pl.ds(j, s.columns, stride=p), :] = column
        for slot, (image, row) in enumerate(where):
            rows = transposed_ref[slot].T
            for c in range(s.channels):
                dplanes_ref[image, c, row] = rows[c * p : (c + 1) * p, :].astype(dplanes_ref.dtype)

    each_group(t, body)


def _image_backward(static, t, scalars_ref, g_ref, w_ref, dplanes_ref, transposed_ref, padded_ref, patches_ref):
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
                g = jnp.where(kept(static, scalars_ref, block * t.images + image, step, t.width), g, 0.0)
            patches_ref[image, : s.tokens, :] += dot(g, w_ref[...], static, (1, 1))

    @pl.when(step == summed - 1)
    def _():
        for image, token, row in moves(s, t):
            padded_ref[row : row + s.columns, :] = patches_ref[image, token : token + s.columns, :] * upscale(static)

    @pl.when(step >= summed - 1)
    def _():
        _unpatchify(s, t, step - (summed - 1), padded_ref, transposed_ref, dplanes_ref)


def _image_scratch(static: Static, t: Plan):
    s = static.shape
    _, _, padded, patches = scratch(static, t)
    return [pltpu.VMEM((t.group, s.patch * s.columns, s.side), jnp.float32), padded, patches]


def parameters(static: Static, planes, g, scalars):
    s = static.shape
    t = static.plan
    body, order, order_specs = with_order(_parameters_backward, static, t)
    dw, da = call(
        body,
        launch=static.launch.within(t.needs),
        name="patch_embed_backward",
        grid=grid(s, t),
        prefetch=1,
        in_specs=[planes_spec(s, t), *order_specs, pl.BlockSpec((t.images, s.tokens, t.width), lambda d, b, r, _: (b, 0, d))],
        out_specs=[
            pl.BlockSpec((s.contracted, t.width), lambda d, b, r, _: (0, d)),
            pl.BlockSpec((s.tokens, t.width), lambda d, b, r, _: (0, d)),
        ],
        out_shapes=[((s.contracted, s.width), jnp.float32), ((s.tokens, s.width), jnp.float32)],
        semantics=("parallel", "arbitrary", "arbitrary"),
        cost=cost(s, backward=True),
        scratch=scratch(static, t),
    )(scalars, planes, *order, g)
    return dw, da


def image(static: Static, weight, g, scalars):
    s = static.shape
    t = static.plan
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
        launch=static.launch.within(t.needs),
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
    )(scalars, g, operand(weight, static))
    return dplanes.astype(static.dtype)
