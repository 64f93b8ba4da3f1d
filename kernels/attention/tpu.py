"""Attention as Pallas TPU kernels: the half of a block, and softmax attention by itself; `reference.py` is the specification.

    z = LN(x);  q, k, v = z qkv_kernel + qkv_bias;  o = attention(q, k, v);  out = s x + dropout(o out_kernel + s out_bias)

with s = residual_scale. Backward saves x and the weights alone, and recomputes z, q, k and v; with keep=True q, k, v and o are
saved as well, as the kernels hold them.

`plan.py` says which kernels run, `general/` and `float32/` hold them. The
arrays between kernels pass through HBM while the MXU works; the batch is taken in parts, so that they take little room there. The
kernels find a part's images in the whole x and dy by the first one's number; dx takes the place of dy.

Operands are rounded where the reference rounds them, or not at all; sums, LN and softmax are float32, as are the gradients of the
parameters. Generations whose Mosaic takes no bfloat16 operands get float32 weights, which their MXU rounds.
"""

import contextlib
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels import by_xla, parts
from kernels import dropout as drop
from kernels.attention import plan as planning
from kernels.attention.float32 import backward as float32_backward
from kernels.attention.float32 import chain as float32_chain
from kernels.attention.float32 import core_backward as float32_core_backward
from kernels.attention.float32 import forward as float32_forward
from kernels.attention.general import backward as general_backward
from kernels.attention.general import core as general_core
from kernels.attention.general import core_backward as general_core_backward
from kernels.attention.general import forward as general_forward
from kernels.attention.general.forward import Static
from kernels.attention.packed.half import attention_half as packed_half
from kernels.attention.plan import (
    CorePlan,
    Float32Backward,
    Float32Forward,
    FusedForward,
    GeneralBackward,
    GeneralForward,
    Packed,
    Plan,
    Refused,
)
from kernels.attention.reference import AttentionWeights
from kernels.attention.reference import attention_half as reference
from kernels.attention.tiling import CoreTiles, Float32Core, RelativeTiles, Shape
from kernels.body import operand_dtype
from kernels.by_xla import ByXLA
from kernels.launch import Launch, vary_alike
from kernels.layer_norm.reference import EPS
from kernels.settings import own
from kernels.stacked import apart, cast, cotangent, in_place, places, taken, writable


def shape_of(x, weights: AttentionWeights, num_heads: int) -> Shape:
    """What the plan of a call depends on."""
    b, t, d = x.shape
    return Shape(b, t, d, num_heads, weights.out_kernel.shape[0] // num_heads, jnp.dtype(x.dtype))


# ---- the half


def operands(x, weights: AttentionWeights, static: Static) -> AttentionWeights:
    """The weights as the products take them: in the activations' dtype, or float32 where the MXU rounds float32 by itself."""
    dtype = operand_dtype(x.dtype, static.launch.device)
    return weights._replace(qkv_kernel=cast(weights.qkv_kernel, dtype), out_kernel=cast(weights.out_kernel, dtype))


def _core_forward(tiles: CoreTiles | RelativeTiles | Float32Core, qkv, **options):
    assert not isinstance(tiles, RelativeTiles), "a plan of relative positions"
    if isinstance(tiles, Float32Core):
        return float32_forward.core(tiles, qkv, **options)
    return general_core.core(tiles, qkv, **options)


def _forward_part(chosen: GeneralForward | Float32Forward, scalars, x, weights: AttentionWeights, static: Static, into=None):
    """(the half of chosen.images images of x, from image scalars[2] on, qkv, o); into: the results of the others, if there are
    any."""
    norm, w = weights[:2], operands(x, weights, static)
    if isinstance(chosen, Float32Forward):
        qkv = float32_chain.project(chosen.project, scalars, x, norm, w.qkv_kernel, w.qkv_bias, chosen.images, static)
        o = float32_chain.core(chosen.core, qkv, x.shape[1], x.dtype, static)
        return float32_chain.output(chosen.output, scalars, o, x, w.out_kernel, w.out_bias, static, into), qkv, o
    qkv = general_forward.project(chosen.project, scalars, x, norm, w.qkv_kernel, w.qkv_bias, chosen.images, static)
    options = {"num_heads": static.num_heads, "width": static.width, "launch": static.launch}
    o = _core_forward(chosen.core, qkv, tokens=static.tokens, **options)
    return general_forward.output(chosen.output, scalars, o, x, w.out_kernel, w.out_bias, static, into), qkv, o


def _core_backward(chosen: GeneralBackward, static: Static, o, qkv, do):
    options = {"num_heads": static.num_heads, "width": static.width, "launch": static.launch}
    assert not isinstance(chosen.core, RelativeTiles), "a plan of relative positions"
    dqkv, *made = general_core_backward.core(chosen.core, qkv, do, with_o=o is None, tokens=static.tokens, **options)
    return dqkv, (made[0] if o is None else o), None


def backward_chain(
    chosen, scalars, x, weights: AttentionWeights, dy, static: Static, core, into=(None,) * 6, qkv=None, turned=None
):
    """dy with dx in its place for chosen.images images, from image scalars[2] on; the gradients of the weights, float32; and the
    third of core(qkv, do) -> (dqkv, o, whatever else). into: where the gradient of each weight belongs, or None; returned is the
    whole array then. qkv: where the forward pass kept it. turned: as of `general_forward.project`."""
    norm, w = weights[:2], operands(x, weights, static)
    if qkv is None:
        qkv = general_forward.project(chosen.project, scalars, x, norm, w.qkv_kernel, w.qkv_bias, chosen.images, static, turned)
    do = general_backward.output_gradient(chosen.output_gradient, scalars, dy, w.out_kernel, chosen.images, static)
    dqkv, o, more = core(qkv, do)
    of_output = general_backward.output_weights(chosen.output_weights, scalars, o, dy, static, into[4])
    of_qkv = general_backward.projection_weights(chosen.projection_weights, scalars, x, norm, dqkv, static, into[2])
    dx, dscale, dbias = general_backward.input_gradient(chosen.input_gradient, scalars, x, norm[0], dqkv, dy, w.qkv_kernel, static)
    return dx, AttentionWeights(dscale[None], dbias[None], *of_qkv, *of_output), more


def part_scalars(scalars, first, x, tokens: int | None = None):
    """The scalars of the part of x that begins with image `first`: its first row, among all of the job's, and that image. tokens:
    rows of an image that count."""
    return jnp.stack([scalars[0], scalars[1] + first * (tokens or x.shape[1]), first])


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _half(scalars, x, weights: AttentionWeights, static: Static):
    """(y, the arrays of stacked weights). scalars: dropout key, first row and first image. Vectors of `weights` are rows [1, D] and
    [3, 1, K]."""
    if static.plan.keep:  # nobody differentiates
        static = replace(static, plan=replace(static.plan, keep=False))
    return _value(scalars, x, weights, static)[0], taken(weights)


def _value(scalars, x, weights: AttentionWeights, static: Static) -> tuple[Any, tuple]:
    """(the half, what is kept of it): float32 q, k, v, o, or qkv and o, or qkv, or with a plan that keeps nothing ()."""
    chosen: Any = static.plan.forward  # XLA's passes do not come here
    if isinstance(chosen, FusedForward):
        w = operands(x, weights, static)
        y, *kept = float32_forward.fused(scalars, x, weights[:2], *w[2:], static)
        return y, tuple(kept)
    n = x.shape[0] // chosen.images
    if n == 1:
        y, *kept = _forward_part(chosen, scalars, x, weights, static)
        return y, tuple(kept[: 1 + static.plan.keeps_o]) if static.plan.keep else ()

    def step(first, y):
        return _forward_part(chosen, part_scalars(scalars, first, x, static.tokens), x, weights, static, y)[0]

    return parts.forward(step, n, x), ()


def _half_forward(scalars, x, weights, static):
    y, kept = _value(scalars, x, weights, static)
    kept = checkpoint_name(kept, "attention_half_kept")
    return (checkpoint_name(y, "attention_half"), taken(weights)), (scalars, x, weights, kept)


def _half_backward(static: Static, residuals, cotangents):
    (scalars, x, weights, kept), (dy, arrays) = residuals, cotangents
    chosen: Any = static.plan.backward
    if isinstance(chosen, Refused):
        raise NotImplementedError(chosen.reason)
    n, where = x.shape[0] // chosen.images, places(weights, arrays)
    written = [n == 1 and writable(place) for place in where]
    into = [place if ready else None for place, ready in zip(where, written, strict=True)]

    def step(first, dy):
        at = part_scalars(scalars, first, x, static.tokens)
        if isinstance(chosen, Float32Backward):
            dx, sums = float32_backward.backward(chosen, at, x, operands(x, weights, static), dy, static, into, kept or None)
            return dx, AttentionWeights(*sums)
        qkv, o = kept if len(kept) == 2 else (None, None)
        return backward_chain(chosen, at, x, weights, dy, static, partial(_core_backward, chosen, static, o), into, qkv)[:2]

    dx, gradients = parts.backward(step, n, x, dy)
    found = zip(weights, where, gradients, written, strict=True)
    return None, dx, AttentionWeights(*(cotangent(w, place, g, written=ready) for w, place, g, ready in found))


_half.defvjp(own(_half_forward), own(_half_backward))


def kept_bytes(b: int, t: int, d: int, num_heads: int, width: int, dtype, *, launch: Launch) -> int | None:
    """The HBM that a call with keep=True keeps beside x [b, t, d] in `dtype`; width: of a head. None where it refuses."""
    shape = Shape(b, t, d, num_heads, width, jnp.dtype(dtype))
    with contextlib.suppress(NotImplementedError):
        return (planning.plan if launch.interpret else planning.choose)(shape, launch.device, keep=True).kept_bytes(shape)
    return None


def attention_half(
    x,
    weights: AttentionWeights,
    *,
    num_heads,
    dropout=None,
    residual_scale=1.0,
    tokens=None,
    eps=EPS,
    keep: bool = False,
    launch: Launch,
    plan: Plan | None = None,
) -> Any:
    """The attention half of a block -> [B, T, D], as `reference.attention_half` (arguments and meaning there).

    keep: save q, k, v and o (`Plan.keep`) for the backward pass, beside x and the weights, which alone are saved otherwise. launch:
    from `kernels.launch`. plan: which kernels run and how, by default what `plan.plan` chooses; one that is given says itself what
    is kept. qkv_kernel and out_kernel may be `stacked.Stacked`: returned is (y, their arrays), or y alone where the heads are
    padded, the batch is taken in parts or they are lent. Differentiable in x and all weights. ValueError for shapes or dtypes that
    do not fit together; NotImplementedError for a shape that no tiles fit, and with keep where `kept_bytes` is None.
    """
    check_half(x, weights, num_heads)
    shape = shape_of(x, weights, num_heads)
    # interpreted, it is the kernels that are tried
    plan = plan or (planning.plan if launch.interpret else planning.choose)(shape, launch.device, keep=keep)
    if plan.narrow and not any(by_xla.left(plan)):
        options = {"num_heads": num_heads, "residual_scale": residual_scale, "tokens": tokens, "eps": eps, "launch": launch}
        narrow = Plan(head_lanes=shape.h, forward=plan.narrow, backward=Refused(reason="the plan's other half does it"))
        return _by_two(narrow, replace(plan, narrow=None), x, apart(weights), dropout, options)
    if any(by_xla.left(plan)):
        own = planning.plan(shape, launch.device)
        options = {"num_heads": num_heads, "residual_scale": residual_scale, "tokens": tokens, "eps": eps}
        return by_xla.partly(
            attention_half, _plain(plan, launch), own, x, apart(weights), dropout, plan=replace(plan, narrow=None), launch=launch,
            name="attention_half", options=options,
        )  # fmt: skip
    scalars, rate = scalars_of(dropout)
    if plan.head_lanes == shape.h:
        whole = not isinstance(plan.backward, Refused | ByXLA) and plan.backward.images == shape.b
        weights = in_place(weights, write=whole, dtype=operand_dtype(x.dtype, launch.device))
    else:
        weights = apart(weights)
    scale, bias, w_qkv, b_qkv, w_out, b_out = weights
    w_qkv, b_qkv, w_out = (_pad_heads(w, axis, shape.h, plan.head_lanes) for w, axis in ((w_qkv, 2), (b_qkv, 1), (w_out, 0)))
    arrays = scale[None], bias[None], w_qkv, b_qkv[:, None], w_out, b_out[None]
    static = Static(
        num_heads=num_heads, width=shape.h, rate=rate, residual_scale=float(residual_scale), eps=float(eps), launch=launch,
        plan=plan, tokens=tokens if tokens != shape.t else None,
    )  # fmt: skip
    scalars, x, *arrays = vary_alike(scalars, x, *arrays)
    both: Any = _half(scalars, x, AttentionWeights(*arrays), static)
    y, stacks = both
    return (y, stacks) if stacks else y


def _plain(plan: Plan, launch: Launch):
    """The half as the passes have it that are XLA's: packed, if either is."""
    packed = [p for p in (plan.forward, plan.backward) if isinstance(p, Packed)]
    assert len(packed) != 1 or sum(by_xla.left(plan)) == 1, "one pass by XLA alone, the other packed"
    return partial(packed_half, tiles=packed[0].core, launch=launch) if packed else reference


def _by_two(forward: Plan, backward: Plan, x, weights, dropout, options):
    """The half with a plan for each pass, which keep x and the weights between them."""

    def run(plan: Plan):
        return lambda x, w, dropout: attention_half(x, w, dropout=dropout, plan=plan, **options)

    passes = by_xla.Passes(run(forward), run(backward), True, False, "attention_half", options["tokens"], whole=True)
    return by_xla.run(passes, x, weights, dropout)


def scalars_of(dropout):
    """(int32 [3]: dropout key, first row and first image; the rate)."""
    rate = 0.0 if dropout is None else float(dropout.rate)
    key, row = (0, 0) if dropout is None or rate == 0.0 else (drop.site_key(dropout.key, drop.ATTENTION_OUT), dropout.row)
    return jnp.stack([jnp.asarray(s, jnp.int32) for s in (key, row, 0)]), rate


def _pad_heads(w, axis: int, width: int, lanes: int):
    """A weight whose axis N*H becomes N*lanes, zeros after each head; differentiation cuts them off again."""
    if width == lanes:
        return w
    heads = w.reshape(*w.shape[:axis], -1, width, *w.shape[axis + 1 :])
    pads = [(0, lanes - width if a == axis + 1 else 0) for a in range(heads.ndim)]
    return jnp.pad(heads, pads).reshape(*w.shape[:axis], -1, *w.shape[axis + 1 :])


def check_half(x, weights: AttentionWeights, num_heads: int) -> None:
    if x.ndim != 3 or min(x.shape) < 1 or x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"attention_half: x is {x.dtype}{list(x.shape)}; required float32 or bfloat16 [B, T, D]")
    d, k = x.shape[2], weights.out_kernel.shape[0] if weights.out_kernel.ndim else 0
    if num_heads < 1 or k == 0 or k % num_heads:
        raise ValueError(f"attention_half: out_kernel has {k} rows; required N*H for num_heads = {num_heads}")
    required = (d,), (d,), (3, d, k), (3, k), (k, d), (d,)
    for name, array, shape in zip(weights._fields, weights, required, strict=True):
        if array.shape != shape:
            raise ValueError(f"attention_half: {name} has shape {array.shape}; required {shape} beside x {x.shape}")


# ---- attention by itself


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _attention(qkv, num_heads, launch, plan: CorePlan):
    return _core_forward(plan.forward, qkv, num_heads=num_heads, width=qkv.shape[3] // num_heads, launch=launch)


def _attention_backward(num_heads, launch, plan: CorePlan, qkv, do):
    options = {"num_heads": num_heads, "width": qkv.shape[3] // num_heads, "launch": launch}
    if isinstance(plan.backward, Refused):
        raise NotImplementedError(plan.backward.reason)
    if isinstance(plan.backward, Float32Core):
        return (float32_core_backward.core(plan.backward, qkv, do, **options),)
    return (general_core_backward.core(plan.backward, qkv, do, with_o=False, **options)[0],)


_attention.defvjp(own(lambda qkv, *static: (_attention(qkv, *static), qkv)), own(_attention_backward))


def attention(qkv, num_heads: int, *, launch: Launch, plan: CorePlan | None = None) -> Any:
    """Multi-head softmax attention of packed projections qkv [3, B, T, N*H] -> [B, T, N*H]; float32 or bfloat16, differentiable.

    plan: as in `attention_half`, by default `plan.core_plan`. ValueError for another shape or dtype; NotImplementedError where T is
    too long for VMEM.
    """
    if qkv.ndim != 4 or qkv.shape[0] != 3 or min(qkv.shape) < 1 or num_heads < 1 or qkv.shape[-1] % num_heads:
        raise ValueError(f"attention: qkv has shape {qkv.shape}; required [3, B, T, N*H] with N = num_heads = {num_heads}")
    if qkv.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"attention: qkv is {qkv.dtype}; required float32 or bfloat16")
    _, b, t, k = qkv.shape
    shape = Shape(b, t, k, num_heads, k // num_heads, jnp.dtype(qkv.dtype))
    return _attention(qkv, num_heads, launch, plan or planning.core_plan(shape, launch.device))
