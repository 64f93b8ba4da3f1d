"""Which ResNet a file of weights holds, told from its names and shapes (`vitcore/weight_names.py` asks)."""

import math
import re
from collections.abc import Mapping

from vitcore.resnet import ResNetStem
from vitcore.resnet_models import ResNetConfig

Found = Mapping[str, tuple[int, ...]]

# Of each layout: the root's kernel, its GroupNorm (post-activation alone), the units, the head's bias.
_LAYOUTS = {
    ("release", ""): ("conv_root/kernel", "gn_root/scale", r"block(\d{1,3})/unit(\d{1,3})/", "head/bias"),
    ("release", "first"): ("root_block/standardized_conv2d/kernel", "", r"block(\d{1,3})/unit(\d{1,3})/", "head/conv2d/bias"),
    ("release", "later"): ("root_block/conv_root/kernel", "", r"block(\d{1,3})/unit(\d{1,3})/", "head/bias"),
    ("timm", ""): ("stem.conv.weight", "stem.norm.weight", r"stages\.(\d{1,3})\.blocks\.(\d{1,3})\.", "head.fc.bias"),
}
HYBRID = "patch_embed.backbone."  # before timm's names of a hybrid's stem


def stem_of(found: Found, naming: str, bit: str, prefix: str) -> tuple[ResNetStem, int] | None:
    """The network and the channels of its images, None for a file without one. ValueError where its arrays make none.

    prefix: before every name. bit: as in `weight_names.Style`.
    """
    if (naming, bit) not in _LAYOUTS:
        return None
    root, norm, unit, _ = _LAYOUTS[naming, bit]
    if prefix.endswith(HYBRID) and prefix + root not in found:  # a root alone is all of timm's backbone
        root, norm = root.removeprefix("stem."), norm.removeprefix("stem.")
    kernel = found.get(prefix + root)
    if kernel is None:
        return None
    if len(kernel) != 4:
        raise ValueError(f"no model can be made out: {prefix}{root} is {list(kernel)}, 4 axes are required")
    out, channels = (kernel[0], kernel[1]) if naming == "timm" else (kernel[3], kernel[2])
    counts: dict[int, set[int]] = {}
    for name in found:
        if match := re.match(re.escape(prefix) + unit, name):
            counts.setdefault(int(match[1]) + (naming == "timm"), set()).add(int(match[2]))
    if sorted(counts) != list(range(1, len(counts) + 1)):
        raise ValueError(f"no model can be made out: its stages are {sorted(counts)}, 1, 2, ... are required")
    form = "post" if norm and prefix + norm in found else "pre"
    return ResNetStem(depths=tuple(len(counts[s]) for s in sorted(counts)), width_factor=out / 64, form=form), channels


def resnet_of(found: Found, naming: str, bit: str, prefix: str) -> ResNetConfig | None:
    """The configuration of a ResNet for itself, None where there is none. Its files do not say for which size of image it is:
    224."""
    stem = stem_of(found, naming, bit, prefix)
    if stem is None:
        return None
    head = found.get(prefix + _LAYOUTS[naming, bit][3], ())
    return ResNetConfig(
        image_size=max(224, stem[0].stride), stem=stem[0], channels=stem[1], num_classes=math.prod(head) if head else 0
    )  # fmt: skip
