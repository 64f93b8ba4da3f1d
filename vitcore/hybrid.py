"""A ResNet as the stem of a Vision Transformer (paper, section 3.1, "Hybrid Architecture"): patches of its feature map, not of
pixels.

    variant("R50+ViT-B/16")      also "R26+S/32", "R+Ti/16"

The number is what the image is divided by in all: /32 is the whole ResNet and patches of one place of its feature map; for /16
stage 4 is left out and its units stand in stage 3 (paper, section 4.1). "R+" is the root alone, under patches of half the number
as released: R+Ti/16 has patches of 8 places, and in truth divides by 32."""

import re
from typing import Any

import jax.numpy as jnp

from vitcore.context import Context
from vitcore.ops import REFERENCE
from vitcore.resnet import DEPTHS, ResNetStem, feature_map


def check_image(config) -> None:
    """Raise ValueError where an image is smaller than what the network divides it by. config: with a ResNetStem."""
    if min(config.image_shape) < config.stem.stride:
        raise ValueError(
            f"image_size={config.image_size}: the ResNet divides it by {config.stem.stride}, at least that many pixels are required"
        )


def run_stem(params, images, config, context: Context):
    ops = context.ops or REFERENCE
    return feature_map(
        params["stem"], images, config.stem, specs=context.specs and context.specs["stem"], mesh=context.mesh,
        remat=bool(context.remat), unrolled="forward" in ops.unrolled, lines=ops.lines,
    )  # fmt: skip


def check(config) -> None:
    """Raise ValueError where the image, or the patches, are not for the stem of this ViTConfig."""
    check_image(config)
    rows, columns = config.stem.grid(config.image_shape)
    if rows % config.patch_size or columns % config.patch_size:
        least = config.stem.stride * config.patch_size
        raise ValueError(
            f"image_size={config.image_size}: the ResNet makes it a map of {rows} x {columns}, which is not divisible by "
            f"patch_size={config.patch_size}: use a multiple of {least} pixels"
        )


def grid(config) -> tuple[int, int]:
    """(rows, columns) of patches."""
    rows, columns = config.stem.grid(config.image_shape)
    return rows // config.patch_size, columns // config.patch_size


def project(params, p, images, config, context: Context):
    """Images [B, Y, X, C] to patch embeddings [B, N, D] of the feature map; the products are XLA's."""
    x = run_stem(params, images, config, context)
    b, (rows, columns), side = x.shape[0], grid(config), config.patch_size
    patches = x.reshape(b, rows, side, columns, side, -1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.einsum("byixjc,ijcd->byxd", patches, p["kernel"].astype(x.dtype), preferred_element_type=wide) + p["bias"]
    return y.reshape(b, rows * columns, -1).astype(x.dtype)


# --- names --------------------------------------------------------------------------------------------------------------------

NAMES = ("R50+ViT-B/16", "R50+ViT-B/32", "R50+ViT-L/16", "R50+ViT-L/32", "R26+S/32", "R26+B/32", "R+Ti/16")


def parse(name: str) -> tuple[dict[str, Any], str] | None:
    """The stem and patch of a hybrid's name, and the size of its ViT; None for another name."""
    match = re.fullmatch(r"R(\d*)\+(?:ViT-)?(\w+)/([1-9]\d*)", name)
    if not match:
        return None
    total = int(match[3])
    if not match[1]:
        return None if total % 2 else ({"stem": ResNetStem(depths=()), "patch_size": total // 2}, match[2])
    if int(match[1]) not in DEPTHS or total % 16:
        return None
    one, two, three, four = DEPTHS[int(match[1])]
    stem = ResNetStem(depths=(one, two, three, four) if total % 32 == 0 else (one, two, three + four))
    return {"stem": stem, "patch_size": total // stem.stride}, match[2]
