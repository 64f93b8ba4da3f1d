"""What a model wants of its pixels: v in [0, 1] becomes (v - mean) / std, channel by channel, on the device.

    HALF       mean and deviation 1/2, so [-1, 1]: the paper's releases, SigLIP, and what is trained here
    IMAGENET   the mean and deviation of ImageNet: DeiT, DINO, MAE
    CLIP       those of CLIP's training images

Images come to the models here in [-1, 1]; `normalise` makes of those what a model of other pixels wants.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp


class Pixels(NamedTuple):
    """mean, std: of each channel, of values in [0, 1]; one number for all channels, or as many as there are channels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


HALF = Pixels((0.5,), (0.5,))
IMAGENET = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Pixels((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def pixels(mean, std) -> Pixels:
    """The record of two lists of numbers. ValueError where they are none; mean and deviation 1/2 in every channel are HALF."""
    try:
        found = Pixels(tuple(float(m) for m in mean), tuple(float(s) for s in std))
        whole = all(map(math.isfinite, (*found.mean, *found.std))) and min(found.std) > 0
    except (TypeError, ValueError):
        whole = False
    if not whole or len(found.mean) != len(found.std) or len(found.mean) not in (1, 3):  # pyright: ignore[reportPossiblyUnbound]
        raise ValueError(f"mean {mean}, std {std}: one or three numbers each, deviations above 0, of values in [0, 1] are required")
    return HALF if {*found.mean, *found.std} == {0.5} else found


def normalise(images, wanted: Pixels):
    """Images [B, Y, X, C] in [-1, 1] as a model that wants these pixels takes them: float32 of the same shape, HALF unchanged.

    Raises ValueError where the record has three channels and the images another number.
    """
    if wanted == HALF:
        return images
    if len(wanted.mean) not in (1, images.shape[-1]):
        raise ValueError(f"images have {images.shape[-1]} channels, mean and std {len(wanted.mean)}: as many, or one, are required")
    mean, std = (jnp.asarray(numbers, jnp.float32) for numbers in wanted)
    return images * (0.5 / std) + (0.5 - mean) / std


def said(wanted: Pixels) -> str:
    """For people: "[-1, 1]" or the numbers."""
    numbers = [",".join(f"{n:.4g}" for n in part) for part in wanted]
    return "[-1, 1]" if wanted == HALF else f"mean {numbers[0]} and std {numbers[1]}"
