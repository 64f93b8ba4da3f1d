"""Masked patch prediction (paper, section 4.6 and appendix B.1.2): what is corrupted, and what is predicted of it.

    K = rate N patches of an image are corrupted: 80 % become a learned [mask] embedding, 10 % the embedding of another patch of the
    image, 10 % stay. Of each corrupted patch its representation LN(zL) predicts, by one linear layer,

    mean     the patch's mean colour, 3 bits a channel: one choice of 512                                       (the paper's)
    small    the colours of the patch reduced to 4x4, in parallel: 16 choices of 512
    pixels   the patch itself, by the squared difference

What is corrupted goes by (key, the image's global index, patch), by the hash of `kernels.dropout`, never by where an image lies on
a mesh. The paper leaves open, and here is decided: exactly K patches of every image, to the nearest whole number and at least one,
rather than each by its own draw, so that all images weigh the same in the loss; another patch is any but the patch itself, each as
likely; the loss is the mean over the corrupted patches, over the 16 choices of `small` and the values of `pixels` in [-1, 1]; 3
bits are the upper three of a byte, of means in exact arithmetic. An image of one channel has 8 colours instead of 512.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels import dropout as drop
from vitcore.parameters import COLUMNS, ROWS, Leaf, dense, normal, zeros

MASK, OTHER = 0.8, 0.1  # shares of the corrupted patches; the rest stays as it is
_ORDER, _KIND, _WHICH = 0x165667B1, 0x27D4EB2F, 0x5BD1E995  # what a draw is for: no site of `kernels.dropout` is any of them
BITS = 3  # a channel
SMALL = 4  # cells a side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masked:
    """What a model under masked patch prediction is told. target: a name of TARGETS. rate: the share of the patches that is
    corrupted, in (0, 1]. Raises ValueError for others."""

    target: str = "mean"
    rate: float = 0.5

    def __post_init__(self):
        if self.target not in TARGETS:
            raise ValueError(f"masked target {self.target!r}: {', '.join(TARGETS)} are the known ones")
        if isinstance(self.rate, bool) or not isinstance(self.rate, int | float) or not 0 < self.rate <= 1:
            raise ValueError(f"masked rate {self.rate!r}: a share of the patches in (0, 1] is required")

    def count(self, patches: int) -> int:
        """How many of so many patches are corrupted: the nearest whole number, at least one."""
        return max(1, int(self.rate * patches + 0.5))


def check(config) -> None:
    """Raise ValueError where masked patches cannot be predicted of a ViTConfig."""
    (rows, columns), (height, width) = config.grid, config.image_shape
    if rows * columns < 2:
        raise ValueError(
            f"image_size={config.image_size} makes one patch: masked patch prediction needs two at least, use smaller patches"
        )
    if height % rows or width % columns:
        raise ValueError(f"image_size={config.image_size} is not divisible into {rows} x {columns} patches: use a multiple of them")
    if config.channels > 3:
        raise ValueError(f"channels={config.channels}: masked patch prediction has colours of 1 to 3 channels")
    TARGETS[config.masked.target].check(config)


def leaves(config) -> tuple[Leaf, ...]:
    """The [mask] embedding, and the linear layer that predicts."""
    outputs = TARGETS[config.masked.target].outputs(config)
    used = config.masked.count(config.grid[0] * config.grid[1])
    return (
        Leaf(path=("masked", "embedding"), shape=(config.width,), initial=normal(0.02)),
        *dense(
            ("masked", "head"), (config.width, outputs), zeros, split=(ROWS, COLUMNS), names={},
            multiply_adds={"head": used * config.width * outputs},
        ),
    )  # fmt: skip


# --- corruption --------------------------------------------------------------------------------------------------------------


class Corruption(NamedTuple):
    """Of B images of N patches. places: int32 [B, K], the corrupted patches, ascending. source: int32 [B, N], whose embedding
    stands in each patch's place: the patch's own, another's, or -1 for the [mask] embedding."""

    places: jax.Array
    source: jax.Array


def corruption(key, first_example, images: int, config) -> Corruption:
    """What is corrupted of so many images. key: a JAX PRNG key. first_example: the global index of the first of them."""
    n = config.grid[0] * config.grid[1]
    k = config.masked.count(n)
    word = lax.bitcast_convert_type(jax.random.bits(key, (), jnp.uint32), jnp.int32)
    example, patch = jnp.arange(images, dtype=jnp.int32)[:, None], jnp.arange(n, dtype=jnp.int32)
    rows = (jnp.asarray(first_example, jnp.int32) + example) * n + patch

    def draw(site):
        """int32 [B, N] of 24 random bits."""
        return lax.shift_right_logical(drop.row_hash(drop.site_key(word, site), rows), jnp.int32(8))

    # all 32 bits of the hash: one to one in the rows, so that no two patches tie
    order = jnp.argsort(drop.row_hash(drop.site_key(word, _ORDER), rows), axis=1)
    rank = jnp.argsort(order, axis=1)
    own = jnp.broadcast_to(patch, rows.shape)
    other = (own + 1 + draw(_WHICH) % (n - 1)) % n
    kind = draw(_KIND)
    source = jnp.where(kind < round((MASK + OTHER) * 2**24), other, own)
    source = jnp.where(kind < round(MASK * 2**24), -1, source)
    return Corruption(jnp.sort(order[:, :k], axis=1).astype(jnp.int32), jnp.where(rank < k, source, own))


def corrupted(patches, chosen: Corruption, embedding):
    """Patch embeddings [B, N, D] as the encoder reads them: the same shape and dtype. embedding: [D], of [mask]."""
    taken = at(patches, jnp.maximum(chosen.source, 0))
    return jnp.where(chosen.source[:, :, None] < 0, embedding.astype(patches.dtype), taken)


def at(x, places):
    """x [B, N, ...] at places [B, K]: [B, K, ...]."""
    return jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1)


# --- targets -----------------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """What is predicted of a corrupted patch; `config` is a ViTConfig.

    outputs: (config) -> columns of the linear layer. colours: choices of a colour a patch, which `right` counts. of: (images
    [B, Y, X, C] in [-1, 1], config) -> targets [B, N, ...]. losses: (predictions [B, K, outputs] float32, targets [B, K, ...]) ->
    [B, K] float32. best: (predictions, config) -> the likeliest targets. right: (targets, targets, config) -> int32 [B, K], how
    many of their colours are the same. shown: (targets, config) -> [B, K, cells, cells, C] in [0, 1], or pixels for cells, for
    people. check: (config) raises ValueError.
    """

    outputs: Callable
    colours: int
    of: Callable
    losses: Callable
    best: Callable
    right: Callable
    shown: Callable
    check: Callable = lambda config: None


def side(config) -> tuple[int, int]:
    """(Y, X) pixels of a patch; of a hybrid, of the part of the image that a token stands for."""
    return config.image_shape[0] // config.grid[0], config.image_shape[1] // config.grid[1]


def patches_of(images, config):
    """Images [B, Y, X, C] to [B, N, Py, Px, C], row after row."""
    (rows, columns), (py, px) = config.grid, side(config)
    x = images.reshape(images.shape[0], rows, py, columns, px, images.shape[-1])
    return x.swapaxes(2, 3).reshape(images.shape[0], rows * columns, py, px, images.shape[-1])


def _cover(pixels: int, cells: int) -> np.ndarray:
    """float32 [cells, pixels]: how much of each pixel, in parts of 1 / cells, lies in each of the cells that share them evenly."""
    ends = np.arange(cells)[:, None] * pixels, np.arange(pixels)[None] * cells
    return np.clip(np.minimum(ends[0] + pixels, ends[1] + cells) - np.maximum(*ends), 0, None).astype(np.float32)


def levels(patches, cells: int):
    """Patches [..., Py, Px, C] in [-1, 1] to int32 [..., cells, cells, C]: the mean of each cell, its upper BITS bits.

    The sums are of whole numbers below 2^24 and so exact: no order of summation, device or batch moves a colour.
    """
    py, px = patches.shape[-3:-1]
    values = jnp.clip(jnp.round((patches.astype(jnp.float32) + 1) * 127.5), 0, 255)
    y, x = _cover(py, cells), _cover(px, cells)
    sums = jnp.einsum("...yxc,iy->...ixc", values, y, precision=lax.Precision.HIGHEST)
    sums = jnp.einsum("...ixc,jx->...ijc", sums, x, precision=lax.Precision.HIGHEST)
    return jnp.round(sums).astype(jnp.int32) // (py * px << (8 - BITS))


def colour(levels) -> Any:
    """int32 [..., C] of BITS bits each to one number [...], the first channel's foremost."""
    channels = levels.shape[-1]
    return sum(levels[..., c] << (BITS * (channels - 1 - c)) for c in range(channels))


def _choices(cells: int) -> Target:
    """The colour of each of cells x cells parts of a patch, by softmax."""

    def number(config):
        return 2 ** (BITS * config.channels)

    def split(predictions):
        return predictions.reshape(*predictions.shape[:-1], cells**2, -1)

    def of(images, config):
        return colour(levels(patches_of(images, config), cells)).reshape(images.shape[0], -1, cells**2)

    def losses(predictions, targets):
        return -at_last(jax.nn.log_softmax(split(predictions)), targets).mean(-1)

    def best(predictions, config):
        return split(predictions).argmax(-1).astype(jnp.int32)

    def right(ours, theirs, config):
        return (ours == theirs).sum(-1)

    def shown(targets, config):
        places = [BITS * (config.channels - 1 - c) for c in range(config.channels)]
        colours = jnp.stack([((targets >> place) % 2**BITS + 0.5) / 2**BITS for place in places], axis=-1)
        return colours.reshape(*targets.shape[:-1], cells, cells, config.channels)

    def check(config):
        if min(side(config)) < cells:
            raise ValueError(
                f"masked target 'small' reduces patches to {cells}x{cells}, and these have {min(side(config))} pixels a side: "
                "use larger patches, or the target mean or pixels"
            )

    return Target(lambda config: cells**2 * number(config), cells**2, of, losses, best, right, shown, check)


def at_last(x, index):
    """x [..., V] at an index [...]."""
    return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]


def _as_patches(values, config):
    """Values [..., Py Px C] in [-1, 1] as patches."""
    return values.reshape(*values.shape[:-1], *side(config), config.channels)


def _same_mean(ours, theirs, config):
    one, other = (colour(levels(_as_patches(values, config), 1))[..., 0, 0] for values in (ours, theirs))
    return (one == other).astype(jnp.int32)


TARGETS: dict[str, Target] = {
    "mean": _choices(1),
    "small": _choices(SMALL),
    "pixels": Target(
        outputs=lambda config: side(config)[0] * side(config)[1] * config.channels,
        colours=1,  # the mean of what is predicted
        of=lambda images, config: patches_of(images, config).reshape(images.shape[0], config.grid[0] * config.grid[1], -1),
        losses=lambda predictions, targets: jnp.square(predictions - targets).mean(-1),
        best=lambda predictions, config: predictions,
        right=_same_mean,
        shown=lambda targets, config: jnp.clip((_as_patches(targets, config) + 1) / 2, 0, 1),
    ),
}
