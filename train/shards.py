"""How the data axis splits a model's parameters and its optimizer: --shard, and what `auto` makes of it.

A step on a data axis of several devices sends about the same bytes whether it sums gradients whole (none) or scatters them and
brings parameters together again (optimizer); splitting the parameters too (parameters) brings them together once more, for the
backward pass. So the less is split, the faster a step is, and the more memory it takes. The choice goes by the model alone: every
process of a job, and its continuation on other devices, comes to the same one. `vitcore.collectives.Shard` says what each does.
"""

import contextlib

import jax.numpy as jnp
from jax.sharding import Mesh

from train import mesh as meshes
from vitcore import families, parameters
from vitcore.collectives import MeshShape, Shard
from vitcore.config import ViTConfig

WHOLE = 2**24  # parameters up to which all is whole: 16 bytes each, with Adam's moments and the gradient, a quarter GiB
COPY = 2**30  # bytes up to which a device holds a copy of the parameters during a step: a sixteenth of a TPU core's memory

LITTLE = 0.01  # share of the parameters that may stay whole without a word: position embeddings and such
STATE = 16  # bytes a parameter, with Adam's moments and its gradient
MEMORY = 16 * 2**30  # of a TPU core or chip of v3 to v5e, the smallest that anybody trains on
FEW = 8  # images a device from which a convolutional network's gradients are fewer bytes than its activations

_WORDS = {
    "parameters": "parameters and optimizer split over the data axis",
    "optimizer": "the optimizer split over the data axis",
    "none": "parameters and optimizer whole on each of the data axis",
}


def choose(asked: str, config, mesh: Mesh | MeshShape, dtype) -> Shard:
    """What --shard means for a model on a mesh. dtype: of the products, in which parameters are brought together."""
    if asked != "auto":
        return asked  # pyright: ignore[reportReturnType]
    here = parameters.count(families.leaves(config)) / _shape(mesh).model
    if here <= WHOLE:
        return "none"
    return "optimizer" if here * jnp.dtype(dtype).itemsize <= COPY else "parameters"


def parted(shard: Shard, mesh: MeshShape, config) -> MeshShape:
    """The mesh as a model's parameters want it: the data axis in two, "data" and "rest", where it splits them better than as one.

    A matrix's rows are split over "data" and its columns over "rest": 512 devices do not divide a width of 1,280, but 256 do, and
    2 its columns. Of all such pairs the one that leaves the least on a device, of equals the shortest "rest"; the mesh as it is
    where nothing is to be split, or where all but a little already is. Every process of a job comes to the same.
    """
    if shard == "none" or mesh.data == 1:
        return mesh
    leaves = families.leaves(config)
    held = parameters.whole_over_data(leaves, mesh)[0]
    if held < LITTLE * parameters.count(leaves):
        return mesh
    pairs = [(mesh.data // rest, rest) for rest in range(2, mesh.data) if mesh.data % rest == 0]
    shapes = [mesh._replace(over_data=("data", "rest"), parts=pair) for pair in pairs]
    best = min(shapes, key=lambda shape: parameters.whole_over_data(leaves, shape)[0], default=mesh)
    return best if parameters.whole_over_data(leaves, best)[0] < held else mesh


def laid_for(shard: Shard, mesh: Mesh, config) -> Mesh:
    """`parted` of the devices of a mesh that `train.mesh.make` made; on v2 and v3 besides in chips and their cores.

    Over all cores of a slice libtpu sums gradients whole on every core, twice the bytes of a reduce-scatter. Over the two cores of
    each chip and then over the chips it scatters them, where a chip's rows are whole tiles.
    """
    shape = meshes.shape_of(mesh)
    parts = parted(shard, shape, config).parts
    if not parts and shard != "none" and shape.data > 2 and meshes.cores_apart(mesh) and _whole_tiles(config, shape.data // 2):
        parts = (shape.data // 2, 2)
    return meshes.parted(mesh, parts[1] if parts else 1)


def _whole_tiles(config, chips: int) -> bool:
    """Whether the rows of nearly all parameters divide over so many chips in tiles of eight."""
    leaves = families.leaves(config)
    rows = [(leaf.size, n) for leaf in leaves for n, s in zip(leaf.shape, leaf.split, strict=bool(leaf.split)) if s and s.data]
    return sum(size for size, n in rows if n % (8 * chips) == 0) > (1 - LITTLE) * parameters.count(leaves)


def said(shard: Shard, mesh: Mesh | MeshShape, config=None) -> str:
    """For the line that says what a mesh lies on; "" where there is nothing to split over. config: of the model, so that parameters
    which the data axis does not divide, and what becomes of them, are named."""
    shape = _shape(mesh)
    if shape.data == 1:
        return ""
    how = _WORDS[shard]
    if shape.parts and shard != "none" and (config is None or parted(shard, MeshShape(shape.data, shape.model), config).parts):
        how += f", rows over {shape.parts[0]} and columns over {shape.parts[1]} of its {shape.data}"
    return f"; {how} (--shard {shard}){_left_whole(config, shape) if config is not None and shard != 'none' else ''}"


def _left_whole(config, shape: MeshShape) -> str:
    """What a device holds beyond its share because the data axis does not divide it, and the longest data axis of as many devices
    that leaves less than half of it; "" for a little."""
    leaves = families.leaves(config)
    whole, lengths = parameters.whole_over_data(leaves, shape)
    share, count = whole / parameters.count(leaves), shape.data * shape.model
    if share < LITTLE:
        return ""
    better = ""
    for data in range(shape.data - 1, 1, -1):
        if count % data == 0:
            with contextlib.suppress(ValueError):  # the heads do not divide over such a model axis
                other = parted("parameters", MeshShape(data, count // data), config)
                if parameters.whole_over_data(leaves, other)[0] < whole / 2:
                    better = f"; --mesh {data}x{count // data} leaves less"
                    break
    widths = " and ".join(map(str, lengths))
    return f"; each device holds {share:.0%} of the parameters beyond its share, for {shape.data} does not divide {widths}{better}"


def better(config, mesh: Mesh | MeshShape, images: int, *, asked: str, dtype) -> str:
    """A line where a longer data axis is clearly faster than this mesh's model axis, "" where it is not: the batch divides over all
    devices, state and a copy of what is brought together fit, and sums of gradients are fewer bytes than sums of tokens.

    `bench.throughput --mesh auto` compares meshes by the compiler; wherever this rule speaks, so far, it found the same: heads and
    hidden columns of a part make short products, and each half block waits for its sum. images: of a batch, or of the parts in
    which it is worked through. asked: --shard.
    """
    shape = _shape(mesh)
    devices = shape.data * shape.model
    if shape.model == 1 or images % devices:
        return ""
    other = parted("parameters", MeshShape(devices, 1), config)
    count, size = parameters.count(families.leaves(config)), jnp.dtype(dtype).itemsize
    how = choose(asked, config, other, dtype)
    whole = parameters.whole_over_data(families.leaves(config), other)[0]
    held = {"none": STATE * count, "optimizer": size * count, "parameters": 0}[how]
    if how != "none":
        held += STATE * (whole + (count - whole) / devices)
    if held > MEMORY / 2:
        return ""
    gradients = 8 * count * (1 - 1 / shape.model)  # float32, once down and once up, more than on this mesh
    if isinstance(config, ViTConfig):
        tokens = 8 * size * images / shape.data * config.tokens * config.width * config.depth * (1 - 1 / shape.model)
        if gradients > tokens:  # four sums a block, once down and once up
            return ""
    elif images < FEW * devices:
        return ""
    return (
        f"mesh {shape.data}x{shape.model}: --mesh {devices}x1 is faster, for the batch divides over {devices} devices and this "
        f"model's parameters fit on each; a model axis is for models that do not fit (bench.throughput --mesh auto compares meshes)"
    )


def _shape(mesh: Mesh | MeshShape) -> MeshShape:
    return mesh if isinstance(mesh, MeshShape) else meshes.shape_of(mesh)
