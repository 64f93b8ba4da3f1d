"""Bilinear interpolation without antialiasing, tf.image.resize(image, size), of a box of an image, to whole levels.

    out(i, j) = the image between its pixels, at ((i + 1/2) h / size - 1/2, (j + 1/2) w / size - 1/2); edges are repeated

Pillow cannot: its resize widens the filter when it shrinks, its transform cuts fractions off, which makes images darker by half a
level, and takes 1.3 ms where this takes 0.8 (crops of a photograph to 224 x 224; Pillow's resize takes 0.7). The rows and columns
that are not between two taken pixels are never touched. Results are rounded to the nearest level: within 1/2 of the release's
floats, where the authors' later code cuts off.
"""

import threading
from functools import lru_cache

import numpy as np

_kept = threading.local()  # buffers, one set a thread: fresh memory costs more than the arithmetic


def bilinear(pixels: np.ndarray, box: tuple[float, float, float, float] | None, size: int) -> np.ndarray:
    """uint8 [size, size, C] of pixels, uint8 [Y, X, C]. box: (left, upper, right, lower) in pixels, None for all; what is around it
    is seen at its edges."""
    y, x, c = pixels.shape
    left, upper, right, lower = box or (0, 0, x, y)
    y0, y1, down, _ = _taps(upper, lower, y, size, 1)
    x0, x1, _, along = _taps(left, right, x, size, c)
    rows = pixels.reshape(y, x * c)
    above, below = (_take(rows, at, 0, f"rows {k}", np.uint8) for k, at in enumerate((y0, y1)))
    if x <= 2 * size:
        between = _lerp(above, below, down, "between").reshape(size, x, c)
        a, b = (_take(between, at, 1, f"columns {k}", np.float32) for k, at in enumerate((x0, x1)))
        out = _lerp(a.reshape(size, -1), b.reshape(size, -1), along, "out")
    else:  # most columns are skipped: choose them first
        corners = [
            _take(line.reshape(size, x, c), at, 1, f"corner {i}{k}", np.uint8).reshape(size, -1)
            for i, line in enumerate((above, below)) for k, at in enumerate((x0, x1))
        ]  # fmt: skip
        a, b = (_lerp(corners[2 * i], corners[2 * i + 1], along, f"line {i}") for i in (0, 1))
        out = _lerp(a, b, down, "out")
    out += np.float32(0.5)
    return out.astype(np.uint8).reshape(size, size, c)


@lru_cache(maxsize=4096)
def _taps(start: float, end: float, count: int, size: int, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The pixels before and after each place, and the share of the second as a column and, repeated over the channels, as a row."""
    place = start + (np.arange(size) + 0.5) * ((end - start) / size) - 0.5
    before = np.floor(place).astype(np.intp)
    share = (place - before).astype(np.float32)
    return np.clip(before, 0, count - 1), np.clip(before + 1, 0, count - 1), share[:, None], np.repeat(share, channels)


def _buffer(name: str, shape: tuple[int, ...], dtype) -> np.ndarray:
    size = int(np.prod(shape))
    held = getattr(_kept, name, None)
    if held is None or held.size < size:
        held = np.empty(size, dtype)
        setattr(_kept, name, held)
    return held[:size].reshape(shape)


def _take(array: np.ndarray, at: np.ndarray, axis: int, name: str, dtype) -> np.ndarray:
    shape = (len(at), *array.shape[1:]) if axis == 0 else (array.shape[0], len(at), *array.shape[2:])
    return array.take(at, axis, out=_buffer(name, shape, dtype), mode="clip")


def _lerp(a: np.ndarray, b: np.ndarray, share: np.ndarray, name: str) -> np.ndarray:
    out = np.subtract(b, a, out=_buffer(name, a.shape, np.float32), dtype=np.float32)
    out *= share
    out += a
    return out
