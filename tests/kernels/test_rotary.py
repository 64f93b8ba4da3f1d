"""Rotary positions in kernels: exact as the einsum in value and gradients, safe on meshes, and XLA's where they do not fit."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import vitcore
from bench.reports import Program
from bench.tpu_compiler import TOPOLOGIES, compile_programs
from kernels.attention.reference import AttentionWeights
from kernels.attention.reference import attention_half as without
from kernels.attention.rotary import plan as planning
from kernels.attention.rotary import reference, tpu, turning
from kernels.attention.rotary.reference import Turn
from kernels.attention.tiling import Shape
from kernels.device import DEVICES
from kernels.dropout import Dropout
from kernels.launch import Launch
from tests import oracle
from tests.kernels.test_relative import normal
from vitcore.ops import INTERPRET

NAMES = ("x", *AttentionWeights._fields)
TURN = Turn(3, 4, 1)
ours_half = oracle.flat(tpu.attention_half, AttentionWeights)
plain_half = oracle.flat(reference.attention_half, AttentionWeights)
KERNELS = ["attention_project", "attention_core_forward", "attention_output"]


def launch(device="v5e"):
    return Launch(device=DEVICES[device], interpret=True)


def arguments(b, t, d, n, h, dtype: Any = jnp.float32):
    k = n * h
    shapes = (d,), (d,), (3, d, k), (3, k), (k, d), (d,)
    scales = 0.1, 0.1, d**-0.5, 0.1, k**-0.5, 0.1
    x, scale, *rest = (normal(i, *s, scale=f) for i, (s, f) in enumerate(zip(((b, t, d), *shapes), (1.0, *scales), strict=True)))
    return x.astype(dtype), scale + 1.0, *rest


HALVES = [
    ("v5e", 2, 64, jnp.bfloat16),
    pytest.param("v3", 1, 128, jnp.float32, marks=pytest.mark.slow),
    pytest.param("v5e", 4, 32, jnp.float32, marks=pytest.mark.slow),
    pytest.param("v3", 2, 64, jnp.bfloat16, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("device", "n", "h", "dtype"), HALVES)
def test_the_half_agrees(device, n, h, dtype):
    """With registers and padding behind the patches, dropout, and a share of the residual."""
    args = arguments(2, 24, 48, n, h, dtype)
    options = {"turn": TURN, "num_heads": n, "residual_scale": 0.5, "dropout": Dropout(0.25, jnp.int32(7), 30), "tokens": 15}

    def real(half):
        return lambda *a: half(*a, **options)[:, :15]

    ours = real(partial(ours_half, launch=launch(device)))
    assert oracle.kernels_in(ours, *args) == KERNELS
    oracle.check(ours, real(plain_half), args, names=NAMES)


@pytest.mark.slow
@pytest.mark.ci
def test_the_half_agrees_where_weights_are_streamed():
    """A section and some columns of the weights a grid step; and an image at a time."""
    args = arguments(2, 16, 32, 2, 128)
    options: Any = {"turn": TURN, "num_heads": 2}
    plan: Any = planning.plan(Shape(2, 16, 32, 2, 128, jnp.dtype(jnp.float32)), DEVICES["v5e"])
    one: Any = planning.plan(Shape(1, 16, 32, 2, 128, jnp.dtype(jnp.float32)), DEVICES["v5e"])
    forward, backward = (
        replace(part, images=1, project=replace(part.project, sections=1, columns=128)) for part in (one.forward, one.backward)
    )
    plan = replace(plan, forward=forward, backward=backward)
    oracle.check(partial(ours_half, launch=launch(), plan=plan, **options), partial(plain_half, **options), args, names=NAMES)


def test_a_row_is_turned_in_lanes_and_turned_back():
    """Of several tiles of rows and images of one; values are not touched; a head's columns as `reference.turned` has them."""
    for turn, t, images in ((TURN, 16, 3), (Turn(32, 33, 1), 1064, 1)):
        qkv = normal(0, 3, images, t, 128)
        found = reference.turned(qkv, turn, 2)
        rows = jax.jit(partial(turning.turn_columns, width=64))(qkv[0, 0], *turning.of_rows(turn, t, 64).tables)
        np.testing.assert_allclose(rows, found[0, 0], atol=1e-6)
        back = turning.turned_back(found, turn, 64, launch=launch())
        np.testing.assert_array_equal(back[2], qkv[2])
        np.testing.assert_allclose(back, qkv, atol=1e-5)


def test_only_the_distance_of_two_patches_counts():
    """The logits of equal queries and keys are those of the patches' distances; one patch, in the middle, is not turned."""
    t, turn = 8, Turn(2, 4, 0)
    q, k = normal(0, 1, 1, t, 64), normal(1, 1, 1, t, 64)
    same = jnp.broadcast_to(q[:, :, :1], q.shape), jnp.broadcast_to(k[:, :, :1], k.shape)
    a, b = reference.turned(jnp.concatenate(same), turn, 1)[:, 0]
    logits = a @ b.T
    np.testing.assert_allclose(logits[0, 1], logits[1, 2], rtol=1e-5)
    np.testing.assert_allclose(logits[0, 4], logits[3, 7], rtol=1e-5)
    assert abs(float(logits[0, 1] - logits[0, 2])) > 1e-3
    x, *weights = arguments(1, 3, 16, 2, 8)
    none = plain_half(x, *weights, turn=Turn(1, 1, 1), num_heads=2)
    np.testing.assert_allclose(none, without(x, AttentionWeights(*weights), num_heads=2), atol=1e-6)


def test_what_the_kernel_does_not_take_is_xlas_and_says_so():
    shape = Shape(1, 201, 768, 12, 64, jnp.dtype(jnp.bfloat16))
    assert tpu.by_xla(shape, launch=launch()) == ""
    assert "heads of width 80, 1280 columns" in tpu.by_xla(shape._replace(n=16, h=80), launch=launch())
    assert "heads of width 64, 192 columns" in tpu.by_xla(shape._replace(n=3), launch=launch())
    assert "images of 6 tokens" in tpu.by_xla(shape._replace(t=6), launch=launch())
    args = arguments(2, 16, 16, 2, 8)
    options = {"turn": TURN, "num_heads": 2}
    run = partial(ours_half, launch=launch(), **options)
    assert not oracle.kernels_in(run, *args)

    def gradients(half):
        return jax.jit(jax.grad(lambda *a: (half(*a) ** 2).sum(), (0, 3)))(*args)

    for a, b in zip(gradients(run), gradients(partial(plain_half, **options)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.slow
@pytest.mark.ci
def test_a_model_runs_on_the_kernels():
    fields: Any = {"image_size": 12, "patch_size": 4, "width": 128, "depth": 1, "mlp_dim": 32, "num_heads": 2, "num_classes": 3}
    config = vitcore.ViTConfig(**fields, position="rope", registers=2, qkv_bias="qv", block="layerscale-gated", gelu="silu")
    params = vitcore.init(jax.random.key(0), config)
    params["head"]["kernel"] = normal(4, 128, 3)
    images = normal(3, 2, 12, 12, 3)
    run = partial(vitcore.apply, config=config, ops=INTERPRET)
    oracle.assert_kernel_ran(run, params, images, name="attention_core_forward")
    plain = vitcore.apply(params, images, config, ops=vitcore.REFERENCE)
    np.testing.assert_allclose(run(params, images), plain, atol=1e-5)


@pytest.mark.slow
def test_under_shard_map():
    """Images over "data", heads over "model"; the gradients of every weight with them."""
    x, *arrays = arguments(2, 16, 32, 2, 128)
    weights = AttentionWeights(*arrays)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    rows: Any = [P(), P(), P(None, None, "model"), P(None, "model"), P("model"), P()]

    def local(x, weights):
        options: Any = {"num_heads": 1, "turn": TURN, "residual_scale": 0.5, "launch": launch()}
        return jax.lax.psum(tpu.attention_half(x, weights, **options), "model")

    run = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), AttentionWeights(*rows)), out_specs=P("data"), check_vma=True)

    def gradients(fn):
        return jax.jit(jax.grad(lambda *a: (fn(*a) ** 2).sum(), argnums=(0, 1)))(x, weights)

    whole = gradients(partial(reference.attention_half, num_heads=2, turn=TURN))
    for a, b in zip(jax.tree.leaves(gradients(run)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("target", [pytest.param(t, marks=[pytest.mark.ci] if t == "v5e" else []) for t in TOPOLOGIES])
def test_it_compiles(target):
    """A training step of DINOv3-B/16, of one block and a few images: its kernels are there, also the one that turns back."""
    program = Program(build="bench.programs:train_step", arguments={"model": "DINOv3-B/16", "batch": 8, "depth": 1})
    (report,) = compile_programs(target, [program], seconds=600)
    assert not report.error
    assert {"attention_project", "attention_turn_back", "attention_core_backward"} <= {k.kernel for k in report.kernels}
