"""The Hopper attention kernels where no card is: lowered by Mosaic GPU, which checks shapes and layouts; what they refuse.

Their numbers are compared on a card (tests/gpu/test_hopper.py, `make test-gpu`).
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from kernels.attention import gpu as attention_gpu
from kernels.attention.hopper import forward as hopper
from kernels.attention.hopper.plan import HEADS, SHARED, TAKEN, longest, memory, pieces, plan, refuses


def lowered(f, *args) -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def gradients(tokens=None):
    return lambda q, k, v, g: jax.vjp(lambda *a: hopper.attention(*a, tokens=tokens), q, k, v)[1](g)


LONG = [pytest.mark.slow, pytest.mark.ci]


@pytest.mark.parametrize(
    ("t", "tokens", "h"),
    [
        (198, 197, 64),
        (5, 3, 64),
        pytest.param(256, 256, 64, marks=pytest.mark.slow),
        pytest.param(384, 383, 64, marks=pytest.mark.slow),
        pytest.param(258, 257, 80, marks=LONG),
        pytest.param(128, 127, 128, marks=pytest.mark.slow),
    ],
)
def test_kernels_lower_for_a_card(t, tokens, h):
    a = jax.ShapeDtypeStruct((2, t, 3, h), jnp.bfloat16)
    assert "mosaic_gpu" in lowered(lambda *qkv: hopper.attention(*qkv, tokens=tokens), a, a, a)
    assert "mosaic_gpu" in lowered(gradients(tokens), a, a, a, a)


def test_gradients_need_no_forward_pass():
    """One kernel from q, k, v and the result's gradient: what a block keeps for its backward pass is no larger for it."""
    a = jax.ShapeDtypeStruct((2, 17, 3, 64), jnp.bfloat16)
    kept = jax.eval_shape(lambda *qkv: jax.vjp(hopper.attention, *qkv)[1], a, a, a)
    assert sorted(x.shape for x in jax.tree.leaves(kept)) == [a.shape] * 3


def test_results_vary_over_a_mesh_as_their_inputs_do():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    a = jax.ShapeDtypeStruct((4, 17, 1, 64), jnp.bfloat16)
    shares = jax.shard_map(gradients(), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert "mosaic_gpu" in lowered(shares, a, a, a, a)


@pytest.mark.parametrize("head", HEADS)
def test_a_plan_covers_the_rows_and_fits_wgmma_and_shared_memory(head):
    assert [width for _, width in pieces(head)] == {64: [64], 80: [64, 16], 128: [64, 64]}[head]
    for t in range(1, longest(head) + 1):
        for tokens in {1, t // 2 + 1, t}:
            p = plan(t, tokens, head)
            assert p.rows >= t
            assert p.keys % 8 == 0
            assert 0 <= p.keys - tokens < 8  # `masked` compares the last columns only
            assert p.warpgroups <= p.tiles  # each waits once for every head
            assert p.stages * memory(p.rows, head)[0] <= SHARED
            assert memory(p.rows, head)[1] <= SHARED
            ends = [first + width for first, width in p.spans]
            assert [first for first, _ in p.spans] == [0, *ends[:-1]]
            assert ends[-1] == p.keys
            # products sum over whole tiles, within the rows, and only the last span has keys of padding
            assert all(width <= 256 and first + -(-width // 64) * 64 <= p.rows and first < tokens for first, width in p.spans)
            assert sum(many for _, many in p.copies) == p.rows
            assert all(many <= 256 for _, many in p.copies)


def test_what_is_taken_fits():
    assert all(head in HEADS and rows <= longest(head) for head, rows in TAKEN.items())


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "width", "t", "because"),
    [
        ("gpu", "9.0", jnp.bfloat16, 64, 197, None),
        ("cpu", "9.0", jnp.bfloat16, 64, 197, "devices are cpu"),
        ("gpu", "8.0", jnp.bfloat16, 64, 197, "compute capability 8.0"),
        ("gpu", "9.0", jnp.float32, 64, 197, "float32"),
        ("gpu", "9.0", jnp.bfloat16, 80, 258, None),
        ("gpu", "9.0", jnp.bfloat16, 96, 197, "heads of 96"),
        ("gpu", "9.0", jnp.bfloat16, 64, 578, "578 tokens"),
        ("gpu", "9.0", jnp.bfloat16, 128, 197, "197 tokens"),
    ],
)
def test_what_is_refused_and_why(monkeypatch, platform, capability, dtype, width, t, because):
    card = type("Card", (), {"compute_capability": capability})()
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [card])
    why = refuses(jnp.dtype(dtype), width, t)
    assert why is None if because is None else because in why
    assert (attention_gpu.implementation(jnp.dtype(dtype), width, t) == "hopper") == (because is None)


@pytest.mark.parametrize(
    ("shapes", "tokens", "words"),
    [
        (((1, 8, 1, 64),) * 2 + ((1, 9, 1, 64),), None, "one bfloat16 shape"),
        (((1, 8, 1, 96),) * 3, None, r"H of \(64, 80, 128\)"),
        (((1, 385, 1, 64),) * 3, None, "T <= 384"),
        (((1, 321, 1, 80),) * 3, None, "T <= 320"),
        (((1, 8, 1, 64),) * 3, 9, "9 keys"),
        (((1, 8, 1, 64),) * 3, 0, "0 keys"),
    ],
)
def test_other_shapes_raise(shapes, tokens, words):
    with pytest.raises(ValueError, match=words):
        hopper.attention(*(jnp.zeros(s, jnp.bfloat16) for s in shapes), tokens=tokens)
