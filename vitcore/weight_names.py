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
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np

from vitcore import families, parameters
from vitcore.config import ViTConfig
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
    first release and "later" for those of the later code. form: whose names the parts have: in transformers "dinov2", "dinov3", and
    "tower" for the vision towers of CLIP and SigLIP; in timm "dinov3" for those of its EVA, which DINOv3 is there. prefix: before
    every name."""

    naming: Naming = "release"
    prefix: str = ""
    numbering: int = 1
    stacked: bool = False
    top_position: bool = False
    modules: bool = False
    bit: Literal["", "first", "later"] = ""
    form: Literal["", "dinov2", "dinov3", "tower"] = ""

    @property
    def tower(self) -> bool:
        return self.form == "tower"


def written(config, naming: Naming) -> Style:
    """The style in which a model is written."""
    if naming == "release" and isinstance(config, ResNetConfig) and config.stem.form == "pre":
        return Style(bit="first", prefix="resnet/")
    if naming == "transformers" and isinstance(config, ViTConfig):
        if config.stem == "clip" or config.pool == "map":
            return Style(naming=naming, form="tower", prefix="vision_model.")
        if config.position == "rope":
            return Style(naming=naming, form="dinov3")
        if config.block in ("layerscale", "layerscale-gated"):
            return Style(naming=naming, form="dinov2", prefix="dinov2_with_registers." if config.registers else "dinov2.")
    if naming == "timm" and isinstance(config, ViTConfig) and (config.position == "rope" or config.qkv_bias == "qv"):
        return Style(naming=naming, form="dinov3")
    return Style(naming=naming, prefix="vit." if naming == "transformers" else "")


def naming_of(config) -> Naming:
    """timm's, or where that has no name for a parameter of the model, transformers'."""
    lost = [naming for naming in ("timm", "transformers") if nameless(config, written(config, naming))]
    return "transformers" if lost == ["timm"] else "timm"


def nameless(config, style: Style) -> list[str]:
    """Paths of the parameters that files of this style have no name for."""
    named = {entry.path for entry in entries(config, style)}
    return ["/".join(path) for path in shapes(config) if path not in named]


def shapes(config) -> dict[tuple[str, ...], tuple[int, ...]]:
    """{path of a leaf: shape} of our parameters."""
    return parameters.shapes(families.leaves(config))


# What transformers' files call the parts, by the form of their names, and what its modules in memory call some of them.
_ATTENTION = {part: f"attention.attention.{part}" for part in ("query", "key", "value")} | {"out": "attention.output.dense"}
_MLP = {"mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2"}
_TRANSFORMERS = {
    "": {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp_in": "intermediate.dense", "mlp_out": "output.dense"},
    "dinov2": {"norm1": "norm1", "norm2": "norm2", **_MLP, "gated_out": "mlp.weights_out"},
    "dinov3": {
        "blocks": "layer", "norm1": "norm1", "norm2": "norm2", "mlp_in": "mlp.up_proj", "mlp_out": "mlp.down_proj",
        "gated_out": "mlp.down_proj", "query": "attention.q_proj", "key": "attention.k_proj", "value": "attention.v_proj",
        "out": "attention.o_proj", "final": "norm", "patches": "embeddings.patch_embeddings",
    },
    "tower": {
        "blocks": "encoder.layers", "norm1": "layer_norm1", "norm2": "layer_norm2", **_MLP, "query": "self_attn.q_proj",
        "key": "self_attn.k_proj", "value": "self_attn.v_proj", "out": "self_attn.out_proj", "final": "post_layernorm",
        "patches": "embeddings.patch_embedding", "class": "embeddings.class_embedding",
        "position": "embeddings.position_embedding.weight",
    },
}  # fmt: skip
_USUAL = {
    "blocks": "encoder.layer", **_ATTENTION, "final": "layernorm", "patches": "embeddings.patch_embeddings.projection",
    "class": "embeddings.cls_token", "position": "embeddings.position_embeddings",
}  # fmt: skip
_MODULES = {
    "blocks": "layers", **_MLP, "query": "attention.q_proj", "key": "attention.k_proj", "value": "attention.v_proj",
    "out": "attention.o_proj",
}  # fmt: skip
_TIMM = {
    "blocks": "blocks", "mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2", "patches": "patch_embed.proj", "class": "cls_token",
    "position": "pos_embed", "scale1": "ls1.gamma", "scale2": "ls2.gamma",
}  # fmt: skip
_EVA = {"scale1": "gamma_1", "scale2": "gamma_2"}


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
    if style.naming == "timm":
        parts = _TIMM | (_EVA if style.form == "dinov3" else {})
    else:
        modules = {"blocks": "model.layer"} if style.form == "dinov3" else _MODULES
        parts = _USUAL | _TRANSFORMERS[style.form] | (modules if style.modules else {})
    return parts | {"block": f"{parts['blocks']}.{layer}"}


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
    (
        "transformers",
        r"(|vit\.|dinov2\.|dinov2_with_registers\.|vision_model\.)(?:embeddings\.|encoder\.layers?\.|layers\.\d|(?:model\.)?layer\.\d)",
    ),
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
            form=_form(naming, rest),
            modules=naming == "transformers" and any(re.match(r"layers\.\d|model\.layer\.\d", name) for name in rest),
            bit="first"
            if "root_block/standardized_conv2d/kernel" in rest
            else "later"
            if "root_block/conv_root/kernel" in rest
            else "",
        )
    return None


def _form(naming: Naming, names: list[str]) -> Literal["", "dinov2", "dinov3", "tower"]:
    """`Style.form` of a file with these names, without their prefix."""

    def any_has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    if naming == "timm":
        return "dinov3" if any_has(r"^blocks\.\d+\.(gamma_1|attn\.q_bias|mlp\.fc1_g\.weight)$") else ""
    if naming == "transformers" and any_has(r"^(model\.)?layer\.\d"):
        return "dinov3"
    if any_has(r"\.layer_scale\d\.lambda1$"):
        return "dinov2"
    return "tower" if "embeddings.patch_embedding.weight" in names else ""
