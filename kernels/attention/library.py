"""Attention of q, k, v as jax.nn has it: cuDNN's kernels or XLA's products."""

from typing import Literal

import jax
import jax.numpy as jnp


def attend(q, k, v, tokens: int, by: Literal["cudnn", "xla"]) -> jax.Array:
    """o of q, k, v [B, T, N, H], of whose rows the first `tokens` are keys."""
    b, t, *_ = q.shape
    # every query is a real one, so that each row of the result is finite; what is padding is no key
    lengths = None if tokens == t else (jnp.full(b, t, jnp.int32), jnp.full(b, tokens, jnp.int32))
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        query_seq_lengths=lengths and lengths[0],
        key_value_seq_lengths=lengths and lengths[1],
        implementation=by,
    )
