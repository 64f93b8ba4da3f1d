"""The attention half with rotary positions as Pallas TPU kernels; `reference.py` is the specification.

    project, with q and k turned (turning.py) -> core -> output (general/)

Backward the same again, and the gradients of q and k are turned back, where they lie, before the products with them. Saved are x
and the weights alone. Where `plan.choose` says so XLA compiles the specification, which saves no more: `by_xla` gives the reason,
for the line in which a run says what it runs on.
"""

from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from kernels import by_xla as xla
from kernels import parts
from kernels.attention import tpu
from kernels.attention.general import core as general_core
from kernels.attention.general import core_backward as general_core_backward
from kernels.attention.general import forward as general_forward
from kernels.attention.general.forward import Static
from kernels.attention.plan import Plan, Refused
from kernels.attention.reference import AttentionWeights
from kernels.attention.rotary import plan as planning
from kernels.attention.rotary import reference, turning
from kernels.attention.rotary.reference import Turn
from kernels.attention.tiling import Shape
from kernels.launch import Launch, vary_alike
from kernels.layer_norm.reference import EPS
from kernels.settings import own


def by_xla(shape: Shape, *, launch: Launch) -> str:
    """Why the half of this shape is XLA's and not the kernels'; "" where it is theirs."""
    chosen = planning.choose(shape, launch.device)
    return chosen.reason if isinstance(chosen, Refused) else ""


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _half(scalars, x, weights: AttentionWeights, static: Static, turn: Turn):
    """scalars: dropout key, first row and first image. Vectors of `weights` are rows [1, D] and [3, 1, K]."""
    chosen: Any = static.plan.forward  # a GeneralForward
    norm, w = weights[:2], tpu.operands(x, weights, static)

    at = turning.of_rows(turn, x.shape[1], static.width)

    def part(scalars, into=None):
        qkv = general_forward.project(chosen.project, scalars, x, norm, w.qkv_kernel, w.qkv_bias, chosen.images, static, at)
        options = {"num_heads": static.num_heads, "width": static.width, "launch": static.launch}
        o = general_core.core(chosen.core, qkv, tokens=static.tokens, **options)
        return general_forward.output(chosen.output, scalars, o, x, w.out_kernel, w.out_bias, static, into)

    n = x.shape[0] // chosen.images
    if n == 1:
        return part(scalars)
    return parts.forward(lambda first, y: part(tpu.part_scalars(scalars, first, x, static.tokens), y), n, x)


def _half_forward(scalars, x, weights, static, turn):
    return checkpoint_name(_half(scalars, x, weights, static, turn), "attention_half"), (scalars, x, weights)


def _half_backward(static: Static, turn: Turn, residuals, dy):
    scalars, x, weights = residuals
    chosen: Any = static.plan.backward  # a GeneralBackward

    def core(qkv, do):
        options = {"num_heads": static.num_heads, "width": static.width, "launch": static.launch}
        dqkv, o = general_core_backward.core(chosen.core, qkv, do, with_o=True, tokens=static.tokens, **options)
        return turning.turned_back(dqkv, turn, static.width, launch=static.launch), o, None

    def step(first, dy):
        at = tpu.part_scalars(scalars, first, x, static.tokens)
        return tpu.backward_chain(chosen, at, x, weights, dy, static, core, turned=turning.of_rows(turn, x.shape[1], static.width))[
            :2
        ]

    dx, gradients = parts.backward(step, x.shape[0] // chosen.images, x, dy)
    return None, dx, jax.tree.map(lambda g, w: g.astype(w.dtype), gradients, weights)


_half.defvjp(own(_half_forward), own(_half_backward))


def attention_half(
    x, weights: AttentionWeights, *, turn: Turn, num_heads, dropout=None, residual_scale=1.0, tokens=None, eps=EPS, launch: Launch,
    plan: Plan | None = None,
) -> Any:  # fmt: skip
    """The attention half with rotary positions -> [B, T, D], as `reference.attention_half` (arguments and meaning there).

    launch: from `kernels.launch`. plan: which kernels run and how, by default what `plan.choose` chooses, which may be XLA; with
    interpreted kernels it is they that are tried. Differentiable in x and all weights. ValueError for shapes or dtypes that do not
    fit together.
    """
    tpu.check_half(x, weights, num_heads)
    shape = tpu.shape_of(x, weights, num_heads)
    chosen = plan or (planning.plan if launch.interpret else planning.choose)(shape, launch.device)
    if isinstance(chosen, Refused):
        options = {"num_heads": num_heads, "residual_scale": residual_scale, "tokens": tokens, "eps": eps}

        def plain(x, weights, dropout):
            return reference.attention_half(x, weights, turn=turn, dropout=dropout, **options)

        return xla.run(xla.Passes(plain, plain, True, True, "attention_half", tokens), x, weights, dropout)
    scalars, rate = tpu.scalars_of(dropout)
    scale, bias, w_qkv, b_qkv, w_out, b_out = weights
    arrays = scale[None], bias[None], w_qkv, b_qkv[:, None], w_out, b_out[None]
    static = Static(
        num_heads=num_heads, width=shape.h, rate=rate, residual_scale=float(residual_scale), eps=float(eps), launch=launch,
        plan=chosen, tokens=tokens if tokens != shape.t else None,
    )  # fmt: skip
    scalars, x, *arrays = vary_alike(scalars, x, *arrays)
    return _half(scalars, x, AttentionWeights(*arrays), static, turn)
