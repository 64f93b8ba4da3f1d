"""Relative positions in kernels: exact as the einsum in value and gradients, safe on meshes, and XLA's where they do not fit."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import vitcore
from bench.reports import Program
from bench.tpu_compiler import TOPOLOGIES, compile_programs
from kernels.attention.plan import Refused
from kernels.attention.reference import AttentionWeights
from kernels.attention.relative import core as relative_core
from kernels.attention.relative import plan as relative_plan
from kernels.attention.relative import reference as relative
from kernels.attention.relative import tpu as relative_tpu
from kernels.attention.relative.reference import RelativeWeights
from kernels.attention.tiling import RelativeTiles, Shape
from kernels.device import DEVICES
from kernels.dropout import Dropout
from kernels.launch import Launch
from tests import oracle
from tests.draws import examples
from vitcore.ops import INTERPRET


def record(*arrays):
    return RelativeWeights(AttentionWeights(*arrays[:-1]), arrays[-1])


NAMES = ("x", *AttentionWeights._fields, "positions")
ours_half = oracle.flat(relative_tpu.attention_half, record)
plain_half = oracle.flat(relative.attention_half, record)


def launch(device="v3"):
    return Launch(device=DEVICES[device], interpret=True)


def normal(seed, *shape, dtype: Any = jnp.float32, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, dtype)


def plain_core(qkv, positions, num_heads, class_token):
    """Softmax attention with relative positions of packed projections, in einsum."""
    _, b, t, k = qkv.shape
    wide = jnp.promote_types(qkv.dtype, jnp.float32)
    q, key, v = qkv.reshape(3, b, t, num_heads, -1)
    logits = jnp.einsum("btnh,bsnh->bnts", q, key, preferred_element_type=wide)
    logits = logits + relative.relative_logits(q, positions.reshape(len(positions), num_heads, -1), class_token=class_token)
    probs = jax.nn.softmax(logits * q.shape[-1] ** -0.5).astype(qkv.dtype)
    return jnp.einsum("bnts,bsnh->btnh", probs, v, preferred_element_type=wide).astype(qkv.dtype).reshape(b, t, k)


def check_core(t, n, h, dtype, *, class_token, device="v3", b=1, tiles=None):
    options = {"num_heads": n, "class_token": class_token}
    ours = partial(relative_tpu.attention, launch=launch(device), tiles=tiles, **options)
    positions = normal(1, relative.entries(t - class_token, class_token), n * h)
    args = normal(0, 3, b, t, n * h, dtype=dtype), positions
    assert len(oracle.kernels_in(ours, *args)) == 1
    oracle.check(ours, partial(plain_core, **options), args, names=("qkv", "positions"))


def arguments(b, t, d, n, h, class_token, dtype):
    k, entries = n * h, relative.entries(t - class_token, class_token)
    shapes = (d,), (d,), (3, d, k), (3, k), (k, d), (d,), (entries, k)
    scales = 0.1, 0.1, d**-0.5, 0.1, k**-0.5, 0.1, 1.0
    x, scale, *rest = (normal(i, *s, scale=f) for i, (s, f) in enumerate(zip(((b, t, d), *shapes), (1.0, *scales), strict=True)))
    return x.astype(dtype), scale + 1.0, *rest


@pytest.mark.parametrize("device", ["v3", "v5e"])
@pytest.mark.parametrize("rows", [1, 8, 21])
def test_the_skew_and_its_transpose_to_the_bit(device, rows):
    """By bits, and by a roll with a stride."""
    t, lanes, reach = rows + 3, 128, 24
    value = np.random.default_rng(0).standard_normal((rows, lanes)).astype(np.float32)
    wanted = np.stack([np.roll(row, u - reach) for u, row in enumerate(value)])
    skew = jax.jit(partial(relative_core.skew, reach=reach, tokens=t, device=DEVICES[device]))
    np.testing.assert_array_equal(skew(value), wanted[:, :t])
    back = np.stack([np.roll(np.pad(row[:t], (0, lanes - t)), reach - u) for u, row in enumerate(wanted)])
    np.testing.assert_array_equal(jax.jit(partial(relative_core.unskew, reach=reach, lanes=lanes))(wanted[:, :t]), back)


@examples(2)
@given(
    t=st.sampled_from([2, 5, 7, 14, 16, 17, 50]),
    heads=st.sampled_from([(1, 32), (3, 64), (3, 80), (2, 20), (1, 128)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    class_token=st.booleans(),
    device=st.sampled_from(["v3", "v5e"]),
)
def test_the_core_agrees(t, heads, dtype, class_token, device):
    n, h = heads
    check_core(t, n, h, dtype, class_token=class_token, device=device, b=2)


TILED = (
    (150, True, "v3"),
    pytest.param(128, False, "v5e", marks=pytest.mark.slow),
    pytest.param(259, True, "v5e", marks=pytest.mark.slow),
)


@pytest.mark.parametrize(("t", "class_token", "device"), TILED)
def test_the_core_agrees_in_tiles_of_queries_and_groups_of_heads(t, class_token, device):
    """The last tile shorter, or of three rows; a table of several windows; four heads in two steps; a gradient over two images."""
    few = RelativeTiles(images=1, lanes=128, queries=128 if t > 128 else t)
    n = 4 if t < 200 else 2
    check_core(t, n, 64, jnp.float32, class_token=class_token, device=device, b=2, tiles=(few, few))


def test_the_core_agrees_with_several_images_a_step():
    few = RelativeTiles(images=2, lanes=128, queries=5)
    check_core(5, 2, 64, jnp.bfloat16, class_token=True, device="v5e", b=4, tiles=(few, few))


@pytest.mark.parametrize(("device", "class_token", "dtype"), [("v3", True, jnp.bfloat16), ("v5e", False, jnp.float32)])
def test_the_half_agrees(device, class_token, dtype):
    """In two parts of an image each, with dropout and a share of the residual."""
    args = arguments(2, 33, 32, 2, 64, class_token, dtype)
    options = {"num_heads": 2, "class_token": class_token, "residual_scale": 0.5, "dropout": Dropout(0.25, jnp.int32(7), 66)}
    shape = Shape(2, 33, 32, 2, 64, jnp.dtype(dtype))
    found = relative_plan.plan(shape, DEVICES[device])
    assert not isinstance(found, Refused)
    halved = replace(found, forward=replace(found.forward, images=1), backward=replace(found.backward, images=1))
    tiles = relative_plan.plan(shape._replace(b=1), DEVICES[device])
    assert not isinstance(tiles, Refused)
    plan = replace(halved, forward=tiles.forward, backward=tiles.backward)
    ours = partial(ours_half, launch=launch(device), plan=plan, **options)
    assert oracle.kernels_in(ours, *args) == ["attention_project", "attention_relative_core_forward", "attention_output"]
    oracle.check(ours, partial(plain_half, **options), args, names=NAMES)


def test_without_positions_it_is_attention():
    """Zeros in the table; and an entry that all pairs have in common changes nothing, by the shift of a softmax."""
    x, *weights = arguments(1, 33, 32, 2, 64, False, jnp.float32)
    run = partial(ours_half, num_heads=2, class_token=False, launch=launch("v5e"))
    zeros, shared = jnp.zeros_like(weights[-1]), jnp.broadcast_to(weights[-1][:1], weights[-1].shape)
    a, b = run(x, *weights[:-1], zeros), run(x, *weights[:-1], shared)
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.abs(run(x, *weights) - a).max() > 1e-3


@pytest.mark.slow
def test_under_shard_map():
    """Images over "data", heads over "model"; the gradients of every weight with them."""
    x, *arrays = arguments(2, 33, 32, 2, 64, True, jnp.float32)
    weights = record(*arrays)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    rows: Any = [P(), P(), P(None, None, "model"), P(None, "model"), P("model"), P(), P(None, "model")]

    def local(x, weights):
        options: Any = {"num_heads": 1, "class_token": True, "residual_scale": 0.5, "launch": launch()}
        return jax.lax.psum(relative_tpu.attention_half(x, weights, **options), "model")

    run = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), record(*rows)), out_specs=P("data"), check_vma=True)

    def gradients(fn):
        return jax.jit(jax.grad(lambda *a: (fn(*a) ** 2).sum(), argnums=(0, 1)))(x, weights)

    whole = gradients(partial(relative.attention_half, num_heads=2, class_token=True))
    for a, b in zip(jax.tree.leaves(gradients(run)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


def test_what_does_not_fit_is_xlas_and_says_so():
    shape = Shape(1, 4097, 768, 12, 64, jnp.dtype(jnp.bfloat16))
    assert "rows of 4097 keys of heads of width 64 do not fit" in relative_tpu.by_xla(shape, launch=launch())
    assert relative_tpu.by_xla(shape._replace(t=197), launch=launch()) == ""
    assert "images of 31 tokens are shorter" in relative_tpu.by_xla(shape._replace(t=31), launch=launch())
    small = replace(DEVICES["v3"], vmem_bytes=2**16)
    args = arguments(1, 40, 16, 2, 8, True, jnp.float32)
    run = partial(ours_half, num_heads=2, class_token=True, launch=Launch(device=small, interpret=True))
    assert not oracle.kernels_in(run, *args)
    np.testing.assert_array_equal(run(*args), plain_half(*args, num_heads=2, class_token=True))
    for fn in (ours_half, plain_half):
        where = {"launch": launch()} if fn is ours_half else {}
        with pytest.raises(ValueError, match="have 78 entries: 79 are required for 40 patches"):
            fn(*args, num_heads=2, class_token=False, **where)


def test_a_model_runs_on_the_kernels():
    fields: Any = {"image_size": 12, "patch_size": 2, "width": 32, "depth": 1, "mlp_dim": 32, "num_heads": 2, "num_classes": 3}
    config = vitcore.ViTConfig(**fields, position="relative")
    params = vitcore.init(jax.random.key(0), config)
    images = normal(3, 2, 12, 12, 3)
    run = partial(vitcore.apply, config=config, ops=INTERPRET)
    oracle.assert_kernel_ran(run, params, images, name="attention_relative_core_forward")
    plain = vitcore.apply(params, images, config, ops=vitcore.REFERENCE)
    np.testing.assert_allclose(run(params, images), plain, atol=1e-5)


SHAPES = {"B/16@224": 2, "B/32@224": 2, "H/14@224": 2, "L/16@384": 2}


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("target", [pytest.param(t, marks=[pytest.mark.ci] if t == "v3" else []) for t in TOPOLOGIES])
def test_it_compiles(target):
    """Forward and backward: one tile of queries and several, short images, heads across columns, no class token, float32."""
    asked: list[dict] = [{"shape": shape, "batch": batch} for shape, batch in SHAPES.items()]
    asked = asked[:1] if target == "v3" else asked
    asked.append({"shape": "B/16@224", "batch": 2, "dtype": "float32", "class_token": False})
    build = "bench.programs:relative_half"
    programs = [Program(build=build, arguments={**a, "backward": True}, name=f"{target} {a}") for a in asked]
    with ThreadPoolExecutor(2) as pool:
        found = [r for reports in pool.map(lambda p: compile_programs(target, [p], seconds=600), programs) for r in reports]
    for report in found:
        assert not report.error, f"{report.name}: {report.error}"
        names = {k.kernel for k in report.kernels}
        wanted = {"attention_relative_core_forward", "attention_relative_core_backward"}
        small = DEVICES[target].vmem_bytes < 2**25  # there neither 577 tokens nor heads of 80 leave room for the backward pass
        by_xla = small and ("H/14" in report.name or "L/16@384" in report.name)
        assert not names if by_xla else wanted <= names, report.name
