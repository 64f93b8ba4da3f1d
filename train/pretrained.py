"""A trained model from wherever it is: the release's .npz, a .safetensors, or the directory of one of our own runs."""

import dataclasses
import hashlib
import os
from typing import Literal, NamedTuple

import jax
import numpy as np

from train import mesh as meshes
from train.data import identity
from train.files import open_regular, parse_json, text_of
from train.job import BEFORE
from train.masked import of as masked_of
from train.shape import shape_of
from vitcore import ViTConfig, families, weight_about, weight_files, weight_tree
from vitcore.normalisation import HALF, Pixels
from vitcore.normalisation import pixels as read_pixels
from vitcore.normalisation import said as pixels_said
from vitcore.weight_checks import left_out
from vitcore.weight_tree import WeightError


class Pretrained(NamedTuple):
    """config: of the parameters. params: the tree of `vitcore.init` in host memory (numpy, float32). about: where from. antialias:
    whether a run's images were averaged when they were shrunk; False of a file, as the authors have it. classes: the names of what
    the head tells apart, None where nothing says. pixels: what the model wants. data: what a run, or a file of ours, says of the
    images behind it (`train.data.identity`). model: what tells these weights from any other, {"step", "checksum"}: a run's step and
    its digest, or None and a hash of the file."""

    config: ViTConfig
    params: dict
    about: str
    antialias: bool = False
    classes: tuple[str, ...] | None = None
    pixels: Pixels = HALF
    data: dict | None = None
    model: dict | None = None


class Run(NamedTuple):
    """A run's parameters in host memory, as they are stored, where they are from, and its config.json (`held`)."""

    config: ViTConfig
    params: dict
    about: str
    held: dict


class Stored(NamedTuple):
    """A model as it lies at `path`, to be opened several times: of a run what was read there, since it may go on; None of a file of
    weights. model: what tells it from any other, as in `Pretrained`. file: which file at `path` that is, as `_which` says; another
    may have come there since."""

    path: str
    model: dict
    run: Run | None = None
    file: tuple[int, ...] | None = None


def store(path: str, model: dict | None = None) -> Stored:
    """Reads what is at `path` once, for a job that opens it several times while the run there may go on.

    model: what it must be, the `Stored.model` of an earlier call; None for the newest good step of a run. Raises ValueError, in one
    line, where that is not there any more, and as `open_pretrained`.
    """
    if not _is_run(path):
        checksum, file = _hash(path)
        found = Stored(path, {"step": None, "checksum": checksum}, file=file)
    else:
        try:
            found = _from_run(path, None if model is None else model["step"])
        except WeightError as error:
            raise error if model is None else WeightError(_another(path, model, str(error))) from error
    if model is not None and found.model != model:
        raise WeightError(_another(path, model, f"that is {said_model(found.model)} now"))
    return found


def said_model(model: dict) -> str:
    """A `Stored.model` in words."""
    return f"checksum {model['checksum']}" if model["step"] is None else f"step {model['step']}, checksum {model['checksum']}"


def _another(path: str, model: dict, why: str) -> str:
    return f"what is in --out was begun from {path} ({said_model(model)}), and {why}: put that back, or choose another --out"


def _is_run(path: str) -> bool:
    return os.path.isdir(path) or os.path.basename(path.rstrip("/")).isdigit()


def _hash(path: str) -> tuple[str, tuple[int, ...]]:
    """A hash of a file's content, and which file it is."""
    with weight_files.opened(path):
        pass  # what is no such file is said there
    try:
        with open_regular(path) as file:
            which = _which(os.fstat(file.fileno()))
            return hashlib.file_digest(file, "sha256").hexdigest()[:16], which  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise WeightError(f"cannot open {path}: {error.strerror}") from error


def _which(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_pretrained(
    path: str | Stored,
    *,
    image_size: int | None = None,
    num_classes: int | None = None,
    head_bias: float = 0.0,
    gelu: Literal["tanh", "erf", "quick", "silu"] | None = None,
    interpolation: Literal["corners", "half-pixel"] = "corners",
    heads: int | None = None,
    pool: str | None = None,
    position: str | None = None,
    pixels: Pixels | None = None,
    masked: bool = False,
    allow_nonfinite: bool = False,
) -> Pretrained:
    """The model at `path`, its position embedding fitted to image_size (default: the one it has).

    path: a file of weights, a run's directory (its newest good checkpoint is taken; where the run keeps a Polyak average, that),
    or a run's directory/STEP; or what `store` has read of one. num_classes: the whole pre-training head, its hidden layer too,
    gives way to a linear one that starts at zero, its bias at head_bias; None keeps the head. gelu, heads, pool, position, pixels:
    what the file does not say. masked: keep what masked patch prediction has besides, which is dropped otherwise; such a run has no
    classes. allow_nonfinite: take parameters that hold NaN or infinities. Default of gelu: tanh for the release, erf for timm's and
    transformers' naming; of pixels: `weight_about.pixels_of`. Raises ValueError in one line for whatever is wrong with what is
    there; OSError.
    """
    stored = path if isinstance(path, Stored) else _from_run(path) if _is_run(path) else Stored(path, {})
    path = stored.path
    if stored.run is not None:
        config, about, held = stored.run.config, stored.run.about, stored.run.held
        params = dict(stored.run.params)
        if not allow_nonfinite:
            _check_finite(path, params)
        if not masked and params.pop("masked", None):
            config = dataclasses.replace(config, masked=None)
        antialias = bool(held.get("antialias", BEFORE["antialias"]))
        seen = identity.check(held.get(identity.KEY))
        classes = None if seen is None else tuple(seen["classes"])
        wanted = pixels or (read_pixels(held["mean"], held["std"]) if held.get("mean") else HALF)
        size = config.image_shape if image_size is None else (image_size, image_size)
        new = dataclasses.replace(config, image_size=size[0] if size[0] == size[1] else size)
        params = families.fitted(params, config, new, method=interpolation)
        if num_classes is not None:
            new = dataclasses.replace(new, num_classes=num_classes, representation_size=None, head_bias=head_bias)
            params.pop("pre_logits", None)
            bias = np.full(num_classes, head_bias, np.float32)
            params["head"] = {"kernel": np.zeros((new.width, num_classes), np.float32), "bias": bias}
    else:
        antialias = False
        style, config, arrays = weight_tree.describe(path, heads=heads, pool=pool, position=position)
        told = weight_tree.about(path)
        classes, seen = told.classes, told.data
        wanted, words = weight_about.pixels_of(path, told, style.naming, config)
        head = {} if num_classes is None else dict(num_classes=num_classes, representation_size=None, head_bias=head_bias)
        new = dataclasses.replace(config, image_size=config.image_size if image_size is None else image_size, **head)
        grid = config.grid
        params = weight_tree.read(
            path, new, new_head=num_classes is not None, grid=grid, interpolation=interpolation, allow_nonfinite=allow_nonfinite
        )
        if stored.file is not None and (not os.path.exists(path) or _which(os.stat(path)) != stored.file):
            raise WeightError(
                f"{path} is another file than when this began ({said_model(stored.model)}): put that back, start again"
            )
        wanted, words = (wanted, words) if pixels is None else (pixels, f"pixels {pixels_said(pixels)}")
        beside = "".join(f"; {said}" for said in (left_out(arrays, style),) if said)
        about = f"{path} ({style.naming} naming; {words}{beside})"
    classes = classes if num_classes is None and new.num_classes else None
    config = families.changed(new, gelu=gelu)
    return Pretrained(config, params, about, antialias, classes, wanted, seen, stored.model or None)


def _check_finite(path: str, params) -> None:
    """Raises `WeightError` where a run's parameters hold NaN or infinity; of a file `weight_tree.read` looks for them."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    bad = [jax.tree_util.keystr(at, simple=True, separator="/") for at, leaf in leaves if not np.isfinite(leaf).all()]
    if bad:
        which = f"{', '.join(bad[:3])}{', ...' * (len(bad) > 3)}"
        raise WeightError(f"{path}: {which} holds NaN or infinity: take another step or file, or these with --allow-nonfinite")


def _from_run(path: str, step: int | None = None) -> Stored:
    """A run's checkpoint: that of `step`, or the one that the path names, or the newest good one."""

    run = path.rstrip("/")
    if os.path.basename(run).isdigit() and not os.path.exists(os.path.join(run, "config.json")):
        step = int(os.path.basename(run))
        run = os.path.dirname(run)
        run = os.path.dirname(run) if os.path.basename(run) == "checkpoints" else run
    try:
        held = parse_json(text_of(os.path.join(run, "config.json")))
        if "vit" in held:  # a fine-tuned model need not have a name
            config = families.restored(held["vit"])
        else:
            config = families.named(
                held["model"], image_size=held["image_size"], pool=held["pool"], gelu=held["gelu"], eps=held.get("eps"),
                position=held.get("position"), representation_size=held.get("representation_size") or None,
                masked=masked_of(held), **shape_of(held),
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
        step, digest, state, _ = saved.load_told(step)
    except ValueError as error:
        raise WeightError(str(error)) from error
    params = state["average"] if state.get("average") else state["params"]
    params = jax.tree.map(np.asarray, params)
    first = params["stem"]["root"]["conv"] if "stem" in params else params["patch_embed"]
    config = dataclasses.replace(
        config, num_classes=params["head"]["kernel"].shape[1] if "head" in params else 0, channels=first["kernel"].shape[2]
    )  # fmt: skip
    what = ", Polyak average" if state.get("average") else ""
    about = f"{run}, step {step} ({digest}){what}{''.join(f' ({text})' for text in passed)}"
    return Stored(path, {"step": step, "checksum": digest}, Run(config, params, about, held))


def main(argv: list[str] | None = None) -> int:
    """`python -m train.pretrained RUN FILE`: a run's parameters as .npz or .safetensors. Returns the exit code."""

    from vitcore.command_line import Parser, attempt

    parser = Parser(prog="python -m train.pretrained", description="A run's parameters as a file of weights.")
    parser.add_argument("run", help="a run's directory, or directory/STEP")
    parser.add_argument("file", help=".npz (the release's layout) or .safetensors")
    parser.add_argument("--naming", choices=["timm", "transformers"], help="of a .safetensors; default timm")
    parser.add_argument("--allow-nonfinite", action="store_true", help="take weights that hold NaN or infinities")
    args = parser.parse_args(argv)
    meshes.prepare(None)

    def work():
        found = open_pretrained(args.run, allow_nonfinite=args.allow_nonfinite)
        weight_tree.save(
            args.file, found.params, found.config, naming=args.naming, classes=found.classes, pixels=found.pixels, data=found.data
        )  # fmt: skip
        print(f"{args.file}: {found.about}")

    return attempt("train.pretrained", work)


if __name__ == "__main__":
    from vitcore.command_line import end

    end("train.pretrained", main)
