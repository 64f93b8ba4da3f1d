"""Fitting a learned position embedding to another grid of patches, as fine-tuning at another resolution needs (paper section 3.2),
and a patch projection to patches of another size.

Output row i of m takes the value at place p_i of the n input rows, linear between neighbours, and columns likewise:

    corners:     p_i = i (n - 1) / (m - 1)            the first and last entries stay what and where they were
    half-pixel:  p_i = (i + 1/2) n / m - 1/2          pixel areas are scaled; places outside are moved to the edge

corners is what the authors' release does (scipy.ndimage.zoom, order 1) and what published fine-tuning results rest on;
half-pixel is the convention of image resizing (torch's align_corners=False), here without anti-aliasing.
"""

from typing import Literal

import numpy as np


def fit(
    position,
    *,
    grid: tuple[int, int],
    to: tuple[int, int],
    class_slots: int = 0,
    method: Literal["corners", "half-pixel"] = "corners",
) -> np.ndarray:
    """The embedding [T, D] of a grid of (rows, columns) patches, as the embedding [T', D] float32 of the grid `to`.

    class_slots: leading entries that belong to no patch and stay as they are. The same grid gives the same values bit for bit.
    Raises ValueError where position does not have class_slots + rows * columns entries, or for an unknown method.
    """
    position = np.asarray(position, np.float32)
    rows, columns = grid
    if position.ndim != 2 or position.shape[0] != class_slots + rows * columns or min(*grid, *to) < 1:
        raise ValueError(
            f"the position embedding is {list(position.shape)}: "
            f"[{class_slots} + {rows} x {columns}, D] is required, to be fitted to {to[0]} x {to[1]}"
        )
    if method not in ("corners", "half-pixel"):
        raise ValueError(f"method={method!r}: 'corners' or 'half-pixel' is required")
    if tuple(grid) == tuple(to):
        return position.copy()
    slots, patches = position[:class_slots], position[class_slots:].reshape(rows, columns, -1)
    patches = _resample(_resample(patches, to[0], method, 0), to[1], method, 1)
    return np.concatenate([slots, patches.reshape(to[0] * to[1], -1)]).astype(np.float32)


def fit_line(table, size: int, method: Literal["corners", "half-pixel"] = "corners") -> np.ndarray:
    """Entries [..., n, D] of a line as [..., size, D] float32, as `fit` does along a side of a grid."""
    table = np.asarray(table, np.float32)
    if table.shape[-2] == size:
        return table.copy()
    return np.moveaxis(_resample(np.moveaxis(table, -2, 0), size, method, 0), 0, -2).astype(np.float32)


def fit_patches(kernel, side: int) -> np.ndarray:
    """A patch projection [P, P, C, D] for patches of another side, [side, side, C, D] float32 (FlexiViT,
    arXiv:2212.08013, section 3.4).

    w' = pinv(R') w for the bilinear resize R of a patch (half-pixel, no antialiasing): of all projections that whose products with
    resized patches are nearest to those of w with the patches before; equal to them where side >= P.
    """
    out = np.asarray(kernel, np.float64)
    for axis in (0, 1):
        resize = _resample(np.eye(out.shape[axis]), side, "half-pixel", 0)  # [side, P]; of a square it is the product of two lines
        out = np.moveaxis(np.tensordot(np.linalg.pinv(resize.T), out, (1, axis)), 0, axis)
    return out.astype(np.float32)


def _resample(x: np.ndarray, size: int, method: str, axis: int) -> np.ndarray:
    """x with `size` entries along the axis, linear between the old ones; float64."""
    old = x.shape[axis]
    if method == "corners":
        place = np.linspace(0, old - 1, size) if size > 1 else np.zeros(1)
    else:
        place = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
    low = np.minimum(np.floor(place).astype(int), max(old - 2, 0))
    high = np.minimum(low + 1, old - 1)
    weight = (place - low).reshape(-1, *(1 for _ in range(x.ndim - axis - 1)))
    return x.take(low, axis) * (1 - weight) + x.take(high, axis) * weight
