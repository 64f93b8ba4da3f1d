"""The attention half with rotary positions on a TPU: XLA's products, `reference.attention_half`, which for the backward pass keep x
and the weights alone."""

from kernels import by_xla as xla
from kernels.attention.reference import AttentionWeights
from kernels.attention.rotary import reference
from kernels.attention.rotary.reference import Turn
from kernels.attention.tiling import Shape
from kernels.launch import Launch
from kernels.layer_norm.reference import EPS


def by_xla(shape: Shape, *, launch: Launch) -> str:
    return "x"


def attention_half(
    x, weights: AttentionWeights, *, turn: Turn, num_heads, dropout=None, residual_scale=1.0, tokens=None, eps=EPS, launch: Launch
):
    def half(x, weights, dropout):
        options = {"num_heads": num_heads, "residual_scale": residual_scale, "tokens": tokens, "eps": eps}
        return reference.attention_half(x, weights, turn=turn, dropout=dropout, **options)

    return xla.run(xla.Passes(half, half, True, True, "attention_half", tokens), x, weights, dropout)
