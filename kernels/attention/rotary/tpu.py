"""The attention half with rotary positions as Pallas TPU kernels; `reference.py` is the specification.

    project, with q and k turned (turning.py) -> core -> output (general/)

Backward the same again, and the gradients of q and k are turned back, where they lie, before the products with them. Saved are x
and the weights alone. Where `plan.choose` says so XLA compiles the specification, which saves no more: `by_xla` gives the reason,
for the line in which a run says what it runs on.
"""

from typing import Any, NamedTuple

from kernels import by_xla as xla
from kernels.attention import positional, tpu
from kernels.attention.general import core as general_core
from kernels.attention.general import core_backward as general_core_backward
from kernels.attention.general.forward import Static
from kernels.attention.plan import Plan, Refused
from kernels.attention.reference import AttentionWeights
from kernels.attention.rotary import plan as planning
from kernels.attention.rotary import reference, turning
from kernels.attention.rotary.reference import Turn
from kernels.attention.tiling import Shape
from kernels.launch import Launch
from kernels.layer_norm.reference import EPS


def by_xla(shape: Shape, *, launch: Launch) -> str:
    """Why the half of this shape is XLA's and not the kernels'; "" where it is theirs."""
    chosen = planning.choose(shape, launch.device)
    return chosen.reason if isinstance(chosen, Refused) else ""


class _Turned(NamedTuple):
    """The `positional.Core` of rotary positions: the plain one, on q and k that are turned."""

    turn: Turn

    def tables(self, tokens: int, width: int):
        return turning.of_rows(self.turn, tokens, width)

    def forward(self, tiles, qkv, table, static: Static):
        return general_core.core(tiles, qkv, tokens=static.tokens, **_options(static))

    def backward(self, tiles, qkv, do, table, static: Static):
        dqkv, o = general_core_backward.core(tiles, qkv, do, with_o=True, tokens=static.tokens, **_options(static))
        return turning.turned_back(dqkv, self.turn, static.width, launch=static.launch), o, None


def _options(static: Static) -> Any:
    return {"num_heads": static.num_heads, "width": static.width, "launch": static.launch}


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
    options: Any = {"num_heads": num_heads, "residual_scale": residual_scale, "tokens": tokens, "eps": eps}
    if isinstance(chosen, Refused):

        def plain(x, weights, dropout):
            return reference.attention_half(x, weights, turn=turn, dropout=dropout, **options)

        return xla.run(xla.Passes(plain, plain, True, True, "attention_half", tokens), x, weights, dropout)
    return positional.half(x, weights, None, _Turned(turn), chosen, dropout=dropout, launch=launch, **options)
