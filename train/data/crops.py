"""The inception crop: which part of an image is shown (Szegedy et al., 2014; ViT paper, B.1), by either of two rules in use.

tensorflow: what the authors' code calls, tf.image.sample_distorted_bounding_box. The shape is drawn, then the height:

    aspect a ~ U(0.75, 1.33)                 width = round(a height)
    height ~ U{h0 ... h1}                    h0 = round(sqrt(0.05 Y X / a))     h1 the largest that fits: at most Y high, X wide

so areas lean to the small side: at 375 x 500 their mean is 0.343 and 42.3 % lie below a quarter. torchvision: RandomResizedCrop,
area uniform and the logarithm of the aspect uniform; what does not fit is drawn again, so that there the mean is 0.416 and 28.1 %
lie below a quarter.

Both are pure functions of the images' sides and of rows of uniform draws.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

AREA = (0.05, 1.0)
TF_ASPECT = (0.75, 1.33)  # the operation's default, which the authors leave
TF_ATTEMPTS = 100
TORCH_ASPECT = (3 / 4, 4 / 3)
TORCH_ATTEMPTS = 10


class Crop(NamedTuple):
    """boxes(heights [B], widths [B], draws [B, self.draws]) -> int64 [B, 4]: (top, left, height, width), inside each image."""

    draws: int
    boxes: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def tensorflow(heights: np.ndarray, widths: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Crops by TensorFlow's rule; see the module.

    An attempt fails where rounding, or an image far from square, leaves an area outside 5-100 %; after 100 of them the whole image
    is taken. A crop smaller than the image never touches its lower edge, nor its right one: the place is drawn below H - h, not up
    to it, as there.
    """
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    h, w = heights.copy(), widths.copy()
    left_over = np.arange(len(h))
    for attempt in range(TF_ATTEMPTS):
        shape, size = draws[left_over, 2 * attempt], draws[left_over, 2 * attempt + 1]
        found, ch, cw = _attempt(heights[left_over], widths[left_over], shape, size)
        h[left_over[found]], w[left_over[found]] = ch[found], cw[found]
        left_over = left_over[~found]
        if not len(left_over):
            break
    top, left = np.floor(draws[:, -2] * (heights - h)), np.floor(draws[:, -1] * (widths - w))
    return np.stack([top, left, h, w], axis=1).astype(np.int64)


def _attempt(y: np.ndarray, x: np.ndarray, shape: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(whether it may be, height, width) of one try for each image."""
    aspect = TF_ASPECT[0] + (TF_ASPECT[1] - TF_ASPECT[0]) * shape
    least, most = AREA[0] * y * x, AREA[1] * y * x

    def width(h):
        return np.rint(h * aspect)

    low, high = np.rint(np.sqrt(least / aspect)), np.rint(np.sqrt(most / aspect))
    widest = np.floor((x + 0.5 - 1e-7) / aspect)  # the largest height whose rounded width still fits
    widest -= width(widest) > x
    high = np.where(width(high) > x, widest, high)
    high = np.minimum(high, y)
    low = np.minimum(low, high)
    h = low + np.floor(size * (high - low + 1))
    h += h * width(h) < least  # what rounding alone has put outside is mended by one pixel
    h -= h * width(h) > most
    w = width(h)
    found = (h >= 1) & (w >= 1) & (h <= y) & (w <= x) & (h * w >= least) & (h * w <= most)
    return found, h, w


def torchvision(heights: np.ndarray, widths: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Crops by torchvision's rule: area uniform in 5-100 % of the image, aspect log-uniform in 3/4-4/3, the first of ten attempts
    that fits. Where none fits (images far from square) the largest centred crop within the aspects is taken."""
    y, x = heights[:, None], widths[:, None]
    area = (AREA[0] + (AREA[1] - AREA[0]) * draws[:, :TORCH_ATTEMPTS]) * y * x
    low, high = math.log(TORCH_ASPECT[0]), math.log(TORCH_ASPECT[1])
    aspect = np.exp(low + (high - low) * draws[:, TORCH_ATTEMPTS : 2 * TORCH_ATTEMPTS])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w >= 1) & (h >= 1) & (w <= x) & (h <= y)
    first = fits.argmax(axis=1)[:, None]
    found = fits.any(axis=1)
    w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]
    w = np.where(found, w, np.maximum(1, np.minimum(widths, np.rint(heights * TORCH_ASPECT[1]))))
    h = np.where(found, h, np.maximum(1, np.minimum(heights, np.rint(widths / TORCH_ASPECT[0]))))
    top = np.where(found, np.floor(draws[:, -2] * (heights - h + 1)), (heights - h) // 2)
    left = np.where(found, np.floor(draws[:, -1] * (widths - w + 1)), (widths - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(np.int64)


CROPS = {
    "tensorflow": Crop(draws=2 * TF_ATTEMPTS + 2, boxes=tensorflow),
    "torchvision": Crop(draws=2 * TORCH_ATTEMPTS + 2, boxes=torchvision),
}
