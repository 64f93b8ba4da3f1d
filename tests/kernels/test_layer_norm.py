"""Layer normalisation as TPU kernels, interpreted: against its reference and the oracle, and by its laws."""

from dataclasses import replace
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from kernels.device import DEVICES
from kernels.launch import Launch
from kernels.layer_norm import reference, tpu
from tests import oracle

FAST = Launch(device=DEVICES["v5e"], interpret=True)
STRICT = replace(FAST, interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"))


def arrays(shape, dtype=jnp.float32, seed=0):
    r = np.random.default_rng(seed)
    x = r.standard_normal(shape) * 1.3 + 0.2
    scale, bias = 1 + 0.3 * r.standard_normal(shape[-1]), 0.3 * r.standard_normal(shape[-1])
    return jnp.asarray(x, dtype), jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)


def judge(args, launch=FAST):
    ours = partial(tpu.layer_norm, launch=launch)
    oracle.assert_kernel_ran(ours, *args, name="layer_norm_forward")
    oracle.check(ours, reference.layer_norm, args, names=("x", "scale", "bias"))


@settings(max_examples=8)
@given(
    shape=st.sampled_from([(1, 64), (7, 48), (16, 128), (17, 192), (511, 64), (513, 64), (2, 17, 64), (3, 1, 5, 32)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    seed=st.integers(0, 999),
)
def test_value_and_gradients_agree_with_the_reference(shape, dtype, seed):
    judge(arrays(shape, dtype, seed))


@pytest.mark.parametrize("rows", [5, 40])
def test_no_uninitialised_row_reaches_a_sum(rows):
    """Tiles of 16 rows, a tail in the last; memory beyond the array is NaN."""
    with mock.patch.object(tpu, "tiles", return_value=tpu.Tiles(rows=16)):
        judge(arrays((rows, 32)), STRICT)


@settings(max_examples=4)
@given(shift=st.floats(-8, 8), factor=st.floats(0.5, 8))
def test_shift_and_scale_of_a_row_do_not_matter(shift, factor):
    x, scale, bias = arrays((9, 64))
    run = partial(tpu.layer_norm, launch=FAST)
    np.testing.assert_allclose(run(x * factor + shift, scale, bias), run(x, scale, bias), atol=1e-4)
    dx = jax.grad(lambda x: (run(x, scale, bias) ** 2).sum())(x)
    np.testing.assert_allclose(dx.sum(-1), 0, atol=1e-3)  # no gradient along a shift


def test_on_a_mesh_and_in_a_scan():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, scale, bias = arrays((4, 9, 32))

    def part(x, scale, bias):
        step = jax.checkpoint(lambda x, _: (tpu.layer_norm(x, scale, bias, launch=STRICT), None))
        return jax.lax.scan(step, x, None, length=2)[0]

    sharded = jax.shard_map(part, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data"), check_vma=True)
    plain = lambda x, s, b: reference.layer_norm(reference.layer_norm(x, s, b), s, b)  # noqa: E731
    for op in (sharded, plain):
        grads = jax.grad(lambda *a, op=op: (op(*a) ** 3).sum(), argnums=(0, 1, 2))(x, scale, bias)
        found = grads if op is sharded else found  # noqa: F821
    for a, b in zip(found, grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3)


def test_rejects_what_it_cannot_take():
    x, scale, bias = arrays((4, 32))
    with pytest.raises(ValueError, match=r"scale has shape \(31,\)"):
        tpu.layer_norm(x, scale[1:], bias, launch=FAST)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        tpu.layer_norm(x.astype(jnp.float16), scale, bias, launch=FAST)
    with pytest.raises(ValueError, match="no row"):
        tpu.layer_norm(x[:0], scale, bias, launch=FAST)
    with pytest.raises(NotImplementedError, match="does not fit"):
        tpu.tiles((16, 2**20), DEVICES["v3"])
