"""BiT ResNets and AxialResNets, a family of their own: a ResNet, the mean of its feature map, a head.

variant("R50x1")             BiT-R50x1, pre-activation: the paper's baseline; "R50x1-post" in the hybrids' form
variant("AxialResNet-50")    every 3x3 convolution replaced by attention over columns, then over rows
"""

import dataclasses
import re
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from kernels.attention.lines.plan import LineShape
from vitcore.context import Context
from vitcore.heads import head_leaves
from vitcore.hybrid import check_image, run_stem
from vitcore.ops import Ops
from vitcore.parameters import Leaf, Name
from vitcore.pixels import to_unit
from vitcore.posemb import fit_line
from vitcore.resnet import AXIAL_HEADS, DEPTHS, ResNetStem, units
from vitcore.resnet_leaves import leaves as stem_leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """A ResNet with a linear classifier on the mean of its feature map. Hashable.

    image_size: side of the square input, or (Y, X), in pixels. stem: the network, a ResNetStem. num_classes: V, 0 for a model
    without a head. representation_size: width of a tanh layer before the classifier, None for none (the paper's ResNets have
    none). channels: C. head_bias: initial value of the head's bias. Raises ValueError where a value makes no model."""

    image_size: int | tuple[int, int] = 224
    stem: ResNetStem
    num_classes: int = 1000
    representation_size: int | None = None
    channels: int = 3
    head_bias: float = 0.0

    def __post_init__(self):
        if isinstance(self.image_size, list):  # as it comes out of config.json
            object.__setattr__(self, "image_size", tuple(self.image_size))
        if isinstance(self.stem, dict):
            object.__setattr__(self, "stem", ResNetStem(**self.stem))
        for name in ("num_classes", "channels"):
            value, least = getattr(self, name), 0 if name == "num_classes" else 1
            if not (isinstance(value, int) and value >= least):
                raise ValueError(f"{name}={value!r}: an integer of at least {least} is required")
        if self.representation_size is not None and self.representation_size < 1:
            raise ValueError(f"representation_size={self.representation_size}: a positive integer or None is required")
        check_image(self)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(Y, X) in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the feature map."""
        return self.stem.grid(self.image_shape)

    @property
    def width(self) -> int:
        """Of the representation."""
        return self.stem.channels

    @property
    def feature_size(self) -> int:
        """Width of what the head reads."""
        return self.representation_size or self.width

    @property
    def depth(self) -> int:
        """Units, each of which can be made again in the backward pass."""
        return sum(self.stem.depths)


# --- ResNets ------------------------------------------------------------------------------------------------------------------


def leaves(config: ResNetConfig) -> tuple[Leaf, ...]:
    """Every parameter but the head's."""
    return stem_leaves(config.stem, config.image_shape, config.channels)


def head(config: ResNetConfig) -> tuple[Leaf, ...]:
    """The leaves of the head, with the names that it has in files of ResNets: there the classifier is often a 1x1 convolution."""
    c, v = config.feature_size, config.num_classes
    timm = {"kernel": Name("head.fc.weight", axes=(1, 0), shape=(v, c, 1, 1)), "bias": Name("head.fc.bias")}
    first = {"kernel": Name("head/conv2d/kernel", shape=(1, 1, c, v)), "bias": Name("head/conv2d/bias")}
    out = []
    for leaf in head_leaves(config):
        if leaf.path[0] == "head":
            later = leaf.names["release"]
            if config.stem.form == "pre":
                later = tuple(name._replace(when={"bit": "later"}) for name in later)
                later += (first[leaf.path[-1]]._replace(when={"bit": "first"}),)
            leaf = dataclasses.replace(leaf, names={"release": later, "timm": (timm[leaf.path[-1]],)})
        out.append(leaf)
    return tuple(out)


def represent(params, images, config: ResNetConfig, context: Context):
    """Images to (the mean of the feature map [B, D] in context.dtype, nothing captured)."""
    if context.capture or context.edit:
        raise ValueError("a ResNet has neither blocks nor patches to look into: features of blocks, maps and edits are a ViT's")
    x = run_stem(params, to_unit(images).astype(context.dtype), config, context)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2)).astype(x.dtype), {}


def fit(path, array, config: ResNetConfig, new: ResNetConfig, method: Literal["corners", "half-pixel"]):
    """A leaf of a model of another image size: tables of offsets along the lines of an axial unit are fitted as lines."""
    if path[-1] != "relative":
        return array
    want = next(leaf.shape for leaf in leaves(new) if leaf.path == path)
    return np.swapaxes(fit_line(np.swapaxes(array, -1, -2), want[-1], method), -1, -2)


def axial_lines(c: ResNetStem, image_shape: tuple[int, int]) -> list[tuple[int, int]]:
    """(places, channels a head) of the lines that axial attention takes, each once. A unit attends before its stride."""
    found, first = [], dataclasses.replace(c, depths=())
    for u in units(c):
        before = max(0, u.stage - 2 if u.number == 1 else u.stage - 1)
        rows, columns = first.grid(image_shape)
        for _ in range(before):
            rows, columns = -(-rows // 2), -(-columns // 2)
        found += [(length, u.middle // AXIAL_HEADS) for length in (rows, columns)]
    return list(dict.fromkeys(found))


def by_xla(config: ResNetConfig, ops: Ops, dtype, heads: int) -> tuple[str, ...]:
    """The parts of a model that are no ops, or ops that XLA does for these `ops`; heads do not matter."""
    if config.stem.form != "axial":
        return ("convolutions",)
    shapes = [LineShape(1, length, AXIAL_HEADS, d, jnp.dtype(dtype)) for length, d in axial_lines(config.stem, config.image_shape)]
    left = [s for s in shapes if ops.lines_by_xla(s)]
    if len(left) < len(shapes):
        return "convolutions", *(f"axial attention of {s.length} places and {s.d} channels a head" for s in left)
    return "convolutions", "axial attention"


# --- names --------------------------------------------------------------------------------------------------------------------


def parse(name: str) -> dict[str, Any] | None:
    """The fields of a ResNetConfig's name, None for another name."""
    if match := re.fullmatch(r"R(\d+)x(\d+(?:\.\d+)?)(-post)?", name):
        depth, width, form = int(match[1]), float(match[2]), "post" if match[3] else "pre"
    elif match := re.fullmatch(r"AxialResNet-(\d+)(?:x(\d+(?:\.\d+)?))?", name):
        depth, width, form = int(match[1]), float(match[2] or 1), "axial"
    else:
        return None
    return {"stem": ResNetStem(depths=DEPTHS[depth], width_factor=width, form=form)} if depth in DEPTHS else None


NAMES = (*(f"R{depth}x{w}" for depth in DEPTHS for w in (1, 2, 3)), "R50x1-post", "AxialResNet-50")
