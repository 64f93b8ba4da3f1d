"""The attention kernels: as exact as the reference in value and every gradient, lawful, safe under scan, remat and meshes."""

from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from kernels.attention import plan as planning
from kernels.attention import reference, tiling, tpu
from kernels.attention.plan import (
    CorePlan,
    Float32Forward,
    FusedForward,
    GeneralBackward,
    GeneralForward,
    Plan,
    Refused,
    core_plan,
    plan,
)
from kernels.device import DEVICES
from kernels.dropout import Dropout
from kernels.launch import Launch
from tests import oracle
from tests.draws import examples

NAMES = ("x", *reference.AttentionWeights._fields)
SIMULATED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
KERNELS = ("project", "core_forward", "output")
GRADIENTS = ("project", "output_gradient", "core_backward", "output_weights", "projection_weights", "input_gradient")


attention_half = oracle.flat(tpu.attention_half, reference.AttentionWeights)
reference_half = oracle.flat(reference.attention_half, reference.AttentionWeights)


def launch(device="cpu"):
    """Interpreted with the tiles and the operand types of a device."""
    return Launch(device=DEVICES[device], interpret=SIMULATED)


def shape(b, t, d, n, h, dtype):
    return tiling.Shape(b, t, d, n, h, jnp.dtype(dtype))


def plain_core(qkv, num_heads):
    """Softmax attention of packed projections in einsum, as in the reference."""
    _, b, t, k = qkv.shape
    wide = jnp.promote_types(qkv.dtype, jnp.float32)
    q, key, v = qkv.reshape(3, b, t, num_heads, -1)
    logits = jnp.einsum("btnh,bsnh->bnts", q, key, preferred_element_type=wide) * q.shape[-1] ** -0.5
    probs = jax.nn.softmax(logits).astype(qkv.dtype)
    o = jnp.einsum("bnts,bsnh->btnh", probs, v, preferred_element_type=wide)
    return o.astype(qkv.dtype).reshape(b, t, k)


def packed(b, t, n, h, dtype, seed=0, sharpness=1.0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((3, b, t, n * h)) * sharpness, dtype)


def arguments(b, t, d, n, h, dtype, seed=0):
    """x in dtype and float32 parameters, at the scales of a network after some training."""
    random, k = np.random.default_rng(seed), n * h

    def normal(*shape, scale=1.0, shift=0.0, dtype=jnp.float32):
        return jnp.asarray(random.standard_normal(shape) * scale + shift, dtype)

    return (
        normal(b, t, d, dtype=dtype),
        normal(d, scale=0.1, shift=1.0),
        normal(d, scale=0.1),
        normal(3, d, k, scale=d**-0.5),
        normal(3, k, scale=0.1),
        normal(k, d, scale=k**-0.5),
        normal(d, scale=0.1),
    )


def check_half(b, t, d, n, h, dtype, *, where=None, dropout=None, residual_scale=1.0, seed=0, plan=None, eps=1e-6, keep=False):
    where, options = where or launch(), {"plan": plan, "eps": eps, "keep": keep}
    ours = partial(attention_half, num_heads=n, dropout=dropout, residual_scale=residual_scale, launch=where, **options)
    plain = partial(reference_half, num_heads=n, dropout=dropout, residual_scale=residual_scale, eps=eps)
    oracle.check(ours, plain, arguments(b, t, d, n, h, dtype, seed), names=NAMES, seed=seed)


@pytest.mark.parametrize(
    ("device", "tokens", "dtype", "rate"),
    [("v3", 21, jnp.bfloat16, 0.3), ("v3", 13, jnp.bfloat16, 0.0), ("v5e", 13, jnp.float32, 0.3)],
    ids=["rows in order", "rows out of order", "general"],
)
def test_rows_behind_the_tokens_change_nothing(device, tokens, dtype, rate):
    """x with rows of padding, of which none is a key: the tokens' values and every gradient, their masks of dropout too."""
    dropout, extra = (Dropout(rate, jnp.int32(3), jnp.int32(70)) if rate else None), -tokens % 8
    where = replace(launch(device), interpret=True)

    def ours(x, *weights):
        x = jnp.pad(x, ((0, 0), (0, extra), (0, 0)))
        return attention_half(x, *weights, num_heads=2, dropout=dropout, tokens=tokens, launch=where)[:, :tokens]

    oracle.check(ours, partial(reference_half, num_heads=2, dropout=dropout), arguments(2, tokens, 128, 2, 64, dtype), names=NAMES)


TOKENS = st.sampled_from([1, 2, 7, 8, 13, 16, 17, 31])
HEADS = st.sampled_from([(1, 32), (3, 32), (4, 32), (1, 64), (2, 64), (3, 64), (1, 80), (3, 80), (8, 80), (1, 128), (2, 128)])
DTYPES = st.sampled_from([jnp.float32, jnp.bfloat16])


@examples(3)
@given(b=st.integers(1, 3), t=TOKENS, heads=HEADS, dtype=DTYPES, device=st.sampled_from(["v3", "v5e"]), seed=st.integers(0, 99))
def test_core_agrees(b, t, heads, dtype, device, seed):
    n, h = heads
    ours = partial(tpu.attention, num_heads=n, launch=launch(device))
    oracle.check(ours, partial(plain_core, num_heads=n), [packed(b, t, n, h, dtype, seed, sharpness=2.0)], seed=seed)


@pytest.mark.parametrize(
    ("t", "n", "h", "queries", "keys", "streamed"),
    [
        (33, 3, 32, 16, 33, False),
        (37, 2, 64, 16, 16, False),
        (48, 1, 128, 48, 16, False),
        (17, 1, 80, 16, 16, False),
        (37, 2, 64, 16, 16, True),
    ],
    ids=["queries in tiles", "online", "keys in chunks", "one row left over", "queries in the grid"],
)
def test_core_agrees_in_tiles(t, n, h, queries, keys, streamed):
    """Tiles of queries and the online softmax, with a shorter last tile of both."""
    few = tiling.CoreTiles(images=1, lanes=n * h, queries=queries, keys=keys)
    chosen = CorePlan(forward=few, backward=replace(few, streamed=streamed))
    ours = partial(tpu.attention, num_heads=n, launch=launch(), plan=chosen)
    oracle.check(ours, partial(plain_core, num_heads=n), [packed(1, t, n, h, jnp.float32, sharpness=3.0)])


@pytest.mark.parametrize(("n", "h"), [(4, 64), (8, 80)], ids=["two heads a column", "heads across columns"])
def test_heads_in_turns_are_the_heads_one_by_one(n, h):
    """Only the order of the code differs: the same bits, and the heads' own, of which several share a column."""
    qkv, device = packed(2, 17, n, h, jnp.bfloat16), DEVICES["v6e"]
    chosen: Any = core_plan(tiling.Shape(2, 17, n * h, n, h, qkv.dtype), device)

    def passes(lags, turns=1):
        order = {"lags": lags, "turns": turns}
        cut = CorePlan(forward=replace(chosen.forward, **order), backward=replace(chosen.backward, **order))
        run = partial(tpu.attention, num_heads=n, launch=Launch(device=device, interpret=True), plan=cut)
        o, pullback = jax.vjp(run, qkv)
        return o, *pullback(o)

    one_by_one = passes(())
    assert chosen.backward.lags
    assert chosen.backward.images == 2
    for order in ((chosen.backward.lags, 1), ((1, 1), 1), (chosen.backward.lags, 2)):
        for ours, theirs in zip(passes(*order), one_by_one, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("device", "images", "tokens", "turns"),
    [("v6e", 32, 200, 2), ("v5e", 32, 200, 2), ("v6e", 33, 200, 1), ("v5p", 32, 200, 1), ("v3", 32, 200, 1), ("v6e", 32, 56, 1)],
)
def test_two_images_whose_heads_take_turns_where_there_is_room(device, images, tokens, turns):
    chosen: Any = core_plan(tiling.Shape(images, tokens, 768, 12, 64, jnp.dtype(jnp.bfloat16)), DEVICES[device])
    for t in (chosen.forward, chosen.backward):
        assert getattr(t, "turns", 1) == turns
        assert getattr(t, "images", 1) % turns == 0


def test_core_agrees_in_groups_of_heads():
    """Several grid steps over the heads and several images a step."""
    few = tiling.CoreTiles(images=2, lanes=128, queries=9, keys=9)
    ours = partial(tpu.attention, num_heads=4, launch=launch("v5e"), plan=CorePlan(forward=few, backward=few))
    oracle.check(ours, partial(plain_core, num_heads=4), [packed(4, 9, 4, 64, jnp.bfloat16)])


@pytest.mark.parametrize("device", ["v3", "v5e"])
@examples(1)
@given(b=st.integers(1, 3), t=TOKENS, heads=HEADS, dtype=DTYPES, rate=st.sampled_from([0.0, 0.25]), seed=st.integers(0, 99))
def test_half_agrees(device, b, t, heads, dtype, rate, seed):
    dropout = Dropout(rate, jnp.int32(seed), jnp.int32(1000)) if rate else None
    n, h = heads
    check_half(b, t, 128, n, h, dtype, where=launch(device), dropout=dropout, residual_scale=0.5 if seed % 2 else 1.0, seed=seed)


@pytest.mark.parametrize("device", ["v3", pytest.param("v5e", marks=pytest.mark.slow)])
def test_the_eps_of_the_norm_reaches_every_kernel(device):
    check_half(1, 17, 128, 2, 64, jnp.float32 if device == "v5e" else jnp.bfloat16, where=launch(device), eps=3.0)


@pytest.mark.parametrize(("t", "n", "h"), [(37, 3, 64), (129, 1, 80)], ids=["odd heads", "two columns of keys"])
def test_half_agrees_in_one_kernel(t, n, h):
    """On v3 the forward half is one kernel, whose rows are in another order inside; dropout knows them all the same."""
    check_half(
        2, t, 128, n, h, jnp.bfloat16, where=launch("v3"), dropout=Dropout(0.3, jnp.int32(3), jnp.int32(9)), residual_scale=0.25
    )


def planned_weights(d: int, n: int, h: int) -> reference.AttentionWeights:
    """Shapes of float32 weights of n heads of h lanes."""
    of: Any = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    k = n * h
    return reference.AttentionWeights(of((d,)), of((d,)), of((3, d, k)), of((3, k)), of((k, d)), of((d,)))


def chain(s: tiling.Shape, **rows: int) -> Plan:
    """The plan of v3 where the fused kernel finds no room."""
    with mock.patch.object(planning, "fused_bytes", return_value=None):
        return plan.__wrapped__(s, DEVICES["v3"], **rows)


@pytest.mark.parametrize(
    ("b", "t", "n", "h", "dtype", "options"),
    [
        (2, 37, 3, 64, jnp.bfloat16, {}),
        pytest.param(2, 129, 1, 80, jnp.float32, {}, marks=pytest.mark.slow),
        pytest.param(6, 11, 2, 64, jnp.bfloat16, {"forward_rows": 64}, marks=pytest.mark.slow),
        pytest.param(2, 24, 2, 64, jnp.bfloat16, {"keep": True}, marks=pytest.mark.slow),
        pytest.param(2, 37, 3, 64, jnp.bfloat16, {"keep": True}, marks=[pytest.mark.slow, pytest.mark.ci]),
    ],
    ids=["odd heads", "two columns of keys", "in parts", "whole registers are kept", "rows are kept"],
)
def test_half_agrees_in_a_chain_of_float32_rows(b, t, n, h, dtype, options):
    chosen: Any = chain(shape(b, t, 128, n, h, dtype), **options)
    assert isinstance(chosen.forward, Float32Forward)
    assert chosen.forward.images == (3 if "forward_rows" in options else b)  # 34 rows at a time, 11 an image
    check_half(b, t, 128, n, h, dtype, where=launch("v3"), dropout=Dropout(0.3, jnp.int32(2), jnp.int32(5)), plan=chosen)


@pytest.mark.slow
@pytest.mark.ci
def test_half_agrees_where_the_backward_pass_alone_pads_its_heads():
    """Eight heads of 80 lanes in five columns forward, each in a column of its own backward; the batch in parts."""
    chosen: Any = plan(shape(2, 9, 128, 8, 128, jnp.bfloat16), DEVICES["v3"])
    chosen = replace(chosen, head_lanes=128, narrow=chain(shape(2, 9, 128, 8, 80, jnp.bfloat16)).forward)
    dropout = Dropout(0.3, jnp.int32(2), jnp.int32(5))
    check_half(2, 9, 128, 8, 80, jnp.bfloat16, where=launch("v3"), dropout=dropout, plan=chosen)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keep", "lags", "dtype"),
    [(False, (0, 0), jnp.bfloat16), pytest.param(True, (1, 2), jnp.float32, marks=pytest.mark.ci)],
)
def test_half_agrees_where_the_core_s_results_lie_over_what_they_are_made_of(keep, lags, dtype):
    """Eight heads of 80 lanes in five columns, two groups of them and two images: four steps take three slots in turns. And the
    gradient of z in three products, one onto the other."""
    chosen: Any = chain(shape(2, 21, 64, 16, 80, dtype), keep=keep)
    core = tiling.Float32Core(lanes=640, lags=lags, shared=True)
    summed = replace(chosen.backward.input_gradient, apart=True)
    chosen = replace(chosen, head_lanes=80, narrow=None, backward=replace(chosen.backward, core=core, input_gradient=summed))
    dropout = Dropout(0.3, jnp.int32(2), jnp.int32(5))
    check_half(2, 21, 64, 16, 80, dtype, where=launch("v3"), dropout=dropout, plan=chosen)


@pytest.mark.parametrize("keep", [False, True])
def test_heads_of_80_are_not_padded(keep):
    """ViT-H/14 on v3: eight of them share five columns in every pass, in slots of their own backward."""
    chosen: Any = plan(shape(32, 257, 1280, 16, 80, jnp.bfloat16), DEVICES["v3"], keep=keep)
    assert (chosen.head_lanes, chosen.narrow, chosen.backward.core.lanes, chosen.backward.core.shared) == (80, None, 640, True)


def test_128_images_of_the_largest_model_are_one_part_forward():
    """Of parts the count takes the input to be fetched for every column tile of the projections."""
    chosen: Any = plan(shape(128, 264, 1280, 16, 80, jnp.bfloat16), DEVICES["v3"])
    assert chosen.forward.images == 128


def test_a_large_batch_is_cut_into_parts_once():
    """Heads whose passes have a plan each: 192 images are three parts forward, eight backward, and nothing is cut before that."""
    x, weights, options = jax.ShapeDtypeStruct((192, 401, 768), jnp.bfloat16), planned_weights(768, 8, 96), {"num_heads": 8}
    chosen: Any = plan(shape(192, 401, 768, 8, 96, jnp.bfloat16), DEVICES["v3"])
    assert 1 < 192 // chosen.narrow.images < 192
    half = partial(tpu.attention_half, launch=Launch(device=DEVICES["v3"]), **options)
    gradient = jax.eval_shape(lambda x, w: jax.grad(lambda x: half(x, w).astype(jnp.float32).sum())(x), x, weights)
    assert gradient.shape == x.shape


def test_a_chain_in_columns_drops_the_same_elements():
    """Several column tiles of the output product, which count their columns for the masks."""
    chosen: Any = chain(shape(2, 21, 256, 2, 64, jnp.bfloat16))
    narrow = replace(chosen.forward, output=replace(chosen.forward.output, columns=128, images=1))
    narrow = replace(narrow, project=replace(narrow.project, columns=128, images=1))
    dropout = Dropout(0.3, jnp.int32(2), jnp.int32(5))
    check_half(2, 21, 256, 2, 64, jnp.bfloat16, where=launch("v3"), dropout=dropout, plan=replace(chosen, forward=narrow))


@pytest.mark.slow
@pytest.mark.parametrize("device", ["v3", "v5e"])
@examples(8)
@given(b=st.integers(1, 4), t=TOKENS, heads=HEADS, dtype=DTYPES, rate=st.sampled_from([0.0, 0.25]), seed=st.integers(0, 99))
def test_half_agrees_often(device, b, t, heads, dtype, rate, seed):
    dropout = Dropout(rate, jnp.int32(seed), jnp.int32(1000)) if rate else None
    n, h = heads
    check_half(b, t, 128, n, h, dtype, where=launch(device), dropout=dropout, residual_scale=0.5 if seed % 2 else 1.0, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("b", "t", "d", "n", "h"), [pytest.param(2, 197, 192, 3, 64, marks=pytest.mark.ci), (1, 257, 160, 2, 80), (1, 1025, 64, 1, 64)]
)
def test_half_agrees_at_the_sizes_of_models(b, t, d, n, h):
    check_half(b, t, d, n, h, jnp.bfloat16, where=launch("v3"), dropout=Dropout(0.1, jnp.int32(1)))


def test_half_agrees_in_tiles():
    """Rows in tiles with a shorter last one, and the weights streamed section by section, column by column; with dropout."""
    few = tiling.ProductTiles(images=1, rows=16, columns=128, sections=1)
    core = tiling.CoreTiles(images=2, lanes=256, queries=21, keys=21)
    forward = GeneralForward(images=2, project=few, core=core, output=few)
    steps = ("project", "output_gradient", "output_weights", "projection_weights", "input_gradient")
    backward = GeneralBackward(images=2, core=core, **dict.fromkeys(steps, few))
    chosen = Plan(head_lanes=64, forward=forward, backward=backward)
    check_half(2, 21, 256, 4, 64, jnp.bfloat16, dropout=Dropout(0.4, jnp.int32(5), jnp.int32(77)), plan=chosen)


def test_half_agrees_where_heads_take_whole_columns():
    """Heads of width 80 that are padded to 128 lanes, as on the cores with 16 MiB: the weights are padded, the scale is not."""
    chosen = replace(plan(shape(1, 9, 128, 2, 128, jnp.float32), DEVICES["v5e"]), head_lanes=128)
    check_half(1, 9, 128, 2, 80, jnp.float32, where=launch("v5e"), plan=chosen)


@pytest.mark.parametrize("device", ["v5e", pytest.param("v3", marks=pytest.mark.slow)])
def test_half_agrees_in_parts_of_the_batch(device):
    """A batch taken in parts, which lie in the whole arrays; dropout knows its rows all the same. On v3, float32 rows."""
    rows = {"forward_rows": 32, "backward_rows": 64 if device == "v3" else 32}
    chosen: Any = plan(shape(6, 11, 128, 2, 64, jnp.float32), DEVICES[device], **rows)
    assert not isinstance(chosen.backward, Refused)
    assert chosen.backward.images < 6
    assert isinstance(chosen.forward, FusedForward) or chosen.forward.images < 6
    where, dropout = launch(device), Dropout(0.3, jnp.int32(2), jnp.int32(5))
    check_half(6, 11, 128, 2, 64, jnp.float32, where=where, dropout=dropout, plan=chosen)


@pytest.mark.parametrize(
    ("device", "t", "n", "h", "dtype"),
    [
        ("v3", 37, 2, 64, jnp.bfloat16),
        pytest.param("v5e", 17, 3, 32, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("v3", 8, 4, 32, jnp.float32, marks=pytest.mark.slow),
    ],
    ids=["fused", "general", "fused, whole registers"],
)
def test_half_agrees_with_what_is_kept(device, t, n, h, dtype):
    """q, k, v and o leave the fused kernel while it goes on in the same memory: the simulation would see a race. Three images."""
    dropout = Dropout(0.3, jnp.int32(3), jnp.int32(9))
    check_half(3, t, 128, n, h, dtype, where=launch(device), dropout=dropout, residual_scale=0.25, keep=True)


def test_half_agrees_with_projections_kept_between_kernels_of_different_forms():
    """As of ViT-L/16 on v3, whose weights do not fit the fused kernel."""
    s = shape(2, 37, 128, 2, 64, jnp.bfloat16)
    general, float32 = (plan(s, DEVICES[name], keep=True) for name in ("v5e", "v3"))
    mixed = replace(float32, forward=general.forward)
    assert not mixed.keeps_o
    check_half(*s, where=launch("v3"), dropout=Dropout(0.3, jnp.int32(3), jnp.int32(9)), residual_scale=0.25, plan=mixed)


@pytest.mark.parametrize(("device", "kept"), [("v3", 4 * 2 * 24 * 128), ("v5e", 4 * 2 * 17 * 128)])
def test_what_is_kept_is_not_made_again(device, kept):
    """And is all that is saved beside the arguments and the three scalars; float32 on v3, of images of 24 rows."""
    args = arguments(2, 17, 128, 2, 64, jnp.bfloat16)
    run = partial(attention_half, num_heads=2, launch=launch(device), keep=True)
    pullback = jax.eval_shape(lambda *a: jax.vjp(run, *a)[1], *args)
    assert sum(a.size for a in jax.tree.leaves(pullback)) == sum(a.size for a in args) + 3 + kept
    names = oracle.kernels_in(lambda *a: jax.vjp(run, *a)[1](a[0]), *args)
    backward = names[1 if device == "v3" else 3 :]
    assert "attention_project" not in backward
    assert backward.count("attention_core_backward") == 1
    assert tpu.kept_bytes(2, 17, 128, 2, 64, jnp.bfloat16, launch=launch(device)) >= kept * (4 if device == "v3" else 2)


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(NotImplementedError, match="as wide as x; 64 is not 128"):
        plan(shape(1, 17, 128, 1, 64, jnp.float32), DEVICES["v3"], keep=True)
    assert tpu.kept_bytes(1, 17, 128, 1, 64, jnp.float32, launch=launch("v3")) is None
    assert tpu.kept_bytes(1, 197, 1024, 16, 64, jnp.bfloat16, launch=launch("v3")) == 4 * 200 * 1024 * 4  # a chain of float32 rows


def test_kernels_ran():
    x, *weights = arguments(2, 5, 128, 3, 64, jnp.bfloat16)
    half = partial(attention_half, num_heads=3, launch=launch())
    assert oracle.kernels_in(half, x, *weights) == [f"attention_{name}" for name in KERNELS]

    def loss(x, *weights):
        return half(x, *weights).astype(jnp.float32).sum()

    names = oracle.kernels_in(jax.grad(loss, argnums=range(7)), x, *weights)
    assert names == [f"attention_{name}" for name in (*KERNELS, *GRADIENTS)]


def test_kernels_of_v3_ran():
    """There the forward half is one kernel where the weights fit VMEM, and three where they do not; backward has float32 rows."""
    where = launch("v3")
    backward = ("prepare_backward", *["project"] * 3, "output_gradient", "core_backward", "output_weights")
    backward = (*backward, *["projection_weights"] * 3, "input_gradient", "finish_backward")
    for d, n, forward in ((128, 3, ["forward"]), (1024, 16, KERNELS)):
        x, *weights = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments(2, 5, d, n, 64, jnp.bfloat16))
        half = partial(attention_half, num_heads=n, launch=where)
        both = lambda *a, half=half: jax.vjp(half, *a)[1](a[0])  # noqa: E731
        assert oracle.kernels_in(both, x, *weights) == [f"attention_{name}" for name in (*forward, *backward)]


def test_residuals_are_the_inputs():
    """What waits for the backward pass is the block's input and the weights: no projections, no probabilities."""
    x, *weights = arguments(2, 16, 128, 2, 64, jnp.bfloat16)
    half = partial(attention_half, num_heads=2, launch=launch())
    saved = jax.eval_shape(lambda *a: jax.vjp(half, *a)[1], x, *weights)
    tokens = [a for a in jax.tree.leaves(saved) if a.shape[:2] == x.shape[:2] or a.size > 3 * 128 * 128]
    assert [a.shape for a in tokens] == [x.shape]


def test_permuted_tokens_give_permuted_outputs():
    x, *weights = arguments(1, 13, 128, 2, 64, jnp.float32)
    order = np.random.default_rng(1).permutation(13)
    half = jax.jit(partial(attention_half, num_heads=2, launch=launch()))
    np.testing.assert_allclose(half(x, *weights)[:, order], half(x[:, order], *weights), atol=1e-5)


def test_shifted_logits_change_nothing():
    """A constant added to all keys shifts every logit of a query; so the keys' bias has no gradient either."""
    qkv = packed(2, 17, 2, 64, jnp.float32)
    attend = jax.jit(partial(tpu.attention, num_heads=2, launch=launch()))
    np.testing.assert_allclose(attend(qkv), attend(qkv.at[1].add(3.0)), atol=1e-5)
    gradient = jax.jit(jax.grad(lambda qkv: jnp.square(attend(qkv)).sum()))(qkv)
    np.testing.assert_allclose(gradient[1].sum(axis=1), 0.0, atol=2e-5)
    assert np.abs(gradient).max() > 0.1


def test_images_do_not_mix():
    """The gradient of one image's output is zero at every other image."""
    qkv = packed(3, 9, 1, 64, jnp.float32)
    gradient = jax.jit(jax.grad(lambda qkv: tpu.attention(qkv, 1, launch=launch())[1].sum()))(qkv)
    assert np.abs(gradient[:, 1]).max() > 0
    assert not gradient[:, [0, 2]].any()


def test_huge_logits_stay_finite():
    qkv = packed(1, 9, 1, 64, jnp.float32, sharpness=1e3)
    value, pullback = jax.vjp(partial(tpu.attention, num_heads=1, launch=launch()), qkv)
    assert np.isfinite(value).all()
    assert np.isfinite(pullback(value)[0]).all()


def test_under_scan_and_remat():
    """Two layers by scan, each rematerialised, give what two calls give. (The simulator has effects, which remat refuses.)"""
    x, *weights = arguments(1, 7, 128, 1, 64, jnp.float32)
    layers = [jnp.stack([w, w * 0.9]) for w in weights]
    half = partial(attention_half, num_heads=1, launch=Launch(device=DEVICES["cpu"], interpret=True))

    def scanned(x, layers):
        return jnp.square(jax.lax.scan(lambda x, w: (jax.checkpoint(half)(x, *w), None), x, layers)[0]).sum()

    def plain(x, layers):
        for i in range(2):
            x = reference_half(x, *(w[i] for w in layers), num_heads=1)
        return jnp.square(x).sum()

    oracle.assert_kernel_ran(jax.grad(scanned), x, layers, name="attention_core_backward")
    found, expected = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, layers) for f in (scanned, plain))
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(f, e, atol=2e-5 * np.abs(e).max())


def test_under_shard_map():
    """Images over "data", heads over "model", dropout on: the sum over "model" and all gradients are those of one device."""
    b, t, d, n, h = 2, 6, 128, 2, 64
    x, scale, bias, w_qkv, b_qkv, w_out, b_out = arguments(b, t, d, n, h, jnp.float32)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    heads = (P("data"), P(), P(), P(None, None, "model"), P(None, "model"), P("model"), P())
    where = launch()

    def local(x, *weights):
        dropout = Dropout(0.3, jnp.int32(3), jax.lax.axis_index("data") * (b // 2) * t)
        y = attention_half(x, *weights, num_heads=n // 2, dropout=dropout, residual_scale=0.5, launch=where)
        return jax.lax.psum(y, "model")

    def loss(*args):
        y = jax.shard_map(local, mesh=mesh, in_specs=heads, out_specs=P("data"), check_vma=True)(*args)
        return jnp.square(y).sum(), y

    def plain(*args):
        y = reference_half(*args, num_heads=n, dropout=Dropout(0.3, jnp.int32(3)))
        return jnp.square(y).sum(), y

    args = x, scale, bias, w_qkv, b_qkv, w_out, b_out
    found, expected = (jax.jit(jax.grad(f, argnums=range(7), has_aux=True))(*args) for f in (loss, plain))
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(f, e, atol=2e-5 * np.abs(e).max())


def test_rejects():
    x, *weights = arguments(1, 3, 8, 2, 4, jnp.float32)
    where = launch()
    with pytest.raises(ValueError, match=r"x is float16\[1, 3, 8\]; required float32 or bfloat16 \[B, T, D\]"):
        attention_half(x.astype(jnp.float16), *weights, num_heads=2, launch=where)
    with pytest.raises(ValueError, match="out_kernel has 8 rows; required N\\*H for num_heads = 3"):
        attention_half(x, *weights, num_heads=3, launch=where)
    weights[3] = weights[3][0]
    with pytest.raises(ValueError, match=r"qkv_bias has shape \(8,\); required \(3, 8\)"):
        attention_half(x, *weights, num_heads=2, launch=where)
    with pytest.raises(ValueError, match=r"required \[3, B, T, N\*H\]"):
        tpu.attention(jnp.zeros((2, 1, 3, 8)), 2, launch=where)
    with pytest.raises(NotImplementedError, match=r"attention over 200000 tokens: .* 16 MiB of VMEM of a v3"):
        core_plan(shape(1, 200_000, 768, 12, 64, jnp.bfloat16), DEVICES["v3"])
    with pytest.raises(NotImplementedError, match="project: 128 tokens of width 65536"):
        plan(shape(1, 197, 65536, 1024, 64, jnp.bfloat16), DEVICES["v3"])
