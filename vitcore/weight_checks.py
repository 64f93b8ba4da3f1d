"""Whether a file of weights is of the model that is asked for, and the one line that says what is not.

Names first (`style_of_file`), then every entry's presence, shape and type (`check`), then what the file says of itself (`agrees`).
"""

import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from vitcore import weight_about
from vitcore.config import ViTConfig
from vitcore.resnet_models import ResNetConfig
from vitcore.weight_files import Stored, WeightError
from vitcore.weight_infer import infer, refuse
from vitcore.weight_names import OPEN_POSITIONS, POSITION, Entry, Style, style_of

PATCHES = ("patch_embed", "kernel")
MOST_PATCHES = 2**16  # of a position embedding that is to be fitted: a side of 4096 pixels in patches of 16
_FLOATS = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float64))


def usual_names(arrays: Mapping[str, Stored]) -> dict[str, Stored]:
    """The arrays under the names that the release's other files have: of two towers, images' and texts', that of the images; and
    the position embedding that for some months of 2021 stood in the encoder."""
    towers = any(name.startswith("params/img/") for name in arrays)
    out = {}
    for name, array in arrays.items():
        if towers:
            if not name.startswith("params/img/"):
                continue
            name = "params/" + name.removeprefix("params/img/")
        if name.endswith("Transformer/pos_embedding"):
            name = name.removesuffix("pos_embedding") + "posembed_input/pos_embedding"
        out[name] = array
    return out


def style_of_file(path: str, names) -> Style:
    style = style_of(names)
    if any("MixerBlock_" in name for name in names):
        raise WeightError(
            f"{path} holds an MLP-Mixer (MixerBlock_0 ...), which is no model of vitcore: it has ViTs, hybrids and ResNets"
        )
    if style is None:
        try:
            refuse(names)
        except ValueError as error:
            raise WeightError(f"{path}: {error}") from error
        some = ", ".join(sorted(names)[:3]) or "nothing"
        raise WeightError(f"{path} holds no Vision Transformer as the release, timm or transformers name it, but {some}, ...")
    return style


def is_head(name: str, style: Style) -> bool:
    """Whether a new head replaces the entry: the classifier and the pre-logits layer."""
    return name.removeprefix(style.prefix).startswith(_HEADS[style.naming])


_HEADS = {
    "release": ("head/", "pre_logits"),
    "timm": ("head.", "pre_logits"),
    "transformers": ("classifier.", "pooler.", "visual_projection."),
}
# Of training by masks (DINOv2, MAE with its decoder), and what stands beside a vision tower.
_BESIDE = re.compile(
    r"(.*embeddings\.)?mask_token$|decoder(\.|_\w+\.|_pos_embed$)|text_model\.|text_projection\.|logit_(scale|bias)$|.*position_ids$"
)


def left_out(names, style: Style) -> str:
    """For people: which parts of a file are no part of the model; "" where there are none."""
    whole = ("mask_token", "position_ids")
    parts = dict.fromkeys(name if name.endswith(whole) else re.split(r"[./]", name)[0] for name in names if _is_other(name, style))
    return f"not of the model, left out: {', '.join(parts)}" if parts else ""


def _is_other(name: str, style: Style) -> bool:
    """Whether an entry lies beside the parameters: what only training has, another tower, the optimizer's state and counters."""
    if style.naming != "release" and _BESIDE.match(name):
        return True
    return style.naming == "release" and not (style.prefix and name.startswith(style.prefix)) and name.startswith(
        ("opt/", "extra/", "state/", "step", "chrono/")
    )  # fmt: skip


def _fits(entry: Entry, array: Stored, config) -> bool:
    if entry.path == POSITION:  # [1, T', D], or without the first axis
        shape = array.shape[1:] if len(array.shape) == 3 and array.shape[0] == 1 else array.shape
        return len(shape) == 2 and shape[1] == config.width and 1 <= shape[0] <= MOST_PATCHES
    # old files keep vectors as (1, 1, 1, C)
    return array.shape == entry.shape or _squeezed(array.shape) == _squeezed(entry.shape)


def _squeezed(shape) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def check(path: str, arrays: Mapping[str, Stored], wanted: tuple[Entry, ...], style: Style, config) -> None:
    """Raise one line that names every entry that is missing, extra, misshapen or of no float type."""
    need = {entry.name: entry for entry in wanted}
    missing = [name for name in need if name not in arrays]
    extra = [name for name in arrays if name not in need and not _is_other(name, style)]
    misshapen = {name: arrays[name] for name, e in need.items() if name in arrays and not _fits(e, arrays[name], config)}
    untyped = [name for name in need if name in arrays and name not in misshapen and arrays[name].dtype not in _FLOATS]
    parts = []
    if missing:
        parts.append(f"missing {_list(missing)}")
    if extra:
        parts.append(f"extra {_list(extra)}")
    if misshapen:
        said = [f"{n} {_shape(a.shape)} for {_shape(need[n].shape)}" for n, a in misshapen.items()]
        parts.append(f"misshapen {_list(said)}")
    if untyped:
        said = [f"{name} {arrays[name].dtype}" for name in untyped]
        parts.append(f"no floats in {_list(said)} (float16, bfloat16, float32 and float64 are read: convert them)")
    if parts:
        raise WeightError(f"{path} is not this config's model: {'; '.join(parts)}{_hint(arrays, style, misshapen, need, config)}")


def _hint(arrays, style, misshapen, need, config) -> str:
    heads = [name for name in misshapen if need[name].path[0] == "head"]
    if heads and len(heads) == len(misshapen):
        return ": new_head=True replaces the head by zeros"
    patches = misshapen and isinstance(config, ViTConfig) and config.of_pixels
    patches = patches and all(need[name].path == PATCHES for name in misshapen)
    other = "resample_patches=True takes patches of another size" if patches else ""
    try:
        open_ = {"pool": getattr(config, "pool", None), "position": getattr(config, "position", None)}
        c = infer({name: a.shape for name, a in arrays.items()}, style, **open_)
    except ValueError:
        return f": {other}" if other else ""
    if isinstance(c, ResNetConfig):
        return f": the file's model is a ResNet, {c.stem}, num_classes={c.num_classes}"
    hidden = f", representation_size={c.representation_size}" if c.representation_size else ""
    return (
        f": the file's model has patch_size={c.patch_size}, width={c.width}, depth={c.depth}, mlp_dim={c.mlp_dim}, "
        f"num_heads={c.num_heads}, num_classes={c.num_classes}, pool={c.pool}{hidden}"
        f"{f'; {other}' if other else ''}"
    )


def _list(names) -> str:
    """Every name; those that differ in one number only, as blocks do, with its range in braces."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for name in names:
        parts = re.split(r"(?<=[_.])(\d+)(?=[/.])", name, maxsplit=1)
        key = (parts[0], parts[2]) if len(parts) == 3 else (name,)
        groups.setdefault(key, []).extend([int(parts[1])] if len(parts) == 3 else [])
    said = []
    for key, numbers in groups.items():
        ranges = _ranges(numbers)
        said.append(key[0] if len(key) == 1 else f"{key[0]}{ranges if ranges.isdigit() else '{' + ranges + '}'}{key[1]}")
    return ", ".join(said)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    out: list[list[int]] = []
    for n in sorted(numbers):
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def _shape(shape) -> str:
    return "(" + ",".join(map(str, shape)) + ")"


def agrees(path: str, about: weight_about.About, config, style: Style) -> None:
    """Raise where a file of ours, or the names of DINOv3's, say of its model what no array shows, and the config says otherwise."""
    told = about.config or ({"position": "rope"} if style.form == "dinov3" else {})
    open_ = {getattr(config, "position", None), told.get("position")} <= set(OPEN_POSITIONS)
    asked = ("num_heads", "gelu", "eps", "pool", *(["position"] if open_ else []))
    other = [name for name in asked if name in told and told[name] != getattr(config, name, told[name])]
    if other:
        said = ", ".join(f"{name}={told[name]!r}, not {getattr(config, name)!r}" for name in other)
        raise WeightError(f"{path} is of a model with {said}: give the config it was saved with, or change that of the result")
