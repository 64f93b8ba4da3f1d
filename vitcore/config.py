"""The model's shape, as data: ViTConfig and the table of named variants (paper Table 1; Ti and S from the later releases)."""

import dataclasses
import difflib
import operator
import re
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A Vision Transformer (paper section 3.1). Hashable: it is a static argument of every jitted function.

    image_size: side of the square input, or (Y, X), in pixels. patch_size: side P of a patch, in pixels. width: D. depth: L.
    mlp_dim: F. num_heads: N. num_classes: V. representation_size: width of the pre-logits tanh layer, None for none (the paper
    has it, as wide as the model, in pre-training only). pool: "token" (class token) or "gap" (mean of the patch tokens).
    dropout: rate. channels: C. gelu: "tanh" (the release) or "erf" (exact). head_bias: initial value of the head's bias
    (the release takes -10 for the sigmoid loss on ImageNet-21k).
    Raises ValueError where a value makes no model.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_classes: int = 1000
    representation_size: int | None = None
    pool: Literal["token", "gap"] = "token"
    dropout: float = 0.0
    channels: int = 3
    gelu: Literal["tanh", "erf"] = "tanh"
    head_bias: float = 0.0

    def __post_init__(self):
        if isinstance(self.image_size, list):  # as it comes out of config.json
            object.__setattr__(self, "image_size", tuple(self.image_size))
        _plain_integers(self)
        for name in ("patch_size", "width", "depth", "mlp_dim", "num_heads", "num_classes", "channels"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise ValueError(f"{name}={getattr(self, name)!r}: a positive integer is required")
        if min(self.image_shape) < 1 or any(side % self.patch_size for side in self.image_shape):
            near = max(1, round(min(self.image_shape) / self.patch_size)) * self.patch_size
            raise ValueError(
                f"image_size={self.image_size} is not divisible by patch_size={self.patch_size}: "
                f"use a multiple of {self.patch_size}, e.g. {near}"
            )
        if self.width % self.num_heads:
            raise ValueError(
                f"width={self.width} is not divisible by num_heads={self.num_heads}: every head has width / num_heads columns"
            )
        if self.representation_size is not None and self.representation_size < 1:
            raise ValueError(f"representation_size={self.representation_size}: a positive integer or None is required")
        if self.pool not in ("token", "gap"):
            raise ValueError(f"pool={self.pool!r}: 'token' or 'gap' is required")
        if self.gelu not in ("tanh", "erf"):
            raise ValueError(f"gelu={self.gelu!r}: 'tanh' or 'erf' is required")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: a rate in [0, 1) is required")

    @property
    def image_shape(self) -> tuple[int, int]:
        """(Y, X) in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        y, x = self.image_shape
        return y // self.patch_size, x // self.patch_size

    @property
    def tokens(self) -> int:
        """T: patches, and the class token where there is one."""
        return self.grid[0] * self.grid[1] + (self.pool == "token")

    @property
    def feature_size(self) -> int:
        """Width of what the head reads."""
        return self.representation_size or self.width


def _plain_integers(config: ViTConfig) -> None:
    """numpy's integers, as a sweep has them, become Python's; what is no integer where a size is due raises ValueError."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if hasattr(value, "__index__") and not isinstance(value, int):
            object.__setattr__(config, field.name, operator.index(value))
    size = config.image_size
    sides = size if isinstance(size, tuple) else (size, size)
    if len(sides) != 2 or not all(hasattr(side, "__index__") and not isinstance(side, bool) for side in sides):
        raise ValueError(f"image_size={size!r}: a positive integer, or two of them, (Y, X), is required")
    if isinstance(size, tuple):
        object.__setattr__(config, "image_size", tuple(map(operator.index, sides)))


#                 width depth  mlp heads   B, L, H: paper Table 1. Ti, S: the releases that followed. Nano: ours, for 8x8 digits.
SIZES = {
    "Nano": dict(width=64, depth=4, mlp_dim=128, num_heads=4),
    "Ti": dict(width=192, depth=12, mlp_dim=768, num_heads=3),
    "S": dict(width=384, depth=12, mlp_dim=1536, num_heads=6),
    "B": dict(width=768, depth=12, mlp_dim=3072, num_heads=12),
    "L": dict(width=1024, depth=24, mlp_dim=4096, num_heads=16),
    "H": dict(width=1280, depth=32, mlp_dim=5120, num_heads=16),
}
_PATCHES = {"Nano": (4, 2), "Ti": (16,), "S": (16, 32), "B": (16, 32), "L": (16, 32), "H": (14,)}


def variant(name: str, **changes) -> ViTConfig:
    """The configuration of a named model, "ViT-{Nano,Ti,S,B,L,H}/P" with any patch side P, with `changes` to its fields.

        variant("ViT-B/16", image_size=384, num_classes=10)

    Raises ValueError for an unknown name, with the nearest known ones, or an unknown field.
    """
    match = re.fullmatch(r"ViT-(\w+)/([1-9]\d*)", name)
    if not match or match[1] not in SIZES:
        known = [f"ViT-{size}/{patch}" for size, patches in _PATCHES.items() for patch in patches]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
        raise ValueError(
            f"unknown model {name!r}: did you mean {', '.join(near)}? (ViT-{{{','.join(SIZES)}}}/P with any patch side P)"
        )
    fields = {field.name for field in dataclasses.fields(ViTConfig)}
    if unknown := set(changes) - fields:
        raise ValueError(f"unknown field {', '.join(sorted(unknown))} of ViTConfig: it has {', '.join(sorted(fields))}")
    return ViTConfig(**{"patch_size": int(match[2]), **SIZES[match[1]], **changes})
