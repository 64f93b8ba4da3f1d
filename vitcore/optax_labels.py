"""What an optimizer has to know of the parameters and cannot read off their shapes.

The blocks of a model are stacked: `params["blocks"]["mlp_in"]["bias"]` is [layers, F], which an optimizer that looks at `ndim`
takes for a matrix, and `mlp_in`'s kernel is [layers, D, F], which it takes for none. So a rule by `ndim` decays biases, Muon leaves
the kernels to Adam, and LAMB gives all layers one trust ratio. Three answers, each a tree beside the parameters or a wrapper:

    labels = vitcore.optax_labels(config)                      # "kernel", "bias", "norm" or "embedding" a leaf
    mask = jax.tree.map(lambda label: label == "kernel", labels)
    tx = optax.adamw(1e-3, weight_decay=0.1, mask=mask)

    tx = vitcore.per_layer(optax.lamb(1e-3), config)           # every layer's matrix is a leaf of its own
    tx = vitcore.per_layer(optax.contrib.muon(1e-3), config)

    depths = vitcore.layer_indices(config)                     # for a rate that falls from the head to the stem
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import optax

from vitcore import families, parameters
from vitcore.config import ViTConfig

Label = Literal["kernel", "bias", "norm", "embedding"]
_LAST = ("norm", "head", "pre_logits", "map")  # parts behind the last block


def _label(path: parameters.Path) -> Label:
    *parents, name = path
    if name in ("kernel", "qkv"):  # the attention of an axial ResNet has its projection without a layer around it
        return "kernel"
    if name == "scale":
        return "norm"
    if name == "bias":
        within = parents[-1] if parents else ""
        return "norm" if within.startswith(("norm", "gn")) else "bias"
    return "embedding"


def optax_labels(config) -> dict:
    """The parameters' tree with a word a leaf: what it is, whatever its number of axes.

    "kernel": of a dense layer or a convolution; "bias": of one; "norm": scale or bias of LayerNorm or GroupNorm; "embedding": class
    token, positions, mask and probe tokens. For `optax.multi_transform`, and for the masks of `optax.adamw` and its like: the
    paper's decay (Table 3) is of kernels alone. config: of any family.
    """
    return parameters.nested({leaf.path: _label(leaf.path) for leaf in families.leaves(config)})


def layer_indices(config) -> dict:
    """The parameters' tree with the depth of each leaf, int32: 0 for stem and embeddings, 1 ... L for the blocks, L + 1 behind.

    A leaf of the blocks has [L, 1, ...], which broadcasts against it; each other a scalar. A layer-wise rate of s^(L + 1 - depth)
    (BEiT, MAE) is `jax.tree.map(lambda depth: s ** (L + 1 - depth), layer_indices(config))`. Raises ValueError for a model without
    blocks.
    """
    if not isinstance(config, ViTConfig):
        raise ValueError(f"{type(config).__name__} has stages and no blocks of one depth: layer_indices is for models with blocks")

    depth = config.depth

    def index(leaf: parameters.Leaf):
        if leaf.path[0] == "blocks":
            return np.arange(1, depth + 1, dtype=np.int32).reshape(-1, *(1,) * (len(leaf.shape) - 1))
        return np.int32(depth + 1 if leaf.path[0] in _LAST else 0)

    return parameters.nested({leaf.path: index(leaf) for leaf in families.leaves(config)})


def per_layer(tx: optax.GradientTransformation, config) -> optax.GradientTransformationExtraArgs:
    """`tx` as it would be if no layer were stacked on another: each layer's array is a leaf of its own to it.

    Along the layer axis, and for q, k and v, which lie in one array, along theirs. What `tx` computes of a leaf as a whole (a trust
    ratio, a norm, an orthogonalisation) is then of one matrix. Its state has such leaves too: place it on a mesh by
    `jax.jit(tx.init)`'s own shardings rather than by `partition_specs`. Updates have the parameters' tree again.
    """
    tx = optax.with_extra_args_support(tx)
    leaves = {leaf.path: leaf for leaf in families.leaves(config)}

    def apart(tree):
        flat = {_path(keys): value for keys, value in jax.tree.leaves_with_path(tree)}
        return parameters.nested({path: _apart(value, _stacked_axes(leaves[path])) for path, value in flat.items()})

    def together(tree, like):
        def one(keys, whole):
            value: Any = tree
            for key in _path(keys):
                value = value[key]
            return _together(value, _stacked_axes(leaves[_path(keys)])).astype(whole.dtype)

        return jax.tree.map_with_path(one, like)

    def init(params):
        return tx.init(apart(params))

    def update(updates, state, params=None, **extra):
        done, state = tx.update(apart(updates), state, None if params is None else apart(params), **extra)
        return together(done, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def stacked_axes(config) -> dict:
    """The parameters' tree with the number of leading axes of each leaf that hold separate arrays: layers, and q, k and v."""
    return parameters.nested({leaf.path: _stacked_axes(leaf) for leaf in families.leaves(config)})


def _stacked_axes(leaf: parameters.Leaf) -> int:
    """How many leading axes of a leaf hold arrays that are separate: the layers', and those of q, k and v or of a gated MLP.

    The units of a ResNet's stage behind its first are stacked as layers are, below "rest".
    """
    return (leaf.layers > 0 or "rest" in leaf.path) + any(name in leaf.path[:-1] for name in ("qkv", "mlp_gated"))


def _apart(array, axes: int):
    if axes == 0:
        return array
    return {str(i): _apart(array[i], axes - 1) for i in range(array.shape[0])}


def _together(tree: Any, axes: int):
    if axes == 0:
        return tree
    assert isinstance(tree, Mapping)
    return jax.numpy.stack([_together(tree[str(i)], axes - 1) for i in range(len(tree))])


def _path(keys) -> parameters.Path:
    return tuple(key.key for key in keys)
