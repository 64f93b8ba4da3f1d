"""Attention between the projections by everybody: ours, the plain one, and JAX's own implementations, each at its best.

Each is given its own layout and lengths, so that no transpose and no padding is counted against it: ours packed [3, B, T, N*H];
plain, `jax.nn` and cuDNN [B, T, N, H]; the Pallas flash and splash attention of jax [B, N, T', H] with T' the next multiple of 128,
padding masked by segment ids, and one block over T' where that is at most 1024 (their default of 128 is slower).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention.tpu import attention as ours
from kernels.device import LANES
from kernels.launch import Launch

NAMES = ("ours", "reference", "jax.nn", "cudnn", "flash", "splash")
_BLOCK = 1024


class Peer(NamedTuple):
    """fn(*arrays): attention in its own layout; pack: q, k, v [B, T, N, H] -> its arrays; unpack: its result -> [B, T, N, H]."""

    fn: Callable
    pack: Callable
    unpack: Callable


def plain(q, k, v):
    """softmax(q k' / sqrt(H)) v with the heads apart, [B, T, N, H], as XLA likes it best."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    probs = jax.nn.softmax(logits).astype(q.dtype)
    return jnp.einsum("bnts,bsnh->btnh", probs, v, preferred_element_type=wide).astype(q.dtype)


def _padded(tokens: int) -> int:
    return -(-tokens // LANES) * LANES


def _block(length: int) -> int:
    """The largest block of at most _BLOCK that divides the padded length."""
    return max(b for b in range(LANES, min(length, _BLOCK) + 1, LANES) if length % b == 0)


def _heads_first(tokens: int):
    """pack and unpack of flash and splash: heads before tokens, tokens padded with zeros."""
    pad = _padded(tokens) - tokens

    def pack(*arrays):
        return tuple(jnp.pad(jnp.swapaxes(a, 1, 2), ((0, 0), (0, 0), (0, pad), (0, 0))) for a in arrays)

    return pack, lambda o: jnp.swapaxes(o[:, :, :tokens], 1, 2)


def _flash(tokens: int) -> Peer:
    from jax.experimental.pallas.ops.tpu import flash_attention as f

    length = _padded(tokens)
    b = _block(length)
    blocks = f.BlockSizes(
        block_q=b, block_k_major=b, block_k=b, block_b=1, block_q_major_dkv=b, block_k_major_dkv=b, block_k_dkv=b,
        block_q_dkv=b, block_k_major_dq=b, block_k_dq=b, block_q_dq=b,
    )  # fmt: skip

    def fn(q, k, v):
        ids = jnp.broadcast_to(jnp.arange(length) < tokens, (q.shape[0], length)).astype(jnp.int32)
        segments = None if length == tokens else f.SegmentIds(q=ids, kv=ids)
        return f.flash_attention(q, k, v, segment_ids=segments, sm_scale=q.shape[-1] ** -0.5, block_sizes=blocks)

    return Peer(fn, *_heads_first(tokens))


def _splash(tokens: int, heads: int, interpret: bool) -> Peer:
    from jax.experimental.pallas.ops.tpu import splash_attention as s

    length = _padded(tokens)
    b = _block(length)
    blocks = s.BlockSizes(
        block_q=b,
        block_kv=b,
        block_kv_compute=b,
        block_q_dkv=b,
        block_kv_dkv=b,
        block_kv_dkv_compute=b,
        block_q_dq=b,
        block_kv_dq=b,
    )
    mask = s.MultiHeadMask([s.FullMask((length, length))] * heads)

    def fn(q, k, v):
        kernel = s.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret)
        ids = jnp.asarray(np.arange(length) < tokens, jnp.int32)
        segments = None if length == tokens else s.SegmentIds(q=ids, kv=ids)
        scaled = (q * q.shape[-1] ** -0.5).astype(q.dtype)
        return jax.vmap(partial(kernel, segment_ids=segments))(scaled, k, v)

    return Peer(fn, *_heads_first(tokens))


def peer(name: str, *, tokens: int, heads: int, launch: Launch | None = None, interpret: bool = False) -> Peer:
    """An implementation by its name in NAMES. launch: of ours alone. interpret: of splash alone."""
    if name == "ours":
        assert launch is not None

        def pack(*arrays):
            return (jnp.stack([a.reshape(*a.shape[:2], -1) for a in arrays]),)

        return Peer(partial(ours, num_heads=heads, launch=launch), pack, lambda o: o.reshape(*o.shape[:2], heads, -1))
    if name == "flash":
        return _flash(tokens)
    if name == "splash":
        return _splash(tokens, heads, interpret)
    same: tuple[Callable, Callable] = (lambda *arrays: arrays), (lambda o: o)
    if name == "reference":
        return Peer(plain, *same)
    library: Any = {"jax.nn": "xla", "cudnn": "cudnn"}[name]
    attention: Callable = jax.nn.dot_product_attention
    return Peer(partial(attention, implementation=library), *same)


def shapes(one: Peer, batch: int, tokens: int, heads: int, width: int, dtype) -> tuple[Any, ...]:
    """Shapes of the arrays that a peer's fn takes."""
    array = jax.ShapeDtypeStruct((batch, tokens, heads, width), dtype)
    return jax.eval_shape(one.pack, array, array, array)
