"""What a training step keeps of its blocks for the backward pass beside their inputs, where memory is plentiful.

The kernels save the input of each half block and make everything else again. Ops that can save more say so (`Ops.keeping`); each
is taken, in their order, while what it keeps fits the room that is left:

    room = SHARE HBM - copies of the parameters - the inputs of the half blocks of all layers

The room is an estimate on the safe side: a step that fits only without must not be refused for what it could do without.
"""

import math
from functools import cache, reduce
from typing import NamedTuple

import jax.numpy as jnp

from vitcore import families
from vitcore.collectives import MeshShape
from vitcore.config import ViTConfig
from vitcore.ops import Keeping, Ops
from vitcore.sharding import partition_specs

SHARE = 0.82  # of a device's memory; the rest is XLA's, the images', and the estimate's error
COPIES = 4  # float32: parameters, two moments and gradients; a Polyak average is one more
INPUTS = 1.25  # the inputs of the half blocks, with the padding of their layout and what else grows with the batch


class Kept(NamedTuple):
    """What an op keeps of all layers on one device."""

    what: str
    bytes: int


def choose(
    ops: Ops, config, images: int, dtype, mesh: MeshShape | None, *, remat: int, average: bool = False
) -> tuple[Ops, tuple[Kept, ...]]:
    """(the ops for a training step of so many images on a device at a time, what they keep). With remat nothing is kept. average:
    the state has a Polyak average."""
    if remat or not isinstance(config, ViTConfig) or ops.device is None or not ops.keeping:
        return ops, ()
    return _choose(ops, config, images, jnp.dtype(dtype), mesh or MeshShape(1, 1), COPIES + average)


@cache
def _choose(ops: Ops, config: ViTConfig, images: int, dtype, mesh: MeshShape, copies: int) -> tuple[Ops, tuple[Kept, ...]]:
    assert ops.device is not None
    calls = [(n, t + ops.padding(t)) for n, t in config.entries.block.calls(config)]
    halves = 2 * sum(images * n * t for n, t in calls) * config.width * dtype.itemsize * config.depth
    room = SHARE * ops.device().hbm_bytes - copies * 4 * _parameters(config, mesh) - INPUTS * halves
    found: list[Kept] = []
    for one in ops.keeping:
        if _by_another(config, one):
            continue
        sizes = [one.bytes(images * n, t, config, mesh.model, dtype) for n, t in calls]
        if None in sizes or (total := config.depth * sum(filter(None, sizes))) > room:
            continue
        room -= total
        found.append(Kept(one.what, total))
        ops = ops._replace(**{one.op: one.run})
    return ops, tuple(found)


def _parameters(config: ViTConfig, mesh: MeshShape) -> int:
    """How many a device holds."""
    specs = partition_specs(config, mesh)

    def parts(path) -> int:
        return mesh.shards(reduce(lambda tree, key: tree[key], path, specs))

    return sum(math.prod(leaf.shape) // parts(leaf.path) for leaf in families.leaves(config))


def _by_another(config: ViTConfig, one: Keeping) -> bool:
    """Whether the model has another op in the place of this one."""
    position, block = config.entries.position, config.entries.block
    return (one.op == "attention_half" and position.attend is not None) or (one.op == "mlp_half" and block.mlp != one.op)


def described(kept: tuple[Kept, ...]) -> str:
    """For people: what is kept and how much; "" for nothing."""
    if not kept:
        return ""
    total = sum(k.bytes for k in kept)
    size = f"{total / 2**30:.1f} GiB" if total >= 2**27 else f"{total / 2**20:.1f} MiB"
    return f"keeps {' and '.join(k.what for k in kept)}: {size}"
