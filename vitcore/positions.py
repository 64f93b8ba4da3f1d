"""Position embeddings, a table of entries that `ViTConfig.position` chooses from."""

from collections.abc import Callable
from typing import NamedTuple

from vitcore.parameters import ROWS, Leaf, Name, normal


def _none(config) -> tuple[Leaf, ...]:
    return ()


class Position(NamedTuple):
    """One kind of position embedding; `config` is a ViTConfig.

    leaves: (config) -> its leaves outside the blocks, under "patch_embed". table: (p, config) -> [T, D] float32 that is added to
    the class token and the patches, None for nothing; p is params["patch_embed"] ready for use. block_leaves: (config) -> its
    leaves in each block, as a block lists its own. at_block: (p, w, config) -> [T, D] that is added to the input of a block,
    whose weights are w; None: nothing is added there.
    """

    leaves: Callable
    table: Callable
    block_leaves: Callable = _none
    at_block: Callable | None = None


def _learned(config) -> tuple[Leaf, ...]:
    rows, columns = config.grid
    whole, patches = (1, config.tokens, config.width), (1, rows * columns, config.width)
    return (
        Leaf(
            path=("patch_embed", "position"),
            shape=(config.tokens, config.width),
            initial=normal(0.02),
            split=(None, ROWS),
            key=1,
            names={
                "release": (
                    Name("Transformer/posembed_input/pos_embedding", shape=whole, when={"top_position": False}),
                    Name("pos_embedding", shape=patches, when={"top_position": True}),
                ),
                "timm": (Name("pos_embed", shape=whole),),
                "transformers": (Name("embeddings.position_embeddings", shape=whole),),
            },
        ),
    )


POSITIONS: dict[str, Position] = {
    # learned, one entry for each token in row-major order: the paper's own
    "1d": Position(leaves=_learned, table=lambda p, config: p["position"]),
    "none": Position(leaves=_none, table=lambda p, config: None),
}
