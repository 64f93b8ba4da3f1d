"""Random erasing (Zhong et al., 2020), as DeiT and MAE take it: a box of the image becomes noise.

The box has 2 % to a third of the image's area, its aspect is log-uniform in 0.3 to 3.33, it lies anywhere, and a side that would be
too long is cut to the image's. Noise is normal, each byte its own, with the mean and deviation of ImageNet's pixels.
"""

import math

import numpy as np

DRAWS = 6  # whether, area, aspect, place, seed of the noise
AREA = (0.02, 1 / 3)
ASPECT = (0.3, 1 / 0.3)
MEAN, DEVIATION = np.array([123.7, 116.3, 103.5], np.float32), np.array([58.4, 57.1, 57.4], np.float32)


def erase(pixels: np.ndarray, draws: np.ndarray, share: float) -> np.ndarray:
    """uint8 [Y, X, C] with a box of noise in it, in `share` of the cases; draws: float [DRAWS] in [0, 1)."""
    whether, area, aspect, down, right, seed = draws.tolist()
    if whether >= share:
        return pixels
    y, x, c = pixels.shape
    size = (AREA[0] + (AREA[1] - AREA[0]) * area) * y * x
    ratio = math.exp(math.log(ASPECT[0]) + math.log(ASPECT[1] / ASPECT[0]) * aspect)
    h, w = (max(1, min(round(side), most)) for side, most in ((math.sqrt(size * ratio), y), (math.sqrt(size / ratio), x)))
    top, left = int(down * (y - h + 1)), int(right * (x - w + 1))
    rng = np.random.Generator(np.random.Philox(key=int(seed * 2**32)))
    noise = rng.standard_normal((h, w, c), np.float32) * DEVIATION[:c] + MEAN[:c]
    pixels = pixels.copy()
    pixels[top : top + h, left : left + w] = np.clip(np.rint(noise), 0, 255)
    return pixels
