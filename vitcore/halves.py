"""A batch in two halves, so that on a model axis the sum of one half's tokens runs while the other half is computed.

Each half block ends in a sum over the model axis, and without something to compute meanwhile the devices wait for it: of ViT-L/16
on two GPUs two fifths of the time. Of two halves the second goes through a half block behind the first: the first's sum runs beside
it, and the second's beside the first's next half block. Backward it is the same, in reverse.
"""

import jax.numpy as jnp
from jax import lax

from vitcore.collectives import sum_over_model, vary
from vitcore.context import Context, Layer


def worthwhile(config, context: Context, images: int, *, unrolled: bool) -> bool:
    """Whether blocks run in halves: for ops that say so (`Ops.paced`), unrolled, on a model axis, where nothing of the blocks is
    captured or made again, and the block is made of `summed` half blocks."""
    mesh, entries = context.mesh, config.entries
    return bool(
        context.ops.paced and unrolled and mesh and mesh.model > 1 and images % 2 == 0 and not context.remat and not context.capture
        and config.block == "encoder" and entries.position.attend is None and not entries.position.at_block
    )  # fmt: skip


def split(x):
    """x [B, T, D] as its halves along B."""
    return tuple(lax.split(x, (x.shape[0] // 2,) * 2))


def join(x):
    """The halves as one."""
    return jnp.concatenate(x)


def summed(half, x, config, layer: Layer):
    """half(x, layer), summed over the model axis; of a tuple of halves each in its turn, and a tuple."""
    mesh = layer.context.mesh
    if not isinstance(x, tuple):
        return sum_over_model(half(vary(x, mesh), layer), mesh)
    parts = []
    for i, part in enumerate(x):
        dropout = layer.dropout and layer.dropout._replace(row=layer.dropout.row + i * part.shape[0] * config.tokens)
        path = layer.path and layer.path._replace(image=layer.path.image + i * part.shape[0])
        part = vary(part, mesh)
        if parts:  # left alone, XLA computes both side by side, and then sums them
            part, parts[-1] = lax.optimization_barrier((part, parts[-1]))
        parts.append(half(part, layer._replace(dropout=dropout, path=path)))
    return tuple(sum_over_model(y, mesh) for y in parts)
