"""From images to the batch that a model sees: augmentation for training, preprocessing for evaluation, MixUp.

An augmentation is a pure function of the images and of their rows of draws (see `sampling.uniforms`), so what happens to an
example depends on (seed, epoch, index) and on nothing around it. Values end in [-1, 1] (ViT paper, B.1), or stay uint8, a quarter
of the memory, for `vitcore.pixels.to_unit` to bring there on the accelerator. Resizing is Pillow's bilinear filter, which widens
its support when it shrinks (anti-aliased; the paper's own release does not widen it).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from train.data.decode import Picture

Images = Sequence[Picture]  # uint8 [Y, X, C] each, of any sizes, C 1 or 3; or Pillow's own, of mode L or RGB


class Augmentation(NamedTuple):
    """apply(images, draws [B, self.draws], size, channels, dtype=float32) -> [B, size, size, channels]: float32 in [-1, 1], or
    uint8 where dtype is that and `exact`, the result being whole numbers from 0 to 255."""

    draws: int
    exact: bool
    apply: Callable[..., np.ndarray]


# --- evaluation -------------------------------------------------------------------------------------------------------------


def resize(images: Images, size: int, channels: int, dtype: Any = np.float32) -> np.ndarray:
    """Each image resized directly to the square, as the paper's release does. As Augmentation.apply."""
    shapes = {image.shape if isinstance(image, np.ndarray) else None for image in images}
    if shapes in ({(size, size, channels)}, {(size, size, 1)}):
        stack = np.stack([np.asarray(image) for image in images])  # the digits: the same pixels as below, eight times cheaper
        return _channels(stack if dtype == np.uint8 else _to_unit(stack), channels)
    return _resample(images, [None] * len(images), size, channels, dtype)


CENTER_SHARE = 224 / 256  # shorter side to 256, the middle 224: the share of the shorter side that stays


def center(images: Images, size: int, channels: int, dtype: Any = np.float32) -> np.ndarray:
    """Shorter side to size * 256/224, then the central square, in one resampling. As `resize`."""
    boxes = []
    for image in images:
        y, x = sides(image)
        side = min(y, x) * CENTER_SHARE
        boxes.append(((x - side) / 2, (y - side) / 2, (x + side) / 2, (y + side) / 2))
    return _resample(images, boxes, size, channels, dtype)


PREPROCESSES = {"resize": resize, "center": center}


# --- training ---------------------------------------------------------------------------------------------------------------

AREA = (0.05, 1.0)
ASPECT = (3 / 4, 4 / 3)
ATTEMPTS = 10


def crop_boxes(heights: np.ndarray, widths: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The inception crop (Szegedy et al., 2014): int [B, 4] of (top, left, height, width), inside each image.

    Area uniform in 5-100 % of the image, aspect ratio log-uniform in 3/4-4/3, the first of ten attempts that fits, anywhere
    uniformly. Where none fits (images far from square) the largest centred crop within the aspects is taken.

    Args:
        heights, widths: int [B]. draws: float [B, 2 * ATTEMPTS + 2].
    """
    y, x = heights[:, None], widths[:, None]
    area = (AREA[0] + (AREA[1] - AREA[0]) * draws[:, :ATTEMPTS]) * y * x
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    aspect = np.exp(low + (high - low) * draws[:, ATTEMPTS : 2 * ATTEMPTS])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w >= 1) & (h >= 1) & (w <= x) & (h <= y)
    first = fits.argmax(axis=1)[:, None]
    found = fits.any(axis=1)
    w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]
    w = np.where(found, w, np.maximum(1, np.minimum(widths, np.rint(heights * ASPECT[1]))))
    h = np.where(found, h, np.maximum(1, np.minimum(heights, np.rint(widths / ASPECT[0]))))
    top = np.where(found, np.floor(draws[:, -2] * (heights - h + 1)), (heights - h) // 2)
    left = np.where(found, np.floor(draws[:, -1] * (widths - w + 1)), (widths - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(np.int64)


def inception(images: Images, draws: np.ndarray, size: int, channels: int, dtype: Any = np.float32) -> np.ndarray:
    """Inception crop, bilinear to the square, horizontal flip of one half: the paper's augmentation (B.1)."""
    shapes = np.array([sides(image) for image in images])
    boxes = crop_boxes(shapes[:, 0], shapes[:, 1], draws[:, :-1])
    crops = [_crop(image, box) for image, box in zip(images, boxes.tolist(), strict=True)]
    return _resample(crops, [None] * len(crops), size, channels, dtype, flips=draws[:, -1] < 0.5)


# An MLP (256, 128) after 1200 batches of 128, two seeds, on the held-out fifth: 97.9 % without augmentation, 98.3 % with half
# this shift, 98.9 % as it stands, 99.0 % with 1.15 and 15 degrees (one image is 0.3 %).
DIGIT_SHIFT = 1 / 8  # of the side, either way: one pixel of an 8x8 digit
DIGIT_SCALE = 1.1
DIGIT_DEGREES = 10.0


def digits(images: Images, draws: np.ndarray, size: int, channels: int, dtype: Any = np.float32) -> np.ndarray:
    """A small rotation, scaling and shift; never a flip, which makes other figures of some digits. Black comes in at the edges.

    The whole batch is one bilinear gather, so the images must have one shape.
    """
    del dtype  # between pixels and between their values: float32 always
    if len({sides(image) for image in images}) > 1:
        found = sorted({sides(image) for image in images})
        raise ValueError(f"the augmentation 'digits' takes images of one shape, got {found[0]} and {found[1]}; use 'inception'")
    stack = np.stack([np.asarray(image) for image in images]).astype(np.float32)
    b, y, x, c = stack.shape
    u = (2 * draws - 1).astype(np.float32)
    angle, scale = u[:, 0] * np.float32(math.radians(DIGIT_DEGREES)), np.float32(DIGIT_SCALE) ** u[:, 1]
    cos, sin = (f(angle)[:, None, None] / scale[:, None, None] for f in (np.cos, np.sin))
    grid = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5)[None]  # pixel centres, the image's side being 1
    gy, gx = grid[:, :, None], grid[:, None, :]
    # Places in an image padded by one black pixel all round, in pixels; beyond the padding everything is black.
    py = (cos * gy - sin * gx + 0.5 + DIGIT_SHIFT * u[:, 2, None, None]) * y + 0.5
    px = (sin * gy + cos * gx + 0.5 + DIGIT_SHIFT * u[:, 3, None, None]) * x + 0.5
    py, px = np.clip(py, 0, y + 1), np.clip(px, 0, x + 1)
    iy, ix = np.minimum(py.astype(np.int32), y), np.minimum(px.astype(np.int32), x)
    fy, fx = (py - iy)[..., None], (px - ix)[..., None]
    flat = np.zeros((b, y + 2, x + 2, c), np.float32)
    flat[:, 1:-1, 1:-1] = stack
    flat = flat.reshape(-1, c)
    at = (np.arange(b, dtype=np.int32)[:, None, None] * (y + 2) + iy) * (x + 2) + ix
    upper = flat[at] * (1 - fx) + flat[at + 1] * fx
    lower = flat[at + x + 2] * (1 - fx) + flat[at + x + 3] * fx
    pixels = np.clip(upper * (1 - fy) + lower * fy, 0, 255)  # rounding may exceed by the last bit
    return _channels(_to_unit(pixels), channels)


def none(images: Images, draws: np.ndarray, size: int, channels: int, dtype: Any = np.float32) -> np.ndarray:
    """No augmentation: the image resized to the square, as in evaluation."""
    del draws
    return resize(images, size, channels, dtype)


AUGMENTATIONS = {
    "inception": Augmentation(draws=2 * ATTEMPTS + 3, exact=True, apply=inception),
    "digits": Augmentation(draws=4, exact=False, apply=digits),
    "none": Augmentation(draws=0, exact=True, apply=none),
}


# --- MixUp ------------------------------------------------------------------------------------------------------------------


def mixup_shares(draws: np.ndarray, strength: float) -> np.ndarray:
    """float32 [B] in [0.5, 1]: the share a row keeps, max(l, 1 - l) with l the `draws`-quantile of Beta(strength, strength)."""
    from scipy.special import betaincinv

    share = betaincinv(strength, strength, draws).astype(np.float32)
    return np.maximum(share, 1 - share)


def mixup(images: np.ndarray, labels: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row mixed with its neighbour: 0 with 1, 2 with 3, ... (Zhang et al., 2018). The neighbour is as random as the order is.

    images: [B, Y, X, C], B even, uint8 (rounded again, by 1/2 at most) or float32; overwritten. shares: float32 [B].
    Returns images, and labels of the neighbours [B]. The target of row i is shares[i] of its own label and the rest of that.
    """
    for i in range(0, len(images), 2):  # pair by pair, in the cache
        a, b = images[i].astype(np.float32), images[i + 1].astype(np.float32)
        for row, own, other in ((i, a, b), (i + 1, b, a)):
            mixed = shares[row] * own + (1 - shares[row]) * other
            images[row] = np.rint(mixed) if images.dtype == np.uint8 else mixed
    return images, labels.reshape(-1, 2)[:, ::-1].reshape(-1)


# --- shared -----------------------------------------------------------------------------------------------------------------


def sides(image: Picture) -> tuple[int, int]:
    """Height and width."""
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)  # type: ignore[return-value]


def _crop(image: Picture, box: list[int]) -> Picture:
    t, left, h, w = box
    return image[t : t + h, left : left + w] if isinstance(image, np.ndarray) else image.crop((left, t, left + w, t + h))


def _to_unit(pixels: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """0..255 to [-1, 1], float32. 0 and 255 land on the ends exactly."""
    out = np.multiply(pixels, np.float32(2 / 255), out=out, dtype=np.float32)
    return np.subtract(out, np.float32(1), out=out)


def _channels(batch: np.ndarray, channels: int) -> np.ndarray:
    """[B, Y, X, C] with 1 or 3 channels made `channels` wide: grey repeated, colour (float32 only) as its luma (ITU-R 601)."""
    if batch.shape[-1] == channels:
        return batch
    if batch.shape[-1] == 1:
        return np.repeat(batch, channels, axis=-1)
    return np.float32(0.299) * batch[..., :1] + np.float32(0.587) * batch[..., 1:2] + np.float32(0.114) * batch[..., 2:]


def _resample(
    images: Images, boxes: Sequence, size: int, channels: int, dtype: Any = np.float32, flips: np.ndarray | None = None
) -> np.ndarray:
    """Each image's box (left, upper, right, lower; None: all of it) resized to the square. uint8, or float32 in [-1, 1].

    Image by image to the end, so that the floats are written while the pixels are in the cache: a sixth of the time of
    converting the batch at once (224 px).
    """
    out = np.empty((len(images), size, size, channels), dtype)
    for i, (image, box) in enumerate(zip(images, boxes, strict=True)):
        picture = image
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
        if channels == 1 and picture.mode != "L":
            picture = picture.convert("L")
        picture = picture.resize((size, size), Image.Resampling.BILINEAR, box)
        if flips is not None and flips[i]:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        small = np.asarray(picture)
        small = small if small.ndim == 3 else small[..., None]
        if dtype == np.uint8:
            out[i] = small
        else:
            _to_unit(small, out[i])
    return out
