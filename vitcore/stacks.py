"""The weights of a layer where they lie, in the arrays of all layers, for ops that read and differentiate them there.

A block's function is given a layer's weights as arrays, and does with them what it likes. `Stacks` knows which of them are still
slices of the arrays of all layers when they reach an op, by identity: one that a block has changed on the way is an array like any.
"""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels.stacked import Lent, Stacked, close


class Stacks:
    """arrays: path -> [L, ...], of the kernels of all layers; what an op returns of one takes its place. slices: path -> the weight
    of this layer, a slice of it. layer: its number. used: how many layers have used each array. kind: `Lent` where the layers are a
    loop, through which the arrays do not run."""

    def __init__(self, arrays: dict[Any, jax.Array], slices: dict[Any, jax.Array], layer, used: Counter, kind: type = Stacked):
        self.arrays, self.layer, self.used, self.kind = arrays, jnp.full(1, layer, jnp.int32), used, kind
        self.paths = {id(a): path for path, a in slices.items()}

    def found(self, weights):
        """(an op's record with `Stacked` for those of its kernels that are slices still, their paths)."""
        paths = {name: self.paths.get(id(w)) for name, w in weights._asdict().items() if name.endswith("kernel")}
        paths = {name: path for name, path in paths.items() if path is not None}
        given = {name: self.kind(self.arrays[path], self.layer, getattr(weights, name)) for name, path in paths.items()}
        return weights._replace(**given), list(paths.values())

    def put(self, paths, arrays) -> None:
        """The arrays as an op returned them."""
        for path, array in zip(paths, arrays, strict=True):
            self.arrays[path] = array
            self.used[path] += 1


def _kernels(weights) -> dict[Any, jax.Array]:
    """path -> the kernels, [L, ...], of the weights of all layers."""
    return {path: a for path, a in jax.tree.leaves_with_path(weights) if a.ndim > 2}


def looped(block, x, layers, depth: int):
    """`lax.scan` of block(x, layer, stacks) -> x over the layers, a tree (weights, keys). A slice that no op needs is not made.

    Gradients are those of the slices: for the arrays a loop would add up zeros.
    """
    arrays = {path: lax.stop_gradient(a) for path, a in _kernels(layers[0]).items()}

    def step(x, both):
        layer, number = both
        slices = {path: a for path, a in jax.tree.leaves_with_path(layer[0]) if path in arrays}
        return block(x, layer, Stacks(arrays, slices, number, Counter(), Lent)), None

    return lax.scan(step, x, (layers, jnp.arange(depth, dtype=jnp.int32)))[0]


def through(block, x, layers, split, depth: int):
    """x through block(x, layer, stacks) of every layer; `split` takes the tree `layers`, (weights, keys), apart into a list."""
    weights, _ = layers
    arrays = _kernels(weights)
    used: Counter = Counter()
    for number, layer in enumerate(split(layers)):
        slices = {path: a for path, a in jax.tree.leaves_with_path(layer[0]) if path in arrays}
        x = block(x, layer, Stacks(arrays, slices, number, used))
    return close(x, {str(path): a for path, a in arrays.items() if used[path] == depth})
