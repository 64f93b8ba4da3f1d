"""RandAugment: every change against its formula in NumPy, and how they are drawn."""

import numpy as np
import pytest
from PIL import Image

from train.data.augment import AUGMENTATIONS, How
from train.data.erase import DRAWS as ERASE_DRAWS
from train.data.erase import MEAN, erase
from train.data.randaugment import DRAWS, OPS, randaugment
from train.data.sampling import uniforms

SIDE = 40
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(20, 230, (SIDE, SIDE, 3), np.uint8)


def changed(name, magnitude, *, sign=1.0, centre=(0.5, 0.5), pixels=PIXELS):
    return np.asarray(OPS[name](Image.fromarray(pixels), magnitude / 10, sign, centre))


def blend(degenerate, factor, pixels=PIXELS):
    return np.clip(degenerate + factor * (pixels.astype(float) - degenerate), 0, 255)


def test_there_are_sixteen():
    assert len(OPS) == 16
    assert list(OPS)[:3] == ["AutoContrast", "Equalize", "Invert"]


@pytest.mark.parametrize("magnitude", [5, 10, 15])
def test_bytes_are_changed_by_formula(magnitude):
    m, p = magnitude / 10, PIXELS.astype(int)
    np.testing.assert_array_equal(changed("Invert", magnitude), 255 - p)
    bits = min(8, int(4 * m))
    np.testing.assert_array_equal(changed("Posterize", magnitude), p // 2 ** (8 - bits) * 2 ** (8 - bits))
    np.testing.assert_array_equal(changed("Solarize", magnitude), np.where(p < int(256 * m), p, 255 - p))
    np.testing.assert_array_equal(
        changed("SolarizeAdd", magnitude), np.where(p < 128, np.minimum(p + int(110 * m), 255), p)
    )  # fmt: skip
    low, high = p.min((0, 1)), p.max((0, 1))
    assert abs(changed("AutoContrast", magnitude) - np.floor((p - low) * 255 / (high - low))).max() <= 1


@pytest.mark.parametrize("magnitude", [0, 5, 10, 15])
def test_blends_are_by_formula(magnitude):
    factor = 0.1 + 0.18 * magnitude
    grey = (0.299 * PIXELS[..., :1] + 0.587 * PIXELS[..., 1:2] + 0.114 * PIXELS[..., 2:]) * np.ones(3)
    assert abs(changed("Color", magnitude) - blend(grey, factor)).max() <= 2 + factor
    assert abs(changed("Contrast", magnitude) - blend(SIDE * SIDE // 256, factor)).max() <= 1
    assert abs(changed("Brightness", magnitude) - blend(0, factor)).max() <= 1
    padded = np.pad(PIXELS.astype(float), ((1, 1), (1, 1), (0, 0)))
    smooth = sum(
        (5 if (i, j) == (1, 1) else 1) / 13 * padded[i : i + SIDE, j : j + SIDE] for i in range(3) for j in range(3)
    )  # fmt: skip
    inner = (slice(1, -1), slice(1, -1))
    assert abs(changed("Sharpness", magnitude) - blend(smooth, factor))[inner].max() <= 2 + factor
    np.testing.assert_array_equal(changed("Sharpness", magnitude)[0], PIXELS[0])


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("magnitude", [3, 10])
def test_moves_take_the_nearest_pixel_and_bring_in_grey(sign, magnitude):
    m = sign * magnitude / 10
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    places = {
        "ShearX": (y, x + 0.3 * m * y),
        "ShearY": (y + 0.3 * m * x, x),
        "TranslateX": (y, x + 100 * m),
        "TranslateY": (y + 100 * m, x),
    }
    for name, (v, u) in places.items():
        clear = (abs(u % 1 - 0.5) > 1e-3) & (abs(v % 1 - 0.5) > 1e-3)  # not half-way between two pixels
        u, v = np.rint(u).astype(int), np.rint(v).astype(int)
        inside = (u >= 0) & (u < SIDE) & (v >= 0) & (v < SIDE)
        expected = np.where(inside[..., None], PIXELS[np.clip(v, 0, SIDE - 1), np.clip(u, 0, SIDE - 1)], 128)
        assert clear.mean() > 0.8
        np.testing.assert_array_equal(changed(name, magnitude, sign=sign)[clear], expected[clear], err_msg=name)
    turned = changed("Rotate", magnitude, sign=sign)
    assert (turned[0, 0] == 128).all()
    np.testing.assert_array_equal(turned[SIDE // 2 - 2 : SIDE // 2 + 2].mean(0).shape, (SIDE, 3))
    ramp = np.repeat(np.arange(SIDE, dtype=np.uint8)[:, None, None], SIDE, 1).repeat(3, 2) * 6
    slope = changed("Rotate", magnitude, sign=sign, pixels=ramp)[12:28, 12:28, 0].astype(float) / 6
    angle = np.degrees(np.arctan2(np.diff(slope, axis=1).mean(), np.diff(slope, axis=0).mean()))
    assert abs(abs(angle) - 30 * abs(m)) < 3
    assert (changed("Rotate", magnitude, sign=-sign) != turned).any()


def test_cutout_is_a_grey_square_where_it_is_drawn():
    found = changed("Cutout", 2, centre=(0.25, 0.9))  # half a side of 8, around (10, 36)
    expected = PIXELS.copy()
    expected[2:18, 28:40] = 128
    np.testing.assert_array_equal(found, expected)


def test_equalize_spreads_what_there_is():
    narrow = (PIXELS // 4 + 90).astype(np.uint8)
    found = changed("Equalize", 10, pixels=narrow)
    assert np.ptp(found) > 240
    order = np.argsort(narrow[..., 0], axis=None)
    assert (np.diff(found[..., 0].reshape(-1)[order].astype(int)) >= 0).all()


def test_each_change_comes_as_often_as_the_others(monkeypatch):
    seen = dict.fromkeys(OPS, 0)
    for name in OPS:
        monkeypatch.setitem(OPS, name, lambda image, m, sign, centre, name=name: seen.update({name: seen[name] + 1}) or image)
    for row in uniforms(0, np.zeros(2000), np.arange(2000), 2 * DRAWS):
        randaugment(Image.fromarray(PIXELS), row, 2, 10)
    assert sum(seen.values()) == 4000
    assert min(seen.values()) > 190
    assert max(seen.values()) < 310


@pytest.mark.parametrize("channels", [1, 3])
def test_as_part_of_the_augmentation(channels):
    how = How(randaugment=(2, 10))
    inception = AUGMENTATIONS["inception"]
    images = [PIXELS if channels == 3 else PIXELS[:, :, :1]] * 24
    draws = uniforms(5, np.zeros(24), np.arange(24), inception.draws(how))
    plain = inception.apply(images, draws[:, : inception.draws(How())], 32, channels)
    found = inception.apply(images, draws, 32, channels, how=how)
    assert found.shape == plain.shape
    assert sum((a != b).any() for a, b in zip(plain, found, strict=True)) > 15
    np.testing.assert_array_equal(inception.apply(images[3:4], draws[3:4], 32, channels, how=how)[0], found[3])
    as_bytes = inception.apply(images, draws, 32, channels, np.uint8, how=how)
    np.testing.assert_allclose(as_bytes / 127.5 - 1, found, atol=1e-6)
    with pytest.raises(ValueError, match="two numbers of 0 or more"):
        How(randaugment=(-1, 10))


# --- random erasing -----------------------------------------------------------------------------------------------------------


def test_a_share_of_the_images_gets_a_box_of_noise():
    pixels = np.full((50, 60, 3), 7, np.uint8)
    rows = uniforms(0, np.zeros(2000), np.arange(2000), ERASE_DRAWS)
    found = [erase(pixels, row, 0.25) for row in rows]
    changed = [(image != 7).any(-1) for image in found]
    touched = np.array([one.any() for one in changed])
    assert abs(touched.mean() - 0.25) < 0.03
    boxes = []
    for one in (one for one in changed if one.any()):
        down, right = np.flatnonzero(one.any(1)), np.flatnonzero(one.any(0))
        h, w = np.ptp(down) + 1, np.ptp(right) + 1
        assert one.sum() > 0.8 * h * w, "one box, of which hardly a pixel is left as it was"
        boxes.append((h, w))
    h, w = np.array(boxes).T
    share = h * w / 3000
    assert 0.01 < share.min() < 0.04
    assert 0.28 < share.max() < 0.35
    assert abs(np.log(h / w).mean()) < 0.15
    noise = np.concatenate([image[one] for image, one in zip(found, changed, strict=True)]).astype(float)
    np.testing.assert_allclose(noise.mean(0), MEAN, atol=4)
    assert (noise.std(0) > 45).all()
    np.testing.assert_array_equal(erase(pixels, rows[0], 1.0), erase(pixels, rows[0], 1.0))
    assert (erase(pixels, rows[0], 1.0) != erase(pixels, rows[1], 1.0)).any()


def test_erasing_as_part_of_the_augmentation():
    how, inception = How(erase=1.0, randaugment=(1, 9)), AUGMENTATIONS["inception"]
    draws = uniforms(5, np.zeros(8), np.arange(8), inception.draws(how))
    for channels in (1, 3):
        images = [PIXELS[:, :, :channels]] * 8
        found = inception.apply(images, draws, 32, channels, np.uint8, how=how)
        plain = inception.apply(images, draws, 32, channels, np.uint8, how=How(randaugment=(1, 9)))
        share = (found != plain).any(-1).mean((1, 2))
        assert (share > 0.01).all()
        assert (share < 0.36).all()
    with pytest.raises(ValueError, match=r"erase 2: a share in \[0, 1\]"):
        How(erase=2)
