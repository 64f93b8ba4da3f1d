"""Attention along one axis of a grid with relative positions, what takes the place of the 3x3 convolutions in an AxialResNet.

    y_o = sum_p softmax_p(q_o . k_p + q_o . r^q_{p-o} + k_p . r^k_{p-o}) (v_p + r^v_{p-o})           Wang et al. 2020, Eq. 4

o and p are places on one line of the grid, r tables of offsets that the heads share; q and k have half the width of v, and the
logits are not scaled: GroupNorm of q, k and v together sees to that, and another GroupNorm ends the layer. The public code that
the paper's authors point to takes k_o where the equation has k_p; this is the equation.

XLA compiles it: rows are short, and the tables act on queries, keys and values, for which there is no kernel.
"""

import jax
import jax.numpy as jnp


def attend(x, w, heads: int, norm):
    """x [M, L, C] and one layer's weights to [M, L, N d], M lines of L places, of N heads: all of them, or those of this device.

    w: "qkv" [C, 2 N d], of each head q, k (d/2 wide) and v (d wide); "relative" [2d, 2L-1], the tables r^q, r^k, r^v of
    offsets 1-L ... L-1; "gn_qkv" and "gn_out", scale and bias. heads: N. norm: (x [M, L, C], scale and bias) -> GroupNorm of it.
    Products accumulate in float32, the softmax is float32.
    """
    qkv = norm(jnp.einsum("mlc,ck->mlk", x, w["qkv"].astype(x.dtype)), w["gn_qkv"])
    return norm(between(qkv, w["relative"], heads), w["gn_out"])


def between(qkv, relative, heads: int):
    """What lies between the two norms: normalised projections [M, L, 2 N d] and the tables [2d, 2L-1] to [M, L, N d]."""
    m, length, _ = qkv.shape
    wide = jnp.promote_types(qkv.dtype, jnp.float32)
    d = qkv.shape[-1] // (2 * heads)
    q, k, v = jnp.split(qkv.reshape(m, length, heads, 2 * d), (d // 2, d), axis=-1)
    offsets = jnp.arange(length) - jnp.arange(length)[:, None] + length - 1  # [o, p]
    r_q, r_k, r_v = jnp.split(relative.astype(qkv.dtype)[:, offsets], (d // 2, d))  # [.., o, p]
    einsum = jax.tree_util.Partial(jnp.einsum, preferred_element_type=wide)
    logits = einsum("mond,mpnd->mnop", q, k) + einsum("mond,dop->mnop", q, r_q) + einsum("mpnd,dop->mnop", k, r_k)
    share = jax.nn.softmax(logits).astype(qkv.dtype)
    y = einsum("mnop,mpnd->mond", share, v) + einsum("mnop,dop->mond", share, r_v)
    return y.astype(qkv.dtype).reshape(m, length, heads * d)


def along(x, w, axis: int, heads: int, norm):
    """`attend` along an axis of the grid of x [B, Y, X, C]: 1, up and down, or 2."""
    if axis == 1:
        x = x.swapaxes(1, 2)
    b, lines, length, c = x.shape
    y = attend(x.reshape(b * lines, length, c), w, heads, norm).reshape(b, lines, length, -1)
    return y.swapaxes(1, 2) if axis == 1 else y
