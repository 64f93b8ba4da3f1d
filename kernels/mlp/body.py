"""What the bodies of the forward and the backward kernel share: GELU, masks, and the walk over a block's images."""

import math
from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.body import iota, kept, staggered, sweep, unpacked_row
from kernels.device import LANES, SUBLANES
from kernels.mlp.plan import Shape, Tiling
from kernels.mlp.reference import LOGISTIC

PIECE = 128  # rows normalised or transposed at a time: one square of the transpose unit


_TANH, _CUBIC = math.sqrt(2 / math.pi), math.sqrt(2 / math.pi) * 0.044715


def gelu(a, kind):
    """GELU(a) = a p, and p, float32: p = (1 + tanh(a (_TANH + _CUBIC a^2))) / 2, in the exact form the normal cdf, in those of
    LOGISTIC the logistic function of a rate times a, which is (1 + tanh(rate a / 2)) / 2."""
    if kind == "tanh":
        p = 0.5 + 0.5 * jnp.tanh(a * (_TANH + _CUBIC * (a * a)))
    elif kind in LOGISTIC:
        p = 0.5 + 0.5 * jnp.tanh(a * (0.5 * LOGISTIC[kind]))
    else:
        p = 0.5 + 0.5 * lax.erf(a * math.sqrt(0.5))
    return a * p, p


def gelu_slope(a, h, p, kind):
    """dGELU/da at a, where h and p are what `gelu` returned: p + a dp/da, with dp/da = 2 p (1 - p) du/da for the tanh of u."""
    if kind == "tanh":
        return p + h * (1 - p) * (2 * _TANH + 6 * _CUBIC * (a * a))
    if kind in LOGISTIC:
        return p + LOGISTIC[kind] * h * (1 - p)
    return p + a * jnp.exp(-0.5 * (a * a)) * (1 / math.sqrt(2 * math.pi))


def by_tile(f, rows):
    """f(rows [n, K] as [n/8, 8, K]), for an f that adds or multiplies vectors [8, K] of eight equal rows.

    A vector of one row would be spread over sublanes through memory by v2 and v3, in regions that nothing is scheduled across.
    """
    n, k = rows.shape
    if n % SUBLANES:
        whole = n // SUBLANES * SUBLANES
        ragged = f(jnp.broadcast_to(rows[whole:, None], (n - whole, SUBLANES, k)))[:, 0]
        return jnp.concatenate([by_tile(f, rows[:whole]), ragged]) if whole else ragged
    return f(rows.reshape(n // SUBLANES, SUBLANES, k)).reshape(n, k)


def sum_by_tile(rows):
    """Sums of rows [n, K] by their number modulo 8, [8, K]: without a reduction over sublanes. A ragged rest goes to the first."""
    n, k = rows.shape
    whole = n // SUBLANES * SUBLANES
    total = jnp.sum(rows[:whole].reshape(-1, SUBLANES, k), axis=0) if whole else jnp.zeros((SUBLANES, k), rows.dtype)
    if whole == n:
        return total
    first = lax.broadcasted_iota(jnp.int32, (SUBLANES, 1), 0) == 0
    return total + jnp.where(first, jnp.sum(rows[whole:], axis=0, keepdims=True), 0.0)


def for_pieces(t: Tiling, body):
    """body(image, first row of it, number of rows) for every piece of every image of a block."""
    sweep(t.images, 1, lambda image, _: sweep(t.rows, PIECE, lambda first, rows: body(image, first, rows)))


def at(t: Tiling, image, r):
    """Where row r of an image stands in a block whose images lie one stride apart."""
    return pl.multiple_of(image * t.stride + r, math.gcd(t.stride, PIECE))


class Block:
    """Where the row tile i of the grid stands in x, of `images` images with `rows` rows, or flat, of one whose rows are many images
    of `length`; of these the first `tokens` count in the masks of dropout."""

    def __init__(self, t: Tiling, i, images: int, rows: int, length: int, tokens: int):
        parts = pl.cdiv(rows, t.rows)
        self.t, self.images, self.rows, self.length, self.tokens = t, images, rows, length, tokens
        self.tile, self.image, self.row = i, lax.div(i, parts) * t.images, lax.rem(i, parts) * t.rows

    def _place(self, n):
        return unpacked_row(iota(n, 0), self.t.unpack)

    def valid(self, image, r, n):
        """bool [n, 1]: which of a piece's rows exist. The others hold anything at all, NaN included."""
        return (self.row + r + self._place(n) < self.rows) & (self.image + image < self.images)

    def _image_of(self, p):
        """int32: in which image of the block place p of VMEM lies, one stride per image."""
        return sum(((p >= k * self.t.stride).astype(jnp.int32) for k in range(1, self.t.images)), jnp.zeros_like(p))

    def exist(self, first, n):
        """bool [n, 1]: which of n rows of the block as they lie in VMEM, from `first` on, there are."""
        p = unpacked_row(first + iota(n, 0), self.t.unpack)
        image = self._image_of(p)
        return (self.row + p - image * self.t.stride < self.rows) & (self.image + image < self.images)

    def global_rows(self, image, r, n):
        """int32 [n, 1]: the rows of a piece, counted over all of x."""
        if self.t.flat:
            return self._counted(self.row + r, self._place(n), n)
        return (self.image + image) * self.tokens + self.row + r + self._place(n)

    def _counted(self, first, place, n: int):
        """int32: rows first + place of flat x, place under n, counted without padding."""
        if self.tokens == self.length:
            return first + place
        image, row = lax.div(first, self.length), lax.rem(first, self.length) + place
        passed = sum((row >= k * self.length).astype(jnp.int32) for k in range(1, n // self.length + 2))
        return image * self.tokens + row - passed * (self.length - self.tokens)

    def all_global_rows(self, n, axis, first=0):
        """The same for n rows of the block as they lie in VMEM, one stride per image, from `first` on; in the padding anything."""
        p = unpacked_row(first + iota(n, axis), self.t.unpack)
        if self.t.flat:
            return self._counted(self.row, p, self.t.columns)
        return self.image * self.tokens + self.row + p + self._image_of(p) * (self.tokens - self.t.stride)


def keep(scalars, site, rows, columns, rate):
    """The dropout mask of rows and columns. scalars: keys of sites 0 (hidden) and 1 (output), first row and hidden column."""
    return kept(scalars[site], scalars[2] + rows, columns, rate)


def block_specs(t: Tiling, shape: Shape, rows: int):
    """Block specs of a row tile, `rows` of each of its images, of a [1, D] vector, w_in and w_out."""
    d, f, of_image = shape.d, shape.f, pl.cdiv(t.view(shape)[1], t.rows)
    tile = pl.BlockSpec((t.images, rows, d), lambda i, j, _: (lax.div(i, of_image), lax.rem(i, of_image), 0))
    vector = pl.BlockSpec((SUBLANES, d), lambda i, j, _: (0, 0))
    if t.roomy:
        return tile, vector, *[pl.BlockSpec(memory_space=pl.ANY)] * 2
    if t.resident:
        whole = partial(pl.BlockSpec, index_map=lambda i, j, _: (0, 0), pipeline_mode=pl.Buffered(1))
        return tile, vector, whole((d, f)), whole((f, d))
    columns = pl.BlockSpec((d, t.hidden), lambda i, j, _: (0, j))
    return tile, vector, columns, pl.BlockSpec((t.hidden, d), lambda i, j, _: (j, 0))


def in_spans(t: Tiling, span: int, hidden, products) -> None:
    """hidden(first) of every span of a hidden tile and products(n) of what was made: of all spans at once, or of each in its turn
    while the next is made."""
    if t.spans == 1:
        sweep(t.hidden, span, lambda k, _: hidden(k))
        products(0)
    else:
        staggered(t.spans, (lambda n: hidden(n * span), products), (1,))


def hidden_columns(ref, first, size):
    """ref[:, first : first + size] of a block of w_in, `first` a multiple of 128 or a literal 0."""
    return ref[...] if size == ref.shape[1] else ref[:, pl.ds(pl.multiple_of(first, LANES), size)]


def hidden_rows(ref, first, size):
    return ref[...] if size == ref.shape[0] else ref[pl.ds(pl.multiple_of(first, LANES), size)]
