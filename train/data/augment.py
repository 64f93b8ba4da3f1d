"""From images to the batch that a model sees: augmentation for training, preprocessing for evaluation.

An augmentation is a pure function of the images and of their rows of draws (see `sampling.uniforms`), so what happens to an
example depends on (seed, epoch, index) and on nothing around it. Values end in [-1, 1] (ViT paper, B.1), or stay uint8, a quarter
of the memory, for `vitcore.pixels.to_unit` to bring there on the accelerator.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from train.data.crops import CROPS
from train.data.decode import Picture
from train.data.erase import DRAWS as ERASE_DRAWS
from train.data.erase import erase
from train.data.randaugment import DRAWS as CHANGE_DRAWS
from train.data.randaugment import randaugment
from train.data.resample import bilinear

Images = Sequence[Picture]  # uint8 [Y, X, C] each, of any sizes, C 1 or 3; or Pillow's own, of mode L or RGB


@dataclass(frozen=True, kw_only=True)
class How:
    """How images are cut, resized and changed, where there is a choice. The defaults are the authors'.

    antialias: whether shrinking averages all the pixels that fall on one (Pillow's widened filter), or interpolates between the
    four nearest (TensorFlow's resize, which the authors take). crop: the rule of the inception crop, see `crops`.
    randaugment: (layers, magnitude), see `randaugment`; None for none. erase: share of the images that get a box of noise.
    """

    antialias: bool = False
    crop: Literal["tensorflow", "torchvision"] = "tensorflow"
    randaugment: tuple[int, int] | None = None
    erase: float = 0.0

    def __post_init__(self):
        if self.crop not in CROPS:
            raise ValueError(f"unknown rule of the crop {self.crop!r}; the known ones are {', '.join(CROPS)}")
        if self.randaugment is not None and (len(self.randaugment) != 2 or min(self.randaugment) < 0):
            raise ValueError(f"randaugment {self.randaugment}: two numbers of 0 or more are required, layers and magnitude")
        if not 0 <= self.erase <= 1:
            raise ValueError(f"erase {self.erase}: a share in [0, 1] is required")


AUTHORS = How()


class Augmentation(NamedTuple):
    """apply(images, draws [B, self.draws(how)], size, channels, dtype=float32, how=How()) -> [B, size, size, channels]: float32 in
    [-1, 1], or uint8 where dtype is that and `exact`, the result being whole numbers from 0 to 255."""

    draws: Callable[[How], int]
    exact: bool
    apply: Callable[..., np.ndarray]


# --- evaluation -------------------------------------------------------------------------------------------------------------


def resize(images: Images, size: int, channels: int, dtype: Any = np.float32, how: How = AUTHORS) -> np.ndarray:
    """Each image resized directly to the square, as the paper's release does. As Augmentation.apply."""
    shapes = {image.shape if isinstance(image, np.ndarray) else None for image in images}
    if shapes in ({(size, size, channels)}, {(size, size, 1)}):
        stack = np.stack([np.asarray(image) for image in images])  # the digits: the same pixels as below, eight times cheaper
        return _channels(stack if dtype == np.uint8 else _to_unit(stack), channels)
    return _resample(images, [None] * len(images), size, channels, dtype, antialias=how.antialias)


CENTER_SHARE = 224 / 256  # the share of the (shorter) side that stays


def resize_center(images: Images, size: int, channels: int, dtype: Any = np.float32, how: How = AUTHORS) -> np.ndarray:
    """Resized to a square of side size * 256/224, whatever the shape was, of which the middle: the authors' few-shot evaluation.
    In one resampling. As `resize`."""
    large = round(size / CENTER_SHARE)
    start = (large - size) // 2
    shares = start / large, (start + size) / large
    boxes = [(x * shares[0], y * shares[0], x * shares[1], y * shares[1]) for y, x in map(sides, images)]
    return _resample(images, boxes, size, channels, dtype, antialias=how.antialias)


def center(images: Images, size: int, channels: int, dtype: Any = np.float32, how: How = AUTHORS) -> np.ndarray:
    """Shorter side to size * 256/224, the shape kept, then the central square, in one resampling, which averages whatever `how`
    says: so do the authors' later evaluations that keep the shape (resize by area). As `resize`."""
    del how
    boxes = []
    for image in images:
        y, x = sides(image)
        side = min(y, x) * CENTER_SHARE
        boxes.append(((x - side) / 2, (y - side) / 2, (x + side) / 2, (y + side) / 2))
    return _resample(images, boxes, size, channels, dtype, antialias=True)


PREPROCESSES = {"resize": resize, "resize-center": resize_center, "center": center}


# --- training ---------------------------------------------------------------------------------------------------------------


def inception(
    images: Images, draws: np.ndarray, size: int, channels: int, dtype: Any = np.float32, how: How = AUTHORS
) -> np.ndarray:  # fmt: skip
    """Inception crop, bilinear to the square, horizontal flip of one half: the paper's augmentation (B.1); then RandAugment and
    random erasing, where `how` has them."""
    rule = CROPS[how.crop]
    shapes = np.array([sides(image) for image in images])
    boxes = rule.boxes(shapes[:, 0], shapes[:, 1], draws[:, : rule.draws])
    crops = [_crop(image, box) for image, box in zip(images, boxes.tolist(), strict=True)]
    rest = draws[:, rule.draws :]
    return _resample(
        crops, [None] * len(crops), size, channels, dtype, antialias=how.antialias, flips=rest[:, 0] < 0.5,
        change=lambda i, small: _changed(small, rest[i, 1:], how),
    )  # fmt: skip


def _changed(small: np.ndarray, draws: np.ndarray, how: How) -> np.ndarray:
    """What `how` asks for beyond the crop and the flip; draws: of one image."""
    if how.randaugment is not None:
        picture = Image.fromarray(small[:, :, 0] if small.shape[2] == 1 else small)
        small = _pixels(randaugment(picture, draws[: CHANGE_DRAWS * how.randaugment[0]], *how.randaugment))
    if how.erase:
        small = erase(small, draws[-ERASE_DRAWS:], how.erase)
    return small


def _inception_draws(how: How) -> int:
    return CROPS[how.crop].draws + 1 + _change_draws(how)


def _change_draws(how: How) -> int:
    return (0 if how.randaugment is None else CHANGE_DRAWS * how.randaugment[0]) + ERASE_DRAWS * bool(how.erase)


# An MLP (256, 128) after 1200 batches of 128, two seeds, on the held-out fifth: 97.9 % without augmentation, 98.3 % with half
# this shift, 98.9 % as it stands, 99.0 % with 1.15 and 15 degrees (one image is 0.3 %).
DIGIT_SHIFT = 1 / 8  # of the side, either way: one pixel of an 8x8 digit
DIGIT_SCALE = 1.1
DIGIT_DEGREES = 10.0


def digits(
    images: Images, draws: np.ndarray, size: int, channels: int, dtype: Any = np.float32, how: How = AUTHORS
) -> np.ndarray:  # fmt: skip
    """A small rotation, scaling and shift; never a flip, which makes other figures of some digits. Black comes in at the edges.

    The whole batch is one bilinear gather, so the images must have one shape.
    """
    del dtype, how  # between pixels and between their values: float32 always
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


def none(
    images: Images, draws: np.ndarray, size: int, channels: int, dtype: Any = np.float32, how: How = AUTHORS
) -> np.ndarray:  # fmt: skip
    """No augmentation: the image resized to the square, as in evaluation."""
    del draws
    return resize(images, size, channels, dtype, how)


AUGMENTATIONS = {
    "inception": Augmentation(draws=_inception_draws, exact=True, apply=inception),
    "digits": Augmentation(draws=lambda how: 4, exact=False, apply=digits),
    "none": Augmentation(draws=lambda how: 0, exact=True, apply=none),
}


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
    images: Images, boxes: Sequence, size: int, channels: int, dtype: Any = np.float32, *, antialias: bool,
    flips: np.ndarray | None = None, change: Callable[[int, np.ndarray], np.ndarray] = lambda i, small: small,
) -> np.ndarray:  # fmt: skip
    """Each image's box (left, upper, right, lower; None: all of it) resized to the square. uint8, or float32 in [-1, 1].

    Image by image to the end, so that the floats are written while the pixels are in the cache: a sixth of the time of
    converting the batch at once (224 px). change: what else is done to the bytes of image i.
    """
    out = np.empty((len(images), size, size, channels), dtype)
    for i, (image, box) in enumerate(zip(images, boxes, strict=True)):
        picture = image
        if isinstance(picture, np.ndarray) and (antialias or picture.shape[2] > channels):
            picture = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
        if channels == 1 and isinstance(picture, Image.Image) and picture.mode != "L":
            picture = picture.convert("L")
        small = _resized(picture, size, box, antialias=antialias)
        if flips is not None and flips[i]:
            small = small[:, ::-1]
        small = change(i, small)
        if dtype == np.uint8:
            out[i] = small
        else:
            _to_unit(small, out[i])
    return out


def _resized(picture: Picture, size: int, box: tuple | None, *, antialias: bool) -> np.ndarray:
    """The box resized to the square, bilinear; uint8 [size, size, C]."""
    if antialias and isinstance(picture, Image.Image):
        return _pixels(picture.resize((size, size), Image.Resampling.BILINEAR, box))
    return bilinear(_pixels(picture), box, size)


def _pixels(picture: Picture) -> np.ndarray:
    """uint8 [Y, X, C]."""
    pixels = np.asarray(picture)
    return pixels if pixels.ndim == 3 else pixels[..., None]
