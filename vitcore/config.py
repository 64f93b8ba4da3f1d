"""The shape of a Vision Transformer, as data: ViTConfig and the table of its named sizes (paper Table 1; Ti and S from the later
releases). `vitcore/families.py` has `variant`, which knows the names of every family."""

import dataclasses
import operator
import re
from typing import Any, Literal, NamedTuple

from kernels.layer_norm.reference import EPS
from kernels.mlp.reference import GELUS
from vitcore import dino, hybrid, masked
from vitcore.block_leaves import QKV_BIASES
from vitcore.blocks import BLOCKS, Block
from vitcore.heads import POOLS, Pool
from vitcore.masked import Masked
from vitcore.positions import POSITIONS, Position
from vitcore.stems import STEMS, Stem, stem_of

SMALLEST_EPS = 1e-30  # of a layer norm: float32, which every kernel normalises in, holds it, and 1 / sqrt of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A Vision Transformer (paper section 3.1). Hashable: it is a static argument of every jitted function.

    image_size: side of the square input, or (Y, X), in pixels. patch_size: side P of a patch, in pixels (of the feature map, with
    a stem that makes one). width: D. depth: L. mlp_dim: F. num_heads: N. num_classes: V, 0 for a model without a head.
    representation_size: width of the pre-logits tanh layer, None for none (the paper has it, as wide as the model, in
    pre-training only). pool: how the tokens become one representation, "token" (class token), "gap" (mean of the patch tokens),
    or another name of `heads.POOLS`. dropout: rate. channels: C. gelu: "tanh" (the release), "erf" (exact), "quick" (CLIP's: a
    times the logistic function of 1.702 a) or "silu" (of a itself: with a gated block, SwiGLU). eps: of every layer norm.
    head_bias: initial value of the head's bias (the release takes -10 for the sigmoid loss on ImageNet-21k), None for a head
    without one. stem: None (a linear projection of patches), a name of `stems.STEMS`, or a stem's own record. position: a name of
    `positions.POSITIONS`. block: a name of `blocks.BLOCKS`. masked: what masked patch prediction is told, which adds its leaves;
    None without it. registers: R, learned tokens that the blocks see besides and nobody reads (arXiv:2309.16588). drop_path: the
    last block's rate of stochastic depth, as dropout with a key alone (`vitcore/drop_path.py`). qkv_bias: which of queries, keys
    and values have a bias in the blocks: "qkv", "qv" or "none". Raises ValueError where a value makes no model.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_classes: int = 1000
    representation_size: int | None = None
    pool: str = "token"
    dropout: float = 0.0
    channels: int = 3
    gelu: Literal["tanh", "erf", "quick", "silu"] = "tanh"
    eps: float = EPS
    head_bias: float | None = 0.0
    stem: Any = None
    position: str = "1d"
    block: str = "encoder"
    masked: Masked | None = None
    registers: int = 0
    drop_path: float = 0.0
    qkv_bias: Literal["qkv", "qv", "none"] = "qkv"

    def __post_init__(self):
        self._from_json()
        _plain_integers(self)
        none = {"num_classes": "a head", "registers": "registers"}
        for name in ("patch_size", "width", "depth", "mlp_dim", "num_heads", "num_classes", "channels", "registers"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= (name not in none)):
                wanted = f"a positive integer, or 0 for a model without {none[name]}," if name in none else "a positive integer"
                raise ValueError(f"{name}={getattr(self, name)!r}: {wanted} is required")
        stem = getattr(self.stem, "kind", self.stem)
        tables = ("pool", POOLS, self.pool), ("position", POSITIONS, self.position), ("block", BLOCKS, self.block)
        for name, table, value in (("stem", STEMS, "patches" if stem is None else stem), *tables):
            if value not in table:
                *others, last = map(repr, table)
                choices = f"{', '.join(others)} or {last}" if others else last
                raise ValueError(f"{name}={value!r}: {choices} is required")
        if min(self.image_shape) < 1:
            raise ValueError(f"image_size={self.image_size}: positive numbers are required")
        self.entries.stem.check(self)
        if self.width % self.num_heads:
            raise ValueError(
                f"width={self.width} is not divisible by num_heads={self.num_heads}: every head has width / num_heads columns"
            )
        if self.representation_size is not None and self.representation_size < 1:
            raise ValueError(f"representation_size={self.representation_size}: a positive integer or None is required")
        if self.gelu not in GELUS:
            raise ValueError(f"gelu={self.gelu!r}: 'tanh', 'erf', 'quick' or 'silu' is required")
        if self.qkv_bias not in QKV_BIASES:
            raise ValueError(f"qkv_bias={self.qkv_bias!r}: 'qkv', 'qv' or 'none' is required")
        if not (isinstance(self.eps, int | float) and SMALLEST_EPS <= self.eps < 1):
            raise ValueError(f"eps={self.eps!r}: a number from {SMALLEST_EPS:g} to below 1 is required, e.g. 1e-6")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: a rate in [0, 1) is required")
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path={self.drop_path}: a rate in [0, 1) is required")
        self.entries.position.check(self)
        self.entries.block.check(self)
        if self.masked is not None:
            masked.check(self)

    def _from_json(self):
        """Take fields as they come out of config.json: a list for a tuple, a dict for a stem's record."""
        if isinstance(self.image_size, list):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        if isinstance(self.stem, dict):
            kind = self.stem.get("kind")
            if kind not in STEMS or (options := STEMS[kind].options) is None:
                known = [name for name, stem in STEMS.items() if stem.options]
                raise ValueError(f"stem={self.stem!r}: 'kind' must be one of {known}, each with its own fields")
            object.__setattr__(self, "stem", options(**self.stem))
        if isinstance(self.masked, dict):
            object.__setattr__(self, "masked", Masked(**self.masked))

    @property
    def entries(self) -> "Entries":
        """What the names of stem, position, block and pool stand for."""
        return Entries(stem_of(self), POSITIONS[self.position], BLOCKS[self.block], POOLS[self.pool])

    @property
    def image_shape(self) -> tuple[int, int]:
        """(Y, X) in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.entries.stem.grid(self)

    @property
    def class_tokens(self) -> int:
        """How many tokens stand before the patches: 1 where the pool reads a class token, else 0."""
        return int(self.entries.pool.class_token)

    @property
    def seen_tokens(self) -> int:
        """The tokens that anybody reads behind the blocks: patches, and the class token where there is one."""
        return self.grid[0] * self.grid[1] + self.class_tokens

    @property
    def tokens(self) -> int:
        """T, the tokens of the blocks: class token, patches, registers, in this order."""
        return self.seen_tokens + self.registers

    @property
    def of_pixels(self) -> bool:
        """Whether patches are of pixels, and not of a CNN's features."""
        return self.stem is None or isinstance(self.stem, str)

    @property
    def feature_size(self) -> int:
        """Width of what the head reads."""
        return self.representation_size or self.width


def _plain_integers(config: "ViTConfig") -> None:
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


class Entries(NamedTuple):
    """The entries of the tables that make up a Vision Transformer."""

    stem: Stem
    position: Position
    block: Block
    pool: Pool


#                 width depth  mlp heads   B, L, H: paper Table 1. The others: the releases that followed. Nano: ours, for digits.
SIZES = {
    "Nano": dict(width=64, depth=4, mlp_dim=128, num_heads=4),
    "mu": dict(width=32, depth=1, mlp_dim=128, num_heads=2),
    "Ti": dict(width=192, depth=12, mlp_dim=768, num_heads=3),
    "S": dict(width=384, depth=12, mlp_dim=1536, num_heads=6),
    "M": dict(width=512, depth=12, mlp_dim=2048, num_heads=8),
    "B": dict(width=768, depth=12, mlp_dim=3072, num_heads=12),
    "L": dict(width=1024, depth=24, mlp_dim=4096, num_heads=16),
    "So400m": dict(width=1152, depth=27, mlp_dim=4304, num_heads=16),
    "H": dict(width=1280, depth=32, mlp_dim=5120, num_heads=16),
    "g": dict(width=1408, depth=40, mlp_dim=6144, num_heads=16),
    "G": dict(width=1664, depth=48, mlp_dim=8192, num_heads=16),
}
PATCHES = {
    "Nano": (4, 2),
    "Ti": (16,),
    "S": (16, 32),
    "B": (16, 32),
    "L": (16, 32),
    "So400m": (14,),
    "H": (14,),
    "g": (14,),
    "G": (14,),
}


def parse(name: str) -> dict[str, Any] | None:
    """The fields of "ViT-{Nano,Ti,S,B,L,H}/P", with any patch side P, also as "Axial-ViT-B/16", a hybrid's "R50+ViT-B/16" or a name
    of `dino.py`; None for another name."""
    if (fields := dino.parse(name)) is not None:
        return fields
    if (found := hybrid.parse(name)) is not None:
        fields, size = found
        return {**fields, **SIZES[size]} if size in SIZES else None
    match = re.fullmatch(r"(Axial-)?ViT-(\w+)/([1-9]\d*)", name)
    if not match or match[2] not in SIZES:
        return None
    axial = {"block": "axial", "pool": "gap"} if match[1] else {}
    return {"patch_size": int(match[3]), **axial, **SIZES[match[2]]}


NAMES = (
    *(f"ViT-{size}/{patch}" for size, patches in PATCHES.items() for patch in patches),
    "Axial-ViT-B/16",
    "Axial-ViT-B/32",
    *hybrid.NAMES,
    *dino.NAMES,
)
