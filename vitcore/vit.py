"""The Vision Transformer of the paper, section 3.1: stem, (edit), position embedding, blocks, norm, pool.

    z0 = dropout([x_class; x_p1 E; ...; x_pN E] + E_pos)                                   Eq. 1
    z'l = z(l-1) + dropout(MSA(LN(z(l-1))))                         l = 1 ... L            Eq. 2
    zl = z'l + dropout(MLP(LN(z'l)))                                                       Eq. 3
    y = LN(zL)[class token]                                                                Eq. 4

Which stem, position embedding, block and pool is said by the configuration; each is an entry of the table in the file of its name.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels import dropout as drop
from kernels.attention.tiling import Shape
from kernels.dropout import Dropout
from vitcore import layers, masked, positions
from vitcore.collectives import first_column
from vitcore.config import ViTConfig
from vitcore.context import Context
from vitcore.drop_path import DropPath, rates
from vitcore.heads import linear, registers
from vitcore.ops import Ops
from vitcore.parameters import Leaf, norm, stacked
from vitcore.pixels import to_unit

_FINAL = {"release": "Transformer/encoder_norm", "timm": "norm", "transformers": "{final}"}


def leaves(config: ViTConfig) -> tuple[Leaf, ...]:
    """Every parameter but the head's."""
    stem, position, block, pool = config.entries
    return (
        *stem.leaves(config),
        *pool.leaves(config),
        *registers(config),
        *position.leaves(config),
        *stacked((*position.block_leaves(config), *block.leaves(config)), config.depth),
        *norm(("norm",), config.width, names=_FINAL),
        *(masked.leaves(config) if config.masked else ()),
    )


def represent(params, images, config: ViTConfig, context: Context):
    """Images to (the representation y [B, D] of Eq. 4 in context.dtype, what was captured)."""
    x, found = encode(params, images, config, context)
    return pooled(params, x, config, context), found


def pooled(params, x, config: ViTConfig, context: Context):
    """Tokens [B, T, D] of the last block, without registers, to the representation [B, D] in the same dtype: the last norm, and the
    pool."""
    p = context.take(params, "norm")
    return config.entries.pool.pool(
        params, x, lambda x: context.ops.layer_norm(x, p["scale"], p["bias"], eps=config.eps), config, context
    )  # fmt: skip


def encode(params, images, config: ViTConfig, context: Context):
    """Images [B, Y, X, C], floats in [-1, 1] or bytes that stand for them, to (the last block's tokens [B, T, D] without registers,
    what was captured): Eq. 1 to 3."""
    keys = None
    if context.dropout_key is not None and (config.dropout > 0 or config.drop_path > 0):
        bits = jax.random.bits(context.dropout_key, (config.depth + 1,), jnp.uint32)
        keys = lax.bitcast_convert_type(bits, jnp.int32)  # one for the embedding, one for each block
    column = first_column(config.mlp_dim, context.mesh)

    def dropout(key, row):
        return None if key is None or not config.dropout else Dropout(config.dropout, key, row, column)

    def chances(key, row):
        if key is None or not config.drop_path:
            return dropout(key, row), None
        key, rate = key
        return dropout(key, row), DropPath(rate, key, row // config.tokens)

    row = context.first_example * config.tokens
    p = context.take(params, "patch_embed")
    if not (images.dtype == jnp.uint8 and context.ops.bytes and config.entries.stem.bytes):
        images = to_unit(images).astype(context.dtype)
    x = embed(params, p, images, config, context, dropout(None if keys is None else keys[0], row))
    if finish := config.entries.stem.finish:
        x = finish(params, x, config, context)
    of_blocks = None if keys is None else (keys[1:], jnp.asarray(rates(config))) if config.drop_path else keys[1:]
    x, found = layers.run(params["blocks"], p, x, row, of_blocks, chances, config, context)
    return x[:, : config.seen_tokens], found


def predict_masked(params, images, config: ViTConfig, context: Context, key):
    """Images to (predictions [B, K, outputs] float32 of their corrupted patches, the `masked.Corruption`). key: a JAX PRNG key."""
    assert config.masked is not None
    chosen = masked.corruption(key, context.first_example, images.shape[0], config)
    p, norm = context.take(params, "masked"), context.take(params, "norm")

    def edit(patches, first_example):
        return masked.corrupted(patches, chosen, p["embedding"])

    x, _ = encode(params, images, config, context._replace(edit=edit))
    y = context.ops.layer_norm(masked.at(x, chosen.places + config.class_tokens), norm["scale"], norm["bias"], eps=config.eps)
    return linear(p["head"], y), chosen


def embed(params, p, images, config: ViTConfig, context: Context, dropout: Dropout | None):
    """Images in context.dtype, or bytes where stem and ops take them, to tokens [B, T, D]: Eq. 1, in one op where the stem has one
    and nobody edits in between."""
    stem, position, _, pool = config.entries
    cls, table = p["cls"] if pool.class_token else None, positions.checked(position.table(p, config), config)
    if stem.embed and context.edit is None and not config.registers:
        return stem.embed(params, p, images, config, context, cls=cls, position=table, dropout=dropout)
    patches = stem.project(params, p, images, config, context)
    wanted = images.shape[0], config.grid[0] * config.grid[1], config.width
    if patches.shape != wanted:
        raise ValueError(
            f"stem={config.stem!r} returns {list(patches.shape)}: [images, patches, width] = {list(wanted)} is required"
        )
    if context.edit is not None:
        patches = edited(context, patches)
    tokens = patches.astype(jnp.promote_types(patches.dtype, jnp.float32))
    if cls is not None:
        first = jnp.broadcast_to(cls.astype(tokens.dtype), (tokens.shape[0], 1, tokens.shape[2]))
        tokens = jnp.concatenate([first, tokens], axis=1)
    if table is not None:
        tokens = tokens + table
    if config.registers:  # last, where the padding of the blocks stands too: who cuts one off cuts off the other
        own = p["registers"].astype(tokens.dtype)
        tokens = jnp.concatenate([tokens, jnp.broadcast_to(own, (tokens.shape[0], *own.shape))], axis=1)
    return drop.apply(tokens, dropout, drop.EMBEDDING).astype(patches.dtype)


def edited(context: Context, patches):
    """The patch embeddings as `context.edit` returns them. ValueError for another shape or dtype."""
    assert context.edit is not None
    new = context.edit(patches, context.first_example)
    have, want = (new.shape, new.dtype), (patches.shape, patches.dtype)
    if have != want:
        raise ValueError(f"edit returned {have[1]}{list(have[0])}: {want[1]}{list(want[0])}, as it was given, is required")
    return new


def fit(path, array, config: ViTConfig, new: ViTConfig, method: str):
    """A leaf of a model of another image size: what its position embedding says of it."""
    return config.entries.position.fit(path[-1], array, config, new, method)


def by_xla(config: ViTConfig, ops: Ops, dtype, heads: int) -> tuple[str, ...]:
    """The parts of a model that are no ops, or ops that XLA does for these `ops`."""
    stem, position, block, _ = config.entries
    shape = Shape(1, config.tokens, config.width, heads, config.width // config.num_heads, jnp.dtype(dtype))
    gated = block.mlp == "gated_half"
    parts = (
        "convolutions" if stem.embed is None else "", position.by_xla(ops, shape), "the gated MLP" if gated else "",
        "attention pooling" if config.pool == "map" else "",
    )  # fmt: skip
    return tuple(filter(None, parts))
