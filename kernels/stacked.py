"""A layer's weight where it lies: in the array of all layers, without a copy of its own.

Parameters are stacked, [L, ...]. A slice of them is a copy, read and written once more, before the kernel reads it; a gradient that
is put together from L results of kernels is another two. So a kernel may be given `Stacked` in place of a weight: its index maps
find the layer in the array (`launch.call`), and its gradient is written into the layer's place in the array of all gradients.

How that is differentiated. An op that is given `Stacked` returns the arrays again, beside its result, and whoever calls it goes on
with those that it returned: so the arrays run through the layers like x does. Backward their cotangents run the other way, and each
layer's op puts its own gradient in its place, which nobody has used before. The last arrays are read by nobody: `close` gives them
a cotangent that holds anything at all, for every place of it is written.

All gradients are there from the first layer's on, which a large batch has no room for, and little gain of. There, and where the
layers are a loop (`Lent`), the array is only read, and the gradient is that of `one`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels.settings import own

WRITTEN_TOKENS = 32768  # most tokens of a batch for whose gradients, in place, there is room from the first layer's on


class Stacked(NamedTuple):
    """A weight [...] that lies in array [L, ...] (or in more axes) at index `at`, int32 [1] (or more).

    one: the weight as an array of its own, for ops that cannot use it in place, and as what is differentiated where the array is
    only read: what nobody reads costs nothing. None inside an op that writes the gradient in place.
    """

    array: Any
    at: Any
    one: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape[self.at.shape[0] :]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self):
        return self.array.dtype


class Lent(Stacked):
    """One whose array may be read only: the op returns no array for it."""


def _is_written(w) -> bool:
    return isinstance(w, Stacked) and w.one is None


def taken(weights):
    """The arrays of those of `weights`, an op's record, whose gradients are written in place, in their order."""
    return tuple(w.array for w in weights if _is_written(w))


def in_place(weights, *, write: bool, dtype):
    """The record with its stacked weights as a kernel takes them: in `dtype`. write: gradients in place. A lent array is not cast:
    in a loop that would be every layer's weights for each layer."""

    def one(w):
        if not isinstance(w, Stacked):
            return w
        if isinstance(w, Lent):
            return w if w.dtype == dtype else w.one
        return w._replace(one=None) if write else w

    return type(weights)(*map(one, weights))


def apart(weights):
    """The record with every weight an array of its own."""
    return type(weights)(*(w.one if isinstance(w, Stacked) else w for w in weights))


def cast(w, dtype):
    """A weight in another dtype: of a stacked one all layers at once, which XLA does once for all of them."""
    return w._replace(array=w.array.astype(dtype)) if isinstance(w, Stacked) else w.astype(dtype)


def section(w, c: int | None):
    """[1, I, J] of a weight [S, I, J], or of a weight [I, J] where c is None."""
    if not isinstance(w, Stacked):
        return w[None] if c is None else w[c, None]
    array, at = jnp.expand_dims(w.array, w.array.ndim - 2), w.at
    return w._replace(array=array, at=at if c is None else jnp.append(at, jnp.int32(c)))


def places(weights, arrays) -> list:
    """For each of `weights` where its gradient belongs, `Stacked` in the cotangents `arrays` of what `taken` returned, or None."""
    rest = iter(arrays)
    return [w._replace(array=next(rest)) if _is_written(w) else None for w in weights]


def writable(place) -> bool:
    """Whether a kernel's float32 gradient can be written in its place."""
    return place is not None and place.dtype == jnp.float32


def cotangent(w, place, gradient, *, written: bool) -> Any:
    """What a custom_vjp returns for the weight `w`: its gradient in its dtype, or for a stacked one the array with the gradient in
    its place. written: a kernel has put it there, and `gradient` is the whole array."""
    if place is None:
        own = gradient.astype(w.dtype)
        return type(w)(None, None, own) if isinstance(w, Stacked) else own
    return Stacked(gradient if written else _put(place, gradient), None)


def _put(into: Stacked, gradient):
    """The array with a gradient in its place, by XLA."""
    update = gradient.astype(into.dtype).reshape(*(1,) * into.at.shape[0], *into.shape)
    return lax.dynamic_update_slice(into.array, update, (*into.at, *(0,) * into.ndim))


@jax.custom_vjp
def close(x, arrays):
    """x. It ends the way of `arrays`, all of whose places were used: their cotangent begins as memory that holds anything."""
    del arrays
    return x


def _backward(arrays, dx):
    def anything(a):
        axes = tuple(jax.typeof(a).manual_axis_type.varying)
        empty = lax.empty(a.shape, a.dtype)
        return lax.pcast(empty, axes, to="varying") if axes else empty

    return dx, jax.tree.map(anything, arrays)


close.defvjp(own(lambda x, arrays: (x, arrays)), own(_backward))
