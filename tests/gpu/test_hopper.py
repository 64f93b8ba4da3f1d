"""The Hopper attention kernels on a card, against plain programs in bfloat16 and float64; nothing to run on other GPUs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import gpu as attention_gpu
from kernels.attention.hopper import forward as hopper
from tests import oracle

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_hopper")]


def plain(q, k, v, tokens):
    """Products in q's dtype, as the kernels' probabilities are; keys from `tokens` on are none."""
    logits = jnp.einsum("btnh,bsnh->bnts", q, k[:, :tokens], preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    probs = jax.nn.softmax(logits * q.shape[-1] ** -0.5).astype(q.dtype)
    return jnp.einsum("bnts,bsnh->btnh", probs, v[:, :tokens])


def arrays(b, t, n, scale=1.0, seed=0, head=64):
    r = np.random.default_rng(seed)
    return [jnp.asarray(r.standard_normal((b, t, n, head)) * s, jnp.bfloat16) for s in (scale, scale, 1.0)]


@pytest.mark.parametrize("t", [1, 7, 8, 50, 64, 65, 128, 129, 192, 193, 197, 201, 208, 209, 256])
def test_value_and_gradients_agree(t):
    for tokens in {t, max(1, t - 1)}:
        ours, reference = partial(hopper.attention, tokens=tokens), partial(plain, tokens=tokens)
        oracle.check(ours, reference, arrays(2, t, 3, seed=t), names="qkv")


@pytest.mark.parametrize(
    ("t", "head"), [(257, 64), (325, 64), (384, 64), (7, 80), (197, 80), (257, 80), (320, 80), (50, 128), (128, 128)]
)
def test_other_heads_and_rows_that_are_taken_in_spans(t, head):
    for tokens in {t, t - 1}:
        args = arrays(2, t, 3, seed=t, head=head)
        oracle.check(partial(hopper.attention, tokens=tokens), partial(plain, tokens=tokens), args, names="qkv")


def test_blocks_that_take_several_heads_in_spans():
    args = arrays(20, 258, 16, 3.0, head=80)
    oracle.check(partial(hopper.attention, tokens=257), partial(plain, tokens=257), args, names="qkv")


@pytest.mark.parametrize("scale", [0.0, 6.0])
def test_flat_and_sharp_rows(scale):
    """All keys alike, and one key far above the others; more heads than the card has processors, so that blocks take several."""
    oracle.check(partial(hopper.attention, tokens=197), partial(plain, tokens=197), arrays(40, 197, 12, scale), names="qkv")


def test_what_padding_holds_does_not_matter():
    tokens, t = 197, 200
    q, k, v = arrays(4, t, 12)
    g = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.bfloat16).at[:, tokens:].set(0)
    attend: Any = partial(hopper.attention, tokens=tokens)
    whole, pull = jax.vjp(attend, *(a.at[:, tokens:].set(3.0) for a in (q, k, v)))
    short, pull_short = jax.vjp(hopper.attention, *(a[:, :tokens] for a in (q, k, v)))
    np.testing.assert_array_equal(whole[:, :tokens], short)
    for long, right in zip(pull(g), pull_short(g[:, :tokens]), strict=True):
        np.testing.assert_array_equal(long[:, :tokens], right)
        assert not np.asarray(long[:, tokens:], np.float32).any()


def test_the_half_block_takes_them():
    assert attention_gpu.implementation(jnp.dtype(jnp.bfloat16), 64, 197) == "hopper"
    core = jax.jit(partial(attention_gpu._core, tokens=197, by="hopper"))
    assert "mosaic_gpu" in core.lower(*arrays(1, 197, 1)).as_text()
