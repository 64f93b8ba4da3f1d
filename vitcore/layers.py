"""The blocks one after the other: as a loop or unrolled, with or without rematerialisation, and what is kept of them on the way.

The blocks' parameters are stacked on a leading L axis and run under `lax.scan`, so a model of any depth compiles in the time of one
block. On a mesh each layer's matrices are brought together inside the loop, just before they are used.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from vitcore import halves, positions, stacks
from vitcore.collectives import (
    gather,
    gather_in_turn,
    in_turn,
    layer_specs,
    recompute_gathers,
    sum_over_model,
    varies_over_model,
    vary,
    vary_like,
)
from vitcore.context import Context, Layer

PART = 24576  # most tokens of a part of the batch in rematerialised blocks: little memory, and still long grids for the kernels

_nothing = jax.checkpoint_policies.nothing_saveable
_again = partial(jax.checkpoint, policy=_nothing, prevent_cse=False)  # inside a loop


def run(blocks, p, x: Any, row, keys, chances, config, context: Context):
    """Tokens [B, T, D], already padded or not, through all the blocks: (tokens, what `context.capture` asks for).

    blocks: their parameters, stacked and split as they lie. p: params["patch_embed"] ready for use. row: the global index of the
    first token. keys: a tree with a leading L, of random keys and rates, or None. chances: (a layer's part of it, row) -> Dropout
    or None, DropPath or None.
    """
    mesh, ops, remat = context.mesh, context.ops, int(context.remat)
    assert ops is not None
    specs = context.specs["blocks"]
    capture = context.capture
    if capture and remat:
        raise ValueError(f"remat is {remat} and results of blocks are asked for: they are kept with remat=0 only")

    extra, tokens = ops.padding(config.tokens), None
    if extra:  # padding, to which no token attends
        x, tokens = jnp.pad(x, ((0, 0), (0, extra + config.tokens - x.shape[1]), (0, 0))), config.tokens
    at_block = config.entries.position.at_block

    def one(x, row, w, key, stacks=None):
        """One block; its position embedding, where each block has one, first."""
        if at_block:
            table: Any = positions.checked(at_block(p, w, config), config)
            x = (x + jnp.pad(table, ((0, extra + config.registers), (0, 0)))).astype(x.dtype)
        dropout, path = chances(key, row)
        y = config.entries.block.apply(x, w, config, Layer(context, dropout, tokens, stacks, path))
        _check_shape(x, y, config)
        if mesh and any(varies_over_model(part, mesh) for part in jax.tree.leaves(y)):
            raise ValueError(
                f"block={config.block!r} returns tokens that differ along the model axis: it must end in `sum_over_model`, and "
                'name the leaves that it uses behind that in `Block.outside`, e.g. outside=(("scale1",),)'
            )
        return y, x

    # vectors are replicated over "data": made varying here, outside the scan, their gradients are summed once, not once a layer
    added = config.entries.position.block_leaves(config) if at_block else ()
    outside = (*config.entries.block.outside, *(leaf.path for leaf in added))
    layers = vary(blocks, mesh, specs, outside), keys
    scan = _unrolled if ("remat" if remat else "forward") in ops.unrolled else lax.scan
    checkpoint = partial(jax.checkpoint, prevent_cse=scan is _unrolled)
    if remat > 1:
        x = _rematerialised(lambda *a: one(*a)[0], x, row, layers, remat, specs, context, scan)
        return (x[:, : config.tokens] if extra else x), {}

    halved = halves.worthwhile(config, context, x.shape[0], unrolled=scan is _unrolled)
    if halved:
        x = halves.split(x)

    def block(x, layer):
        w, key = layer
        return one(x, row, gather(w, layer_specs(specs), mesh, context.dtype), key)[0], None

    def block_in_turn(carry, layer):
        assert mesh is not None
        (x, turn), (w, key) = carry, layer
        x, before = in_turn(vary(x, mesh), turn)
        w, turn = gather_in_turn(w, layer_specs(specs), mesh, context.dtype, turn, summed)
        return (one(x, row, w, key)[0], turn + before), None

    if capture:
        return _captured(one, x, row, layers, config, context, scan, tokens)
    gathered = mesh and mesh.data > 1
    if ops.stacked and not remat and not gathered:
        layers = gather(layers[0], specs, mesh, context.dtype), keys

        def placed(x, layer, at):
            return one(x, row, layer[0], layer[1], at)[0]

        looped = partial(stacks.looped, depth=config.depth)
        x = (partial(stacks.through, split=_split, depth=config.depth) if scan is _unrolled else looped)(placed, x, layers)
        return (x[:, : config.tokens] if extra else x), {}
    paced = ops.paced and scan is _unrolled and not remat and gathered
    summed = context.gathers_again or not ops.alone()  # which `block_in_turn` waits for
    step: Any = block_in_turn if paced else block
    if paced:
        x = x, _first_turn(layers[0], mesh)
    if remat:
        step = checkpoint(step, policy=_nothing)
    elif context.gathers_again:
        step = checkpoint(step, policy=recompute_gathers(ops.keeps))
    x = scan(step, x, layers)[0]
    x = x[0] if paced else x
    x = halves.join(x) if halved else x
    return (x[:, : config.tokens] if extra else x), {}


def _check_shape(x, y, config) -> None:
    """ValueError where a block returns tokens of another shape or dtype than it was given."""
    have, want = ([f"{a.dtype}{list(a.shape)}" for a in jax.tree.leaves(tokens)] for tokens in (y, x))
    if have != want:
        raise ValueError(f"block={config.block!r} returns {', '.join(have)} for {', '.join(want)}: it must keep shape and dtype")


def _split(layers) -> list:
    """A tree stacked on a leading axis as a list of trees. The stacks are split once: a gradient is then put together once, where
    layer by layer it would be a sum of padded arrays."""
    leaves, tree = jax.tree.flatten(layers)
    parts = [[part.reshape(part.shape[1:]) for part in lax.split(a, (1,) * a.shape[0])] for a in leaves]
    return [jax.tree.unflatten(tree, layer) for layer in zip(*parts, strict=True)]


def _unrolled(block, x, layers):
    """`lax.scan` of a block without results of its own, as one program without a loop."""
    for layer in _split(layers):
        x, _ = block(x, layer)
    return x, None


def _first_turn(blocks, mesh):
    """Zero, whose gradient is that of some vector's first element, times zero: XLA takes away a barrier whose results nobody reads.
    Where the product is NaN, gradients were not finite before."""
    vector = min(jax.tree.leaves(blocks), key=lambda a: a.size)
    return vary(0 * vector.reshape(-1)[0], mesh)


# --- what is kept of the blocks ----------------------------------------------------------------------------------------------


def _captured(one, x, row, layers, config, context: Context, scan, tokens: int | None):
    """`run` with the results of some blocks: those of a kind that every block is asked for are results of the loop; for others the
    loop carries arrays, which the blocks that are asked for fill.

    Returns (tokens, {"features": [K, B, T, D] in x's dtype, "maps": [K, B, N, T, T] float32, "statistics": `Statistics` of arrays
    with a leading K}), a K for each block asked for, in that order, N the heads of this device.
    """
    kinds = _kinds(config, context, tokens)
    order = {name: sorted(set(asked)) for name, (_, asked) in kinds.items()}  # a block's place in the array of its kind
    every = {name for name in kinds if len(order[name]) == config.depth}

    def places(block: int) -> dict[str, int]:
        return {name: order[name].index(block) if block in order[name] else -1 for name in kinds}

    slots = [places(block) for block in range(1, config.depth + 1)]

    def step(carry, layer, slot):
        (x, found), (w, key) = carry, layer
        w = gather(w, layer_specs(context.specs["blocks"]), context.mesh, context.dtype)
        y, x = one(x, row, w, key)
        made = {name: partial(of, x, y, w) for name, (of, _) in kinds.items()}
        found = {name: _put(found[name], made[name], slot[name]) for name in found}
        return (y, found), {name: made[name]() for name in every}

    def empty(name):
        def made(x, layer):
            w = gather(layer[0], layer_specs(context.specs["blocks"]), context.mesh, context.dtype)
            return kinds[name][0](x, x, w)

        like = jax.eval_shape(made, x, jax.tree.map(lambda a: a[0], layers))
        zeros = jax.tree.map(lambda a: jnp.zeros((len(order[name]), *a.shape), a.dtype), like)
        return jax.tree.map(lambda z, a: vary_like(z, a), zeros, like)

    carry = x, {name: empty(name) for name in kinds if name not in every}
    checkpoint = partial(jax.checkpoint, prevent_cse=scan is _unrolled, policy=recompute_gathers(context.ops.keeps))
    kept = checkpoint if context.gathers_again else lambda step: step
    if scan is _unrolled:
        results = []
        for layer, slot in zip(_split(layers), slots, strict=True):
            carry, made = kept(partial(step, slot=slot))(carry, layer)
            results.append(made)
        results = jax.tree.map(lambda *a: jnp.stack(a), *results)
    else:
        stacked = {name: jnp.array([slot[name] for slot in slots]) for name in kinds}
        one_step = kept(step)
        carry, results = lax.scan(lambda carry, both: one_step(carry, *both), carry, (layers, stacked))
    y, found = carry
    places_of = {name: [order[name].index(i) for i in asked] for name, (_, asked) in kinds.items()}
    found = {name: _taken({**found, **results}[name], places_of[name]) for name in kinds}
    return (y if tokens is None else y[:, :tokens]), found


def _taken(found, places: list[int]):
    """The arrays' entries at these places of the first axis; as they are where that is all of them in order."""
    leaves = jax.tree.leaves(found)
    if places == list(range(leaves[0].shape[0])):
        return found
    return jax.tree.map(lambda a: a[jnp.array(places)], found)


def _kinds(config, context: Context, tokens: int | None) -> dict:
    """What is asked for: name -> (function of a block's input, output and weights, blocks). ValueError for what there is not."""
    capture, mesh, block = context.capture, context.mesh, config.entries.block
    assert capture is not None
    for asked in (capture.features, capture.maps, capture.statistics):
        if wrong := [number for number in asked if not 1 <= number <= config.depth]:
            raise ValueError(f"block {wrong[0]}: the model has blocks 1 to {config.depth}")
    if (capture.maps and block.maps is None) or (capture.statistics and block.statistics is None):
        raise ValueError(f"block={config.block!r} has no attention maps: ask for the features of its blocks")
    layer = Layer(context, None, tokens)

    seen = config.seen_tokens  # not the registers, and no padding

    def features(x, y, w):
        return y[:, :seen]

    def maps(x, y, w):
        return block.maps(x, w, config, layer)[..., :seen, :seen]

    def statistics(x, y, w):
        options = {"mean": capture.mean, "row": capture.row, "distances": capture.distances}
        found = block.statistics(x, w, config, layer, **options)
        mean, row = found.mean, found.row
        if mean is not None:  # each device's is over its own heads
            mean = mean[..., :seen, :seen]
            mean = sum_over_model(mean, mesh) / mesh.model if mesh else mean
        return found._replace(mean=mean, row=None if row is None else row[..., :seen])

    kinds = {
        "features": (features, capture.features),
        "maps": (maps, capture.maps),
        "statistics": (statistics, capture.statistics),
    }
    return {name: (of, asked) for name, (of, asked) in kinds.items() if asked}


def _put(found, value, slot):
    """The arrays of `found` with those of value() at an index; as they are, and nothing computed, where the index is negative."""
    if isinstance(slot, int):
        return jax.tree.map(lambda a, v: a.at[slot].set(v), found, value()) if slot >= 0 else found

    def put(found):
        return jax.tree.map(lambda a, v: lax.dynamic_update_index_in_dim(a, v, slot, 0), found, value())

    return lax.cond(slot >= 0, put, lambda found: found, found)


# --- blocks made again for the backward pass ---------------------------------------------------------------------------------


def _rematerialised(block, x, row, layers, every: int, specs, context: Context, scan):
    """`scan` over the blocks that keeps the input of every n-th block for the backward pass, which computes the others again.

    The backward pass takes a part of the batch at a time, so that the inputs of the blocks in between exist for one part only. A
    weight's gradients are summed over the parts in float32. block: (x, row, weights, key) -> x. Raises ValueError where n does
    not divide the depth.
    """
    mesh, dtype = context.mesh, context.dtype
    depth, tokens = jax.tree.leaves(layers)[0].shape[0], x.shape[1]
    if depth % every:
        raise ValueError(f"remat is {every} and the blocks are {depth}: a divisor of {depth} is required, or 0 to keep everything")
    parts = _parts(x.shape[0], tokens)

    def group(x, layers):
        weights, keys = layers
        weights = gather(weights, specs, mesh, dtype)
        if parts > 1:
            weights = jax.tree.map(lambda w: w.astype(jnp.float32), weights)

        def run(part):
            x, row = part
            return lax.scan(_again(lambda x, layer: (block(x, row, *layer), None)), x, (weights, keys))[0]

        if parts == 1:
            return run((x, row)), None
        pieces = x.reshape(parts, -1, *x.shape[1:])
        pieces = lax.map(_again(run), (pieces, row + jnp.arange(parts) * (pieces.shape[1] * tokens)))
        return pieces.reshape(x.shape), None

    checkpoint = partial(jax.checkpoint, prevent_cse=scan is _unrolled)
    # Several parts are checkpointed each: around them a checkpoint is only there to drop the gathered weights.
    if parts == 1 or (mesh and mesh.data > 1):
        group = checkpoint(group, policy=_nothing)
    return scan(group, x, jax.tree.map(lambda a: a.reshape(-1, every, *a.shape[1:]), layers))[0]


def _parts(batch: int, tokens: int) -> int:
    """The number of equal parts in which rematerialised blocks take the batch: the fewest with at most PART tokens each. It is 1
    where the parts would have less than an eighth of that, as when the number of images is prime."""
    most = max(1, PART // tokens)
    images = next(n for n in range(min(batch, most), 0, -1) if batch % n == 0)
    return batch // images if 8 * images >= most else 1
