"""Schedules and optimizers against a float64 NumPy implementation written from the equations."""

import math
import types
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from train import pretrain, tuning
from train.optim import adamw, optimizer, schedule, sgd
from train.step import StepOptions, make_init, make_train_step
from vitcore.families import variant

BASE, TOTAL, WARMUP = 3e-3, 40, 8


def shapes():
    return {
        "patch_embed": {"kernel": (4, 6), "bias": (6,), "position": (5, 6), "cls": (6,)},
        "blocks": {"norm1": {"scale": (2, 6), "bias": (2, 6)}, "qkv": {"kernel": (2, 6, 8), "bias": (2, 8)}},
        "head": {"kernel": (8, 3), "bias": (3,)},
    }


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32), shapes(), is_leaf=lambda x: isinstance(x, tuple)
    )


def expected_rate(t, decay):
    progress = min(1.0, max(0.0, (t - WARMUP) / (TOTAL - WARMUP)))
    lr = 1e-5 + (BASE - 1e-5) * (1 - progress) if decay == "linear" else BASE * (1 + math.cos(math.pi * progress)) / 2
    return lr * min(1.0, t / WARMUP)


def expected_adam(params, gradients, *, decay, weight_decay, form, first_moment=None):
    """The parameters after all gradients, in float64, leaf by leaf; first_moment rounds m between steps."""
    result = {}
    for path, w in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        w = np.asarray(w, np.float64)
        m, v = np.zeros_like(w), np.zeros_like(w)
        for t, grads in enumerate(gradients):
            g = np.asarray(
                dict((jax.tree_util.keystr(p), x) for p, x in jax.tree_util.tree_leaves_with_path(grads))[name], np.float64
            )
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            u = (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
            lr = expected_rate(t, decay)
            shrink = 0.0
            if name.endswith("['kernel']"):
                shrink = lr * weight_decay if form == "adamw" else lr / BASE * weight_decay
            w = w - lr * u - shrink * w
            m = m if first_moment is None else m.astype(first_moment).astype(np.float64)
        result[name] = w
    return result


def trained(tx, params: Any, gradients) -> tuple[Any, Any]:
    step = jax.jit(tx.update)
    state = tx.init(params)
    for grads in gradients:
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize(("form", "weight_decay"), [("adamw", 0.3), ("independent", 0.01), ("adamw", 0.0)])
def test_adam_is_its_equations(decay: Any, form: Any, weight_decay):
    params, gradients = tree(0), [tree(1 + i, 0.1) for i in range(TOTAL)]
    rate = schedule(base_lr=BASE, total_steps=TOTAL, warmup_steps=WARMUP, decay=decay)
    tx = optimizer(rate, base_lr=BASE, weight_decay=weight_decay, weight_decay_form=form)
    found, _ = trained(tx, params, gradients)
    expected = expected_adam(params, gradients, decay=decay, weight_decay=weight_decay, form=form)
    for path, w in jax.tree_util.tree_leaves_with_path(found):
        np.testing.assert_allclose(
            w, expected[jax.tree_util.keystr(path)], rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path)
        )


def test_weight_decay_moves_kernels_and_nothing_else():
    params, gradients = tree(0), [tree(1), tree(2)]
    rate = schedule(base_lr=BASE, total_steps=10, decay="cosine")
    plain, _ = trained(optimizer(rate, base_lr=BASE), params, gradients)
    forms: Any = (("adamw", 0.3), ("independent", 1e-3))
    for form, weight_decay in forms:
        decayed, _ = trained(optimizer(rate, base_lr=BASE, weight_decay=weight_decay, weight_decay_form=form), params, gradients)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(decayed), strict=True):
            assert np.array_equal(a, b) == (path[-1].key != "kernel"), jax.tree_util.keystr(path)


def test_the_two_forms_of_decay_are_one_at_the_same_product():
    params, gradients = tree(0), [tree(1 + i) for i in range(5)]
    rate = schedule(base_lr=BASE, total_steps=10, decay="linear")
    a, _ = trained(optimizer(rate, base_lr=BASE, weight_decay=0.1), params, gradients)
    b, _ = trained(optimizer(rate, base_lr=BASE, weight_decay=0.1 * BASE, weight_decay_form="independent"), params, gradients)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), a, b)


def test_a_bfloat16_first_moment_is_kept_so_and_costs_only_its_rounding():
    params, gradients = tree(0), [tree(1 + i, 0.1) for i in range(TOTAL)]
    rate = schedule(base_lr=BASE, total_steps=TOTAL, warmup_steps=WARMUP, decay="cosine")
    found, state = trained(optimizer(rate, base_lr=BASE, first_moment="bfloat16"), params, gradients)
    assert {leaf.dtype for leaf in jax.tree.leaves(state[0].mu)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state[0].nu)} == {jnp.dtype("float32")}
    same = expected_adam(params, gradients, decay="cosine", weight_decay=0.0, form="adamw", first_moment=jnp.bfloat16)
    other = expected_adam(params, gradients, decay="cosine", weight_decay=0.0, form="adamw")
    for path, w in jax.tree_util.tree_leaves_with_path(found):
        name = jax.tree_util.keystr(path)
        rounding = np.abs(same[name] - other[name]).max()
        assert rounding > 1e-5
        # A product that lands on the edge between two bfloat16 values may round either way in float32 and in float64.
        assert np.abs(w - same[name]).max() < 0.5 * rounding


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_schedule_is_its_equation_at_every_step(decay):
    rate = jax.jit(schedule(base_lr=BASE, total_steps=TOTAL, warmup_steps=WARMUP, decay=decay))
    found = [float(rate(jnp.int32(t))) for t in range(TOTAL + 5)]
    np.testing.assert_allclose(found, [expected_rate(t, decay) for t in range(TOTAL + 5)], rtol=1e-5, atol=1e-9)
    assert found[0] == 0.0
    assert found[WARMUP] == pytest.approx(BASE)
    assert found[TOTAL] == found[TOTAL + 4] == pytest.approx(1e-5 if decay == "linear" else 0.0, abs=1e-9)


def test_schedule_counts_single_steps_of_a_very_long_run():
    rate = schedule(base_lr=1.0, total_steps=2**25, warmup_steps=2**25 - 8, decay="linear", linear_end=0.0)
    found = [float(jax.jit(rate)(jnp.int32(2**25 - 8 + i))) for i in range(9)]
    np.testing.assert_allclose(found, 1 - np.arange(9) / 8, atol=1e-6)


def test_schedule_without_warm_up_starts_at_its_peak():
    assert float(schedule(base_lr=0.1, total_steps=5, decay="cosine")(0)) == pytest.approx(0.1)


def test_the_state_mirrors_the_parameters():
    params = tree(0)
    tx = optimizer(schedule(base_lr=BASE, total_steps=9), base_lr=BASE, weight_decay=0.1, first_moment="bfloat16")
    specs = jax.tree.map(lambda w: P(*("data",) * w.ndim), params)
    state = jax.eval_shape(tx.init, params)
    marked: Any = optax.tree_utils.tree_map_params(tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P())
    assert marked[0].mu == marked[0].nu == specs
    assert marked[0].count == P()
    assert jax.tree.structure(marked, is_leaf=lambda x: isinstance(x, P)) == jax.tree.structure(state)


def test_shards_are_updated_as_the_whole_is():
    params = {"a": {"kernel": jnp.arange(32.0).reshape(8, 4) / 7, "bias": jnp.arange(8.0)}}
    gradients = jax.tree.map(jnp.sin, params)
    tx = optimizer(schedule(base_lr=BASE, total_steps=9), base_lr=BASE, weight_decay=0.1)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def two_steps(params, grads):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    split = jax.jit(jax.shard_map(two_steps, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(params, gradients)
    whole = jax.jit(two_steps)(params, gradients)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), split, whole)
    assert not np.allclose(whole["a"]["kernel"], params["a"]["kernel"], rtol=1e-6)


def test_sgd_is_its_equations():
    params, gradients = tree(0), [tree(1 + i) for i in range(6)]
    found, _ = trained(sgd(schedule(base_lr=0.1, total_steps=8)), params, gradients)
    for i, w in enumerate(jax.tree.leaves(params)):
        w, m = np.asarray(w, np.float64), 0.0
        for t, grads in enumerate(gradients):
            m = 0.9 * m + np.asarray(jax.tree.leaves(grads)[i], np.float64)
            w = w - 0.1 * (1 + math.cos(math.pi * t / 8)) / 2 * m
        np.testing.assert_allclose(jax.tree.leaves(found)[i], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "change", "words"),
    [
        (schedule, {"warmup_steps": 10}, "warmup_steps=10 of total_steps=10"),
        (schedule, {"warmup_steps": -1}, "warmup_steps=-1"),
        (schedule, {"decay": "step"}, "decay='step'"),
        (optimizer, {"weight_decay_form": "l2"}, "weight_decay_form='l2'"),
        (optimizer, {"first_moment": "float16"}, "first_moment='float16'"),
        (optimizer, {"weight_decay": -0.1}, "weight_decay=-0.1"),
        (optimizer, {"base_lr": 0.0}, "base_lr=0.0"),
    ],
)
def test_what_makes_no_optimizer_is_refused(function, change, words):
    arguments = {"total_steps": 10} if function is schedule else {"learning_rate": optax.constant_schedule(1.0)}
    with pytest.raises(ValueError, match=r"must|required") as error:
        function(**{"base_lr": 1.0, **arguments, **change})
    assert words in str(error.value)


def test_decay_without_parameters_is_refused():
    tx = optimizer(optax.constant_schedule(1.0), base_lr=1.0, weight_decay=0.1)
    with pytest.raises(ValueError, match="params=None"):
        tx.update(tree(0), tx.init(tree(0)))


# --- 20 steps of the jobs' own optimizers in the train step ------------------------------------------------------------------

STEPS, WARM, PEAK, ADAMW_PEAK, DEPTH = 20, 5, 0.03, 2e-3, 2


def pretraining(recipe, **options):
    """Resolved options of a job, its optimizer and its step's options."""
    full: Any = pretrain.resolve(
        pretrain.Pretrain(recipe=recipe, model="ViT-B/16", data="folder:x", steps=STEPS, warmup_steps=WARM, dropout=0.0, **options),
        examples=10**6,
    )
    step = StepOptions(loss=full.loss, clip_norm=full.clip_norm or None, label_smoothing=full.label_smoothing)
    return full, pretrain._optimizer(full, None)[1], step


def fine_tuning(recipe, rate=ADAMW_PEAK, **more):
    """As `pretraining`, of train.finetune."""
    options = tuning.Finetune(
        init="x.npz", data="folder:x", recipe=recipe, steps=STEPS, warmup_steps=WARM, learning_rate=rate, **more
    )
    full: Any = tuning.resolve(options)
    tx = tuning.make_optimizer(full, types.SimpleNamespace(depth=DEPTH))[1]
    return full, tx, StepOptions(clip_norm=full.clip_norm or None, label_smoothing=full.label_smoothing)


def rate_of(t, peak, decay):
    p = max(0.0, (t - WARM) / (STEPS - WARM))
    lr = 1e-5 + (peak - 1e-5) * (1 - p) if decay == "linear" else peak * (1 + math.cos(math.pi * p)) / 2
    return lr * min(1.0, t / WARM)


def adam64(peak, decay, weight_decay, factor=1.0):
    """(name, parameter, its gradients) -> the parameter after them, in float64, by Adam with AdamW's decay of the kernels."""

    def run(name, w, gradients):
        m = v = np.zeros_like(w)
        for t, g in enumerate(gradients):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            u = (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
            w = w - factor * rate_of(t, peak, decay) * (u + (weight_decay * w if name.endswith("['kernel']") else 0))
        return w

    return run


def layers64(share, weight_decay):
    """As `adam64`, with a rate that falls from the head down; blocks are stacked."""

    def run(name, w, gradients):
        if name.startswith("['blocks']"):
            parts = (
                adam64(ADAMW_PEAK, "cosine", weight_decay, share ** (DEPTH - i))(name, w[i], [g[i] for g in gradients])
                for i in range(DEPTH)
            )
            return np.stack(list(parts))
        factor = share ** (DEPTH + 1) if name.startswith("['patch_embed']") else 1.0
        return adam64(ADAMW_PEAK, "cosine", weight_decay, factor)(name, w, gradients)

    return run


def momentum64(name, w, gradients):
    m = np.zeros_like(w)
    for t, g in enumerate(gradients):
        m = 0.9 * m + g
        w = w - rate_of(t, PEAK, "cosine") * m
    return w


@pytest.mark.parametrize(
    ("job", "expected", "clip"),
    [
        (partial(pretraining, "imagenet"), adam64(3e-3, "cosine", 0.3), 1.0),
        pytest.param(  # jft has the loss
            partial(pretraining, "imagenet", loss="sigmoid"), adam64(3e-3, "cosine", 0.3), 1.0, marks=pytest.mark.slow
        ),
        (partial(pretraining, "jft"), adam64(8e-4, "linear", 0.1), None),
        pytest.param(partial(pretraining, "imagenet21k"), adam64(1e-3, "linear", 0.03), None, marks=pytest.mark.slow),  # as jft
        (partial(fine_tuning, "cifar10", PEAK), momentum64, 1.0),
        pytest.param(partial(fine_tuning, "mae-b"), layers64(0.65, 0.05), None, marks=pytest.mark.slow),  # as adamw
        (partial(fine_tuning, "pets", optimizer="adamw", layer_decay=0.5), layers64(0.5, 0.0), 1.0),
    ],
    ids=["imagenet", "imagenet, sigmoid", "jft", "imagenet21k", "fine-tuning", "mae", "adamw"],
)
def test_twenty_steps_of_a_job_are_those_of_a_float64_optimizer(job, expected, clip):
    """The step's parameters against a float64 optimizer that gets the step's own gradients: within 1e-6 after 20 updates."""
    full, tx, options = job()
    config = variant("ViT-Nano/4", image_size=8, num_classes=5, channels=1, head_bias=full.head_bias, depth=DEPTH)
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    seen = optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, updates))
    watched = optax.chain(seen, tx)
    state = make_init(config, mesh, watched, options)(jax.random.key(0))
    step = make_train_step(config, mesh, watched, options)
    start, gradients = jax.tree.map(np.asarray, state.params), []
    for t in range(STEPS):
        images = jax.random.uniform(jax.random.key(t), (8, 8, 8, 1), minval=-1, maxval=1)
        state, metrics = step(state, images, jnp.arange(8) % 5)
        gradients.append(jax.tree.map(lambda g: np.asarray(g, np.float64), state.opt_state[0]))
        norm = math.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients[-1])))
        whole = float(metrics["gradient_norm"])
        assert norm == pytest.approx(whole if clip is None else min(clip, whole), rel=1e-5)
    worst = 0.0
    for path, w in jax.tree_util.tree_leaves_with_path(start):
        name = jax.tree_util.keystr(path)
        series = [dict(jax.tree_util.tree_leaves_with_path(g))[path] for g in gradients]
        found = dict(jax.tree_util.tree_leaves_with_path(state.params))[path]
        wanted = expected(name, np.asarray(w, np.float64), series)
        off = abs(np.asarray(found, np.float64) - wanted) / np.maximum(
            1, abs(wanted)
        )  # at 10, where a head's bias is, float32 has 1e-6
        worst = max(worst, off.max())
        assert off.max() < 1e-6, name
        assert abs(wanted - w).max() > 1e-4, f"{name} has moved"
    print(f"after {STEPS} steps at most {worst:.1e} from float64")  # pytest -rP


@pytest.mark.parametrize("change", [{"layer_decay": 0.0}, {"layer_decay": 1.1}, {"weight_decay": -1.0}], ids=str)
def test_what_makes_no_adamw_is_refused(change):
    with pytest.raises(ValueError, match="are required"):
        adamw(optax.constant_schedule(1.0), **{"weight_decay": 0.0, "depth": 2, **change})
