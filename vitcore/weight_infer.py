"""The configuration of a model by the names and shapes of its arrays, and what is refused by the names of what it has."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from vitcore import dino, weight_resnets
from vitcore.config import SIZES, ViTConfig
from vitcore.resnet_models import ResNetConfig
from vitcore.weight_names import OPEN_POOLS, OPEN_POSITIONS, Style, words

_REFUSED = (
    (
        r"\.mlp\.(w12|w1_w2|w[123])\.|^storage_tokens$|^rope_embed\.",
        "SwiGLU or rotary positions in the names of its own code (of DINO timm's and transformers' are read)",
    ),
    (r"(^|\.)rope\.", "rotary positions of another kind than DINOv3's"),
    (r"\.attn\.(q_proj|norm)\.|\.mlp\.norm\.", "EVA-02's blocks"),
    (r"(^|\.)(dist_token|distillation_token)$", "a distillation token (DeiT distilled)"),
    (r"\.(q_norm|k_norm)\.", "normalised queries and keys"),
    (r"^fc_norm\.", "its last norm behind the mean of the tokens (fc_norm)"),
    (r"\.relative_position_bias_table$", "relative position biases (BEiT)"),
)


def refuse(found: Iterable[str]) -> None:
    """Raise ValueError, by its name, where the names of arrays tell of a model that there is no entry for."""
    for pattern, what in _REFUSED:
        if names := [name for name in found if re.search(pattern, name)]:
            raise ValueError(f"the model has {what}, which is not supported ({names[0]})")


def _refuse_eva(found: Mapping[str, tuple[int, ...]], style: Style) -> None:
    """Raise ValueError for a model of timm's EVA that is not DINOv3, whose class and names it shares.

    DINOv3 has registers, no position embedding and no bias of keys; the other models there have one of them otherwise.
    """
    if style.naming != "timm" or style.form != "dinov3":
        return
    if "pos_embed" in found:
        raise ValueError(
            "the model has EVA's blocks beside a position embedding (EVA-02, BEiT), which is not supported (pos_embed)"
        )
    if "blocks.0.attn.qkv.bias" in found or "reg_token" not in found:
        raise ValueError("the model has rotary positions of another kind than DINOv3's, which is not supported (blocks.0.gamma_1)")


def infer(
    found: Mapping[str, tuple[int, ...]], style: Style, *, heads: int | None = None, grid=None, pool: str | None = None,
    position: str | None = None,
) -> ViTConfig | ResNetConfig:  # fmt: skip
    """The configuration of the model whose arrays have these names and shapes.

    heads: number of heads, which timm's and transformers' files do not say; by default that of the named model of this width, depth
    and hidden width, and where there is none it must be said. grid: (rows, columns) of the position embedding, by default square.
    pool, position: where the names leave them open, which without class token and attention pooling is the pool, and without a
    position embedding is how there is none. num_classes is 0 where there is no head; gelu is tanh for the release, erf for the
    others, as their models compute. Raises ValueError for the first thing that makes no model, or is open and not said.
    """

    refuse(found)
    _refuse_eva(found, style)

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if len(found.get(name, ())) != rank or 0 in found[name]:
            there = list(found[name]) if name in found else "missing"
            raise ValueError(f"no model can be made out: {name} is {there}, {rank} axes are required")
        return found[name]

    p = style.prefix
    transformer = f"{p}embedding/kernel" if style.naming == "release" else f"{p}patch_embed.proj.weight"
    if transformer not in found and (resnet := weight_resnets.resnet_of(found, style.naming, style.bit, p)):
        return resnet
    gated, has_bias, rotary = False, "qkv", style.form == "dinov3"
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
        classes = head
    else:
        timm, parts = style.naming == "timm", words(style, 0)
        if style.tower and len(found[f"{p}{parts['patches']}.weight"]) == 2:
            raise ValueError("the model has patches of images of any shape (SigLIP 2's NaFlex), which is not supported")
        width, channels, side, other = shape(f"{p}{parts['patches']}.weight", 4)
        depth = _count(found, rf"{p}{re.escape(parts['blocks'])}\.(\d+)\.")
        block = p + parts["block"]
        inner, gated = _hidden(found, block, parts, timm=timm)
        mlp_dim = shape(inner, 1)[0] // (2 if gated == "packed" else 1)
        has_bias = _qkv_bias(found, block, parts, timm=timm)
        heads = heads or known_heads(width, depth, mlp_dim, rotary=rotary)
        table, cls = p + parts["position"], p + parts["class"]
        pre = "pre_logits.fc.bias" if timm else f"{p}pooler.dense.bias"
        head = "head" if timm else "visual_projection" if "visual_projection.weight" in found else "classifier"
        classes, head = f"{head}.weight", f"{head}.bias"
    if side != other:
        raise ValueError(f"no model can be made out: patches are {side} x {other}, square ones are required")
    scaled = any(re.search(r"(^|\.)(ls1\.gamma|gamma_1|layer_scale1\.lambda1)$", name) for name in found)
    if rotary:
        position = "rope"
    has_class = cls in found
    has_map = any(name in found for name in (f"{p}MAPHead_0/probe", f"{p}head.probe", "attn_pool.latent"))
    normed = f"{p}{'norm_pre' if style.naming == 'timm' else 'pre_layrnorm'}.weight" in found
    registers = found.get("reg_token" if style.naming == "timm" else f"{p}embeddings.register_tokens", (0, 0))
    pool = (
        "token" if has_class else "map" if has_map else _said("pool", pool, "no class token and no attention pooling", OPEN_POOLS)
    )
    if table in found or position in (None, "1d", "1d-patches"):
        if table not in found and style.naming == "release":
            _said("position", None, "no position embedding", OPEN_POSITIONS)
        entries_there = math.prod(shape(table, 2 if style.tower else 3)[:-1])
        bare = has_class and style.naming == "timm" and (scaled or len(registers) == 3 or position == "1d-patches")
        bare = bare and _bare(entries_there, grid)
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
        num_classes=found[classes][0] if len(found.get(classes, ())) == (1 if classes == head else 2) else 0,
        head_bias=None if classes in found and head not in found else 0.0,
        representation_size=found[pre][0] if len(found.get(pre, ())) == 1 else None,
        pool=pool,
        gelu=_gelu(style, gated=bool(gated), normed=normed),
        eps=1e-5 if normed or rotary else 1e-12 if style.naming == "transformers" and not style.form else 1e-6,
        block="-".join(filter(None, ("layerscale" if scaled else "", "gated" if gated else ""))) or "encoder",
        stem=stem[0] if stem else "clip" if normed else None,
        position=position,
        registers=registers[1] if len(registers) == 3 else 0,
        qkv_bias=has_bias,
    )


def _gelu(style: Style, *, gated: bool, normed: bool) -> Literal["tanh", "erf", "quick", "silu"]:
    """What the models of these names compute where nothing says it. normed: with a norm in front of the blocks, as CLIP has."""
    if gated:
        return "silu"
    if style.tower:
        return "quick" if normed else "tanh"
    return "tanh" if style.naming == "release" else "erf"


def _hidden(found, block: str, parts, *, timm: bool) -> tuple[str, str]:
    """(the bias of the MLP's first projection; how it is gated: "" not, "apart": this is one of two, "packed": both are in it)."""
    gate, other, packed = ("fc1_g", "fc1_x", "fc1") if timm else ("gate_proj", "up_proj", "weights_in")
    if f"{block}.mlp.{gate}.bias" in found:
        return f"{block}.mlp.{other}.bias", "apart"
    bias, out = f"{block}.mlp.{packed}.bias", found.get(f"{block}.mlp.fc2.weight", ())
    if bias in found and (not timm or (len(out) == 2 and found[bias] == (2 * out[1],))):
        return bias, "packed"
    return f"{block}.{parts['mlp_in']}.bias", ""


def _qkv_bias(found, block: str, parts, *, timm: bool) -> Literal["qkv", "qv", "none"]:
    """Which of q, k and v have a bias."""
    whole, two = ("attn.qkv.bias", "attn.q_bias") if timm else (f"{parts['key']}.bias", f"{parts['query']}.bias")
    return "qkv" if f"{block}.{whole}" in found else "qv" if f"{block}.{two}" in found else "none"


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


def known_heads(width: int, depth: int, mlp_dim: int, *, rotary: bool = False) -> int:
    """The number of heads of the named size with these sides, which a file without it must be of; rotary: of DINOv3's, one of which
    has another number than the ViT with its sides. Raises ValueError."""
    sizes = [*dino.SIZES["3"].values()] if rotary else [*SIZES.values(), *dino.SIZES["2"].values()]
    for size in sizes:
        if (size["width"], size["depth"], size["mlp_dim"]) == (width, depth, mlp_dim):
            return size["num_heads"]
    raise ValueError(
        f"the number of heads is not in the file, and {width} wide, {depth} deep with {mlp_dim} hidden is no model whose number is "
        "known: say it (--heads, heads=)"
    )


def _count(found: Iterable[str], pattern: str) -> int:
    numbers = {int(match[1]) for name in found if (match := re.match(pattern, name)) and len(match[1]) < 5}
    return max(numbers, default=0) + 1
