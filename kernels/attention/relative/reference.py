"""The attention half of a block with relative positions (paper, appendix D.4): plain einsum, the specification, and the path
without kernels.

    logits[t, s] = (q_t . k_s + q_t . r_(s-t)) / sqrt(H)

"we use the original query (the content of query), but use relative positional embeddings as keys", and add these logits to the
others before the softmax. Offsets are between patches in row-major order; the class token is at no distance from anything, so all
pairs with it have one entry of their own, the last.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import dropout as drop
from kernels.attention.reference import AttentionWeights
from kernels.layer_norm.reference import EPS, layer_norm


class RelativeWeights(NamedTuple):
    """Parameters of the attention half with relative positions on one device, which holds N heads of width H."""

    half: AttentionWeights  # those of the half without positions
    positions: jax.Array  # [entries, N*H]: of the offsets in order, and last of the pairs with the class token


def entries(patches: int, class_token: bool) -> int:
    """How many offsets there are: 1 - N ... N - 1, and the class token's."""
    return 2 * patches - 1 + class_token


def check(positions, tokens: int, *, class_token: bool) -> None:
    """Raises ValueError where the table of `tokens` tokens, the class token included, has another number of entries."""
    required = entries(tokens - class_token, class_token)
    if positions.shape[0] != required:
        raise ValueError(
            f"the relative positions have {positions.shape[0]} entries: {required} are required "
            f"for {tokens - class_token} patches{' and a class token' if class_token else ''}"
        )


def relative_logits(q, positions, *, class_token: bool):
    """q_t . r_(s-t): q [B, T, N, H], positions [entries, N, H] to [B, N, T, T], accumulated in float32.

    Each query meets every offset once; row t of these products, shifted by t, are its logits. The shift is a reshape: rows of one
    element more, read as rows of one element less.
    """
    b, t, n, _ = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    products = jnp.einsum("btnh,rnh->bntr", q, positions.astype(q.dtype), preferred_element_type=wide)
    patches = t - class_token
    rows = products[:, :, class_token:, : 2 * patches - 1]
    rows = jnp.pad(rows, ((0, 0),) * 3 + ((0, 1),)).reshape(b, n, -1)[:, :, : patches * (2 * patches - 1)]
    shifted = rows.reshape(b, n, patches, 2 * patches - 1)[..., patches - 1 :]
    if not class_token:
        return shifted
    own = products[..., -1:]  # of the pairs with the class token, first as key and then as query
    shifted = jnp.concatenate([own[:, :, 1:], shifted], axis=3)
    return jnp.concatenate([jnp.broadcast_to(own[:, :, :1], (b, n, 1, t)), shifted], axis=2)


def attention_half(
    x, weights: RelativeWeights, *, num_heads, class_token, dropout=None, residual_scale=1.0, tokens=None, eps=EPS
):  # fmt: skip
    """`reference.attention_half` with relative positions: arguments and meaning there, and weights.positions.

    class_token: whether the first token is one. tokens: how many of the T are real, None for all: the others are seen by none.
    Raises ValueError where the table has another number of entries.
    """
    b, t, _ = x.shape
    real = t if tokens is None else tokens
    check(weights.positions, real, class_token=class_token)
    (norm_scale, norm_bias, w_qkv, b_qkv, w_out, b_out), positions = weights
    acc_dtype = jnp.promote_types(x.dtype, jnp.float32)
    w_qkv, w_out = w_qkv.astype(x.dtype), w_out.astype(x.dtype)
    z = layer_norm(x[:, :real], norm_scale, norm_bias, eps=eps)
    qkv = jnp.einsum("btd,cdk->cbtk", z, w_qkv, preferred_element_type=acc_dtype) + b_qkv[:, None, None]
    q, k, v = qkv.astype(x.dtype).reshape(3, b, real, num_heads, -1)
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=acc_dtype)
    logits = logits + relative_logits(q, positions.reshape(len(positions), num_heads, -1), class_token=class_token)
    probs = jax.nn.softmax(logits * q.shape[-1] ** -0.5).astype(x.dtype)
    o = jnp.einsum("bnts,bsnh->btnh", probs, v, preferred_element_type=acc_dtype).astype(x.dtype)
    y = jnp.einsum("btk,kd->btd", o.reshape(b, real, -1), w_out, preferred_element_type=acc_dtype) + residual_scale * b_out
    if real < t:
        y = jnp.pad(y, ((0, 0), (0, t - real), (0, 0)))
    return (residual_scale * x.astype(acc_dtype) + drop.apply(y, dropout, drop.ATTENTION_OUT, tokens=tokens)).astype(x.dtype)
