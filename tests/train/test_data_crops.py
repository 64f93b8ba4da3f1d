"""The rules of the inception crop against their descriptions, written down one image and one attempt at a time."""

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from train.data.crops import CROPS, TF_ASPECT, TORCH_ASPECT
from train.data.sampling import uniforms

DRAWS = 20_000
SHAPES = [(375, 500), (500, 375), (224, 224), (100, 640), (33, 17)]


def boxes_of(rule, y, x, count, seed=0):
    draws = uniforms(seed, np.zeros(count), np.arange(count), CROPS[rule].draws)
    return CROPS[rule].boxes(np.full(count, y), np.full(count, x), draws)


def one_of_tensorflow(rng, y, x):
    """tf.image.sample_distorted_bounding_box(area_range=(0.05, 1), min_object_covered=0): what it does, in words of ours."""
    for _ in range(100):
        aspect = rng.uniform(0.75, 1.33)
        tallest = round(math.sqrt(y * x / aspect))
        while round(tallest * aspect) > x:
            tallest -= 1
        tallest = min(tallest, y)
        shortest = min(round(math.sqrt(0.05 * y * x / aspect)), tallest)
        h = rng.randint(shortest, tallest)
        if round(h * aspect) * h < 0.05 * y * x:
            h += 1
        if round(h * aspect) * h > y * x:
            h -= 1
        w = round(h * aspect)
        if 0.05 * y * x <= h * w <= y * x and 0 < w <= x and 0 < h <= y:
            return (rng.randrange(y - h) if h < y else 0, rng.randrange(x - w) if w < x else 0, h, w)
    return 0, 0, y, x


def one_of_torchvision(rng, y, x):
    """RandomResizedCrop(scale=(0.05, 1)), as its documentation has it."""
    for _ in range(10):
        area, aspect = y * x * rng.uniform(0.05, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= x and 0 < h <= y:
            return rng.randint(0, y - h), rng.randint(0, x - w), h, w
    w, h = min(x, round(y * 4 / 3)), min(y, round(x * 4 / 3))
    return (y - h) // 2, (x - w) // 2, h, w


@pytest.mark.parametrize(("y", "x"), SHAPES)
@pytest.mark.parametrize(("rule", "one"), [("tensorflow", one_of_tensorflow), ("torchvision", one_of_torchvision)])
def test_draws_follow_the_rule(rule, one, y, x):
    """Kolmogorov and Smirnov's test of every side, place, area and aspect, 20,000 draws of each."""
    rng = random.Random(1)
    expected, found = np.array([one(rng, y, x) for _ in range(DRAWS)]), boxes_of(rule, y, x, DRAWS)

    def seen(boxes):
        top, left, h, w = boxes.T
        return {"top": top, "left": left, "h": h, "w": w, "area": h * w, "aspect": w / h, "bottom": top + h, "right": left + w}

    test: Any = ks_2samp  # whose result scipy does not type
    likely = {name: test(values, seen(found)[name]).pvalue for name, values in seen(expected).items()}
    print(f"{rule}, {y} x {x}: the smallest of {len(likely)} p-values is {min(likely.values()):.3f}")  # pytest -rP
    assert min(likely.values()) > 1e-3, likely
    other = seen(boxes_of("torchvision" if rule == "tensorflow" else "tensorflow", y, x, DRAWS))
    assert test(seen(expected)["area"], other["area"]).pvalue < 1e-9, "the two rules can be told apart"


@pytest.mark.parametrize(("rule", "mean", "quarter"), [("tensorflow", 0.343, 0.423), ("torchvision", 0.416, 0.281)])
def test_areas_on_a_photograph(rule, mean, quarter):
    _, _, h, w = boxes_of(rule, 375, 500, DRAWS, seed=3).T
    area = h * w / (375 * 500)
    print(f"{rule}: mean area {area.mean():.3f}, {(area < 0.25).mean():.1%} below a quarter")
    assert abs(area.mean() - mean) < 0.005
    assert abs((area < 0.25).mean() - quarter) < 0.012
    assert area.min() > 0.049
    assert area.max() <= 1
    low, high = TF_ASPECT if rule == "tensorflow" else TORCH_ASPECT
    assert 0.97 * low < (w / h).min() < 1.03 * low
    assert 0.97 * high < (w / h).max() < 1.03 * high


@given(rule=st.sampled_from(list(CROPS)), y=st.integers(1, 600), x=st.integers(1, 600), seed=st.integers(0, 100))
def test_crops_lie_inside_the_image(rule, y, x, seed):
    top, left, h, w = boxes_of(rule, y, x, 64, seed).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (h >= 1).all()
    assert (w >= 1).all()
    assert (top + h <= y).all()
    assert (left + w <= x).all()


def test_torchvisions_crops_reach_both_edges_and_tensorflows_only_the_first():
    for rule, shares in (("torchvision", [1 / 3] * 3), ("tensorflow", [1 / 2, 1 / 2, 0])):
        top, left, h, w = boxes_of(rule, 4, 4, DRAWS).T
        for start, extent in ((top, h), (left, w)):
            places = np.bincount(start[extent == 2], minlength=3) / (extent == 2).sum()
            assert abs(places - shares).max() < 0.03


@pytest.mark.parametrize(("y", "x", "centre"), [(1000, 10, (493, 0, 13, 10)), (10, 1000, (0, 493, 10, 13)), (1, 1, (0, 0, 1, 1))])
def test_where_no_crop_fits(y, x, centre):
    assert (boxes_of("torchvision", y, x, 50) == centre).all()
    assert (boxes_of("tensorflow", y, x, 50) == (0, 0, y, x)).all(), "the whole image"


def test_a_box_depends_on_its_own_row_alone():
    draws = uniforms(0, np.zeros(64), np.arange(64), CROPS["tensorflow"].draws)
    sides = np.random.default_rng(0).integers(1, 200, (2, 64))  # some of them take many attempts
    y, x = sides
    together = CROPS["tensorflow"].boxes(y, x, draws)
    for i in range(64):
        np.testing.assert_array_equal(CROPS["tensorflow"].boxes(y[i : i + 1], x[i : i + 1], draws[i : i + 1])[0], together[i])
