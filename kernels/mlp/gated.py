"""The gated MLP half on a TPU: XLA's products, `reference.gated_half`, which for the backward pass keep x and the weights alone.

Left to itself, differentiation keeps both projections of all layers in float32, 8 F bytes a token and layer.
"""

from kernels import by_xla
from kernels.layer_norm.reference import EPS
from kernels.mlp import reference
from kernels.mlp.reference import GatedWeights


def gated_half(x, weights: GatedWeights, *, gelu="silu", dropout=None, residual_scale=1.0, tokens=None, eps=EPS):
    """As `reference.gated_half`: the same arguments, the same result; a large batch is taken in parts."""

    def half(x, weights, dropout):
        options = {"gelu": gelu, "residual_scale": residual_scale, "tokens": tokens, "eps": eps}
        return reference.gated_half(x, weights, dropout=dropout, **options)

    return by_xla.run(by_xla.Passes(half, half, True, True, "mlp_half", tokens), x, weights, dropout)
