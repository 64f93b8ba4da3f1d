"""The Hopper attention kernels where no card is: lowered by Mosaic GPU, which checks shapes and layouts; what they refuse.

Their numbers are compared on a card (tests/gpu/test_hopper.py, `make test-gpu`).
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from kernels.attention import gpu as attention_gpu
from kernels.attention.hopper import forward as hopper
from kernels.attention.hopper.plan import plan, refuses


def lowered(f, *args) -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def gradients(tokens=None):
    return lambda q, k, v, g: jax.vjp(lambda *a: hopper.attention(*a, tokens=tokens), q, k, v)[1](g)


@pytest.mark.parametrize(("t", "tokens"), [(198, 197), pytest.param(256, 256, marks=pytest.mark.slow), (5, 3)])
def test_kernels_lower_for_a_card(t, tokens):
    a = jax.ShapeDtypeStruct((2, t, 3, 64), jnp.bfloat16)
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


def test_a_plan_covers_the_rows_and_fits_wgmma():
    for t in range(1, 257):
        for tokens in {1, t // 2 + 1, t}:
            p = plan(t, tokens)
            assert p.rows >= t
            assert p.keys % 8 == 0
            assert 0 <= p.keys - tokens < 8  # `masked` compares the last columns only
            assert p.warpgroups <= p.tiles  # each waits once for every head


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "width", "t", "because"),
    [
        ("gpu", "9.0", jnp.bfloat16, 64, 197, None),
        ("cpu", "9.0", jnp.bfloat16, 64, 197, "devices are cpu"),
        ("gpu", "8.0", jnp.bfloat16, 64, 197, "compute capability 8.0"),
        ("gpu", "9.0", jnp.float32, 64, 197, "float32"),
        ("gpu", "9.0", jnp.bfloat16, 80, 197, "heads of 80"),
        ("gpu", "9.0", jnp.bfloat16, 64, 257, "257 tokens"),
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
        (((1, 8, 1, 80),) * 3, None, "H = 64"),
        (((1, 257, 1, 64),) * 3, None, "T <= 256"),
        (((1, 8, 1, 64),) * 3, 9, "9 keys"),
        (((1, 8, 1, 64),) * 3, 0, "0 keys"),
    ],
)
def test_other_shapes_raise(shapes, tokens, words):
    with pytest.raises(ValueError, match=words):
        hopper.attention(*(jnp.zeros(s, jnp.bfloat16) for s in shapes), tokens=tokens)
