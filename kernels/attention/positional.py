"""The attention half around a core that knows where tokens stand: what relative and rotary positions have in common.

    project -> core -> output (general/)

Backward the same again, then the gradients. Saved are x and the weights alone. A `Core` says what the positions do.
"""

from functools import partial
from typing import Any, Protocol

import jax
from jax.ad_checkpoint import checkpoint_name

from kernels import parts
from kernels.attention import tpu
from kernels.attention.general import forward as general_forward
from kernels.attention.general.forward import Static
from kernels.attention.plan import Plan
from kernels.attention.reference import AttentionWeights
from kernels.launch import Launch, vary_alike
from kernels.settings import own


class Core(Protocol):
    """Softmax attention with positions, of packed projections qkv [3, B, T, K]; hashable, for it is static.

    tables: what `general_forward.project` turns q and k of T tokens by, None for nothing. forward: -> o [B, T, K]. backward: of the
    gradient do of o -> (that of qkv, o, that of `table` or None). table: an array of learned positions, or None.
    """

    def tables(self, tokens: int, width: int) -> Any: ...

    def forward(self, tiles: Any, qkv: Any, table: Any, static: Static) -> Any: ...

    def backward(self, tiles: Any, qkv: Any, do: Any, table: Any, static: Static) -> tuple[Any, Any, Any]: ...


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _half(scalars, x, weights: AttentionWeights, table, static: Static, core: Core):
    """scalars: dropout key, first row and first image. Vectors of `weights` are rows [1, D] and [3, 1, K]."""
    chosen: Any = static.plan.forward  # a GeneralForward
    norm, w = weights[:2], tpu.operands(x, weights, static)
    turned = core.tables(x.shape[1], static.width)

    def part(scalars, into=None):
        qkv = general_forward.project(chosen.project, scalars, x, norm, w.qkv_kernel, w.qkv_bias, chosen.images, static, turned)
        o = core.forward(chosen.core, qkv, table, static)
        return general_forward.output(chosen.output, scalars, o, x, w.out_kernel, w.out_bias, static, into)

    n = x.shape[0] // chosen.images
    if n == 1:
        return part(scalars)
    return parts.forward(lambda first, y: part(tpu.part_scalars(scalars, first, x, static.tokens), y), n, x)


def _half_forward(scalars, x, weights, table, static, core):
    return checkpoint_name(_half(scalars, x, weights, table, static, core), "attention_half"), (scalars, x, weights, table)


def _half_backward(static: Static, core: Core, residuals, dy):
    scalars, x, weights, table = residuals
    chosen: Any = static.plan.backward  # a GeneralBackward

    def of_core(qkv, do):
        return core.backward(chosen.core, qkv, do, table, static)

    def step(first, dy):
        at = tpu.part_scalars(scalars, first, x, static.tokens)
        turned = core.tables(x.shape[1], static.width)
        dx, *gradients = tpu.backward_chain(chosen, at, x, weights, dy, static, of_core, turned=turned)
        return dx, gradients

    dx, gradients = parts.backward(step, x.shape[0] // chosen.images, x, dy)
    return None, dx, *jax.tree.map(lambda g, w: g.astype(w.dtype), gradients, [weights, table])


_half.defvjp(own(_half_forward), own(_half_backward))


def half(
    x, weights: AttentionWeights, table, core: Core, plan: Plan, *, num_heads: int, dropout=None, residual_scale=1.0, tokens=None,
    eps: float, launch: Launch,
) -> Any:  # fmt: skip
    """The half by kernels -> [B, T, D]; x and weights as of `reference.attention_half`, checked before; table as of `Core`."""
    scalars, rate = tpu.scalars_of(dropout)
    scale, bias, w_qkv, b_qkv, w_out, b_out = weights
    arrays = scale[None], bias[None], w_qkv, b_qkv[:, None], w_out, b_out[None]
    static = Static(
        num_heads=num_heads, width=w_out.shape[0] // num_heads, rate=rate, residual_scale=float(residual_scale), eps=float(eps),
        launch=launch, plan=plan, tokens=tokens if tokens != x.shape[1] else None,
    )  # fmt: skip
    scalars, x, table, *arrays = vary_alike(scalars, x, table, *arrays)
    return _half(scalars, x, AttentionWeights(*arrays), table, static, core)
