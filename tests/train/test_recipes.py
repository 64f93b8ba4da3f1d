"""The recipes against Table 3 of the paper, typed in again from its text."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcore
from train import pretrain
from train.recipes import TABLE_3, TABLE_4, Recipe, finetune_recipe, names, recipe
from train.step import StepOptions

# Models, data set, epochs, base LR, LR decay, weight decay, dropout: the thirteen rows as printed.
PAPER = """
ViT-B/16 ViT-B/32         | jft         | 7     | 8e-4 | linear | 0.1  | 0.0
ViT-L/32                  | jft         | 7     | 6e-4 | linear | 0.1  | 0.0
ViT-L/16                  | jft         | 7 14  | 4e-4 | linear | 0.1  | 0.0
ViT-H/14                  | jft         | 14    | 3e-4 | linear | 0.1  | 0.0
R50x1 R50x2               | jft         | 7     | 1e-3 | linear | 0.1  | 0.0
R101x1                    | jft         | 7     | 8e-4 | linear | 0.1  | 0.0
R152x1 R152x2             | jft         | 7     | 6e-4 | linear | 0.1  | 0.0
R50+ViT-B/16 R50+ViT-B/32 | jft         | 7     | 8e-4 | linear | 0.1  | 0.0
R50+ViT-L/32              | jft         | 7     | 2e-4 | linear | 0.1  | 0.0
R50+ViT-L/16              | jft         | 7 14  | 4e-4 | linear | 0.1  | 0.0
ViT-B/16 ViT-B/32         | imagenet21k | 90    | 1e-3 | linear | 0.03 | 0.1
ViT-L/16 ViT-L/32         | imagenet21k | 30 90 | 1e-3 | linear | 0.03 | 0.1
ViT-Ti/16 ViT-S/16 ViT-B/16 ViT-B/32 ViT-L/16 ViT-L/32 ViT-H/14 | imagenet | 300 | 3e-3 | cosine | 0.3 | 0.1
"""
ROWS = [[cell.strip() for cell in line.split("|")] for line in PAPER.strip().splitlines()]
EXAMPLES = {"jft": 303_000_000, "imagenet21k": 14_197_122, "imagenet": 1_281_167}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[1]}-{row[0].split()[0]}")
def test_every_row_of_table_3(row):
    models, data, epochs, base_lr, decay, weight_decay, dropout = row
    for model in models.split():
        for position, count in enumerate(epochs.split()):
            found = [recipe(data, model)] if position == 0 else []
            if f"{data}-{count}ep" in names():
                found.append(recipe(f"{data}-{count}ep", model))
            assert found
            for r in found:
                assert (r.epochs, r.base_lr, r.decay) == (int(count), float(base_lr), decay)
                assert (r.weight_decay, r.dropout) == (float(weight_decay), float(dropout))
                assert (r.batch_size, r.warmup_steps, r.image_size) == (4096, 10_000, 224)
                assert (r.b1, r.b2) == (0.9, 0.999)
                assert r.clip_norm == (1.0 if data == "imagenet" else None)
                assert r.examples == EXAMPLES[data]
                assert r.steps == round(int(count) * EXAMPLES[data] / 4096) > r.warmup_steps
                assert (r.crop, r.antialias, r.randaugment, r.mixup, r.mixup_share) == ("tensorflow", False, (0, 0), 0.0, "batch")


def test_the_table_holds_the_paper_s_rows_and_no_others():
    def key(models, data, epochs):
        return frozenset(models), data, tuple(epochs)

    printed = {key(models.split(), data, map(int, epochs.split())) for models, data, epochs, *_ in ROWS if data != "imagenet"}
    assert {key(row.models, row.data, row.epochs) for row in TABLE_3 if row.data != "imagenet"} == printed
    assert [row.models for row in TABLE_3 if row.data == "imagenet"] == [("ViT-*",)]
    assert len(TABLE_3) == len(ROWS) == 13


def test_a_hybrid_is_trained_as_its_vit_where_the_table_has_no_row():
    for data in ("imagenet21k", "imagenet"):
        assert recipe(data, "R50+ViT-B/16") == recipe(data, "ViT-B/16")
    assert recipe("jft", "R50+ViT-L/32").base_lr != recipe("jft", "ViT-L/32").base_lr


def test_digits_is_for_any_model():
    r = recipe("digits", "ViT-Nano/2")
    assert r == recipe("digits", "anything")
    assert (r.image_size, r.examples) == (8, 1442)
    assert r.warmup_steps < r.steps


def test_multi_label_data_take_the_sigmoid():
    assert recipe("imagenet21k", "ViT-B/16").loss == recipe("jft", "ViT-B/16").loss == "sigmoid"
    assert recipe("imagenet", "ViT-B/16").loss == "softmax"


@pytest.mark.parametrize(
    ("name", "options", "classes", "bias", "loss"),
    [
        ("jft", {}, 18_291, -10.0, 18_291 * math.log1p(math.exp(-10)) + 10),  # 10.8
        ("imagenet21k", {}, 21_843, -10.0, 21_843 * math.log1p(math.exp(-10)) + 10),
        ("imagenet", {"loss": "sigmoid"}, 1000, -6.9, 1000 * math.log1p(math.exp(-6.9)) + 6.9),
        ("imagenet", {}, 1000, 0.0, math.log(1000)),
        ("jft", {"loss": "softmax"}, 18_291, 0.0, math.log(18_291)),
        ("jft", {"head_bias": 0.0}, 18_291, 0.0, 18_291 * math.log(2)),  # 12,678: what a run does not recover from
        ("imagenet", {"head_bias": -1.0}, 1000, -1.0, math.log(1000)),
    ],
    ids=str,
)
def test_the_first_loss_of_a_recipe(name, options, classes, bias, loss):
    """Of the model that the job makes of a recipe, made small, with as many classes as the data set has."""
    full = pretrain.resolve(pretrain.Pretrain(recipe=name, model="ViT-B/16", data="folder:x", **options), examples=10**6)
    assert full.head_bias == bias
    full: Any = full
    whole = pretrain.model_of(full, classes=classes, channels=3)
    config = dataclasses.replace(whole, depth=1, width=8, mlp_dim=8, num_heads=1, representation_size=8, image_size=32)
    params = vitcore.init(jax.random.key(0), config)
    images = jax.random.uniform(jax.random.key(1), (4, 32, 32, 3), minval=-1, maxval=1)
    first = StepOptions(loss=full.loss).losses(vitcore.apply(params, images, config), jnp.array([0, 7, 99, classes - 1]))
    np.testing.assert_allclose(first, loss, rtol=1e-4)
    assert (abs(loss - 10.8) < 0.1) == (name == "jft" and not options)


@pytest.mark.parametrize(
    ("name", "model", "words"),
    [
        ("imagnet", "ViT-B/16", "unknown recipe 'imagnet': the nearest are imagenet"),
        ("zzz", "ViT-B/16", "digits"),
        ("jft", "ViT-B/61", "no 'ViT-B/61' on jft: the nearest are ViT-B/16"),
        ("jft", "R200x3", "no 'R200x3' on jft"),
        ("jft-14ep", "ViT-B/16", "for 7 epochs, not 14"),
        ("imagenet21k-30ep", "ViT-B/32", "for 90 epochs, not 30"),
        ("imagenet-10ep", "ViT-B/16", "unknown recipe 'imagenet-10ep'"),
    ],
)
def test_what_the_table_lacks_is_refused_with_the_nearest(name, model, words):
    with pytest.raises(ValueError, match=r"recipe|Table 3") as error:
        recipe(name, model)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"warmup_steps": -1},
        {"dropout": 1.0},
        {"label_smoothing": -0.1},
        {"clip_norm": 0.0},
        {"loss": "sigmoid", "label_smoothing": 0.1},
    ],
    ids=str,
)
def test_a_changed_recipe_is_checked_again(change):
    with pytest.raises(ValueError, match=next(reversed(change))):
        dataclasses.replace(recipe("imagenet", "ViT-B/16"), **change)


def test_steps_are_the_nearest_whole_batches_and_at_least_one():
    r = Recipe(name="x", examples=10, epochs=3, base_lr=1.0, decay="cosine", weight_decay=0.0, dropout=0.0, batch_size=4)
    assert r.steps == 8  # 7.5, and 8 is even
    assert dataclasses.replace(r, examples=9).steps == 7  # 6.75, which is 6 whole batches
    assert dataclasses.replace(r, batch_size=100).steps == 1


def test_the_plain_baseline_is_that_of_its_report():
    """arXiv:2205.01580: what the job makes of it, for S/16 on train[:99%]."""
    for name, epochs in (("plain", 90), ("plain-300ep", 300)):
        full = pretrain.resolve(pretrain.Pretrain(recipe=name, data="folder:x"), examples=1_268_355)
        config = pretrain.model_of(full, classes=1000, channels=3)
        assert (full.model, config.pool, config.position, config.dropout) == ("ViT-S/16", "gap", "sincos2d", 0.0)
        assert (config.representation_size, config.image_size, config.head_bias) == (384, 224, 0.0)
        assert (full.steps, full.batch_size, full.warmup_steps) == (round(epochs * 1_268_355 / 1024), 1024, 10_000)
        assert (full.learning_rate, full.weight_decay, full.weight_decay_form) == (1e-3, 1e-4, "independent")
        assert (full.decay, full.clip_norm, full.first_moment, full.loss) == ("cosine", 1.0, "bfloat16", "softmax")
        assert (full.randaugment, full.mixup, full.mixup_share, full.preprocess) == ((2, 10), 0.2, "batch", "center")
        assert full.how.randaugment == (2, 10)
    adamw = pretrain.resolve(pretrain.Pretrain(recipe="plain", data="folder:x", weight_decay_form="adamw"), examples=10**6)
    assert adamw.weight_decay == pytest.approx(0.1), "the same decay in the other form"
    with pytest.raises(ValueError, match="trains plain ViTs, and 'R50x1' is none"):
        recipe("plain", "R50x1")


# --- Table 4 ----------------------------------------------------------------------------------------------------------------

# Data set, steps, base LRs, share of train held out to choose on, warm-up: as printed, and as the releases have it.
PAPER_4 = """
imagenet | 20000 | 0.003 0.01 0.03 0.06  | 0.01 | 500
cifar100 | 10000 | 0.001 0.003 0.01 0.03 | 0.02 | 500
cifar10  | 10000 | 0.001 0.003 0.01 0.03 | 0.02 | 500
pets     | 500   | 0.001 0.003 0.01 0.03 | 0.1  | 100
flowers  | 500   | 0.001 0.003 0.01 0.03 | 0.1  | 100
vtab     | 2500  | 0.01                  | 0.2  | 500
"""
ROWS_4 = [[cell.strip() for cell in line.split("|")] for line in PAPER_4.strip().splitlines()]


@pytest.mark.parametrize("row", ROWS_4, ids=lambda row: row[0])
def test_every_row_of_table_4(row):
    name, steps, rates, share, warmup = row
    r = finetune_recipe(name)
    assert (r.name, r.steps, r.base_lrs) == (name, int(steps), tuple(map(float, rates.split())))
    assert (r.dev_share, r.warmup_steps) == (float(share), int(warmup))
    assert (r.batch_size, r.momentum, r.clip_norm, r.image_size, r.runs, r.polyak) == (512, 0.9, 1.0, 384, 3, 0.0)


def test_table_4_has_these_rows_and_no_others():
    assert list(TABLE_4) == [row[0] for row in ROWS_4]


def test_table_2_s_runs_are_larger_and_averaged():
    for width, patch, size in ((1024, 16, 512), (1280, 14, 518), (768, 16, 384), (1024, 32, 384), (None, None, 384)):
        r = finetune_recipe("imagenet-table2", width=width, patch_size=patch)
        assert (r.image_size, r.polyak, r.steps, r.base_lrs) == (size, 0.9999, 20_000, (0.003, 0.01, 0.03, 0.06))


def test_an_unknown_fine_tuning_recipe_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown fine-tuning recipe 'cifar1O0': the nearest are cifar10"):
        finetune_recipe("cifar1O0")


@pytest.mark.parametrize(
    "change",
    [{"steps": 500}, {"base_lrs": ()}, {"base_lrs": (0.0,)}, {"dev_share": 1.0}, {"polyak": 1.0}, {"runs": 0}, {"batch_size": 0}],
    ids=str,
)
def test_a_changed_fine_tuning_recipe_is_checked_again(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}.* in recipe 'cifar10'"):
        dataclasses.replace(finetune_recipe("cifar10"), **change)
