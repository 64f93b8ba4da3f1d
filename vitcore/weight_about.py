"""What a file of weights says of its model beside the arrays: of ours, everything; of others', what lies in the files beside it.

Ours hold one text of JSON, in a .safetensors' metadata and in the comment of an .npz, which no other reader minds:

    {"format": 1, "config": {fields of ViTConfig}, "classes": ["cat", ...], "mean": [...], "std": [...], "data_seen": {...}}

The hub's folders have config.json (heads, the form of GELU; timm's: normalisation) and preprocessor_config.json (normalisation).
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vitcore.config import SMALLEST_EPS
from vitcore.families import restored
from vitcore.json_text import parse as parse_json
from vitcore.normalisation import CLIP, HALF, IMAGENET, Pixels, pixels, said
from vitcore.weight_files import WeightError

KEY = "vitcore"
FORMAT = 1
MOST = 2**22  # bytes of the text
_FAMILIES = (
    ("SigLIP's", r"siglip", HALF),
    ("CLIP's", r"(?<![a-z])clip", CLIP),
    ("ImageNet's", r"deit|dino|(?<![a-z])mae(?![a-z])", IMAGENET),
)
_MODELS = (  # by what their models have, where no name tells
    ("CLIP's", "stem", "clip", CLIP),
    ("SigLIP's", "pool", "map", HALF),
    ("ImageNet's", "block", "layerscale", IMAGENET),
    ("ImageNet's", "block", "layerscale-gated", IMAGENET),
)
# timm's architectures that compute another GELU than the exact one
_ARCHITECTURES = (
    ("quick", r"quickgelu"),
    ("tanh", r"(base_patch32|so400m_patch16|giantopt_patch16)_siglip|large_patch16_siglip(_gap)?_512"),
)
_GELU = {"quick_gelu": "quick", "gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "silu": "silu"}


class About(NamedTuple):
    """config: all fields of the model's, None where the file is not ours. heads, gelu, eps: where said. classes, pixels, data:
    None where nothing does."""

    config: dict[str, Any] | None = None
    heads: int | None = None
    gelu: str | None = None
    eps: float | None = None
    classes: tuple[str, ...] | None = None
    pixels: Pixels | None = None
    data: dict | None = None


def text_of(config, *, classes: Sequence[str] | None, wanted: Pixels, data: Mapping | None) -> str:
    """What `save` puts into a file of ours. ValueError where there are not as many names as classes."""
    if classes is not None and len(classes) != config.num_classes:
        raise ValueError(f"{len(classes)} class names for a head of {config.num_classes} classes: as many are required")
    told: dict[str, Any] = {"format": FORMAT, "config": dataclasses.asdict(config), "mean": wanted.mean, "std": wanted.std}
    if classes is not None:
        told["classes"] = list(classes)
    if data is not None:
        told["data_seen"] = dict(data)
    return json.dumps(told)


def read(path: str, metadata: Mapping[str, str]) -> About:
    """What a file says, by its metadata or the files beside it. Raises WeightError where ours is damaged."""
    if KEY in metadata:
        try:
            told = parse_json(metadata[KEY])
            if told["format"] != FORMAT:
                raise ValueError(f"format {told['format']}")
            config = dict(told["config"])
            restored(config)
            classes = tuple(map(str, told["classes"])) if "classes" in told else None
            wanted = pixels(told["mean"], told["std"])
            return About(
                config, config.get("num_heads"), config.get("gelu"), config.get("eps"), classes, wanted, told.get("data_seen")
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightError(
                f"{path}: what it says of its model is damaged or of another version ({error}): get it again"
            ) from error
    heads = metadata.get("vitcore.num_heads", "")  # of ours, before there was more
    return _beside(path)._replace(**{"heads": int(heads)} if re.fullmatch(r"[1-9]\d{0,3}", heads) else {})


def _beside(path: str) -> About:
    """What config.json and preprocessor_config.json in the file's folder say, where they are as the hub has them."""
    folder, found = os.path.dirname(path) or ".", About()
    model, processor = (_json(os.path.join(folder, name)) for name in ("config.json", "preprocessor_config.json"))
    vision = _part(model, "vision_config") or model
    if isinstance(heads := vision.get("num_attention_heads"), int) and not isinstance(heads, bool) and heads > 0:
        found = found._replace(heads=heads)
    if vision.get("use_swiglu_ffn") is True:  # DINOv2's, whatever its hidden_act
        found = found._replace(gelu="silu")
    elif isinstance(act := vision.get("hidden_act"), str):
        if act not in _GELU:
            raise WeightError(f"{path} is of a model with {act!r} by the config.json beside it: 'gelu' is supported")
        found = found._replace(gelu=_GELU[act])
    elif isinstance(name := model.get("architecture"), str):  # timm's
        found = found._replace(gelu=next((gelu for gelu, pattern in _ARCHITECTURES if re.search(pattern, name)), "erf"))
    eps = vision.get("layer_norm_eps")
    if isinstance(eps, int | float) and SMALLEST_EPS <= eps < 1:
        found = found._replace(eps=float(eps))
    cfg = _part(model, "pretrained_cfg")
    for mean, std in ((processor.get("image_mean"), processor.get("image_std")), (cfg.get("mean"), cfg.get("std"))):
        if mean is not None and std is not None and found.pixels is None:
            with contextlib.suppress(ValueError):
                found = found._replace(pixels=pixels(mean, std))
    return found


def _part(told: dict, name: str) -> dict:
    found = told.get(name)
    return found if isinstance(found, dict) else {}


def _json(path: str) -> dict:
    with contextlib.suppress(OSError, ValueError):
        if os.path.isfile(path) and os.path.getsize(path) <= MOST:
            with open(path, encoding="utf-8") as file:
                found = parse_json(file.read())
            return found if isinstance(found, dict) else {}
    return {}


def pixels_of(path: str, about: About, naming: str, config=None) -> tuple[Pixels, str]:
    """The pixels that the model of a file wants, and a few words on them for people; those say where it is a guess. config: of the
    model, which may be of a family that wants its own."""
    if about.pixels is not None:
        return about.pixels, f"pixels {said(about.pixels)}"
    if naming == "release":
        return HALF, "pixels [-1, 1]"
    name = "/".join(os.path.abspath(path).lower().split("/")[-2:])
    for family, pattern, wanted in _FAMILIES:
        if re.search(pattern, name):
            return wanted, f"pixels {said(wanted)}, {family} by the name of the file: --mean and --std say others"
    for family, field, value, wanted in _MODELS:
        if getattr(config, field, None) == value:
            return wanted, f"pixels {said(wanted)}, {family} by its layers: --mean and --std say others"
    return HALF, "pixels [-1, 1], a guess: --mean and --std say others"
