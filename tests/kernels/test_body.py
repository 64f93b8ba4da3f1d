# pyright: reportCallIssue=false
"""What is no number, and what is at the edge of being one, passes through the casts, and through every kernel with them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from kernels import body
from kernels.attention import reference as attention
from kernels.attention import tpu as attention_tpu
from kernels.device import DEVICES
from kernels.launch import Launch
from kernels.layer_norm import reference as layer_norm
from kernels.layer_norm import tpu as layer_norm_tpu
from kernels.mlp import reference as mlp
from kernels.mlp import tpu as mlp_tpu
from kernels.patch_embed import reference as patch_embed
from kernels.patch_embed import tpu as patch_embed_tpu
from tests import oracle

# Quiet and signalling NaN of both signs, those whose rounding overflows first; infinities; the largest finite, which round to them
NAN = (0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000, 0xFFC00000, 0x7F807FFF, 0x7FBFFFFF, 0x7FFF8000, 0xFFFF7FFF)
INF = (0x7F800000, 0xFF800000)
LARGE = (0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F7FFF, 0x7F7F8000, 0x7F7F0000)
# zeros and subnormals; ties to even, upwards and downwards, and their neighbours
SMALL = (0, 0x80000000, 1, 0x80000001, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x007FFFFF, 0x00800000, 0x807FFFFF)
TIES = (0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x3F818001, 0xBF808000, 0xBF818000, 0x3FFF8000)


def floats(bits) -> np.ndarray:
    return np.asarray(bits, np.uint32).view(np.float32)


def table() -> np.ndarray:
    """[64, 256] float32: every pattern of interest, in even and in odd rows, among random bits."""
    bits = np.random.default_rng(0).integers(0, 2**32, (64, 256), dtype=np.uint64).astype(np.uint32)
    patterns = [*NAN, *INF, *LARGE, *SMALL, *TIES]
    for row in (0, 1, 14, 15, 40, 63):
        bits[row, : len(patterns)] = patterns
    return bits.view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, ties to even, as uint16; NaN is 0x7fc0."""
    bits = values.view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest & 0xFFFF).astype(np.uint16)


def through_a_kernel(f, *arrays, dtype):
    """f of whole arrays, inside an interpreted kernel, which returns an array like the first in `dtype`."""

    def kernel(*refs):
        refs[-1][...] = f(*(ref[...] for ref in refs[:-1]))

    return np.asarray(pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(arrays[0].shape, dtype), interpret=True)(*arrays))


def as_bits(values) -> np.ndarray:
    """bfloat16 as uint16, every NaN as 0x7fc0."""
    return np.where(np.isnan(values.astype(np.float32)), 0x7FC0, values.view(np.uint16))


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "plain"])
def test_float32_rounds_to_nearest_even_and_nan_stays_nan(pack):
    values = table()
    order = np.asarray(body.unpacked_row(jnp.arange(64), pack))
    assert sorted(order) == list(range(64))
    found = through_a_kernel(partial(body.from_float32, dtype=jnp.bfloat16, pack=pack), values[order], dtype=jnp.bfloat16)
    np.testing.assert_array_equal(as_bits(found), rounded(values))


@pytest.mark.parametrize("unpack", [True, False], ids=["unpacked", "plain"])
def test_bfloat16_becomes_float32_exactly(unpack):
    """All 65536 bit patterns."""
    values = np.arange(2**16, dtype=np.uint32).astype(np.uint16).reshape(256, 256)
    order = np.asarray(body.unpacked_row(jnp.arange(256), unpack))
    found = through_a_kernel(partial(body.to_float32, unpack=unpack), jnp.asarray(values).view(jnp.bfloat16), dtype=jnp.float32)
    expected = (values.astype(np.uint32) << 16).view(np.float32)[order]
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(found.view(np.uint32)[number], expected.view(np.uint32)[number])


# ---- whole ops: where the reference returns NaN the kernels do, and the other images stay numbers


def _normal(seed, *shape, scale=1.0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, dtype)


def op(name: str, launch: Launch, dtype):
    """(kernels, reference, arguments) of an op on two images; the first argument is of `dtype`, its leading axis the images."""
    d, x = 128, _normal(0, 2, 19, 128, dtype=dtype)
    norm, bias = (1 + _normal(1, d, scale=0.1), _normal(2, d, scale=0.1)), _normal(3, d, scale=0.1)
    if name == "attention":
        ours, plain = partial(attention_tpu.attention, num_heads=2, launch=launch), plain_attention
        return ours, plain, [_normal(4, 2, 3, 19, 128, dtype=dtype)]
    if name == "attention_half":
        w = (_normal(4, 3, d, 128, scale=0.1), _normal(5, 3, 128), _normal(6, 128, d, scale=0.1), bias)
        ours, plain = (oracle.flat(f.attention_half, attention.AttentionWeights) for f in (attention_tpu, attention))
        return partial(ours, num_heads=2, launch=launch), partial(plain, num_heads=2), [x, *norm, *w]
    if name == "mlp_half":
        w = (_normal(4, d, 256, scale=0.1), _normal(5, 256), _normal(6, 256, d, scale=0.1), bias)
        ours, plain = (oracle.flat(f.mlp_half, mlp.MLPWeights) for f in (mlp_tpu, mlp))
        return partial(ours, launch=launch), plain, [x, *norm, *w]
    if name == "layer_norm":
        return partial(layer_norm_tpu.layer_norm, launch=launch), layer_norm.layer_norm, [x, *norm]
    args = [_normal(4, 2, 8, 16, 3, dtype=dtype), _normal(5, 4, 4, 3, d, scale=0.1), bias, norm[0], _normal(6, 9, d)]
    return partial(patch_embed_tpu.patch_embed, launch=launch), patch_embed.patch_embed, args


def plain_attention(qkv):
    """Softmax attention of two heads, qkv [B, 3, T, K]."""
    q, k, v = (qkv[:, c].reshape(*qkv[:, c].shape[:2], 2, -1) for c in range(3))
    probs = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5)
    return jnp.einsum("bnts,bsnh->btnh", probs.astype(qkv.dtype), v).reshape(qkv[:, 0].shape)


def value_and_gradients(fn):
    return jax.jit(lambda args, g: (lambda value, pull: (value, *pull(g)))(*jax.vjp(fn, *args)))


OPS = ("attention", "attention_half", "mlp_half", "layer_norm", "patch_embed")


@pytest.mark.parametrize("device", ["v3", "v5e"])
@pytest.mark.parametrize("name", OPS)
def test_ops_pass_on_what_is_no_number(name, device):
    """bfloat16 in and out: NaN and infinities in the first argument and in the cotangent; NaN in every parameter."""
    launch = Launch(device=DEVICES[device], interpret=True)
    if name == "mlp_half":  # XLA's CPU client lacks some of its products of bfloat16
        launch = replace(launch, device=replace(launch.device, bf16_matmul=False))
    ours, plain, args = op(name, launch, jnp.bfloat16)
    if name == "attention":
        ours = lambda qkv, ours=ours: ours(qkv.swapaxes(0, 1))  # noqa: E731
    run, expect = value_and_gradients(ours), value_and_gradients(plain)
    cotangent = _normal(9, *jax.eval_shape(plain, *args).shape, dtype=jnp.bfloat16)

    def check(args, cotangent, what, *, contained=True, infinite=False):
        found, expected = run(args, cotangent), expect(args, cotangent)
        for i, (f, e) in enumerate(zip(found, expected, strict=True)):
            f, e = np.asarray(f, np.float32), np.asarray(e, np.float32)
            lost = ~np.isfinite(e) & np.isfinite(f) if infinite else np.isnan(e) & ~np.isnan(f)
            assert not lost.any(), f"{what}: {'value' if i == 0 else f'gradient {i - 1}'} at {np.argwhere(lost)[0]} is {f[lost][0]}"
        assert not contained or np.isfinite(np.asarray(found[0][1], np.float32)).all(), f"{what}: it reached the other image"
        return found

    assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in check(args, cotangent, "numbers"))
    for bits in (0x7FFF, 0xFFFF, 0x7F81, 0xFF80, 0x7F80):
        special, infinite = jnp.asarray(np.uint16(bits)).view(jnp.bfloat16), bits & 0x7F == 0
        given = [args[0].at[(0,) * args[0].ndim].set(special), *args[1:]]
        value = check(given, cotangent, f"{bits:#x} in the input", infinite=infinite)[0]
        assert not np.isfinite(np.asarray(value[0], np.float32)).all()
        check(args, cotangent.at[(0, 1, 5)].set(special), f"{bits:#x} in the cotangent", infinite=infinite)
    for i in range(1, len(args)):
        for bits in NAN[:3]:
            given = [a if k != i else a.at[(0,) * a.ndim].set(floats(bits)) for k, a in enumerate(args)]
            check(given, cotangent, f"{bits:#x} in argument {i}", contained=False)
