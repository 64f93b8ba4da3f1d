"""A trained model from wherever it is: the release's .npz, a .safetensors, or the directory of one of our own runs."""

import dataclasses
import json
import os
from typing import Literal, NamedTuple

import jax
import numpy as np

from train import mesh as meshes
from vitcore import weight_tree
from vitcore.config import ViTConfig, variant
from vitcore.posemb import fit
from vitcore.weight_tree import WeightError


class Pretrained(NamedTuple):
    """config: of the parameters. params: the tree of `vitcore.init` in host memory (numpy, float32). about: where from."""

    config: ViTConfig
    params: dict
    about: str


def open_pretrained(
    path: str,
    *,
    image_size: int | None = None,
    num_classes: int | None = None,
    gelu: Literal["tanh", "erf"] | None = None,
    interpolation: Literal["corners", "half-pixel"] = "corners",
) -> Pretrained:
    """The model at `path`, its position embedding fitted to image_size (default: the one it has).

    path: a file of weights, a run's directory (its newest good checkpoint is taken; where the run keeps a Polyak average, that),
    or a run's directory/STEP. num_classes: the whole pre-training head, its hidden layer too, gives way to a linear one that starts
    at zero; None keeps the head. gelu: what the file cannot say; default: tanh for the release and our runs, erf for timm's and
    transformers' naming. Raises ValueError in one line for whatever is wrong with what is there; OSError.
    """
    if os.path.isdir(path) or os.path.basename(path.rstrip("/")).isdigit():
        config, params, about = _from_run(path)
        size = config.image_shape if image_size is None else (image_size, image_size)
        new = dataclasses.replace(config, image_size=size[0] if size[0] == size[1] else size)
        patch = params["patch_embed"]
        slots = int(config.pool == "token")
        patch["position"] = fit(patch["position"], grid=config.grid, to=new.grid, class_slots=slots, method=interpolation)
        if num_classes is not None:
            new = dataclasses.replace(new, num_classes=num_classes, representation_size=None, head_bias=0.0)
            params.pop("pre_logits", None)
            params["head"] = {"kernel": np.zeros((new.width, num_classes), np.float32), "bias": np.zeros(num_classes, np.float32)}
    else:
        style, config, _ = weight_tree.describe(path)
        head = {} if num_classes is None else dict(num_classes=num_classes, representation_size=None)
        new = dataclasses.replace(config, image_size=config.image_size if image_size is None else image_size, **head)
        grid = config.grid
        params = weight_tree.read(path, new, new_head=num_classes is not None, grid=grid, interpolation=interpolation)
        about = f"{path} ({style.naming} naming)"
    leaves = jax.tree_util.tree_leaves_with_path(params)
    bad = [jax.tree_util.keystr(at, simple=True, separator="/") for at, leaf in leaves if not np.isfinite(leaf).all()]
    if bad:
        raise WeightError(f"{path}: {', '.join(bad[:3])}{', ...' * (len(bad) > 3)} holds NaN or infinity: no model to go on from")
    return Pretrained(dataclasses.replace(new, gelu=gelu or new.gelu), params, about)


def _from_run(path: str) -> tuple[ViTConfig, dict, str]:
    """Configuration and parameters of a run's checkpoint."""

    run, step = path.rstrip("/"), None
    if os.path.basename(run).isdigit() and not os.path.exists(os.path.join(run, "config.json")):
        step = int(os.path.basename(run))
        run = os.path.dirname(run)
        run = os.path.dirname(run) if os.path.basename(run) == "checkpoints" else run
    try:
        with open(os.path.join(run, "config.json")) as file:
            held = json.load(file)
        if "vit" in held:  # a fine-tuned model need not have a name
            config = ViTConfig(**held["vit"])
        else:
            config = variant(
                held["model"], image_size=held["image_size"], pool=held["pool"], gelu=held["gelu"],
                representation_size=held.get("representation_size") or None,
            )  # fmt: skip
    except OSError as error:
        wanted = "a run's directory with config.json and checkpoints/, an .npz or a .safetensors is required"
        raise WeightError(f"{path} holds no config.json ({error.strerror}): {wanted}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightError(f"{run}/config.json is not that of a run ({type(error).__name__}: {error}): restore it") from error
    if not os.path.isdir(os.path.join(run, "checkpoints")):
        raise WeightError(f"{run} has no checkpoints yet: train it first")
    from train.saved import SavedSteps  # it takes seconds, which a file of weights need not wait for

    passed: list[str] = []
    saved = SavedSteps(os.path.join(run, "checkpoints"), say=passed.append)
    try:
        step, state, _ = saved.load(step)
    except ValueError as error:
        raise WeightError(str(error)) from error
    params = state["average"] if state.get("average") else state["params"]
    params = jax.tree.map(np.asarray, params)
    config = dataclasses.replace(
        config, num_classes=params["head"]["bias"].shape[0], channels=params["patch_embed"]["kernel"].shape[2]
    )  # fmt: skip
    what = ", Polyak average" if state.get("average") else ""
    return config, params, f"{run}, step {step} ({saved.digest(step)}){what}{''.join(f' ({text})' for text in passed)}"


def main(argv: list[str] | None = None) -> int:
    """`python -m train.pretrained RUN FILE`: a run's parameters as .npz or .safetensors. Returns the exit code."""
    import argparse
    import sys

    parser = argparse.ArgumentParser(prog="python -m train.pretrained", description="A run's parameters as a file of weights.")
    parser.add_argument("run", help="a run's directory, or directory/STEP")
    parser.add_argument("file", help=".npz (the release's layout) or .safetensors")
    parser.add_argument("--naming", choices=["timm", "transformers"], help="of a .safetensors; default timm")
    args = parser.parse_args(argv)
    meshes.prepare(None)
    try:
        found = open_pretrained(args.run)
        weight_tree.save(args.file, found.params, found.config, naming=args.naming)
        print(f"{args.file}: {found.about}")
    except (ValueError, OSError) as error:
        print(f"train.pretrained: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
