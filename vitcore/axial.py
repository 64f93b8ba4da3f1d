"""Attention along one axis of a grid with relative positions, what takes the place of the 3x3 convolutions in an AxialResNet.

    y_o = sum_p softmax_p(q_o . k_p + q_o . r^q_{p-o} + k_p . r^k_{p-o}) (v_p + r^v_{p-o})           Wang et al. 2020, Eq. 4

`kernels/attention/lines/` is the op. q and k have half the width of v, and the logits are not scaled: GroupNorm of q, k and v
together sees to that, and another GroupNorm ends the layer; the statistics are those of a line.
"""

import jax.numpy as jnp

from kernels.attention.lines import reference


def attend(x, w, heads: int, norm, lines=reference.attention):
    """x [M, L, C] and one layer's weights to [M, L, N d], M lines of L places, of N heads: all of them, or those of this device.

    w: "qkv" [C, 2 N d], of each head q, k (d/2 wide) and v (d wide); "relative" [2d, 2L-1], the tables r^q, r^k, r^v of
    offsets 1-L ... L-1; "gn_qkv" and "gn_out", scale and bias. heads: N. norm: (x [M, L, C], scale and bias) -> GroupNorm of it.
    lines: the op, of `vitcore.ops`. Products accumulate in float32, the softmax is float32.
    """
    qkv = norm(jnp.einsum("mlc,ck->mlk", x, w["qkv"].astype(x.dtype)), w["gn_qkv"])
    return norm(lines(qkv, w["relative"], heads=heads), w["gn_out"])


def along(x, w, axis: int, heads: int, norm, lines=reference.attention):
    """`attend` along an axis of the grid of x [B, Y, X, C]: 1, up and down, or 2.

    The lines of all images that lie at the same place stand together: as one register of the kernels has them, and as XLA lays out
    maps of few channels by itself.
    """
    first = (2, 0, 1, 3) if axis == 1 else (1, 0, 2, 3)
    back = (1, 2, 0, 3) if axis == 1 else (1, 0, 2, 3)
    x = x.transpose(first)
    y = attend(x.reshape(-1, *x.shape[2:]), w, heads, norm, lines)
    return y.reshape(*x.shape[:3], -1).transpose(back)
