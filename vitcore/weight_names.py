"""The names that others give to a ViT's parameters, as data: one list of entries for each naming, read in both directions.

    release       flat names joined by "/", kernels HWIO and [in, out], heads apart: the paper's own .npz files. Two numberings of a
                  block's parts; later files stack the blocks, or keep the position embedding at the top without a class slot
    timm          blocks.0.attn.qkv.weight ...: [out, in], q, k and v in one
    transformers  vit.encoder.layer.0.attention.attention.query.weight ...: [out, in], q, k and v apart, as its files have them
                  (from version 5 on the modules in memory are called vit.layers.0.attention.q_proj; both are read)

An entry says which part of which of our arrays it is, and how that part is turned: transposed by `axes`, then reshaped.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from vitcore.config import SIZES, ViTConfig
from vitcore.model import init

Naming = Literal["release", "timm", "transformers"]
POSITION = ("patch_embed", "position")


class Entry(NamedTuple):
    """One array of a file. path: of our leaf. index: the part of it, e.g. (layer,) or (layer, 0). axes: the transposition, None for
    none. shape: in the file."""

    name: str
    path: tuple[str, ...]
    index: tuple[Any, ...]
    axes: tuple[int, ...] | None
    shape: tuple[int, ...]

    def to_file(self, leaf: np.ndarray) -> np.ndarray:
        part = leaf[self.index]
        return (part if self.axes is None else part.transpose(self.axes)).reshape(self.shape)

    def into(self, leaf: np.ndarray, array: np.ndarray) -> None:
        """Write the file's array into our leaf: the inverse of `to_file`."""
        part = leaf[self.index]
        if self.axes is None:
            leaf[self.index] = array.reshape(part.shape)
        else:
            turned = tuple(part.shape[a] for a in self.axes)
            leaf[self.index] = array.reshape(turned).transpose(np.argsort(self.axes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """How a file names things. numbering (release): 1 counts all parts of a block on (MlpBlock_3), 0 each kind for itself
    (MlpBlock_0). stacked (release): blocks along a leading axis. top_position (release): `pos_embedding` at the top, without a
    class slot. modules (transformers): the names in memory. prefix: before every name."""

    naming: Naming = "release"
    prefix: str = ""
    numbering: int = 1
    stacked: bool = False
    top_position: bool = False
    modules: bool = False


@cache
def shapes(config: ViTConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """{path of a leaf: shape} of our parameters."""
    tree = jax.eval_shape(partial(init, config=config), jax.random.key(0))
    return {tuple(str(k.key) for k in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}  # pyright: ignore[reportAttributeAccessIssue]


@cache
def entries(config: ViTConfig, style: Style) -> tuple[Entry, ...]:
    """What a file of this style holds for a model of this configuration."""
    listed = {"release": _release, "timm": _timm, "transformers": _transformers}[style.naming](config, style)
    ours = shapes(config)
    out = []
    for name, path, index, axes, shape in listed:
        if path not in ours:  # no class token, no pre-logits
            continue
        part = ours[path][len(index) :]
        turned = part if axes is None else tuple(part[a] for a in axes)
        out.append(Entry(name, path, index, axes, shape or turned))
    return tuple(out)


Listed = list[tuple[str, tuple[str, ...], tuple[Any, ...], tuple[int, ...] | None, tuple[int, ...] | None]]  # Entry, shape open


def _release(c: ViTConfig, style: Style) -> Listed:
    n, h = c.num_heads, c.width // c.num_heads
    norm1, attention, norm2, mlp = ("0", "1", "2", "3") if style.numbering else ("0", "0", "1", "0")
    position = "pos_embedding" if style.top_position else "Transformer/posembed_input/pos_embedding"
    tokens = c.grid[0] * c.grid[1] + (0 if style.top_position else int(c.pool == "token"))
    out: Listed = [
        ("embedding/kernel", ("patch_embed", "kernel"), (), None, None),
        ("embedding/bias", ("patch_embed", "bias"), (), None, None),
        ("cls", ("patch_embed", "cls"), (), None, (1, 1, c.width)),
        (position, POSITION, (), None, (1, tokens, c.width)),
        *((f"Transformer/encoder_norm/{w}", ("norm", w), (), None, None) for w in ("scale", "bias")),
        *((f"pre_logits/{w}", ("pre_logits", w), (), None, None) for w in ("kernel", "bias")),
        *((f"head/{w}", ("head", w), (), None, None) for w in ("kernel", "bias")),
    ]
    for layer in range(1 if style.stacked else c.depth):
        at: tuple[int, ...] = () if style.stacked else (layer,)
        lead = (c.depth,) if style.stacked else ()
        block = f"Transformer/encoderblock{'' if style.stacked else f'_{layer}'}"
        mha = f"{block}/MultiHeadDotProductAttention_{attention}"
        out += [(f"{block}/LayerNorm_{norm1}/{w}", ("blocks", "norm1", w), at, None, None) for w in ("scale", "bias")]
        for i, which in enumerate(("query", "key", "value")):
            part = (slice(None), i) if style.stacked else (layer, i)
            out += [
                (f"{mha}/{which}/kernel", ("blocks", "qkv", "kernel"), part, None, (*lead, c.width, n, h)),
                (f"{mha}/{which}/bias", ("blocks", "qkv", "bias"), part, None, (*lead, n, h)),
            ]
        out += [
            (f"{mha}/out/kernel", ("blocks", "out", "kernel"), at, None, (*lead, n, h, c.width)),
            (f"{mha}/out/bias", ("blocks", "out", "bias"), at, None, None),
        ]
        out += [(f"{block}/LayerNorm_{norm2}/{w}", ("blocks", "norm2", w), at, None, None) for w in ("scale", "bias")]
        for i, which in enumerate(("mlp_in", "mlp_out")):
            out += [(f"{block}/MlpBlock_{mlp}/Dense_{i}/{w}", ("blocks", which, w), at, None, None) for w in ("kernel", "bias")]
    return [(style.prefix + name, *rest) for name, *rest in out]  # pyright: ignore[reportReturnType]


def _torch(ours: tuple[str, ...], theirs: str, index: tuple[int, ...] = ()) -> Listed:
    """A dense layer or a norm under torch's names; kernels [out, in]."""
    if "norm" in ours[-1]:
        return [(f"{theirs}.{w}", (*ours, v), index, None, None) for w, v in (("weight", "scale"), ("bias", "bias"))]
    return [
        (f"{theirs}.weight", (*ours, "kernel"), index, (1, 0), None),
        (f"{theirs}.bias", (*ours, "bias"), index, None, None),
    ]


def _stem(c: ViTConfig, projection: str, cls: str, position: str) -> Listed:
    return [
        (cls, ("patch_embed", "cls"), (), None, (1, 1, c.width)),
        (position, POSITION, (), None, (1, c.tokens, c.width)),
        (f"{projection}.weight", ("patch_embed", "kernel"), (), (3, 2, 0, 1), None),
        (f"{projection}.bias", ("patch_embed", "bias"), (), None, None),
    ]


def _timm(c: ViTConfig, style: Style) -> Listed:
    out = _stem(c, "patch_embed.proj", "cls_token", "pos_embed")
    for i in range(c.depth):
        block = f"blocks.{i}"
        out += _torch(("blocks", "norm1"), f"{block}.norm1", (i,))
        out += [
            (f"{block}.attn.qkv.weight", ("blocks", "qkv", "kernel"), (i,), (0, 2, 1), (3 * c.width, c.width)),
            (f"{block}.attn.qkv.bias", ("blocks", "qkv", "bias"), (i,), None, (3 * c.width,)),
        ]
        out += _torch(("blocks", "out"), f"{block}.attn.proj", (i,)) + _torch(("blocks", "norm2"), f"{block}.norm2", (i,))
        out += _torch(("blocks", "mlp_in"), f"{block}.mlp.fc1", (i,)) + _torch(("blocks", "mlp_out"), f"{block}.mlp.fc2", (i,))
    return out + _torch(("norm",), "norm") + _torch(("pre_logits",), "pre_logits.fc") + _torch(("head",), "head")


def _transformers(c: ViTConfig, style: Style) -> Listed:
    embeddings = f"{style.prefix}embeddings"
    stem = (f"{embeddings}.patch_embeddings.projection", f"{embeddings}.cls_token", f"{embeddings}.position_embeddings")
    out = _stem(c, *stem)
    query, projection, mlp_in, mlp_out = (
        ("attention.{0}_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
        if style.modules
        else ("attention.attention.{1}", "attention.output.dense", "intermediate.dense", "output.dense")
    )
    for i in range(c.depth):
        block = style.prefix + (f"layers.{i}" if style.modules else f"encoder.layer.{i}")
        out += _torch(("blocks", "norm1"), f"{block}.layernorm_before", (i,))
        for j, names in enumerate((("q", "query"), ("k", "key"), ("v", "value"))):
            out += _torch(("blocks", "qkv"), f"{block}.{query.format(*names)}", (i, j))
        out += _torch(("blocks", "out"), f"{block}.{projection}", (i,))
        out += _torch(("blocks", "norm2"), f"{block}.layernorm_after", (i,))
        out += _torch(("blocks", "mlp_in"), f"{block}.{mlp_in}", (i,)) + _torch(("blocks", "mlp_out"), f"{block}.{mlp_out}", (i,))
    out += _torch(("norm",), f"{style.prefix}layernorm") + _torch(("pre_logits",), f"{style.prefix}pooler.dense")
    return out + _torch(("head",), "classifier")


# --- which naming, which model ----------------------------------------------------------------------------------------------

_KNOWN: tuple[tuple[Naming, str], ...] = (
    ("release", r"(|params/|opt/target/|target/)(?:embedding/|cls$|Transformer/|pos_embedding$|head/kernel)"),
    ("transformers", r"(|vit\.)(?:embeddings\.|encoder\.layer\.|layers\.\d)"),
    ("timm", r"()(?:patch_embed\.|blocks\.\d|pos_embed$|cls_token$)"),
)


def style_of(names: Iterable[str]) -> Style | None:
    """The style of a file with these names, None where no name is known."""
    names = list(names)
    for naming, pattern in _KNOWN:
        found = [match[1] for name in names if (match := re.match(pattern, name))]
        if not found:
            continue
        prefix = max(set(found), key=found.count)
        rest = [name[len(prefix) :] for name in names if name.startswith(prefix)]
        return Style(
            naming=naming,
            prefix=prefix,
            numbering=int(not any("/MlpBlock_0/" in name for name in rest)) if naming == "release" else 1,
            stacked=any(name.startswith("Transformer/encoderblock/") for name in rest),
            top_position="pos_embedding" in rest,
            modules=naming == "transformers" and any(re.match(r"layers\.\d", name) for name in rest),
        )
    return None


def infer(found: Mapping[str, tuple[int, ...]], style: Style, *, heads: int | None = None, grid=None) -> ViTConfig:
    """The configuration of the model whose arrays have these names and shapes.

    heads: number of heads, which timm's and transformers' files do not say; by default that of the named model of this width, depth
    and hidden width, and where there is none it must be said. grid: (rows, columns) of the position embedding, by default square.
    num_classes is 1 where there is no head; gelu is tanh for the release, erf for the others, as their models compute. Raises
    ValueError for the first thing that makes no model.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if len(found.get(name, ())) != rank or 0 in found[name]:
            there = list(found[name]) if name in found else "missing"
            raise ValueError(f"no model can be made out: {name} is {there}, {rank} axes are required")
        return found[name]

    p = style.prefix
    if style.naming == "release":
        side, other, channels, width = shape(f"{p}embedding/kernel", 4)
        block = f"{p}Transformer/encoderblock" + ("" if style.stacked else "_0")
        mha, mlp = ("1", "3") if style.numbering else ("0", "0")
        query = shape(f"{block}/MultiHeadDotProductAttention_{mha}/query/kernel", 4 if style.stacked else 3)
        depth, heads = _count(found, rf"{p}Transformer/encoderblock_(\d+)/"), query[-2]
        depth = query[0] if style.stacked else depth
        mlp_dim = shape(f"{block}/MlpBlock_{mlp}/Dense_0/kernel", 3 if style.stacked else 2)[-1]
        position = f"{p}pos_embedding" if style.top_position else f"{p}Transformer/posembed_input/pos_embedding"
        cls, pre, head = f"{p}cls", f"{p}pre_logits/bias", f"{p}head/bias"
    else:
        timm = style.naming == "timm"
        stem = f"{p}patch_embed.proj" if timm else f"{p}embeddings.patch_embeddings.projection"
        width, channels, side, other = shape(f"{stem}.weight", 4)
        block = "blocks" if timm else "layers" if style.modules else "encoder.layer"
        depth = _count(found, rf"{p}{re.escape(block)}\.(\d+)\.")
        mlp_dim = shape(f"{p}{block}.0.{'mlp.fc1' if timm or style.modules else 'intermediate.dense'}.bias", 1)[0]
        heads = heads or known_heads(width, depth, mlp_dim)
        position = "pos_embed" if timm else f"{p}embeddings.position_embeddings"
        cls = "cls_token" if timm else f"{p}embeddings.cls_token"
        pre = "pre_logits.fc.bias" if timm else f"{p}pooler.dense.bias"
        head = "head.bias" if timm else "classifier.bias"
    if side != other:
        raise ValueError(f"no model can be made out: patches are {side} x {other}, square ones are required")
    patches = math.prod(shape(position, 3)[:2]) - int(cls in found and not style.top_position)
    rows, columns = grid or (math.isqrt(max(patches, 0)),) * 2
    if rows * columns != patches or patches < 1:
        raise ValueError(f"no model can be made out: the position embedding has {patches} patches, no square: say its grid")
    return ViTConfig(
        image_size=rows * side if rows == columns else (rows * side, columns * side),
        patch_size=side,
        width=width,
        depth=depth,
        mlp_dim=mlp_dim,
        num_heads=heads,
        channels=channels,
        num_classes=found[head][0] if len(found.get(head, ())) == 1 else 1,
        representation_size=found[pre][0] if len(found.get(pre, ())) == 1 else None,
        pool="token" if cls in found else "gap",
        gelu="tanh" if style.naming == "release" else "erf",
    )


def known_heads(width: int, depth: int, mlp_dim: int) -> int:
    """The number of heads of the named size with these sides, which a file without it must be of. Raises ValueError."""
    for size in SIZES.values():
        if (size["width"], size["depth"], size["mlp_dim"]) == (width, depth, mlp_dim):
            return size["num_heads"]
    raise ValueError(
        f"the number of heads is not in the file, and {width} wide, {depth} deep with {mlp_dim} hidden is no model whose number is "
        "known: say it (--heads, heads=)"
    )


def _count(found: Iterable[str], pattern: str) -> int:
    numbers = {int(match[1]) for name in found if (match := re.match(pattern, name)) and len(match[1]) < 5}
    return max(numbers, default=0) + 1
