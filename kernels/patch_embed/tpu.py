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

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from kernels import dropout as drop
from kernels.by_xla import ByXLA
from kernels.launch import Launch, call, vary_alike
from kernels.patch_embed import backward
from kernels.patch_embed import plan as planning
from kernels.patch_embed.body import (
    Static,
    dot,
    grid,
    kept,
    operand,
    patchify,
    planes_spec,
    scratch,
    to_tokens,
    upscale,
    with_order,
)
from kernels.patch_embed.plan import Plan, Shape, cost
from kernels.patch_embed.reference import patch_embed as reference
from kernels.settings import own


def _forward(
    static, t, scalars_ref, planes_ref, order_ref, w_ref, a_ref, out_ref, rows_ref, transposed_ref, padded_ref, patches_ref
):
    s = static.shape
    tile, block, chunk = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    patchify(static, t, chunk, planes_ref, order_ref, rows_ref, transposed_ref, padded_ref)

    @pl.when(chunk == s.rows // t.rows - 1)
    def _():
        to_tokens(s, t, padded_ref, patches_ref)
        for image in range(t.images):
            tokens = dot(patches_ref[image], w_ref[...], static, (1, 0))[: s.tokens] + a_ref[...]
            if static.rate:
                keep = kept(static, scalars_ref, block * t.images + image, tile, t.width)
                tokens = jnp.where(keep, tokens * upscale(static), 0.0)
            out_ref[image] = tokens.astype(out_ref.dtype)


def _planes(s: Shape, images):
    """images [B, Y, X, C] with their channels apart and pixels side by side, as the kernel reads them: [B, C, R, P, X]."""
    return images.transpose(0, 3, 1, 2).reshape(s.batch, s.channels, s.rows, s.patch, s.patch * s.columns)


def _run_forward(static: Static, images, weight, added, scalars):
    s = static.shape
    t = static.plan
    body, order, order_specs = with_order(_forward, static, t)
    held = pl.Buffered(1)  # constant while the images go by: a second buffer would never fill
    (tokens,) = call(
        body,
        launch=static.launch.within(t.needs),
        name="patch_embed",
        grid=grid(s, t),
        prefetch=1,
        in_specs=[
            planes_spec(s, t),
            *order_specs,
            pl.BlockSpec((s.contracted, t.width), lambda d, b, r, _: (0, d), pipeline_mode=held),
            pl.BlockSpec((s.tokens, t.width), lambda d, b, r, _: (0, d), pipeline_mode=held),
        ],
        out_specs=[pl.BlockSpec((t.images, s.tokens, t.width), lambda d, b, r, _: (b, 0, d))],
        out_shapes=[((s.batch, s.tokens, s.width), static.dtype)],
        semantics=("parallel", "parallel", "arbitrary"),
        cost=cost(s),
        scratch=scratch(static, t),
    )(scalars, _planes(s, images), *order, operand(weight, static), added)
    return tokens


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _embed(static: Static, images, weight, added, scalars):
    """images [B, Y, X, C], weight [K, D], added [T, D] float32, scalars int32 [2] -> tokens [B, T, D]."""
    return _run_forward(static, images, weight, added, scalars)


def _embed_forward(static, images, weight, added, scalars):
    return _run_forward(static, images, weight, added, scalars), (images, weight, scalars)


def _embed_backward(static, saved, g):
    images, weight, scalars = saved
    s = static.shape
    images, g = lax.optimization_barrier((images, g))  # or XLA keeps the forward pass's planes instead of making them again
    dw, da = backward.parameters(static, _planes(s, images), g, scalars)
    dplanes = backward.image(static, weight, g, scalars)
    dimages = dplanes.reshape(s.batch, s.channels, s.rows * s.patch, -1).transpose(0, 2, 3, 1)
    scale = upscale(static)
    return dimages, (dw * scale).astype(weight.dtype), da * scale, np.zeros(scalars.shape, jax.dtypes.float0)


_embed.defvjp(own(_embed_forward), own(_embed_backward))


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


def patch_embed(
    images, kernel, bias, cls, position, *, dropout: drop.Dropout | None = None, launch: Launch, plan: Plan | ByXLA | None = None
):
    """dropout([cls; patches @ kernel + bias] + position): images to tokens; `kernels.patch_embed.reference` on a TPU.

    images [B, Y, X, C] float32 or bfloat16; kernel [P, P, C, D]; bias [D]; cls [D] or None; position [T, D] or None.
    Differentiable in all of them. Returns [B, T, D] in the dtype of `images`. plan: by default what `plan.choose` says.
    ValueError for shapes that do not fit together; NotImplementedError for a dtype, or a shape and device, that the kernel cannot
    take.
    """
    s = _shape(images, kernel, bias, cls, position)
    # interpreted, it is the kernel that is tried
    plan = plan or (planning.plan if launch.interpret else planning.choose)(s, launch.device)
    if isinstance(plan, ByXLA):
        return reference(images, kernel, bias, cls, position, dropout=dropout)
    rate, scalars = 0.0, jnp.zeros(2, jnp.int32)
    if dropout is not None and dropout.rate > 0.0:
        rate = float(dropout.rate)
        scalars = jnp.stack([drop.site_key(dropout.key, drop.EMBEDDING), jnp.asarray(dropout.row, jnp.int32)])
    static = Static(shape=s, plan=plan, rate=rate, launch=launch, dtype=images.dtype)
    weight = kernel.transpose(1, 2, 0, 3).reshape(s.contracted, s.width)  # (j, c, i): the order in which patches are gathered
    added = jnp.broadcast_to(bias.astype(jnp.float32), (s.rows * s.columns, s.width))
    if cls is not None:
        added = jnp.concatenate([cls.astype(jnp.float32)[None], added])
    if position is not None:
        added = added + position.astype(jnp.float32)
    return _embed(static, *vary_alike(images, weight, added, scalars))
