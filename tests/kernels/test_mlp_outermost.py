"""The MLP half whose backward pass has hidden tiles outermost, interpreted with v3's operands: against its reference."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels.by_xla import ByXLA
from kernels.device import DEVICES
from kernels.dropout import Dropout
from kernels.launch import Launch
from kernels.mlp import reference, tpu
from kernels.mlp.plan import Outermost, Plan, Shape, choose, outermost, plan
from kernels.stacked import Stacked, close
from tests import oracle
from tests.kernels.test_mlp import NAMES, STRICT, WIDE, arrays, mlp_half, reference_half

RACES = replace(STRICT, device=DEVICES["v3"])


def cut(b, t, d, f, hidden, dtype, **options) -> Plan:
    forward = plan(Shape(b, t, d, f, jnp.dtype(dtype).itemsize), DEVICES["v3"]).forward
    return Plan(forward=forward, backward=Outermost(hidden=hidden), **options)


def judge(b, t, d, f, hidden, dtype, *, launch=WIDE, seed=0, images=None, **options):
    args, chosen = arrays(b, t, d, f, dtype, seed), cut(b, t, d, f, hidden, dtype, backward_images=images)
    ours = partial(mlp_half, launch=launch, plan=chosen, **options)
    names = oracle.kernels_in(lambda *a: jax.vjp(ours, *a)[1](a[0]), *args)
    assert names[1:] == ["mlp_half_prepare_backward", "mlp_half_backward", "mlp_half_finish_backward"]
    oracle.check(ours, partial(reference_half, **options), args, names=NAMES)


@settings(max_examples=1)
@given(
    bt=st.sampled_from([(3, 50), (9, 16), (1, 257), (17, 9), (4, 64)]),
    dfh=st.sampled_from([(128, 256, 128), (256, 512, 256), (384, 256, 128), (128, 512, 512)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    gelu=st.sampled_from(["tanh", "erf", "quick"]),
    rate=st.sampled_from([0.0, 0.3]),
    residual_scale=st.sampled_from([1.0, 0.25]),
    seed=st.integers(0, 99),
)
@example(bt=(3, 50), dfh=(384, 256, 128), dtype=jnp.float32, gelu="tanh", rate=0.3, residual_scale=0.25, seed=0)
@example(bt=(9, 16), dfh=(128, 256, 128), dtype=jnp.bfloat16, gelu="erf", rate=0.0, residual_scale=1.0, seed=1)
def test_value_and_gradients_agree_with_the_reference(bt, dfh, dtype, gelu, rate, residual_scale, seed):
    dropout = Dropout(rate, jnp.int32(seed), 1000, 77) if rate else None
    (b, t), (d, f, hidden) = bt, dfh
    judge(b, t, d, f, hidden, dtype, gelu=gelu, dropout=dropout, residual_scale=residual_scale, seed=seed)


def test_rows_behind_the_tokens_change_nothing():
    """x with rows of padding: the tokens' values, and with their own masks of dropout every gradient."""
    tokens, dropout = 21, Dropout(0.3, jnp.int32(5), 1000, 77)
    options = {"tokens": tokens, "launch": WIDE, "plan": cut(7, 24, 128, 256, 128, jnp.float32), "dropout": dropout}

    def ours(x, *weights):
        return mlp_half(jnp.pad(x, ((0, 0), (0, 3), (0, 0))), *weights, **options)[:, :tokens]

    oracle.check(ours, partial(reference_half, dropout=dropout), arrays(7, tokens, 128, 256), names=NAMES)


@pytest.mark.slow
def test_a_batch_in_parts_agrees_with_the_reference():
    """Gradients summed over three parts, each with its own rows in the masks."""
    judge(9, 50, 128, 256, 128, jnp.float32, images=3, dropout=Dropout(0.3, jnp.int32(5), 9, 4))


@pytest.mark.slow
@pytest.mark.ci
def test_no_race_and_no_uninitialised_memory():
    """The TPU interpreter: sums over hidden tiles come back from HBM when they are there, pieces of W1 turn in memory that is free,
    and what stands behind the last row, NaN, reaches nothing."""
    judge(3, 50, 384, 512, 256, jnp.float32, launch=RACES, dropout=Dropout(0.2, jnp.int32(5)))


def test_gradients_of_stacked_weights_are_written_in_their_places():
    """The second of three layers: its place holds what the layer alone has, in the arrays of all."""
    x, *weights = arrays(3, 50, 128, 256)
    chosen = cut(3, 50, 128, 256, 128, jnp.float32)
    own = reference.MLPWeights(*weights)
    stacks = {name: jnp.stack([getattr(own, name)] * 3) for name in ("in_kernel", "out_kernel")}

    def stacked(x, stacks):
        given = {name: Stacked(array, jnp.asarray([1]), array[1]) for name, array in stacks.items()}
        found: Any = tpu.mlp_half(x, own._replace(**given), launch=WIDE, plan=chosen)
        return (close(*found) ** 2).sum()

    def alone(x, kernels):
        found: Any = tpu.mlp_half(x, own._replace(**kernels), launch=WIDE, plan=chosen)
        return (found**2).sum()

    found = jax.grad(stacked, argnums=1)(x, stacks)
    expected = jax.grad(alone, argnums=1)(x, {name: getattr(own, name) for name in stacks})
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name][1], gradient, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("device", "shape", "kind"),
    [
        ("v3", (32, 264, 1280, 5120, 2), Outermost),
        ("v2", (32, 264, 1280, 5120, 2), Outermost),
        ("v3", (32, 264, 1280, 5120, 4), ByXLA),  # float32: not counted
    ],
)
def test_where_it_is_chosen(device, shape, kind):
    chosen: Any = choose(Shape(*shape), DEVICES[device])
    assert isinstance(chosen.backward, kind)
    many: Any = choose(Shape(12 * shape[0], *shape[1:]), DEVICES[device])  # 15 kB a row in HBM between the three kernels
    assert kind is ByXLA or many.backward_images == 64 < 12 * chosen.backward_images


def test_nothing_is_kept_for_it():
    """A training step that has room asks what would be kept: the kernels that keep stream their weights for few rows a step."""
    x = 32, 257, 1280, 5120, jnp.bfloat16
    assert tpu.kept_bytes(*x, launch=Launch(device=DEVICES["v3"])) is None
    assert tpu.kept_bytes(*x, launch=Launch(device=DEVICES["v5e"])) is not None


@pytest.mark.parametrize("device", ["v2", "v3", "v4", "v5e"])
@pytest.mark.parametrize(("d", "f"), [(1280, 5120), (1024, 4096), (1408, 6144), (768, 3072), (4096, 16384)])
def test_tiles_fit_and_cover(device, d, f):
    s = Shape(32, 257, d, f, 2)
    t = outermost(s, DEVICES[device])
    if DEVICES[device].bf16_matmul or d == 4096:
        assert t is None
        return
    assert t is not None
    assert f % t.hidden == 0
    assert 16 * t.hidden * d < t.needs <= DEVICES[device].vmem_bytes
    assert t.cost(s).flops == 10 * s.rows * d * f
