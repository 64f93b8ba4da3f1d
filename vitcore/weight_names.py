"""The names that others give to a model's parameters, as data: one list of entries for each naming, read in both directions.

    release       flat names joined by "/", kernels HWIO and [in, out], heads apart: the paper's own .npz files. Two numberings of a
                  block's parts; later files stack the blocks, or keep the position embedding at the top without a class slot
    timm          blocks.0.attn.qkv.weight ...: [out, in], q, k and v in one
    transformers  vit.encoder.layer.0.attention.attention.query.weight ...: [out, in], q, k and v apart, as its files have them
                  (from version 5 on the modules in memory are called vit.layers.0.attention.q_proj; both are read)

An entry says which part of which of our arrays it is, and how that part is laid out: transposed by `axes`, then reshaped. Each
leaf's own record has its names; what differs between the styles of one naming is here.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np

from vitcore import families, parameters, weight_resnets
from vitcore.config import SIZES, ViTConfig
from vitcore.heads import POOLS
from vitcore.parameters import Leaf
from vitcore.positions import POSITIONS
from vitcore.resnet_models import ResNetConfig

Naming = Literal["release", "timm", "transformers"]
POSITION = ("patch_embed", "position")
# What no name in a file tells of.
OPEN_POOLS = tuple(name for name, entry in POOLS.items() if entry.unnamed)
OPEN_POSITIONS = tuple(name for name, entry in POSITIONS.items() if entry.unnamed)


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
            transposed = tuple(part.shape[a] for a in self.axes)
            leaf[self.index] = array.reshape(transposed).transpose(np.argsort(self.axes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """How a file names things. numbering (release): 1 counts all parts of a block on (MlpBlock_3), 0 each kind for itself
    (MlpBlock_0). stacked (release): blocks along a leading axis. top_position (release): `pos_embedding` at the top, without a
    class slot. modules (transformers): the names in memory. bit (release): of a pre-activation ResNet, "first" for the names of its
    first release and "later" for those of the later code. form (transformers): whose names a block's
    parts have. prefix: before every name."""

    naming: Naming = "release"
    prefix: str = ""
    numbering: int = 1
    stacked: bool = False
    top_position: bool = False
    modules: bool = False
    bit: Literal["", "first", "later"] = ""
    form: Literal["", "dinov2"] = ""


def written(config, naming: Naming) -> Style:
    """The style in which a model is written."""
    if naming == "release" and isinstance(config, ResNetConfig) and config.stem.form == "pre":
        return Style(bit="first", prefix="resnet/")
    if naming == "transformers" and getattr(config, "block", None) == "layerscale":
        return Style(naming=naming, form="dinov2", prefix="dinov2.")
    return Style(naming=naming, prefix="vit." if naming == "transformers" else "")


def nameless(config, style: Style) -> list[str]:
    """Paths of the parameters that files of this style have no name for."""
    named = {entry.path for entry in entries(config, style)}
    return ["/".join(path) for path in shapes(config) if path not in named]


def shapes(config) -> dict[tuple[str, ...], tuple[int, ...]]:
    """{path of a leaf: shape} of our parameters."""
    return parameters.shapes(families.leaves(config))


# What transformers' files call the parts of a block, by the form of their names.
_TRANSFORMERS = {
    "": {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp_in": "intermediate.dense", "mlp_out": "output.dense"},
    "dinov2": {"norm1": "norm1", "norm2": "norm2", "mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2"},
}


def words(style: Style, layer: int | None = None) -> dict[str, str]:
    """What stands for the words in braces of a `parameters.Name`, in a file of this style; {block} is a layer, None all of them."""
    if style.naming == "release":
        block = "Transformer/encoderblock" + ("" if layer is None else f"_{layer}")
        norm1, attention, norm2, mlp = ("0", "1", "2", "3") if style.numbering else ("0", "0", "1", "0")
        return {
            "block": block,
            "norm1": f"LayerNorm_{norm1}",
            "attention": f"MultiHeadDotProductAttention_{attention}",
            "norm2": f"LayerNorm_{norm2}",
            "mlp": f"MlpBlock_{mlp}",
        }
    parts = _TRANSFORMERS[style.form] if style.naming == "transformers" else {}
    return parts | {"block": f"{'blocks' if style.naming == 'timm' else 'layers' if style.modules else 'encoder.layer'}.{layer}"}


@cache
def entries(config, style: Style) -> tuple[Entry, ...]:
    """What a file of this style holds for a model of this configuration, layer by layer."""
    out: list[Entry] = []
    for layers, group in itertools.groupby(families.leaves(config), lambda leaf: leaf.layers):
        leaves = tuple(group)
        for layer in range(1 if style.stacked or not layers else layers):
            out += [entry for leaf in leaves for entry in _entries(leaf, style, layer)]
    return tuple(out)


def _entries(leaf: Leaf, style: Style, layer: int) -> Iterator[Entry]:
    """The arrays of a file that hold a leaf, or one layer of it."""
    for name in leaf.names.get(style.naming, ()):
        if any(getattr(style, field) != value for field, value in name.when.items()):
            continue
        part = leaf.shape[bool(leaf.layers) + len(name.part) :]
        shape = name.shape or (part if name.axes is None else tuple(part[a] for a in name.axes))
        index, axes = name.part, name.axes
        if leaf.layers and style.stacked:
            index = (slice(None), *index) if index else ()
            axes = None if axes is None else (0, *(a + 1 for a in axes))
            shape = (leaf.layers, *shape)
        elif leaf.layers:
            index = (layer, *index)
        text = name.text.format(**words(style, None if style.stacked else layer))
        yield Entry(("" if name.outside else style.prefix) + text, leaf.path, index, axes, shape)


# --- which naming, which model ----------------------------------------------------------------------------------------------

_KNOWN: tuple[tuple[Naming, str], ...] = (
    (
        "release",
        r"(|params/|opt/target/|target/|resnet/)(?:embedding/|cls$|Transformer/|pos_embedding$|head/kernel|conv_root/|root_block/)",
    ),
    ("transformers", r"(|vit\.|dinov2\.)(?:embeddings\.|encoder\.layer\.|layers\.\d)"),
    ("timm", r"()(?:patch_embed\.|blocks\.\d|pos_embed$|cls_token$|stem\.conv|stages\.\d)"),
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
            numbering=int(not any("encoderblock" in name and "/MlpBlock_0/" in name for name in rest))
            if naming == "release"
            else 1,
            stacked=any(name.startswith("Transformer/encoderblock/") for name in rest),
            top_position="pos_embedding" in rest,
            form="dinov2" if any(re.search(r"\.layer_scale\d\.lambda1$", name) for name in rest) else "",
            modules=naming == "transformers" and any(re.match(r"layers\.\d", name) for name in rest),
            bit="first"
            if "root_block/standardized_conv2d/kernel" in rest
            else "later"
            if "root_block/conv_root/kernel" in rest
            else "",
        )
    return None


_REFUSED = (
    (r"\.mlp\.(weights_in|w12|w1_w2)\.", "a SwiGLU MLP (DINOv2-giant)"),
    (
        r"(^|\.)(rope_embed|rope)\.|\.mlp\.fc1_g\.|\.mlp\.w[123]\.|\.gamma_1$",
        "rotary positions or EVA's blocks (DINOv3, EVA-02, BEiT)",
    ),
    (r"(^|\.)(reg_token|register_tokens)$", "register tokens (DINOv2 with registers, DINOv3)"),
    (r"(^|\.)(dist_token|distillation_token)$", "a distillation token (DeiT distilled)"),
    (r"(^|\.)(norm_pre|pre_layrnorm)\.", "a layer norm in front of its blocks (CLIP)"),
    (r"^(vision_model\.|attn_pool\.)", "SigLIP's or CLIP's vision tower in these names: the release's .npz of SigLIP is read"),
    (r"\.(q_norm|k_norm)\.", "normalised queries and keys"),
    (r"^fc_norm\.", "its last norm behind the mean of the tokens (fc_norm)"),
    (r"\.relative_position_bias_table$", "relative position biases (BEiT)"),
)


def refuse(found: Iterable[str]) -> None:
    """Raise ValueError, by its name, where the names of arrays tell of a model that there is no entry for."""
    for pattern, what in _REFUSED:
        if names := [name for name in found if re.search(pattern, name)]:
            raise ValueError(f"the model has {what}, which is not supported ({names[0]})")


def infer(
    found: Mapping[str, tuple[int, ...]], style: Style, *, heads: int | None = None, grid=None, pool: str | None = None,
    position: str | None = None,
) -> ViTConfig | ResNetConfig:  # fmt: skip
    """The configuration of the model whose arrays have these names and shapes.

    heads: number of heads, which timm's and transformers' files do not say; by default that of the named model of this width, depth
    and hidden width, and where there is none it must be said. grid: (rows, columns) of the position embedding, by default square.
    pool, position: where the names leave them open, which without class token and attention pooling is the pool, and without a
    position embedding is how there is none. num_classes is 1 where there is no head; gelu is tanh for the release, erf for the
    others, as their models compute. Raises ValueError for the first thing that makes no model, or is open and not said.
    """

    refuse(found)

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if len(found.get(name, ())) != rank or 0 in found[name]:
            there = list(found[name]) if name in found else "missing"
            raise ValueError(f"no model can be made out: {name} is {there}, {rank} axes are required")
        return found[name]

    p = style.prefix
    transformer = f"{p}embedding/kernel" if style.naming == "release" else f"{p}patch_embed.proj.weight"
    if transformer not in found and (resnet := weight_resnets.resnet_of(found, style.naming, style.bit, p)):
        return resnet
    stem = weight_resnets.stem_of(found, style.naming, "", p + (weight_resnets.HYBRID if style.naming == "timm" else ""))
    if style.naming == "release":
        side, other, channels, width = shape(f"{p}embedding/kernel", 4)
        block = f"{p}Transformer/encoderblock" + ("" if style.stacked else "_0")
        mha, mlp = ("1", "3") if style.numbering else ("0", "0")
        query = shape(f"{block}/MultiHeadDotProductAttention_{mha}/query/kernel", 4 if style.stacked else 3)
        depth, heads = _count(found, rf"{p}Transformer/encoderblock_(\d+)/"), query[-2]
        depth = query[0] if style.stacked else depth
        mlp_dim = shape(f"{block}/MlpBlock_{mlp}/Dense_0/kernel", 3 if style.stacked else 2)[-1]
        table = f"{p}pos_embedding" if style.top_position else f"{p}Transformer/posembed_input/pos_embedding"
        cls, pre, head = f"{p}cls", f"{p}pre_logits/bias", f"{p}head/bias"
    else:
        timm = style.naming == "timm"
        projection = f"{p}patch_embed.proj" if timm else f"{p}embeddings.patch_embeddings.projection"
        width, channels, side, other = shape(f"{projection}.weight", 4)
        block = "blocks" if timm else "layers" if style.modules else "encoder.layer"
        depth = _count(found, rf"{p}{re.escape(block)}\.(\d+)\.")
        mlp_dim = shape(f"{p}{block}.0.{'mlp.fc1' if timm or style.modules else words(style, 0)['mlp_in']}.bias", 1)[0]
        heads = heads or known_heads(width, depth, mlp_dim)
        table = "pos_embed" if timm else f"{p}embeddings.position_embeddings"
        cls = "cls_token" if timm else f"{p}embeddings.cls_token"
        pre = "pre_logits.fc.bias" if timm else f"{p}pooler.dense.bias"
        head = "head.bias" if timm else "classifier.bias"
    if side != other:
        raise ValueError(f"no model can be made out: patches are {side} x {other}, square ones are required")
    scaled = style.form == "dinov2" or (style.naming == "timm" and "blocks.0.ls1.gamma" in found)
    has_class, has_map = cls in found, f"{p}MAPHead_0/probe" in found
    pool = (
        "token" if has_class else "map" if has_map else _said("pool", pool, "no class token and no attention pooling", OPEN_POOLS)
    )
    if table in found or position in (None, "1d", "1d-patches"):
        if table not in found and style.naming == "release":
            _said("position", None, "no position embedding", OPEN_POSITIONS)
        entries_there = math.prod(shape(table, 3)[:2])
        bare = has_class and style.naming == "timm" and (scaled or position == "1d-patches") and _bare(entries_there, grid)
        position = "1d-patches" if bare else "1d"
        patches = entries_there - int(has_class and not style.top_position and not bare)
        rows, columns = grid or (math.isqrt(max(patches, 0)),) * 2
        if rows * columns != patches or patches < 1:
            raise ValueError(f"no model can be made out: the position embedding has {patches} patches, no square: say its grid")
    else:
        _said("position", position, "no position embedding", OPEN_POSITIONS)
        rows, columns = grid or (224 // side,) * 2
    pixels = side * (stem[0].stride if stem else 1)
    return ViTConfig(
        image_size=rows * pixels if rows == columns else (rows * pixels, columns * pixels),
        patch_size=side,
        width=width,
        depth=depth,
        mlp_dim=mlp_dim,
        num_heads=heads,
        channels=stem[1] if stem else channels,
        num_classes=found[head][0] if len(found.get(head, ())) == 1 else 1,
        representation_size=found[pre][0] if len(found.get(pre, ())) == 1 else None,
        pool=pool,
        gelu="tanh" if style.naming == "release" else "erf",
        eps=1e-12 if style.naming == "transformers" and not style.form else 1e-6,
        block="layerscale" if scaled else "encoder",
        stem=stem[0] if stem else None,
        position=position,
    )


def _bare(entries: int, grid) -> bool:
    """Whether a table beside a class token is of the patches alone: by the grid, or as a square that it is not without one."""
    if grid is not None:
        return entries == grid[0] * grid[1]
    return math.isqrt(entries) ** 2 == entries


def _said(what: str, value: str | None, there: str, choices: tuple[str, ...]) -> str:
    """A choice that a file leaves open, as its reader says it. ValueError where he does not."""
    if value not in choices:
        raise ValueError(
            f"the file has {there}, so its {what} is {' or '.join(map(repr, choices))}, and no name says which: say {what}="
        )
    return value


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
