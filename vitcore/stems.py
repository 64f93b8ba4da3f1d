"""Stems: from images to patch embeddings, a table of entries that `ViTConfig.stem` chooses from.

A stem's leaves lie under "patch_embed", with those of the class token and the position embedding. A large stem may have a tree of
its own besides, which it brings together part by part with `context.take`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from vitcore import hybrid
from vitcore.parameters import COLUMNS, ROWS, Leaf, Name, lecun, norm, zeros
from vitcore.resnet import ResNetStem
from vitcore.resnet_leaves import leaves as resnet_leaves


class Stem(NamedTuple):
    """One kind of stem; `config` is a ViTConfig.

    check: (config) raises ValueError for an image that it cannot take. grid: (config) -> (rows, columns) of patch embeddings.
    leaves: (config) -> its leaves. project: (params, p, images [B, Y, X, C] in context.dtype, config, context) -> patch embeddings
    [B, rows * columns, D]; p is params["patch_embed"] ready for use. embed: the same with `cls=` [D] or None, `position=` [T, D] or
    None and `dropout=` -> tokens [B, T, D], where one op does all of it (paper Eq. 1); None: the encoder adds the rest itself.
    bytes: whether both take images as bytes, too, where the ops do (`Ops.bytes`). options: the frozen dataclass of the stem's own
    fields, which has a field `kind`; None where its name says all. finish: (params,
    tokens [B, T, D], config, context) -> the same, in front of the blocks; None: nothing is done there.
    """

    check: Callable
    grid: Callable
    leaves: Callable
    project: Callable
    embed: Callable | None = None
    options: type | None = None
    finish: Callable | None = None
    bytes: bool = False


def _check(config) -> None:
    patch = config.patch_size
    if any(side % patch for side in config.image_shape):
        near = max(1, round(min(config.image_shape) / patch)) * patch
        raise ValueError(
            f"image_size={config.image_size} is not divisible by patch_size={patch}: use a multiple of {patch}, e.g. {near}"
        )


def _grid(config) -> tuple[int, int]:
    y, x = config.image_shape
    return y // config.patch_size, x // config.patch_size


def projection(config, channels: int, patch: int, positions: int) -> tuple[Leaf, Leaf]:
    """The leaves of a linear projection of patches [P, P, C], which is applied at so many places of an image."""
    kernel = (patch, patch, channels, config.width)
    names = ("embedding", "patch_embed.proj", "{patches}")
    release, timm, transformers = names
    return (
        Leaf(
            path=("patch_embed", "kernel"),
            shape=kernel,
            initial=lecun,
            split=(COLUMNS, None, None, ROWS),
            key=0,
            names={
                "release": (Name(f"{release}/kernel"),),
                "timm": (Name(f"{timm}.weight", axes=(3, 2, 0, 1)),),
                "transformers": (Name(f"{transformers}.weight", axes=(3, 2, 0, 1)),),
            },
            multiply_adds={"patch_embed": positions * patch * patch * channels * config.width},
        ),
        Leaf(
            path=("patch_embed", "bias"),
            shape=(config.width,),
            initial=zeros,
            names={
                "release": (Name(f"{release}/bias"),),
                "timm": (Name(f"{timm}.bias"),),
                "transformers": (Name(f"{transformers}.bias"),),
            },
        ),
    )


def _leaves(config):
    rows, columns = _grid(config)
    return projection(config, config.channels, config.patch_size, rows * columns)


def _embed(params, p, images, config, context, *, cls, position, dropout, rows=None):
    options = {"dtype": context.dtype, "rows": rows} if images.dtype == jnp.uint8 else {}
    return context.ops.patch_embed(images, p["kernel"], p["bias"], cls, position, dropout=dropout, **options)


def _whole(params, p, images, config, context, **rest):
    """All of Eq. 1. Of bytes with the padding of the blocks: behind a kernel it would be one more pass over all tokens."""
    return _embed(params, p, images, config, context, rows=config.tokens + context.ops.padding(config.tokens), **rest)


def _no_bias(params, p, images, config, context):
    return params, {**p, "bias": jnp.zeros((config.width,), p["kernel"].dtype)}, images, config, context


def _without_bias(*given, **rest):
    return _whole(*_no_bias(*given), **rest)


def _normalise(params, tokens, config, context):
    p = context.take(params, "norm_pre")
    return context.ops.layer_norm(tokens, p["scale"], p["bias"], eps=config.eps)


def _clip_leaves(config):
    names = {"timm": "norm_pre", "transformers": "pre_layrnorm"}  # so written in its files
    return (_leaves(config)[0], *norm(("norm_pre",), config.width, names=names))


def _project(params, p, images, config, context):
    return _embed(params, p, images, config, context, cls=None, position=None, dropout=None)


def _hybrid(config):
    rows, columns = hybrid.grid(config)
    root = resnet_leaves(config.stem, config.image_shape, config.channels, timm="patch_embed.backbone.")
    return (*projection(config, config.stem.channels, config.patch_size, rows * columns), *root)


STEMS: dict[str, Stem] = {
    "patches": Stem(check=_check, grid=_grid, leaves=_leaves, project=_project, embed=_whole, bytes=True),
    # CLIP's (arXiv:2103.00020, section 2.4): a projection without bias, and a layer norm of the tokens before the blocks
    "clip": Stem(
        check=_check,
        grid=_grid,
        leaves=_clip_leaves,
        project=lambda *given: _project(*_no_bias(*given)),
        embed=_without_bias,
        finish=_normalise,
        bytes=True,
    ),
    "resnet": Stem(check=hybrid.check, grid=hybrid.grid, leaves=_hybrid, project=hybrid.project, options=ResNetStem),
}


def stem_of(config) -> Stem:
    """The entry that a configuration names."""
    stem = config.stem
    return STEMS["patches" if stem is None else stem if isinstance(stem, str) else stem.kind]
