"""Position embeddings, a table of entries that `ViTConfig.position` chooses from."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels.attention.relative import reference as relative
from kernels.attention.rotary.reference import Turn, turned
from vitcore import posemb
from vitcore.blocks import IN_ATTENTION, attention_weights, heads_here
from vitcore.collectives import sum_over_model, vary
from vitcore.parameters import ROWS, Leaf, Name, Split, normal


def _none(config) -> tuple[Leaf, ...]:
    return ()


class Position(NamedTuple):
    """One kind of position embedding; `config` is a ViTConfig.

    leaves: (config) -> its leaves outside the blocks, under "patch_embed". table: (p, config) -> [T, D] float32 that is added to
    the class token and the patches, of which T is the number here and below, None for nothing; p is params["patch_embed"] ready for
    use. block_leaves: (config) -> its leaves in each block, as a block lists its own. at_block: (p, w, config) -> [T, D] that is
    added to the input of a block, whose weights are w; None: nothing is added there. attend: (x, w, config, layer) -> x +
    dropout(MSA(LN(x))) in place of the block's own attention half, and logits: (q [B, T, N, H], w, config) -> [B, N, T, T] that it
    adds to the others before their scale; None: neither. check: (config) raises ValueError for a configuration that it cannot take.
    fit: (name, array, config, new, method) -> a leaf of this name, of any number of layers, as a model `new` of another grid has it
    (`posemb`). turn: (qk [C, B, T, N*H], config, heads) -> the queries and keys that attend, None for as they are. by_xla: (ops,
    `kernels.attention.tiling.Shape`) -> what of it these ops leave to XLA, for people; "" for nothing. unnamed: nothing in a
    file of weights tells of it.
    """

    leaves: Callable
    table: Callable
    block_leaves: Callable = _none
    at_block: Callable | None = None
    attend: Callable | None = None
    logits: Callable | None = None
    turn: Callable | None = None
    by_xla: Callable = lambda ops, shape: ""
    check: Callable = lambda config: None
    fit: Callable = lambda name, array, config, new, method: array
    unnamed: bool = False


def checked(table, config):
    """A table that a position embedding adds, or None. ValueError for another shape than [T, D]."""
    wanted = config.seen_tokens, config.width
    if table is not None and table.shape != wanted:
        what = "class token and patches" if config.class_tokens else "patches"
        raise ValueError(f"position={config.position!r} adds {list(table.shape)}: [{what}, width] = {list(wanted)} is required")
    return table


def _learned(config) -> tuple[Leaf, ...]:
    rows, columns = config.grid
    whole, patches = (1, config.seen_tokens, config.width), (1, rows * columns, config.width)
    return (
        Leaf(
            path=("patch_embed", "position"),
            shape=(config.seen_tokens, config.width),
            initial=normal(0.02),
            split=(None, ROWS),
            key=1,
            names={
                "release": (
                    Name("Transformer/posembed_input/pos_embedding", shape=whole, when={"top_position": False}),
                    Name("pos_embedding", shape=patches, when={"top_position": True}),
                ),
                # beside registers timm's positions have no slot for a class token
                "timm": () if config.registers and config.class_tokens else (Name("pos_embed", shape=whole),),
                "transformers": (
                    Name("{position}", shape=whole, when={"tower": False}),
                    Name("{position}", when={"tower": True}),
                ),
            },
        ),
    )


def _of_patches(config) -> tuple[Leaf, ...]:
    """DeiT-III's: the class token has no entry."""
    rows, columns = config.grid
    shape = (rows * columns, config.width)
    names = {"timm": (Name("pos_embed", shape=(1, *shape)),)}
    return (Leaf(path=("patch_embed", "position"), shape=shape, initial=normal(0.02), split=(None, ROWS), names=names),)


def _without_class(p, config):
    return jnp.pad(p["position"], ((config.class_tokens, 0), (0, 0)))


def _fit_patches(name, array, config, new, method):
    return posemb.fit(array, grid=config.grid, to=new.grid, class_slots=0, method=method) if name == "position" else array


# --- the other entries of Table 8, and sincos2d -------------------------------------------------------------------------------


def _halves(config) -> tuple[Leaf, ...]:
    """2-D: a table of rows and one of columns, half of D wide each. The class token has no place on the grid and gets nothing."""
    rows, columns = config.grid
    return tuple(
        Leaf(path=("patch_embed", name), shape=(n, config.width // 2), initial=normal(0.02), split=(None, ROWS))
        for name, n in (("position_columns", columns), ("position_rows", rows))
    )


def _joined(p, config):
    """[T, D]: of each patch its column's half and its row's half."""
    rows, columns = config.grid
    x, y = p["position_columns"], p["position_rows"]
    shape = (rows, columns, config.width // 2)
    table = jnp.concatenate([jnp.broadcast_to(x[None], shape), jnp.broadcast_to(y[:, None], shape)], axis=-1)
    return jnp.pad(table.reshape(rows * columns, config.width), ((config.class_tokens, 0), (0, 0)))


def sincos2d(rows: int, columns: int, width: int, temperature: float = 10_000.0) -> np.ndarray:
    """The fixed table [rows * columns, D] float32 of the authors' later code: sine and cosine of column, then of row, times
    temperature^(-i / (D/4 - 1)), i = 0 ... D/4 - 1."""
    omega = temperature ** -(np.arange(width // 4) / max(width // 4 - 1, 1))
    y, x = (place.reshape(-1, 1) * omega for place in np.mgrid[:rows, :columns])
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


def _fixed(p, config):
    rows, columns = config.grid
    table = jnp.asarray(sincos2d(rows, columns, config.width))
    return jnp.pad(table, ((config.class_tokens, 0), (0, 0)))


def _divides(parts: int):
    def check(config) -> None:
        if config.width % parts:
            raise ValueError(f"width={config.width} with position={config.position!r}: a multiple of {parts} is required")

    return check


def _in_blocks(leaves):
    """The leaves of a table as leaves of every block, which no published file has."""
    return lambda config: tuple(
        dataclasses.replace(leaf, path=leaf.path[1:], names={}, key=None) for leaf in leaves(config)
    )  # fmt: skip


def _offsets(config) -> tuple[Leaf, ...]:
    """Relative: one embedding for each offset between patches, and one for all pairs with the class token; each head its own."""
    rows, columns = config.grid
    entries, n = relative.entries(rows * columns, bool(config.class_tokens)), config.num_heads
    return (
        Leaf(
            path=("relative",),
            shape=(entries, config.width),
            initial=normal(0.02),
            split=(None, Split(model=("num_heads", n))),
            multiply_adds={"attention": config.tokens * entries * config.width},
        ),
    )


def _attend_relative(x, w, config, layer):
    """The attention half of a block with relative positions, summed over the model axis."""
    mesh = layer.context.mesh
    x, weights = vary(x, mesh), attention_weights(w)

    def run(residual_scale):
        return layer.context.ops.relative_half(
            x,
            relative.RelativeWeights(weights, w["relative"]),
            num_heads=heads_here(config, layer),
            class_token=bool(config.class_tokens),
            dropout=layer.dropout,
            residual_scale=residual_scale,
            **layer.padding,
            eps=config.eps,
        )

    return sum_over_model(layer.residual(run, x, weights.out_bias, IN_ATTENTION), mesh)


# --- rotary: queries and keys of patches are turned by where they stand (DINOv3) -----------------------------------------------


def _turn(config) -> Turn:
    rows, columns = config.grid
    return Turn(rows, columns, config.class_tokens)


def _turned(qk, config, heads: int):
    return turned(qk, _turn(config), heads)


def _attend_rotary(x, w, config, layer):
    """The attention half of a block with rotary positions, summed over the model axis."""
    options = {"turn": _turn(config), "num_heads": heads_here(config, layer), "eps": config.eps}
    x, layer = vary(x, layer.context.mesh), layer._replace(stacks=None)  # no op of it takes weights where they lie
    return sum_over_model(
        layer.half(layer.context.ops.rotary_half, x, attention_weights(w), IN_ATTENTION, **options), layer.context.mesh
    )


def _whole_quarters(config) -> None:
    if (width := config.width // config.num_heads) % 4:
        raise ValueError(
            f"position='rope' with heads of {config.width} / {config.num_heads} = {width} columns: a multiple of 4 is required, "
            "pairs of columns for rows and for columns of patches"
        )


def _no_registers(config) -> None:
    if config.registers:
        raise ValueError(f"position='relative' with registers={config.registers}: a register is at no distance; use '1d' or '2d'")


def _relative_logits(q, w, config):
    table = w["relative"].reshape(w["relative"].shape[0], q.shape[2], q.shape[3])
    return relative.relative_logits(q, table, class_token=bool(config.class_tokens))


def _fit_grid(name, array, config, new, method):
    """A table of all tokens, of one layer or of each."""
    if name != "position":
        return array
    fit = partial(posemb.fit, grid=config.grid, to=new.grid, class_slots=config.class_tokens, method=method)
    return fit(array) if array.ndim == 2 else np.stack([fit(layer) for layer in array])


def _fit_halves(name, array, config, new, method):
    axis = {"position_rows": 0, "position_columns": 1}.get(name)
    return array if axis is None else posemb.fit_line(array, new.grid[axis], method)


def _fit_offsets(name, array, config, new, method):
    """Offsets of patches in row-major order are a line, and are fitted as one; the class token's entry stays."""
    if name != "relative" or config.grid == new.grid:
        return array
    rows, columns = new.grid
    cut = array.shape[-2] - config.class_tokens
    line = posemb.fit_line(array[..., :cut, :], 2 * rows * columns - 1, method)
    return np.concatenate([line, array[..., cut:, :]], axis=-2)


def _nothing(p, config):
    return None


def _one(p, config):
    return p["position"]


POSITIONS: dict[str, Position] = {
    # learned, one entry for each token in row-major order: the paper's own
    "1d": Position(fit=_fit_grid, leaves=_learned, table=_one),
    # the same without an entry for the class token, which no position is added to (DeiT-III)
    "1d-patches": Position(fit=_fit_patches, leaves=_of_patches, table=_without_class),
    "1d-layers": Position(
        fit=_fit_grid,
        leaves=_none,
        table=_nothing,
        block_leaves=_in_blocks(_learned),
        at_block=lambda p, w, config: _one(w, config),
    ),
    "1d-shared": Position(fit=_fit_grid, leaves=_learned, table=_nothing, at_block=lambda p, w, config: _one(p, config)),
    "2d": Position(fit=_fit_halves, leaves=_halves, table=_joined, check=_divides(2)),
    "2d-layers": Position(
        fit=_fit_halves,
        leaves=_none,
        table=_nothing,
        block_leaves=_in_blocks(_halves),
        at_block=lambda p, w, config: _joined(w, config),
        check=_divides(2),
    ),
    "2d-shared": Position(
        fit=_fit_halves, leaves=_halves, table=_nothing, at_block=lambda p, w, config: _joined(p, config), check=_divides(2)
    ),
    "relative": Position(
        fit=_fit_offsets,
        leaves=_none,
        table=_nothing,
        block_leaves=_offsets,
        attend=_attend_relative,
        logits=_relative_logits,
        by_xla=lambda ops, shape: "relative positions" if ops.relative_by_xla(shape) else "",
        check=_no_registers,
    ),
    # no table: the angle between two patches is that of their places, in any grid
    "rope": Position(
        leaves=_none,
        table=_nothing,
        attend=_attend_rotary,
        turn=_turned,
        by_xla=lambda ops, shape: "rotary positions" if ops.rotary_by_xla(shape) else "",
        check=_whole_quarters,
        unnamed=True,
    ),
    "sincos2d": Position(leaves=_none, table=_fixed, check=_divides(4), unnamed=True),
    "none": Position(leaves=_none, table=_nothing, unnamed=True),
}
