"""What a block's attention says of its heads, without keeping its maps: the specification, and the path of XLA.

    p = softmax(q k^T / sqrt(H)),  q, k = LN(x) qkv_kernel + qkv_bias        probabilities [B, N, T, T]
    mean      sum_n p / N                        [B, T, T]                   over the heads of this device
    row       p[:, :, 0]                         [B, N, T]                   of the first token, which is the class token
    distance  sum_ts p[t, s] d[t, s] / T         [B, N]                      for given distances d of pairs of tokens

`tpu.py` is the kernel. Here the probabilities of a few images exist at a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels.attention.reference import AttentionWeights
from kernels.layer_norm.reference import EPS, layer_norm
from kernels.parts import divisor

PART = 2**26  # most probabilities that exist at a time, 256 MiB


class Statistics(NamedTuple):
    """What was asked for, arrays of float32; the rest is None. Elsewhere the same fields hold specs or shapes of these."""

    mean: Any = None  # [B, T, T]
    row: Any = None  # [B, N, T]
    distance: Any = None  # [B, N]


def probabilities(
    x, weights: AttentionWeights, *, num_heads: int, eps: float = EPS, extra: Callable | None = None, turn: Callable | None = None
):
    """The attention probabilities [B, N, T, T] of the block's input x [B, T, D], float32, or float64 of float64.

    q and k are rounded to x's dtype as in `reference.attention_half`, the probabilities are not. extra: (q [B, T, N, H]) -> logits
    [B, N, T, T] that are added before the scale, or None. turn: (q and k [2, B, T, N*H]) -> the same, before they are
    rounded, or None. eps: of LN.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    z = layer_norm(x, weights.norm_scale, weights.norm_bias, eps=eps)
    kernel, bias = weights.qkv_kernel[:2].astype(x.dtype), weights.qkv_bias[:2]
    qk = jnp.einsum("btd,cdk->cbtk", z, kernel, preferred_element_type=wide) + bias[:, None, None]
    qk = qk if turn is None else turn(qk)
    q, k = qk.astype(x.dtype).reshape(2, *x.shape[:2], num_heads, -1)
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=wide)
    if extra is not None:
        logits = logits + extra(q)
    return jax.nn.softmax(logits * q.shape[-1] ** -0.5)


def of_probabilities(p, *, mean: bool, row: bool, distances) -> Statistics:
    """The statistics of maps p [B, N, T, T]."""
    distance = None if distances is None else jnp.einsum("bnts,ts->bn", p, jnp.asarray(distances, p.dtype)) / p.shape[2]
    return Statistics(p.mean(1) if mean else None, p[:, :, 0] if row else None, distance)


def check(x, weights: AttentionWeights, *, num_heads: int, mean: bool, row: bool, distances) -> None:
    """Raise ValueError where the arguments do not fit together."""
    if x.ndim != 3 or min(x.shape) < 1:
        raise ValueError(f"attention_statistics: x is {x.dtype}{list(x.shape)}; required [B, T, D]")
    k = weights.qkv_kernel.shape[-1]
    if weights.qkv_kernel.shape != (3, x.shape[2], k) or weights.qkv_bias.shape != (3, k) or num_heads < 1 or k % num_heads:
        raise ValueError(
            f"attention_statistics: qkv_kernel and qkv_bias have shapes {weights.qkv_kernel.shape} and {weights.qkv_bias.shape}; "
            f"required [3, {x.shape[2]}, N*H] and [3, N*H] with N = num_heads = {num_heads}"
        )
    if not (mean or row or distances is not None):
        raise ValueError("attention_statistics: nothing is asked for: mean=True, row=True or distances= is required")
    if distances is not None and distances.shape != (x.shape[1],) * 2:
        raise ValueError(f"attention_statistics: distances have shape {distances.shape}; required {(x.shape[1],) * 2}")


def attention_statistics(
    x, weights: AttentionWeights, *, num_heads, mean=False, row=False, distances=None, eps=EPS, extra: Callable | None = None,
    turn: Callable | None = None,
) -> Statistics:  # fmt: skip
    """Statistics of the attention of a block's input x [B, T, D], float32 or bfloat16, over its N = num_heads heads.

    mean, row: whether they are wanted. distances: float [T, T], of a query (first axis) and a key; None: no distance is wanted.
    eps, extra, turn: as in `probabilities`. Images are taken a few at a time. Returns float32. ValueError for shapes that do not
    fit.
    """
    check(x, weights, num_heads=num_heads, mean=mean, row=row, distances=distances)

    def part(x):
        p = probabilities(x, weights, num_heads=num_heads, eps=eps, extra=extra, turn=turn)
        return of_probabilities(p, mean=mean, row=row, distances=distances)

    b, t, d = x.shape
    images = divisor(b, PART // (num_heads * t * t))
    if images == b:
        return part(x)
    found = lax.map(part, x.reshape(b // images, images, t, d))
    return jax.tree.map(lambda a: a.reshape(b, *a.shape[2:]), found)
