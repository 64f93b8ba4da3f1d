"""Masked patch prediction as an objective of `train.pretrain`: its options, its recipe, and its picture.

The model's part is `vitcore/masked.py`; `train/objectives.py` has the loss. A run leaves masked.png: a few held-out images, what of
them the model sees, and the colours that it predicts of the rest, beside the true ones.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from train import distributed, recipes
from train import mesh as meshes
from train.files import write_picture
from train.job import say
from vitcore import families, masked
from vitcore.config import ViTConfig
from vitcore.masked import Masked

PICTURE = "masked.png"
SHOWN = 8  # images in the picture
_SIDE = 24  # pixels of the picture a patch has at least
_BLUE, _ORANGE, _GREEN = (0.16, 0.27, 0.53), (1.0, 0.5, 0.05), (0.17, 0.63, 0.17)
_PALE = (0.78, 0.87, 0.98)


# --- options -----------------------------------------------------------------------------------------------------------------


def recipe_of(args, name: str, model: str) -> recipes.Recipe:
    """The recipe of a name for a model and what `args` want it for. ValueError as `recipes.recipe`, and for a ResNet that is to
    predict masked patches."""
    if args.objective != "masked":
        return recipes.recipe(name, model)
    if "patch_size" not in families.fields_of(model):
        raise ValueError(
            f"--objective masked: {model} is a ResNet, which has no patches to mask: give a ViT, e.g. --model ViT-B/16"
        )
    return of_appendix(recipes.recipe(name, model))


def of_appendix(recipe: recipes.Recipe) -> recipes.Recipe:
    """A recipe's masked patch prediction (appendix B.1.2): Adam at 2e-4, 10k steps of warm-up, cosine. Data size, epochs, batch and
    images stay the recipe's.

    What the appendix leaves out is as in the rows of JFT, on which the authors did it: decay 0.1, no dropout, no clipping. There it
    ran for 1M steps, "ca. 14 epochs"; 100k steps, of ImageNet about its 300 epochs, did nearly as well. The digits are not the
    paper's, and keep their own rate, warm-up and decay.
    """
    if recipe.name == "digits":
        return dataclasses.replace(recipe, dropout=0.0)
    return dataclasses.replace(
        recipe, epochs=14 if recipe.name == "jft" else recipe.epochs, base_lr=2e-4, decay="cosine", warmup_steps=10_000,
        weight_decay=0.1, weight_decay_form="adamw", dropout=0.0, clip_norm=None, label_smoothing=0.0, loss="softmax",
        head_bias=0.0, mixup=0.0, cutmix=0.0,
    )  # fmt: skip


def resolve(args) -> dict[str, Any]:
    """The options of this objective with every open value filled in: None with another. ValueError where options do not belong
    together."""
    if args.objective != "masked":
        if args.masked_target is not None or args.corrupt is not None:
            raise ValueError("--masked-target and --corrupt belong to --objective masked: give that, or leave them out")
        return {"masked_target": None, "corrupt": None}
    wrong = [name for name in ("mixup", "cutmix", "label_smoothing", "head_bias", "representation_size") if getattr(args, name)]
    wrong += ["loss"] if args.loss == "sigmoid" else []
    if wrong:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
        raise ValueError(f"{options}: of labels and their head, which --objective masked does without: leave it out")
    rate = 0.5 if args.corrupt is None else args.corrupt
    if not 0 < rate <= 1:
        raise ValueError(f"--corrupt {rate}: a share of the patches in (0, 1] is required")
    return {"masked_target": args.masked_target or "mean", "corrupt": rate}


def of(options) -> Masked | None:
    """What the model of resolved options is told, or of a run's config.json: None for another objective."""
    held = options if isinstance(options, dict) else vars(options)
    if held.get("objective", "classes") != "masked":
        return None
    return Masked(target=held["masked_target"], rate=held["corrupt"])


def described(config) -> dict[str, Any]:
    """What of a model's `masked` makes it another model: the target, not the rate."""
    told = getattr(config, "masked", None)
    return {"masked": told and told.target} if isinstance(config, ViTConfig) else {}


def about(full, config) -> str:
    """What a run does with its images, for people; "" with another objective."""
    if config.num_classes or not config.masked:
        return ""
    n = config.grid[0] * config.grid[1]
    what = {"mean": "mean colour", "small": "colours in 4x4", "pixels": "pixels"}[full.masked_target]
    return f"whose labels are not used: of {n} patches {config.masked.count(n)} are corrupted, their {what} predicted"


def counted(objective: str) -> tuple[str, str]:
    """(what an evaluation counts, the picture that a run leaves of it)."""
    return (
        ("colours of corrupted patches of held-out images", PICTURE) if objective == "masked" else ("held-out images", "curves.png")
    )


# --- the picture -------------------------------------------------------------------------------------------------------------


def finish(full, config, mesh, held_out, how, out) -> dict[str, Any]:
    """The picture at the end, as `train.loop.Run` takes it."""
    if full.objective != "masked":
        return {}

    def write(state):
        params = state.params if state.average is None else state.average
        try:
            found = look(params, config, mesh, held_out, how, full)
        except ValueError as error:  # images that cannot be read, of a run that is done
            say(f"no {PICTURE}: {error}")
            return
        if distributed.rank() == 0:
            draw(found, config, out / PICTURE, f"{full.model}, step {int(state.step)}")

    return {"finish": write}


def look(params, config, mesh, source, how, full) -> dict[str, np.ndarray]:
    """Of a few images, evenly from the whole set: "images" [B, Y, X, C] in [0, 1], "places" and "source" as in
    `vitcore.masked.Corruption`, "predicted" and "true" [B, K, cells, cells, C] in [0, 1]. Every process calls it. ValueError
    where none can be read."""
    from train.data.select import Selected
    from train.frozen import Reader

    indices = np.unique(np.linspace(0, len(source) - 1, SHOWN).round().astype(int))
    few = Selected(source=source, name=source.name, indices=indices, classes=source.classes)
    reader = Reader(
        batch_size=SHOWN, preprocess=full.preprocess, antialias=full.antialias, threads=full.threads, decoder=full.decoder
    )  # fmt: skip
    return reader.all(partial(_make_look(config, mesh, how), params), few, config, mesh)[0]


def _make_look(config, mesh, how):
    """A compiled function (params, images [B, Y, X, C] bytes) -> what `look` returns, split over "data"."""
    from train.objectives import predicted
    from vitcore.context import Context
    from vitcore.pixels import to_unit
    from vitcore.sharding import partition_specs

    shape, rows = meshes.shape_of(mesh), meshes.rows(mesh)

    def local(params, images):
        first = jax.lax.axis_index(shape.over_data) * images.shape[0]
        context = Context(ops=how.ops, dtype=how.dtype, mesh=shape, first_example=first)
        found, targets, chosen = predicted(params, images, config, context, how, jax.random.key(how.seed))
        target = masked.TARGETS[config.masked.target]
        colours = {"predicted": target.best(found, config), "true": targets}
        colours = {name: target.shown(values, config) for name, values in colours.items()}
        return {"images": (to_unit(images) + 1) / 2, **chosen._asdict(), **colours}

    specs = partition_specs(config, shape)
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs, rows), out_specs=rows))


def draw(found: dict[str, np.ndarray], config, path, title: str) -> None:
    """Four rows, an image a column: the image, what the model sees of it, the predicted colours, the true ones; to a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = ("images", "seen", "predicted", "true")
    names = ("original", "corrupted input", "predicted", "true")
    count = len(found["images"])
    figure = Figure(figsize=(1.35 * count + 1.1, 6.6), dpi=120, layout="constrained")
    axes = figure.subplots(4, count, squeeze=False)
    for column in range(count):
        one = {name: values[column] for name, values in found.items()}
        for row, kind in enumerate(rows):
            axes[row, column].imshow(_panel(kind, one, config), interpolation="nearest", vmin=0, vmax=1)
            axes[row, column].set(xticks=[], yticks=[])
    for row, name in enumerate(names):
        axes[row, 0].set_ylabel(name)
    figure.suptitle(f"{title}: {config.masked.rate:.0%} of the patches corrupted, target {config.masked.target}", fontsize=11)
    words = (_BLUE, "replaced by [mask]"), (_ORANGE, "replaced by another patch"), (_GREEN, "corrupted, but kept as it is")
    figure.legend(
        handles=[Patch(color=color, label=label) for color, label in words], loc="outside lower center", ncols=3, frameon=False
    )
    write_picture(figure, path)


def _panel(kind: str, one: dict[str, np.ndarray], config) -> np.ndarray:
    """[Y', X', 3] of one image in one row. Where predictions are shown, patches that are not corrupted are pale and bluish."""
    py, px = masked.side(config)
    zoom = -(-_SIDE // min(py, px))
    (rows, columns), image = config.grid, np.asarray(one["images"], np.float64)
    image = np.repeat(image, 3 // image.shape[-1], axis=-1) if image.shape[-1] != 3 else image
    patches = np.array(masked.patches_of(image[None], dataclasses.replace(config, channels=3, masked=None))[0])
    big = [_zoomed(patch, py * zoom, px * zoom) for patch in patches]
    if kind in ("predicted", "true"):
        out = [0.8 * np.array(_PALE) + 0.2 * patch for patch in big]
        for place, colours in zip(one["places"], one[kind], strict=True):
            out[place] = _zoomed(np.repeat(colours, 3 // colours.shape[-1], axis=-1), py * zoom, px * zoom)
    elif kind == "seen":
        out = list(big)
        for place in one["places"]:
            out[place] = _corrupted(int(place), int(one["source"][place]), big, max(2, min(py, px) * zoom // 12))
    else:
        out = big
    grid = np.stack(out).reshape(rows, columns, py * zoom, px * zoom, 3)
    return grid.swapaxes(1, 2).reshape(rows * py * zoom, columns * px * zoom, 3)


def _corrupted(place: int, source: int, patches: list[np.ndarray], edge: int) -> np.ndarray:
    """A corrupted patch as it is shown: blue for [mask], else the patch in its place, in a frame that says which it is."""
    if source < 0:
        return np.broadcast_to(_BLUE, patches[place].shape)
    out = np.empty_like(patches[place])
    out[:] = _GREEN if source == place else _ORANGE
    out[edge:-edge, edge:-edge] = patches[source][edge:-edge, edge:-edge]
    return out


def _zoomed(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cells [I, J, C] as [height, width, C], each cell a box."""
    i, j = np.arange(height) * cells.shape[0] // height, np.arange(width) * cells.shape[1] // width
    return cells[i][:, j]
