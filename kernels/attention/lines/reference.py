"""Attention along a line with relative positions (Wang et al. 2020, Eq. 4): the specification of the op, and the path without
kernels.

    y_o = sum_p softmax_p(q_o . k_p + q_o . r^q_{p-o} + k_p . r^k_{p-o}) (v_p + r^v_{p-o})

o and p are places on one line, r tables of offsets that the heads share; q and k have half the width of v, and the logits are not
scaled. The public code that the paper's authors point to takes k_o where the equation has k_p; this is the equation.
"""

import jax
import jax.numpy as jnp


def attention(qkv, relative, *, heads: int):
    """Normalised projections qkv [M, L, 2 N d] and the tables [2d, 2L-1] to [M, L, N d] in qkv's dtype, M lines of L places.

    qkv: of each of the N = heads heads q, k (d/2 wide) and v (d wide). relative: r^q, r^k, r^v of offsets 1-L ... L-1.
    Products accumulate in float32, the softmax is float32; probabilities and tables are rounded to qkv's dtype.
    """
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
