"""Statistics of attention: the kernel agrees with its specification, alone and on a mesh, refuses what does not fit, compiles."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from bench.reports import Program
from bench.tpu_compiler import compile_programs
from kernels.attention.reference import AttentionWeights
from kernels.attention.statistics import reference as statistics
from kernels.attention.statistics import tpu as statistics_tpu
from kernels.attention.tiling import Shape
from kernels.device import DEVICES
from tests import oracle
from tests.draws import examples
from tests.kernels.test_attention import arguments, launch

SHAPES = st.sampled_from([(17, 128, 2, 64), (37, 160, 2, 80), (5, 24, 3, 8), (197, 64, 1, 64), (40, 36, 3, 12), (1, 16, 2, 8)])


def case(b, t, d, n, h, dtype, seed=0):
    x, *weights = arguments(b, t, d, n, h, dtype, seed)
    apart = np.random.default_rng(seed).random((t, t)).astype(np.float32)  # not symmetric: a transposed one is another
    return x, AttentionWeights(*weights), jnp.asarray(apart)


def by_hand(x, w, num_heads, eps=1e-6):
    """Probabilities [B, N, T, T] in float64 NumPy, of the values that x has."""
    x, w = np.asarray(x, np.float64), [np.asarray(a, np.float64) for a in w]
    z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * w[0] + w[1]
    q, k = ((z @ w[2][i] + w[3][i]).reshape(*x.shape[:2], num_heads, -1) for i in range(2))
    s = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("device", ["v3", "v5e"])
def test_the_eps_of_the_norm_reaches_it(device):
    x, weights, _ = case(1, 17, 128, 2, 64, jnp.float32)
    for ours in (statistics.attention_statistics, partial(statistics_tpu.attention_statistics, launch=launch(device))):
        found = ours(x, weights, num_heads=2, mean=True, eps=3.0).mean
        np.testing.assert_allclose(found, by_hand(x, weights, 2, eps=3.0).mean(1), atol=1e-5)


# Rows of bfloat16 on v3 are put in order by the kernel: whole sixteens, a rest, a width that is no multiple of 128.
@example(shape=(37, 160, 2, 80), b=1, dtype=jnp.bfloat16, device="v3", asked=(True, True, True), seed=0)
@examples(3)
@given(
    shape=SHAPES,
    b=st.integers(1, 2),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    device=st.sampled_from(["v3", "v5e"]),
    asked=st.sampled_from([(True, True, True), (False, True, True), (True, False, False), (False, True, False)]),
    seed=st.integers(0, 99),
)
def test_the_kernel_agrees(shape, b, dtype, device, asked, seed):
    t, d, n, h = shape
    x, weights, apart = case(b, t, d, n, h, dtype, seed)
    options = {"num_heads": n, "mean": asked[0], "row": asked[1], "distances": apart if asked[2] else None}
    ours = partial(statistics_tpu.attention_statistics, launch=launch(device), **options)
    assert oracle.kernels_in(ours, x, weights) == ["attention_statistics"]
    p = by_hand(x, weights, n)
    truth = p.mean(1), p[:, :, 0], np.einsum("bnts,ts->bn", p, np.asarray(apart)) / t
    plain = statistics.attention_statistics(x, weights, **options)
    for name, found, expected, true in zip(plain._fields, ours(x, weights), plain, truth, strict=True):
        assert (found is None) == (expected is None), name
        if found is not None:
            assert (found.shape, found.dtype) == (expected.shape, jnp.float32)
            allowed = 1e-5 if dtype == jnp.float32 else 2 * np.abs(expected - true).max() + 2.0**-8 * np.abs(true).max()
            assert np.abs(found - true).max() <= allowed, name


@pytest.mark.parametrize("device", ["v3", "v5e"])
def test_groups_of_heads_and_tiles_of_queries_change_nothing(device, monkeypatch):
    """Of 130 tokens in two tiles, and of four heads in two groups; rows of bfloat16 come in another order on v3."""
    x, weights, apart = case(1, 130, 32, 4, 64, jnp.bfloat16)
    options = {"num_heads": 4, "mean": True, "row": True, "distances": apart}
    whole = statistics_tpu.attention_statistics(x, weights, launch=launch(device), **options)
    tiles = statistics_tpu.StatisticsTiles(heads=2, head_lanes=64, queries=128, rows=144, copies=2, needs=2**20)
    monkeypatch.setattr(statistics_tpu, "tiles", lambda *_, **__: tiles)
    cut = statistics_tpu.attention_statistics(x, weights, launch=launch(device), **options)
    for a, b in zip(cut, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_few_images_at_a_time_change_nothing(monkeypatch):
    x, weights, apart = case(6, 9, 16, 2, 8, jnp.float32)
    options = {"num_heads": 2, "mean": True, "row": True, "distances": apart}
    whole = statistics.attention_statistics(x, weights, **options)
    monkeypatch.setattr(statistics, "PART", 2 * 2 * 81)
    for a, b in zip(statistics.attention_statistics(x, weights, **options), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    text = str(jax.make_jaxpr(partial(statistics.attention_statistics, **options))(x, weights))
    assert "f32[2,2,9,9]" in text  # the maps of two images
    assert "f32[6,2,9,9]" not in text


def test_under_shard_map():
    """Images over "data", heads over "model"."""
    x, weights, apart = case(2, 9, 32, 2, 64, jnp.float32)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    specs: Any = [P(), P(), P(None, None, "model"), P(None, "model"), P("model"), P()]
    heads = AttentionWeights(*specs)

    def local(x, weights):
        options = {"num_heads": 1, "row": True, "distances": apart, "launch": launch()}
        return statistics_tpu.attention_statistics(x, weights, **options)[1:]

    run = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), heads), out_specs=P("data", "model"), check_vma=True)
    expected = statistics.attention_statistics(x, weights, num_heads=2, row=True, distances=apart)[1:]
    for a, b in zip(jax.jit(run)(x, weights), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_rejects():
    x, weights, apart = case(1, 5, 16, 2, 8, jnp.float32)
    for run in (statistics.attention_statistics, partial(statistics_tpu.attention_statistics, launch=launch())):
        with pytest.raises(ValueError, match="nothing is asked for: mean=True, row=True or distances= is required"):
            run(x, weights, num_heads=2)
        with pytest.raises(ValueError, match=r"distances have shape \(4, 4\); required \(5, 5\)"):
            run(x, weights, num_heads=2, distances=apart[:4, :4])
        with pytest.raises(ValueError, match="N = num_heads = 3"):
            run(x, weights, num_heads=3, row=True)
    shape = Shape(1, 40_000, 768, 12, 64, jnp.dtype(jnp.bfloat16))
    with pytest.raises(NotImplementedError, match=r"40000 tokens .* 16 MiB of VMEM of a v3: use the reference ops"):
        statistics_tpu.tiles(shape, DEVICES["v3"], mean=True, distance=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_compiles():
    """Packed heads and heads across columns, in groups on v3; one tile of queries and several."""
    asked = [{"shape": shape, "batch": 2, "dtype": "bfloat16"} for shape in ("B/16@224", "H/14@224", "L/16@512")]
    asked.append({"shape": "B/16@224", "batch": 2, "dtype": "float32"})
    build = "bench.programs:statistics_alone"
    programs = [Program(build=build, arguments=arguments, name=str(arguments)) for arguments in asked]
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda target: compile_programs(target, programs, seconds=600), ("v3", "v5e", "v6e"))
        for report in (report for reports in found for report in reports):
            assert not report.error, report.error
            assert {k.kernel for k in report.kernels} == {"attention_statistics"}, report.name
