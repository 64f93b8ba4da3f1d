"""Augmentation: range, shape, the laws of its randomness, and the geometry of every kind of crop."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from train.data import AUGMENTATIONS, PREPROCESSES, digits
from train.data.augment import AUTHORS, CENTER_SHARE, DIGIT_DEGREES, DIGIT_SCALE, DIGIT_SHIFT, How
from train.data.crops import CROPS
from train.data.sampling import AUGMENT, SUBSET, epoch_order, philox4x32, random_subset, uniforms

RNG = np.random.default_rng(0)


def noise(y, x, c=3):
    return RNG.integers(0, 256, (y, x, c), np.uint8)


def draws_of(name, count, seed=0, epoch=0, how=AUTHORS):
    return uniforms(seed, np.full(count, epoch), np.arange(count), AUGMENTATIONS[name].draws(how))


# --- the randomness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that its authors publish (Random123, kat_vectors, philox4x32 10)
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    found = philox4x32(tuple(np.array([c], np.uint64) for c in counter), (key[0], key[1]))
    assert [int(word[0]) for word in found] == expected


@given(
    seed=st.integers(0, 2**64 - 1),
    rows=st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), min_size=1, max_size=6),
    count=st.integers(1, 25),
)
def test_draws_of_a_row_depend_on_nothing_else(seed, rows, count):
    epoch, index = np.array(rows).T
    together = uniforms(seed, epoch, index, count)
    assert together.shape == (len(rows), count)
    assert (together >= 0).all()
    assert (together < 1).all()
    for row, (e, i) in zip(together, rows, strict=True):
        np.testing.assert_array_equal(uniforms(seed, np.array([e]), np.array([i]), 25)[0, :count], row)


def test_draws_differ_by_seed_epoch_index_and_stream():
    at = lambda seed, epoch, index, stream=AUGMENT: tuple(uniforms(seed, np.array([epoch]), np.array([index]), 4, stream)[0])  # noqa: E731
    seen = {at(s, e, i) for s in (0, 1, 2**32, 2**33) for e in range(4) for i in range(4)} | {at(0, 0, 0, SUBSET)}
    assert len(seen) == 4 * 4 * 4 + 1


def test_draws_are_uniform_and_uncorrelated():
    u = np.concatenate([uniforms(3, np.full(2000, e), np.arange(2000), 8) for e in range(4)])
    assert abs(u.mean(0) - 0.5).max() < 5 * math.sqrt(1 / 12 / len(u))
    correlation = np.corrcoef(np.concatenate([u, np.roll(u, 1, axis=0)], axis=1).T) - np.eye(16)
    assert abs(correlation).max() < 5 / math.sqrt(len(u))


@pytest.mark.parametrize("length", [1, 2, 7, 1000])
def test_epoch_order_is_a_permutation_of_its_own(length):
    orders = [tuple(epoch_order(length, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(length)) for order in orders)
    if length == 1000:
        assert len(set(orders)) == 4  # also: seed 0's second epoch is not seed 1's first


def test_epoch_order_puts_every_example_everywhere():
    places = np.array([epoch_order(16, 5, epoch) for epoch in range(2000)])
    counts = np.array([np.bincount(column, minlength=16) for column in places.T])
    assert abs(counts - 125).max() < 6 * math.sqrt(125)


def test_subsets_are_random_and_nested():
    small, large = random_subset(1000, 50, 7), random_subset(1000, 300, 7)
    assert len(set(small.tolist())) == 50
    assert set(small.tolist()) < set(large.tolist())
    assert (np.diff(large) > 0).all()
    assert 350 < large.mean() < 650
    assert set(random_subset(1000, 50, 8).tolist()) != set(small.tolist())
    np.testing.assert_array_equal(random_subset(10, 10, 0), np.arange(10))


# --- what all augmentations and preprocessings share ------------------------------------------------------------------------


@given(
    name=st.sampled_from([*AUGMENTATIONS, *PREPROCESSES]),
    channels=st.sampled_from([1, 3]),
    source_channels=st.sampled_from([1, 3]),
    size=st.integers(1, 40),
    y=st.integers(1, 50),
    x=st.integers(1, 50),
    value=st.sampled_from([0, 128, 255, None]),
)
def test_shape_type_and_range(name, channels, source_channels, size, y, x, value):
    images = [noise(y, x, source_channels) if value is None else np.full((y, x, source_channels), value, np.uint8)] * 3
    before = images[0].copy()
    if name in AUGMENTATIONS:
        out = AUGMENTATIONS[name].apply(images, draws_of(name, 3), size, channels)
    else:
        out = PREPROCESSES[name](images, size, channels)
    assert out.shape == (3, size, size, channels)
    assert out.dtype == np.float32
    assert out.min() >= -1
    assert out.max() <= 1
    np.testing.assert_array_equal(images[0], before)
    if value is not None and name != "digits":  # a constant stays constant, and [0, 255] becomes [-1, 1]
        np.testing.assert_allclose(out, value / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [8, 13])
def test_an_example_does_not_depend_on_its_batch(name, size):
    images = [noise(8, 8, 1) for _ in range(9)]
    draws = draws_of(name, 9)
    together = AUGMENTATIONS[name].apply(images, draws, size, 3)
    for i in range(9):
        np.testing.assert_array_equal(AUGMENTATIONS[name].apply(images[i : i + 1], draws[i : i + 1], size, 3)[0], together[i])


@pytest.mark.parametrize("name", ["inception", "none"])
def test_an_example_does_not_depend_on_the_shapes_in_its_batch(name):
    images = [noise(16, 16, 3), noise(16, 16, 1), noise(31, 9, 3)]
    draws = draws_of(name, 3)
    together = AUGMENTATIONS[name].apply(images, draws, 16, 3)
    for i in range(3):
        np.testing.assert_array_equal(AUGMENTATIONS[name].apply(images[i : i + 1], draws[i : i + 1], 16, 3)[0], together[i])


@pytest.mark.parametrize("name", ["inception", "digits"])
def test_augmentation_changes_with_epoch_and_with_nothing_else(name):
    images = [noise(24, 24)] * 4
    apply = AUGMENTATIONS[name].apply
    first, again, later = (apply(images, draws_of(name, 4, epoch=e), 24, 3) for e in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert all(abs(first[i] - later[i]).max() > 0.1 for i in range(4))
    assert abs(first[0] - first[1]).max() > 0.1  # the same image at another index


def test_colour_becomes_its_luma():
    image = np.zeros((8, 8, 3), np.uint8)
    image[...] = (200, 100, 50)
    expected = (0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 127.5 - 1
    for name in ("none", "inception"):
        out = AUGMENTATIONS[name].apply([image], draws_of(name, 1), 8, 1)
        np.testing.assert_allclose(out, expected, atol=1 / 127)
    out = AUGMENTATIONS["digits"].apply([image], np.full((1, 4), 0.5), 8, 1)
    np.testing.assert_allclose(out, expected, atol=1e-5)


# --- the inception crop, resized; the crop's rules are in test_data_crops -----------------------------------------------------


def bilinear(image, box, size):
    """tf.image.resize without antialiasing, of a box of the image, in float64: half-pixel centres, edges repeated."""
    image = np.asarray(image, np.float64)
    for axis, (start, end) in enumerate(((box[1], box[3]), (box[0], box[2]))):
        place = start + (np.arange(size) + 0.5) * (end - start) / size - 0.5
        below = np.floor(place).astype(int)
        share = (place - below).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        last = image.shape[axis] - 1
        a, b = (image.take(np.clip(below + step, 0, last), axis=axis) for step in (0, 1))
        image = a * (1 - share) + b * share
    return image


def assert_nearest(found, expected):
    """found are the levels nearest to expected; half-way between two either will do."""
    levels = np.rint((found + 1) * 127.5)
    np.testing.assert_allclose((found + 1) * 127.5, levels, atol=1e-4)
    assert abs(levels - expected).max() < 0.5 + 1e-4


SHAPES = [(30, 40), (16, 16), (7, 90), (200, 11), (5, 4), (600, 700)]


@pytest.mark.parametrize(("y", "x"), SHAPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_is_tensorflows_bilinear(y, x, channels):
    image = noise(y, x, channels)
    assert_nearest(PREPROCESSES["resize"]([image], 16, channels)[0], bilinear(image, (0, 0, x, y), 16))


@pytest.mark.parametrize(("y", "x"), SHAPES)
def test_resize_center_is_squashed_to_256_of_which_the_middle_224(y, x):
    """Against the two steps one after the other."""
    image = noise(y, x)
    two = bilinear(image, (0, 0, x, y), 256)[16:240, 16:240]
    assert_nearest(PREPROCESSES["resize-center"]([image], 224, 3)[0], two)


def test_antialiasing_is_pillows_by_name():
    image = noise(60, 80)
    expected = np.asarray(Image.fromarray(image).resize((12, 12), Image.Resampling.BILINEAR)) / 127.5 - 1
    how = How(antialias=True)
    np.testing.assert_allclose(PREPROCESSES["resize"]([image], 12, 3, how=how)[0], expected, atol=1e-6)
    np.testing.assert_allclose(AUGMENTATIONS["none"].apply([image], draws_of("none", 1), 12, 3, how=how)[0], expected, atol=1e-6)
    assert abs(PREPROCESSES["resize"]([image], 12, 3)[0] - expected).max() > 0.3
    large = np.asarray(Image.fromarray(image).resize((14, 14), Image.Resampling.BILINEAR))[1:13, 1:13] / 127.5 - 1
    found = PREPROCESSES["resize-center"]([image], 12, 3, how=how)[0]
    assert abs(found - large).mean() < abs(PREPROCESSES["resize-center"]([image], 12, 3)[0] - large).mean() / 5


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("antialias", [False, True])
def test_inception_is_its_crop_resized_and_flipped(crop, antialias):
    how, rule = How(crop=crop, antialias=antialias), CROPS[crop]
    images = [noise(30, 40) for _ in range(32)]
    draws = draws_of("inception", 32, how=how)
    out = AUGMENTATIONS["inception"].apply(images, draws, 16, 3, how=how)
    boxes = rule.boxes(np.full(32, 30), np.full(32, 40), draws[:, : rule.draws])
    flips = draws[:, rule.draws] < 0.5
    assert 8 < flips.sum() < 24
    for image, (t, left, h, w), flip, found in zip(images, boxes, flips, out, strict=True):
        part = image[t : t + h, left : left + w]
        straight = found[:, ::-1] if flip else found
        if antialias:
            resized = np.asarray(Image.fromarray(part).resize((16, 16), Image.Resampling.BILINEAR))
            np.testing.assert_allclose(straight, resized / 127.5 - 1, atol=1e-6)
        else:
            assert_nearest(straight, bilinear(part, (0, 0, w, h), 16))


def test_one_half_is_flipped():
    ramp = np.repeat(np.arange(0, 250, 10, dtype=np.uint8)[None, :, None], 25, axis=0)
    out = AUGMENTATIONS["inception"].apply([ramp] * 4000, draws_of("inception", 4000), 8, 1)
    flipped = (out[:, :, 0] > out[:, :, -1]).all(axis=(1, 2))
    straight = (out[:, :, 0] < out[:, :, -1]).all(axis=(1, 2))
    assert (flipped ^ straight).all()
    assert abs(flipped.mean() - 0.5) < 0.04


# --- the digits' own --------------------------------------------------------------------------------------------------------


def test_digits_at_rest_are_the_digits():
    images = list(digits.load("train").images[:20])
    found = AUGMENTATIONS["digits"].apply(images, np.full((20, 4), 0.5), 8, 1)
    np.testing.assert_allclose(found, np.stack(images) / 127.5 - 1, atol=1e-5)


def test_digits_shift_by_a_known_amount():
    image = np.zeros((8, 8, 1), np.uint8)
    image[4, 4] = 200
    part, rest = 0.65, 0.5  # a draw of 1 is the whole shift, 0.5 none
    found = (AUGMENTATIONS["digits"].apply([image], np.array([[rest, rest, part, rest]]), 8, 1)[0, ..., 0] + 1) * 127.5
    moved = DIGIT_SHIFT * 8 * 0.3  # in pixels, upwards
    expected = np.zeros((8, 8))
    expected[4, 4], expected[3, 4] = 200 * (1 - moved), 200 * moved
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("scale", [0, 0.5, 1])
@pytest.mark.parametrize("angle", [0, 0.5, 1])
def test_digits_turn_and_scale_without_shear(angle, scale):
    """On linear ramps bilinear sampling is exact, so the slopes of the result are the Jacobian of the map."""
    gy, gx = np.mgrid[0:16, 0:16].astype(np.uint8)[..., None]
    draws = np.array([[angle, scale, 0.3, 0.8]] * 2)
    out = (AUGMENTATIONS["digits"].apply([10 * gy, 10 * gx], draws, 16, 1)[:, 5:11, 5:11, 0] + 1) * 12.75
    jacobian = np.array([[np.diff(ramp, axis=0).mean(), np.diff(ramp, axis=1).mean()] for ramp in out])
    radians, factor = math.radians(DIGIT_DEGREES) * (2 * angle - 1), DIGIT_SCALE ** -(2 * scale - 1)
    turn = np.array([[math.cos(radians), -math.sin(radians)], [math.sin(radians), math.cos(radians)]])
    np.testing.assert_allclose(jacobian, factor * turn, atol=1e-4)


def test_digits_are_never_flipped():
    """However it is drawn, a spot in one quarter of the image stays in that quarter."""
    draws = np.concatenate([draws_of("digits", 2000), np.array(np.meshgrid(*[[0, 1]] * 4)).reshape(4, -1).T])
    for y, x in ((1, 1), (1, 6), (6, 1), (6, 6)):
        image = np.zeros((8, 8, 1), np.uint8)
        image[y, x] = 255
        ink = AUGMENTATIONS["digits"].apply([image] * len(draws), draws, 8, 1)[..., 0] + 1
        quarter = ink[:, slice(0, 4) if y < 4 else slice(4, 8), slice(0, 4) if x < 4 else slice(4, 8)]
        assert (quarter.sum(axis=(1, 2)) > 0.7 * ink.sum(axis=(1, 2))).all()


def test_digits_bring_in_black():
    out = AUGMENTATIONS["digits"].apply([np.full((8, 8, 1), 255, np.uint8)] * 64, draws_of("digits", 64), 8, 1)
    assert (out[:, 3:5, 3:5] > 0.999).all()
    corners = out[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.min() < -0.2


def test_digits_refuse_images_of_several_shapes():
    with pytest.raises(ValueError, match="one shape"):
        AUGMENTATIONS["digits"].apply([noise(8, 8), noise(8, 9)], draws_of("digits", 2), 8, 3)


# --- evaluation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("y", "x"), [(256, 256), (256, 400), (512, 300)])
def test_center_is_shorter_side_to_256_then_the_middle_224(y, x):
    """Against the two steps done one after the other, on a smooth image."""
    gy, gx = np.mgrid[0:y, 0:x]
    image = np.stack([gy * 255 / y, gx * 255 / x, (gy + gx) * 255 / (y + x)], axis=-1).astype(np.uint8)
    scale = 256 / min(y, x)
    large = Image.fromarray(image).resize((round(x * scale), round(y * scale)), Image.Resampling.BILINEAR)
    left, upper = (large.width - 224) / 2, (large.height - 224) / 2
    expected = np.asarray(large.crop((round(left), round(upper), round(left) + 224, round(upper) + 224)))
    found = (PREPROCESSES["center"]([image], 224, 3)[0] + 1) * 127.5
    assert np.abs(found - expected).max() < 2.5
    assert CENTER_SHARE == 224 / 256
