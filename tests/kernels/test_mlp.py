# pyright: reportCallIssue=false
"""The MLP half as TPU kernels, interpreted: against its reference, by laws, under every transformation, on a mesh."""

from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from kernels.device import DEVICES
from kernels.dropout import Dropout
from kernels.launch import Launch, vary_alike
from kernels.mlp import forward, reference, tpu
from kernels.mlp.plan import Plan, Shape, Tiling, cost, plan, vmem_bytes
from tests import oracle
from tests.draws import examples

NAMES = ("x", *reference.MLPWeights._fields)
# v5e's tiles; float32 operands, because XLA's CPU client lacks some products of bfloat16 (they are exact in float32)
FAST = Launch(device=replace(DEVICES["v5e"], bf16_matmul=False), interpret=True)
WIDE = Launch(device=DEVICES["v3"], interpret=True)  # float32 operands in VMEM
STRICT = replace(FAST, interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"))

mlp_half = oracle.flat(tpu.mlp_half, reference.MLPWeights)
reference_half = oracle.flat(reference.mlp_half, reference.MLPWeights)

# Two and more steps along every axis of the grid, with tails: images of their own, flat rows, weights resident and streamed.
WORDS = Tiling(flat=False, images=2, rows=47, stride=48, hidden=128, resident=False, unpack=True)
RESIDENT = Tiling(flat=False, images=2, rows=17, stride=32, hidden=128, resident=True)
PARTS = Tiling(flat=False, images=1, rows=16, stride=16, hidden=128, resident=False)
RESIDENT_FLAT = Tiling(flat=True, images=1, rows=128, stride=128, hidden=128, resident=True)
STREAMED = Tiling(flat=True, images=1, rows=128, stride=128, hidden=128, resident=False)
SHARED = replace(STREAMED, shared=True)


def cut(t: Tiling | None, **options) -> Plan | None:
    """A plan of these tiles for both kernels."""
    return t and Plan(forward=t, backward=t, **options)


def arrays(b, t, d, f, dtype=jnp.float32, seed=0):
    r = np.random.default_rng(seed)
    x = r.standard_normal((b, t, d)) * 1.3 + 0.2
    w_in, w_out = r.standard_normal((d, f)) / d**0.5, r.standard_normal((f, d)) / f**0.5
    vectors = [r.standard_normal(n) * 0.3 for n in (d, d, f, d)]
    rest = (1 + vectors[0], vectors[1], w_in, vectors[2], w_out, vectors[3])
    return (jnp.asarray(x, dtype), *(jnp.asarray(a, jnp.float32) for a in rest))


def judge(args, launch, plan=None, keep=False, **options):
    ours = partial(mlp_half, launch=launch, plan=plan, keep=keep, **options)
    oracle.assert_kernel_ran(ours, *args, name="mlp_half_forward")
    oracle.check(ours, partial(reference_half, **options), args, names=NAMES)


@examples(6)
@given(
    bt=st.sampled_from([(1, 1), (2, 17), (3, 13), (1, 128), (1, 129), (2, 50)]),
    df=st.sampled_from([(64, 32), (48, 128), (128, 256)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    gelu=st.sampled_from(["tanh", "erf", "quick"]),
    rate=st.sampled_from([0.0, 0.3]),
    residual_scale=st.sampled_from([1.0, 0.25]),
    launch=st.sampled_from([FAST, WIDE]),
    seed=st.integers(0, 99),
)
@example(bt=(2, 17), df=(48, 128), dtype=jnp.float32, gelu="quick", rate=0.0, residual_scale=1.0, launch=FAST, seed=3)
@example(bt=(2, 9), df=(48, 128), dtype=jnp.float32, gelu="silu", rate=0.0, residual_scale=1.0, launch=FAST, seed=4)
@example(bt=(1, 1), df=(64, 32), dtype=jnp.float32, gelu="erf", rate=0.3, residual_scale=0.5, launch=FAST, seed=0)
def test_value_and_gradients_agree_with_the_reference(bt, df, dtype, gelu, rate, residual_scale, launch, seed):
    dropout = Dropout(rate, jnp.int32(seed), 1000, 77) if rate else None
    if bt == (1, 1):
        launch = WIDE  # XLA's CPU client has no bfloat16 matrix-vector product, which one interpreted row becomes
    judge(arrays(*bt, *df, dtype, seed), launch, gelu=gelu, dropout=dropout, residual_scale=residual_scale)


@pytest.mark.parametrize("t", [None, RESIDENT_FLAT], ids=["chosen", "flat, one image in two tiles"])
def test_rows_behind_the_tokens_change_nothing(t):
    """x with rows of padding: the tokens' values, and with their own masks of dropout every gradient."""
    dropout, tokens = Dropout(0.3, jnp.int32(5), 1000, 77), 21
    options = {"dropout": dropout, "tokens": tokens, "launch": FAST, "plan": cut(t)}

    def ours(x, *weights):
        return mlp_half(jnp.pad(x, ((0, 0), (0, 3), (0, 0))), *weights, **options)[:, :tokens]

    oracle.check(ours, partial(reference_half, dropout=dropout), arrays(8, tokens, 48, 128), names=NAMES)


def test_the_eps_of_the_norm_reaches_both_kernels():
    """One so large that the normalised rows halve: a kernel with its own would be far off."""
    judge(arrays(2, 17, 48, 128), FAST, eps=5.0)


@pytest.mark.slow
@examples(25)
@given(
    bt=st.tuples(st.integers(1, 5), st.integers(1, 70)),
    df=st.sampled_from([(64, 32), (48, 128), (128, 256), (192, 384)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    gelu=st.sampled_from(["tanh", "erf", "quick"]),
    rate=st.sampled_from([0.0, 0.1, 0.6]),
    launch=st.sampled_from([FAST, WIDE]),
    seed=st.integers(0, 9999),
)
def test_many_shapes_agree_with_the_reference(bt, df, dtype, gelu, rate, launch, seed):
    dropout = Dropout(rate, jnp.int32(seed), seed, 3 * seed) if rate else None
    launch = WIDE if bt == (1, 1) else launch
    judge(arrays(*bt, *df, dtype, seed), launch, gelu=gelu, dropout=dropout)


@pytest.mark.parametrize("t", [RESIDENT, PARTS, STREAMED, SHARED], ids=["resident", "parts", "streamed", "shared"])
@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_every_way_to_cut_agrees_with_the_reference(t, dtype):
    t = replace(t, rows=47, stride=48) if t is RESIDENT else t
    judge(arrays(3, 47, 64, 384, dtype), FAST, cut(t), dropout=Dropout(0.3, jnp.int32(5), 9, 4))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_spans_of_a_hidden_tile_agree_with_the_reference(dtype, keep):
    """Two row tiles, two hidden tiles of two spans each, whose products are made beside the next one's GELU."""
    t = Tiling(flat=False, images=2, rows=17, stride=32, hidden=256, resident=True, spans=2, keep=keep)
    judge(arrays(3, 17, 64, 512, dtype), FAST, cut(t), dropout=Dropout(0.3, jnp.int32(5), 9, 4))


@pytest.mark.parametrize("t", [47, 21], ids=["squares", "a border within 16 rows"])
def test_rows_taken_apart_unpack_agree_with_the_reference(t):
    """As v2 and v3 do: even rows beside odd ones in VMEM, images that begin in the middle of 16 rows, each row's own dropout."""
    both = Plan(forward=replace(WORDS, rows=t, stride=-(-t // 8) * 8), backward=replace(WORDS, rows=48, stride=48))
    args = arrays(3, t, 64, 384, jnp.bfloat16)
    options: dict = {"dropout": Dropout(0.3, jnp.int32(5), 9, 4)}
    judge(args, WIDE, both, **options)


@examples(2)
@given(
    bt=st.sampled_from([(2, 17), (3, 13), (1, 129), (3, 48)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    gelu=st.sampled_from(["tanh", "erf", "quick"]),
    rate=st.sampled_from([0.0, 0.3]),
    launch=st.sampled_from([FAST, WIDE]),
    seed=st.integers(0, 99),
)
@example(bt=(3, 48), dtype=jnp.bfloat16, gelu="tanh", rate=0.3, launch=WIDE, seed=1)
@pytest.mark.slow
@pytest.mark.ci
def test_kept_hidden_values_give_the_reference_s_gradients(bt, dtype, gelu, rate, launch, seed):
    dropout = Dropout(rate, jnp.int32(seed), 1000, 77) if rate else None
    judge(arrays(*bt, 48, 256, dtype, seed), launch, gelu=gelu, dropout=dropout, residual_scale=0.5, keep=True)


@pytest.mark.parametrize(
    "t",
    [
        replace(WORDS, rows=48),
        *(pytest.param(t, marks=pytest.mark.slow) for t in (PARTS, STREAMED, SHARED, replace(RESIDENT, rows=47, stride=48))),
    ],
    ids=["words", "parts", "streamed", "shared", "resident"],
)
def test_every_way_to_cut_keeps_what_its_backward_pass_reads(t):
    """Rows taken apart, a part of an image, flat rows in a batch of parts otherwise, images with padding between them."""
    words = t.unpack
    args = arrays(3, 48 if words else 47, 64, 384, jnp.bfloat16 if words else jnp.float32)
    judge(args, WIDE if words else FAST, cut(replace(t, keep=True)), dropout=Dropout(0.3, jnp.int32(5), 9, 4))


def test_what_is_kept_is_read_and_not_made_again():
    """The residuals hold B*T*F values in x's dtype, padding aside; with others in their place the gradients are others."""
    args = arrays(2, 16, 64, 256, jnp.bfloat16)
    run = partial(mlp_half, launch=WIDE, keep=True)
    assert "mlp_half_hidden" not in str(jax.make_jaxpr(run)(*args)), "kept where nobody differentiates"
    y, pullback = jax.vjp(run, *args)
    leaves, tree = jax.tree.flatten(pullback)
    (at,) = [i for i, a in enumerate(leaves) if getattr(a, "shape", ())[-1:] == (256,) and a.ndim == 3]
    assert leaves[at].dtype == jnp.bfloat16
    assert 2 * 16 * 256 <= leaves[at].size < 1.2 * 2 * 16 * 256
    other = jax.tree.unflatten(tree, [jnp.zeros_like(a) if i == at else a for i, a in enumerate(leaves)])
    of_w_in, of_zeros = (np.asarray(pull(y)[3]) for pull in (pullback, other))
    assert np.abs(of_w_in - of_zeros).max() > 0.1 * np.abs(of_w_in).max()


@pytest.mark.parametrize(
    ("t", "shape"),
    [(RESIDENT, (3, 17, 32, 256)), *(pytest.param(t, (1, 150, 32, 384), marks=pytest.mark.slow) for t in (STREAMED, SHARED))],
    ids=["resident", "streamed", "shared"],
)
def test_nothing_that_a_padded_row_holds_reaches_a_gradient(t, shape):
    """Uninitialised memory is NaN: behind the last token of an image, and behind the last row of the batch."""
    judge(arrays(*shape), STRICT, cut(replace(t, keep=True)), dropout=Dropout(0.2, jnp.int32(5)))


def test_a_batch_in_parts_agrees_with_the_reference(monkeypatch):
    """Flat rows, which are copied: the backward pass two images at a time, gradients summed over the parts; dropout knows its rows
    all the same. Images as they lie are not copied, and take no parts."""
    args, counted = arrays(6, 21, 64, 384), []
    each = tpu.parts.backward
    monkeypatch.setattr(tpu.parts, "backward", lambda step, n, *rest: counted.append(n) or each(step, n, *rest))
    for t, images, parts in ((STREAMED, 2, 3), (replace(RESIDENT, rows=21), 6, 1)):
        judge(args, FAST, cut(t, backward_images=images), dropout=Dropout(0.3, jnp.int32(5), 9, 4))
        assert set(counted) == {parts}
        counted.clear()


def test_tall_row_tiles_agree_with_the_reference():
    """Which finish in a pass of their own, without code of their own for the last hidden tile."""
    args, options = arrays(3, 21, 64, 256), {"dropout": Dropout(0.3, jnp.int32(5), 9, 4), "residual_scale": 0.5}
    with mock.patch.object(forward, "FUSED_ROWS", 0):
        judge(args, FAST, cut(replace(RESIDENT, rows=21)), **options)


@pytest.mark.parametrize(
    "t",
    [RESIDENT, STREAMED, pytest.param(SHARED, marks=[pytest.mark.slow, pytest.mark.ci])],
    ids=["resident", "streamed", "shared"],
)
def test_no_race_and_no_uninitialised_memory(t):
    """The TPU interpreter: DMAs take time, memory begins as NaN (rows beyond the array too), races raise."""
    args = arrays(*((3, 17) if t is RESIDENT else (1, 150)), 32, 256 if t is RESIDENT else 384)
    judge(args, STRICT, cut(t), dropout=Dropout(0.2, jnp.int32(5)))


def test_rows_are_independent_and_in_any_order():
    args = arrays(2, 17, 64, 128)
    run = lambda x: mlp_half(x, *args[1:], launch=FAST)  # noqa: E731
    order = np.random.default_rng(0).permutation(17)
    np.testing.assert_allclose(run(args[0][:, order]), run(args[0])[:, order], atol=1e-5)
    gradient = jax.grad(lambda x: run(x)[1, 3].sum())(args[0])
    assert np.abs(gradient[1, 3]).max() > 0.1
    assert not np.asarray(gradient.at[1, 3].set(0)).any(), "a row's gradient reached another row"


def test_residual_scale_splits_a_block_over_devices():
    """The parts of a hidden axis split in two, each with half the residual and its global column, sum to the whole."""
    x, scale, bias, w_in, b_in, w_out, b_out = arrays(2, 17, 64, 256)
    drop = Dropout(0.25, jnp.int32(9), 34, 0)
    whole = mlp_half(x, scale, bias, w_in, b_in, w_out, b_out, dropout=drop, launch=FAST)
    parts = 0.0
    for column in (0, 128):
        of = slice(column, column + 128)
        parts += mlp_half(
            x,
            scale,
            bias,
            w_in[:, of],
            b_in[of],
            w_out[of],
            b_out,
            dropout=drop._replace(column=column),
            residual_scale=0.5,
            launch=FAST,
        )
    np.testing.assert_allclose(parts, whole, atol=2e-5)


def test_rows_split_over_devices_drop_the_same_elements():
    args = arrays(4, 17, 64, 128)
    drop = Dropout(0.25, jnp.int32(9), 0, 0)
    whole = mlp_half(*args, dropout=drop, launch=FAST)
    for first in range(4):
        part = mlp_half(args[0][first : first + 1], *args[1:], dropout=drop._replace(row=first * 17), launch=FAST)
        np.testing.assert_allclose(part[0], whole[first], atol=1e-5)


def test_forward_and_backward_drop_the_same_elements_as_the_reference():
    """With the output as the identity of the drop mask, zeros of the kernel's dy path stand where the reference's do."""
    x, scale, bias, w_in, b_in, w_out, b_out = arrays(2, 17, 64, 128)
    drop = Dropout(0.5, jnp.int32(3), 11, 0)
    masks = []
    for op in (partial(mlp_half, launch=FAST), reference_half):
        y = op(x, scale, bias, 0 * w_in, b_in, 0 * w_out, b_out + 1, dropout=drop) - x
        kept = np.asarray(y) != 0
        gradient = jax.grad(lambda v, op=op: op(x, scale, bias, 0 * w_in, b_in, 0 * w_out, v, dropout=drop).sum())(b_out)
        np.testing.assert_allclose(gradient, 2.0 * kept.sum((0, 1)), rtol=1e-6)
        masks.append(kept)
    np.testing.assert_array_equal(masks[0], masks[1])


def test_under_jit_scan_and_remat():
    """A stack of two layers, rematerialised, gives the gradients of the plain stack."""
    x, *params = arrays(1, 17, 32, 128)
    stacked = [jnp.stack([p, p * 0.5]) for p in params]

    def loss(op, x, stacked):
        body = jax.checkpoint(lambda x, p: (op(x, *p), None))
        return (jax.lax.scan(body, x, stacked)[0] ** 2).mean()

    ours = jax.jit(jax.value_and_grad(partial(loss, partial(mlp_half, launch=FAST)), argnums=(0, 1)))
    plain = jax.value_and_grad(partial(loss, reference_half), argnums=(0, 1))
    for a, b in zip(jax.tree.leaves(ours(x, stacked)), jax.tree.leaves(plain(x, stacked)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


def test_on_a_mesh_with_all_axes_manual():
    """2 x 2: images over "data", hidden values over "model"; check_vma=True. Value and every gradient as on one device."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    args = arrays(2, 17, 32, 256)
    specs = (P("data"), P(), P(), P(None, "model"), P("model"), P("model"), P())
    drop = Dropout(0.25, jnp.int32(9))

    def part(x, *params):
        at = drop._replace(row=jax.lax.axis_index("data") * 17, column=jax.lax.axis_index("model") * 128)
        x, *params = vary_alike(x, *params)
        y = mlp_half(x, *params, dropout=at, residual_scale=0.5, launch=STRICT)
        return jax.lax.psum(y, "model")

    sharded = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=True))
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(args[0].shape), jnp.float32)
    value = lambda op, *a: (op(*a) * weight).sum()  # noqa: E731
    found = jax.grad(partial(value, sharded), argnums=range(7))(*args)
    expected = jax.grad(partial(value, partial(reference_half, dropout=drop)), argnums=range(7))(*args)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4, err_msg=name)


def test_backward_is_one_kernel_that_saves_no_hidden_values():
    args = arrays(2, 17, 64, 128, jnp.bfloat16)
    run = partial(mlp_half, launch=FAST)
    _, pullback = jax.vjp(run, *args)
    saved = sum(a.size for a in jax.tree.leaves(pullback) if hasattr(a, "size"))
    assert saved <= sum(a.size for a in args) + 4, "something besides the inputs is saved"
    names = oracle.kernels_in(lambda *a: jax.vjp(run, *a)[1](a[0]), *args)
    assert names == ["mlp_half_forward", "mlp_half_backward"]


@pytest.mark.parametrize("device", [d for d in DEVICES.values()], ids=lambda d: d.name)
@pytest.mark.parametrize(
    "shape",
    [(128, 197, 768, 3072), (64, 197, 1024, 4096), (32, 257, 1280, 5120), (8, 1370, 1280, 5120), (8, 17, 64, 32)],
)
def test_tiles_fit_and_cover(shape, device):
    for itemsize in (2, 4):
        s = Shape(*shape, itemsize)
        both: Any = plan(s, device)
        for backward, t in ((False, both.forward), (True, both.backward)):
            assert vmem_bytes(s, device, t, backward=backward) <= device.vmem_bytes
            row_tiles, hidden_tiles = t.grid(s)
            assert hidden_tiles * t.hidden == s.f
            assert row_tiles * t.images * t.rows >= s.rows
            assert t.stride >= t.rows
            assert t.stride % 8 == 0
            assert cost(s, t, backward=backward).flops == (5 if backward else 2) * 2 * s.rows * s.d * s.f
        if s.f % 128:
            with pytest.raises(NotImplementedError, match="multiple of 128"):
                plan(s, device, keep=True)
            continue
        kept: Any = plan(s, device, keep=True)
        assert kept.forward.kept(s) == kept.backward.kept(s)
        assert kept.backward_images == s.b
        for backward, t in ((False, kept.forward), (True, kept.backward)):
            assert vmem_bytes(s, device, t, backward=backward) <= device.vmem_bytes
            assert np.prod(t.kept(s)) >= s.rows * s.f
            assert cost(s, t, backward=True).flops == 4 * 2 * s.rows * s.d * s.f


def test_rejects_what_it_cannot_take():
    x, scale, bias, w_in, b_in, w_out, b_out = arrays(1, 8, 32, 64)
    good = [x, scale, bias, w_in, b_in, w_out, b_out]

    def call(at=None, value=None, **options):
        given = [value if k == at else a for k, a in enumerate(good)]
        return mlp_half(*given, launch=FAST, **options)

    with pytest.raises(ValueError, match=r"x has shape \(8, 32\)"):
        call(0, x[0])
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        call(0, x.astype(jnp.float16))
    with pytest.raises(ValueError, match=r"out_kernel has shape \(32, 64\)"):
        call(5, w_out.T)
    with pytest.raises(ValueError, match="known: 'tanh', 'erf'"):
        call(gelu="relu")
    with pytest.raises(ValueError, match="must be in"):
        call(dropout=Dropout(1.0, jnp.int32(0)))
    with pytest.raises(NotImplementedError, match="multiple of 128 can be tiled"):
        plan(Shape(1, 197, 4096, 16384 + 1, 4), DEVICES["v3"])


def test_steps_forward_are_long_where_weights_stream():
    """256 hidden values a step of v3's and v2's forward kernel at ViT-H/14: with half as many the MXU waits between steps."""
    for name in ("v2", "v3"):
        chosen: Any = plan(Shape(128, 264, 1280, 5120, 2), DEVICES[name]).forward
        assert (chosen.rows, chosen.hidden) == (384, 256)
