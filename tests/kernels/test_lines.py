"""Attention along lines in kernels: exact as the einsum in value and gradients, and XLA's where lines do not fit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import vitcore
from bench.reports import Program
from bench.tpu_compiler import TOPOLOGIES, compile_programs
from kernels.attention.lines import reference, tpu
from kernels.attention.lines.plan import LineShape
from kernels.device import DEVICES
from kernels.launch import Launch
from tests import oracle
from vitcore import families
from vitcore.ops import INTERPRET, fused


def launch(device="v3"):
    return Launch(device=DEVICES[device], interpret=True)


def arguments(m, length, heads, d, dtype):
    draw = np.random.default_rng(length * d + m).standard_normal
    relative = jnp.asarray(draw((2 * d, 2 * length - 1)) * 0.5, jnp.float32)
    return jnp.asarray(draw((m, length, 2 * heads * d)), dtype), relative


def check(m, length, heads, d, dtype, device="v3"):
    ours = partial(tpu.attention, heads=heads, launch=launch(device))
    args = arguments(m, length, heads, d, dtype)
    assert oracle.kernels_in(ours, *args) == ["attention_lines_forward"]
    oracle.check(ours, partial(reference.attention, heads=heads), args, names=("qkv", "relative"))


@settings(max_examples=2)
@given(
    m=st.sampled_from([1, 3, 130]),
    length=st.sampled_from([1, 2, 5, 7, 14]),
    heads=st.sampled_from([8, 2]),
    d=st.sampled_from([2, 8, 36]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    device=st.sampled_from(["v3", "v5e"]),
)
def test_it_agrees(m, length, heads, d, dtype, device):
    check(m, length, heads, d, dtype, device)


def test_more_lines_than_a_grid_step_has():
    """Two blocks, the second with lines of zeros; places of several turns of a loop, channels of two sums."""
    check(200, 6, 8, 40, jnp.float32)


def test_a_shift_of_all_logits_changes_nothing():
    """r^k alike at every offset adds k_p . r to every query's logit of p; r^q alike adds the same to all of a query."""
    qkv, relative = arguments(3, 7, 8, 4, jnp.float32)
    ours = partial(tpu.attention, heads=8, launch=launch())
    np.testing.assert_allclose(ours(qkv, relative.at[:2].add(3.0)), ours(qkv, relative), rtol=2e-4, atol=2e-5)
    assert np.abs(ours(qkv, relative.at[2:4].add(3.0)) - ours(qkv, relative)).max() > 0.1


def test_an_axial_resnet_runs_on_them():
    stem = vitcore.ResNetStem(depths=(1,), width_factor=0.5, form="axial")
    config = vitcore.ResNetConfig(image_size=(24, 16), stem=stem, num_classes=3)
    params, images = vitcore.init(jax.random.key(0), config), jax.random.uniform(jax.random.key(1), (2, 24, 16, 3), minval=-1)
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(2), a.shape), params)
    run = partial(vitcore.apply, config=config, ops=INTERPRET)
    assert oracle.kernels_in(run, params, images) == ["attention_lines_forward"] * 2
    plain = vitcore.apply(params, images, config, ops=vitcore.REFERENCE)
    assert np.abs(plain).max() > 0.1
    np.testing.assert_allclose(run(params, images), plain, rtol=1e-4, atol=1e-4)


def test_what_xla_does_is_said():
    shape = LineShape(1, 7, 8, 64, jnp.dtype(jnp.bfloat16))
    of = {device: partial(tpu.by_xla, launch=launch(device)) for device in ("v3", "v5e")}
    assert of["v3"](shape) == of["v5e"](shape) == ""
    assert "tables of 14720 bytes do not fit the 16384 bytes of SMEM of a v3" in of["v3"](shape._replace(length=58, d=16))
    assert of["v5e"](shape._replace(length=96, d=16)) == ""
    assert "112 places of 16 channels a head need 25 MiB of the 16 MiB of VMEM" in of["v3"](shape._replace(length=112, d=16))
    assert "float64 is XLA's" in of["v3"](shape._replace(dtype=jnp.dtype(jnp.float64)))
    args = arguments(2, 96, 8, 16, jnp.bfloat16)
    run = partial(tpu.attention, heads=8)
    assert not oracle.kernels_in(partial(run, launch=launch("v3")), *args)
    for size, left in ((224, ()), (384, tuple(f"axial attention of {n}" for n in ("96 places", "48 places", "24 places")))):
        config = vitcore.variant("AxialResNet-50", image_size=size)
        said = [
            families.family_of(config).by_xla(config, ops, "bfloat16", 1) for ops in (fused("v3"), fused("v5e"), vitcore.REFERENCE)
        ]
        assert said[0][0] == "convolutions"
        assert all(a.startswith(b) for a, b in zip(said[0][1:], left, strict=True))
        assert said[1:] == [("convolutions",), ("convolutions", "axial attention")]
    with pytest.raises(ValueError, match=r"required .M, L, 2 N d. with an even d"):
        run(*arguments(2, 7, 8, 3, jnp.float32), launch=launch())


@pytest.mark.slow
def test_a_mesh_sums_the_tables_gradients():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    qkv, relative = arguments(6, 5, 8, 4, jnp.float32)

    def gradients(op, qkv, relative):
        return jax.grad(lambda *a: jnp.square(op(*a, heads=8)).sum(), (0, 1))(qkv, relative)

    ours = partial(gradients, partial(tpu.attention, launch=launch()))
    run = jax.shard_map(ours, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P()))
    for got, wanted in zip(jax.jit(run)(qkv, relative), gradients(reference.attention, qkv, relative), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("target", [pytest.param(t, marks=[pytest.mark.ci] if t == "v3" else []) for t in TOPOLOGIES])
def test_it_compiles(target):
    """Forward and backward of the longest and the shortest lines of an AxialResNet-50, float32 too; of v3, in CI, the shortest."""
    lines = {"length": 7, "channels": 512, "images": 16}, {"length": 56, "channels": 128, "images": 2}
    asked = [{**lines[0], "dtype": "float32"}, *(lines if target != "v3" else lines[:1])]
    programs = [
        Program(build="bench.programs:axial_lines", arguments={**a, "kernels": True, "backward": True}, name=f"{target} {a}")
        for a in asked
    ]
    for report in compile_programs(target, programs, seconds=600):
        assert not report.error, f"{report.name}: {report.error}"
        assert {k.kernel for k in report.kernels} == {"attention_lines_queries", "attention_lines_keys"}
