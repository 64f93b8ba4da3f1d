"""Images of a batch mixed with each other: MixUp (Zhang et al., 2018) and CutMix (Yun et al., 2019).

Each row is mixed with its neighbour, 0 with 1, 2 with 3, ..., which is as random as the order is. How much stays of a row is drawn
for the whole batch, as the authors do, or for each row.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

DRAWS = 4  # of a share: its quantile, MixUp or CutMix, and the place of CutMix's box


@dataclass(frozen=True, kw_only=True)
class Mix:
    """mixup, cutmix: strengths a; shares are drawn from Beta(a, a), 0 for none. With both, one of the two is drawn each time.
    share: "batch", one for all rows of a global batch, or "row"."""

    mixup: float = 0.0
    cutmix: float = 0.0
    share: Literal["batch", "row"] = "batch"

    def __post_init__(self):
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name} {getattr(self, name)}: a strength >= 0 is required, 0 for none")
        if self.share not in ("batch", "row"):
            raise ValueError(f"unknown share of MixUp {self.share!r}; the known ones are batch, row")

    def __bool__(self) -> bool:
        return bool(self.mixup or self.cutmix)


def quantile(draws: np.ndarray, strength: float) -> np.ndarray:
    """float32: the `draws`-quantiles of Beta(strength, strength)."""
    from scipy.special import betaincinv

    return betaincinv(strength, strength, draws).astype(np.float32)


def mixup_shares(draws: np.ndarray, strength: float) -> np.ndarray:
    """float32 [B] in [0.5, 1]: the share a row keeps, max(l, 1 - l) with l the `draws`-quantile of Beta(strength, strength)."""
    share = quantile(draws, strength)
    return np.maximum(share, 1 - share)


def cutmix_boxes(draws: np.ndarray, strength: float, sides: tuple[int, int]) -> np.ndarray:
    """int [B, 4]: (top, left, bottom, right) of what a row gets of its neighbour, in images of `sides`.

    The box has the image's shape and the share 1 - l of its area, l being Beta-distributed; its centre lies anywhere, and what
    falls outside is cut off. draws: [B, 3], of l and of the centre.
    """
    size = np.array(sides)
    cut = np.sqrt(1 - quantile(draws[:, 0], strength))[:, None]
    half = np.floor(size * cut).astype(int) // 2
    centre = np.floor(draws[:, 1:] * size).astype(int)
    return np.concatenate([np.maximum(centre - half, 0), np.minimum(centre + half, size)], axis=1)


def mixup(images: np.ndarray, labels: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row mixed with its neighbour.

    images: [B, Y, X, C], B even, uint8 (rounded again, by 1/2 at most) or float32; overwritten. shares: float32 [B].
    Returns images, and labels of the neighbours [B]. The target of row i is shares[i] of its own label and the rest of that.
    """
    for i in range(0, len(images), 2):  # pair by pair, in the cache
        a, b = images[i].astype(np.float32), images[i + 1].astype(np.float32)
        for row, own, other in ((i, a, b), (i + 1, b, a)):
            mixed = shares[row] * own + (1 - shares[row]) * other
            images[row] = np.rint(mixed) if images.dtype == np.uint8 else mixed
    return images, neighbours(labels)


def cutmix(images: np.ndarray, labels: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each row with a box of its neighbour's; as `mixup`. Returns images, the neighbours' labels, and the shares [B] that stay."""
    y, x = images.shape[1:3]
    for i in range(0, len(images), 2):
        a, b = images[i].copy(), images[i + 1].copy()
        for row, other in ((i, b), (i + 1, a)):
            t, left, down, right = boxes[row]
            images[row, t:down, left:right] = other[t:down, left:right]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return images, neighbours(labels), (1 - area / (y * x)).astype(np.float32)


def neighbours(labels: np.ndarray) -> np.ndarray:
    return labels.reshape(-1, 2)[:, ::-1].reshape(-1)


def mixed(images: np.ndarray, labels: np.ndarray, draws: np.ndarray, how: Mix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """images (overwritten), labels of the neighbours, shares, by what `how` says and the draws [B, DRAWS], pairs alike or not."""
    cut = np.full(len(images), bool(how.cutmix)) if not (how.mixup and how.cutmix) else draws[:, 1] < 0.5
    cut[1::2] = cut[::2]  # a pair is mixed in one way
    other, shares = neighbours(labels), np.ones(len(images), np.float32)
    for chosen, is_cut in ((~cut, False), (cut, True)):
        if not chosen.any():
            continue
        some, own = images[chosen], draws[chosen]
        if is_cut:
            images[chosen], _, shares[chosen] = cutmix(
                some, labels[chosen], cutmix_boxes(own[:, [0, 2, 3]], how.cutmix, images.shape[1:3])
            )
        else:
            shares[chosen] = mixup_shares(own[:, 0], how.mixup)
            images[chosen] = mixup(some, labels[chosen], shares[chosen])[0]
    return images, other, shares
