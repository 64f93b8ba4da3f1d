"""What a model has learned, as pictures and numbers: the paper's Figures 6, 7, 10, 11 and 14 for any model and any images.

    python -m vitcore.inspect ViT-B_16.npz photo.jpg other.png --out look
    python -m vitcore.inspect runs/pretrain photo.jpg                        a run's directory, or directory/STEP

It writes filters.png (principal components of the patch projection), positions.png (similarity of position embeddings),
distances.png (mean attention distance of every head in every block, in pixels), rollout.png (attention from what the head reads
back to the image) and inspect.json, which has the numbers. Each file is whole or not there. What a model has none of is said in a
line. Images are whatever Pillow reads: of each the middle, of the model's own aspect, resized. `vitcore.look` and
`vitcore.attention_statistics` are the same in a program.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vitcore import look, look_pictures, weight_about
from vitcore.command_line import Parser, attempt, end
from vitcore.config import ViTConfig
from vitcore.model import attention_statistics
from vitcore.normalisation import Pixels
from vitcore.normalisation import pixels as read_pixels
from vitcore.pixels import to_unit
from vitcore.runs import as_file, is_run
from vitcore.weight_files import appearing
from vitcore.weight_names import OPEN_POOLS, OPEN_POSITIONS
from vitcore.weight_tree import about, describe, load

MOST_IMAGES = 64  # whose mean maps of all blocks are in memory together


def read_images(paths: list[str], config) -> np.ndarray:
    """uint8 [B, Y, X, C]: the middle of each image in the model's aspect, resized. ValueError, one line, for what is no image."""
    from PIL import Image, ImageOps

    if config.channels not in (1, 3):
        raise ValueError(f"the model takes images of {config.channels} channels: those of 1 or 3 can be read from files")
    y, x = config.image_shape
    found = []
    for path in paths:
        try:
            with Image.open(path) as image:
                whole = ImageOps.exif_transpose(image).convert("L" if config.channels == 1 else "RGB")
        except Exception as error:  # Pillow's readers raise many kinds
            raise ValueError(f"{path} cannot be read as an image ({error or type(error).__name__}): give another") from error
        found.append(np.asarray(ImageOps.fit(whole, (x, y), Image.Resampling.BILINEAR)).reshape(y, x, config.channels))
    return np.stack(found)


def positions_of(params, config) -> tuple[np.ndarray | None, str]:
    """(similarities [rows, columns, rows, columns] or None, why there are none)."""
    position, p = config.entries.position, params["patch_embed"]
    table = position.table(p, config)
    if table is None and position.at_block and not position.block_leaves(config):  # one table for all blocks
        table = position.at_block(p, None, config)
    if table is None:
        return None, f"position={config.position!r} has no one table of embeddings"
    if min(config.grid) < 2:
        return None, f"a grid of {config.grid[0]} x {config.grid[1]} patches has no similarities worth drawing"
    return look.position_similarity(np.asarray(table), config.grid, config.class_tokens), ""


def filters_of(params, config) -> tuple[tuple[np.ndarray, np.ndarray] | None, str]:
    """((filters, shares) or None, why there are none)."""
    kernel = params.get("patch_embed", {}).get("kernel")
    if not config.of_pixels or kernel is None:
        return None, "the patches are projected from a CNN's features, which have no colours"
    if kernel.shape[2] not in (1, 3):
        return None, f"patches of {kernel.shape[2]} channels have no colours"
    return look.projection_filters(kernel), ""


def attention_of(params, config, images: np.ndarray, pixels: Pixels):
    """(distances [L, B, N], rollout [B, rows, columns], class rows of the last block [B, N, T] or None)."""
    run = jax.jit(lambda p, x: attention_statistics(p, to_unit(x, pixels), config, mean=True, row=True, distance=True))
    found = run(params, images)
    rollout = look.attention_rollout(found.mean, class_tokens=config.class_tokens)
    row = np.asarray(found.row[-1]) if config.class_tokens else None
    return np.asarray(found.distance), rollout.reshape(-1, *config.grid), row


def inspect(
    params, config, images: np.ndarray, names: list[str], pixels: Pixels
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(numbers for JSON, file name -> figure, lines on what is left out) of a model and uint8 images [B, Y, X, C]."""
    if not isinstance(config, ViTConfig):
        raise ValueError(f"a {type(config).__name__} has neither patches, positions nor attention to look at: a ViT is required")
    numbers: dict[str, Any] = {
        "tokens": config.seen_tokens,
        "grid": config.grid,
        "image_shape": config.image_shape,
        "images": names,
    }
    figures, left = {}, []
    found, why = filters_of(params, config)
    if found is None:
        left.append(f"no filters: {why}")
    else:
        figures["filters.png"] = look_pictures.filters(*found)
        numbers["filters"] = {"values": found[0].tolist(), "share_of_variance": found[1].tolist()}
    similar, why = positions_of(params, config)
    if similar is None:
        left.append(f"no similarity of positions: {why}")
    else:
        figures["positions.png"] = look_pictures.positions(similar)
        numbers["position_similarity"] = similar.round(5).tolist()
    if config.entries.block.statistics is None:
        left.append(f"no attention: the maps of block={config.block!r} are of rows and columns, not of the image")
    elif not names:
        left.append("no attention: it is an image's, and none is given")
    else:
        distances, rollout, row = attention_of(params, config, images, pixels)
        figures["distances.png"] = look_pictures.distances(distances.mean(1), len(names), config.image_shape)
        figures["rollout.png"] = look_pictures.rollout(images, rollout, names)
        numbers["attention_distance_pixels"] = {"mean": distances.mean(1).tolist(), "of_each_image": distances.tolist()}
        numbers["rollout"] = rollout.tolist()
        numbers["last_block_class_rows"] = None if row is None else row.tolist()
        if not config.class_tokens:
            left.append("no class token: the rollout is of the mean over all tokens, and there are no class rows")
    return numbers, figures, left


def opened(path: str, args) -> tuple[Any, Any, Pixels]:
    """(parameters, configuration, pixels) of a file of weights, or of a run's directory, whose weights another process writes to a
    file. ValueError, one line."""
    if is_run(path):
        with as_file(path, allow_nonfinite=args.allow_nonfinite) as file:
            return opened(file, args)
    style, config, _ = describe(path, heads=args.heads, pool=args.pool, position=args.position)
    params, config = load(path, heads=args.heads, pool=args.pool, position=args.position, allow_nonfinite=args.allow_nonfinite)
    told = weight_about.pixels_of(path, about(path), style.naming, config)[0]
    if (args.mean is None) != (args.std is None):
        raise ValueError("--mean and --std belong together: give both, or neither")
    return params, config, told if args.mean is None else read_pixels(args.mean, args.std)


def write_whole(path: Path, data: bytes) -> None:
    """A file, whole or not at all. OSError."""
    with appearing(path) as (file, _):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _run(args) -> None:
    if len(args.images) > MOST_IMAGES:
        raise ValueError(f"{len(args.images)} images: at most {MOST_IMAGES} at a time")
    params, config, pixels = opened(args.model, args)
    images = read_images(args.images, config) if args.images and isinstance(config, ViTConfig) else np.zeros(0)
    numbers, figures, left = inspect(params, config, images, args.images, pixels)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        write_whole(out / name, look_pictures.png(figure))
        print(out / name, flush=True)
    text = json.dumps({"model": args.model, **numbers, "left_out": left})
    write_whole(out / "inspect.json", text.encode() + b"\n")
    print(out / "inspect.json")
    for line in left:
        print(line)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 with one line on stderr."""
    parser = Parser(prog="python -m vitcore.inspect", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a file of weights, .npz or .safetensors; or a run's directory, or directory/STEP")
    parser.add_argument("images", nargs="*", help="image files; without any, what needs none is drawn")
    parser.add_argument("--out", default="look", help="the directory that is written to; default: look")
    parser.add_argument("--heads", type=int, help="number of heads, where the file does not say and the model is unusual")
    parser.add_argument("--pool", choices=OPEN_POOLS, help="of a file without class token, which does not say it")
    parser.add_argument("--position", choices=OPEN_POSITIONS, help="of a file without position embedding, which does not say it")
    parser.add_argument("--mean", type=float, nargs="+", help="of the pixels that the model wants, where the file does not say")
    parser.add_argument("--std", type=float, nargs="+", help="deviation of the pixels, likewise")
    parser.add_argument("--allow-nonfinite", action="store_true", help="take weights that hold NaN or infinities")
    args = parser.parse_args(argv)
    return attempt("vitcore.inspect", lambda: _run(args))


if __name__ == "__main__":
    end("vitcore.inspect", main)
