"""Layer normalisation as TPU kernels, interpreted: against its reference and the oracle, and by its laws."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from kernels.device import DEVICES
from kernels.launch import Launch
from kernels.layer_norm import reference, tpu
from kernels.layer_norm.plan import Plan, plan
from tests import oracle
from tests.draws import examples

FAST = Launch(device=DEVICES["v5e"], interpret=True)
STRICT = replace(FAST, interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"))


def arrays(shape, dtype=jnp.float32, seed=0):
    r = np.random.default_rng(seed)
    x = r.standard_normal(shape) * 1.3 + 0.2
    scale, bias = 1 + 0.3 * r.standard_normal(shape[-1]), 0.3 * r.standard_normal(shape[-1])
    return jnp.asarray(x, dtype), jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)


def judge(args, launch=FAST, plan=None, **options):
    ours = partial(tpu.layer_norm, launch=launch, plan=plan, **options)
    oracle.assert_kernel_ran(ours, *args, name="layer_norm_forward")
    oracle.check(ours, partial(reference.layer_norm, **options), args, names=("x", "scale", "bias"))


@examples(8)
@given(
    shape=st.sampled_from([(1, 64), (7, 48), (16, 128), (17, 192), (511, 64), (513, 64), (2, 17, 64), (3, 1, 5, 32)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    seed=st.integers(0, 999),
)
def test_value_and_gradients_agree_with_the_reference(shape, dtype, seed):
    judge(arrays(shape, dtype, seed))


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 3.0])
def test_its_eps_is_that_of_the_model(eps):
    """Rows of a deviation of some 1e-5, on which every one of them tells; the reference is held to float64 by the oracle."""
    x, scale, bias = arrays((7, 48))
    judge((x * (1e-5 if eps < 1 else 1), scale, bias), eps=eps)


@pytest.mark.parametrize("rows", [5, 40])
def test_no_uninitialised_row_reaches_a_sum(rows):
    """Tiles of 16 rows, a tail in the last; memory beyond the array is NaN."""
    judge(arrays((rows, 32)), STRICT, plan=Plan(rows=16))


@examples(4)
@given(shift=st.floats(-8, 8), factor=st.floats(0.5, 8))
def test_shift_and_scale_of_a_row_do_not_matter(shift, factor):
    x, scale, bias = arrays((9, 64))
    run = partial(tpu.layer_norm, launch=FAST)
    np.testing.assert_allclose(run(x * factor + shift, scale, bias), run(x, scale, bias), atol=1e-4)
    dx = jax.grad(lambda x: (run(x, scale, bias) ** 2).sum())(x)
    np.testing.assert_allclose(dx.sum(-1), 0, atol=1e-3)  # no gradient along a shift


def twice(norm):
    """The norm of the norm, as a scan, and the gradients of a sum over it."""

    def run(x, scale, bias):
        return jax.lax.scan(lambda x, _: (norm(x, scale, bias), None), x, None, length=2)[0]

    return lambda *args, wrap=lambda run: run: jax.grad(lambda *a: (wrap(run)(*a) ** 3).sum(), argnums=(0, 1, 2))(*args)


def assert_near(ours, plain):
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3)


def test_in_a_scan_rematerialised():
    args = arrays((4, 9, 32))
    ours = jax.checkpoint(partial(tpu.layer_norm, launch=FAST))
    assert_near(twice(ours)(*args), twice(reference.layer_norm)(*args))


def test_on_a_mesh_and_in_a_scan():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    args = arrays((4, 9, 32))
    sharded = partial(jax.shard_map, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data"), check_vma=True)
    ours = partial(tpu.layer_norm, launch=STRICT)
    assert_near(twice(ours)(*args, wrap=sharded), twice(reference.layer_norm)(*args))


def test_rejects_what_it_cannot_take():
    x, scale, bias = arrays((4, 32))
    with pytest.raises(ValueError, match=r"scale has shape \(31,\)"):
        tpu.layer_norm(x, scale[1:], bias, launch=FAST)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        tpu.layer_norm(x.astype(jnp.float16), scale, bias, launch=FAST)
    with pytest.raises(ValueError, match="no row"):
        tpu.layer_norm(x[:0], scale, bias, launch=FAST)
    with pytest.raises(NotImplementedError, match="does not fit"):
        plan((16, 2**20), DEVICES["v3"])
