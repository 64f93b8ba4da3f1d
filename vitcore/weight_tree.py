"""Published weights in and out: the release's .npz, and .safetensors as timm and transformers name things.

    params = vitcore.load("ViT-B_16.npz", config)               the position embedding fitted to config.image_size
    params = vitcore.load("model.safetensors", config, new_head=True)
    vitcore.save("mine.safetensors", params, config, naming="transformers")

Which naming a file has is seen from its names (`weight_names`); that it is what it claims to be is checked before memory is taken
(`weight_files`), and no array is read whose shape is not the model's. What is stored as bfloat16 or float16 becomes float32
exactly. The release computes GELU by tanh, timm and transformers exactly. Files of ours say which, and all else of their model
(`weight_about`); of others the config says it (`gelu`).
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from vitcore import posemb, weight_about, weight_files
from vitcore.config import ViTConfig
from vitcore.families import leaves as leaves_of
from vitcore.families import restored
from vitcore.normalisation import HALF, Pixels
from vitcore.parameters import flat, nested
from vitcore.resnet_models import ResNetConfig
from vitcore.weight_checks import PATCHES, agrees, check, is_head, style_of_file, usual_names
from vitcore.weight_files import Stored, WeightError
from vitcore.weight_infer import infer
from vitcore.weight_names import POSITION, Naming, Style, entries, nameless, naming_of, shapes, written

MOST_SIDE = 1024  # of a patch that is to be resampled


def load(
    path,
    config: ViTConfig | ResNetConfig | None = None,
    *,
    new_head: bool = False,
    allow_nonfinite: bool = False,
    grid: tuple[int, int] | None = None,
    heads: int | None = None,
    pool: str | None = None,
    position: str | None = None,
    interpolation: Literal["corners", "half-pixel"] = "corners",
    resample_patches: bool = False,
) -> Any:
    """Parameters for `config` from a file: a nested dict of float32 arrays, as `vitcore.init` makes. Without a config: (parameters,
    the configuration of the file's model).

    path: .npz in any of the release's layouts, or .safetensors in timm's or transformers' naming. new_head: leave the file's head
    and pre-logits layer alone, whatever they are; the head is zeros (its bias config.head_bias), and the config must have no
    pre-logits layer. grid: (rows, columns) of the file's position embedding, needed where it is not square.
    heads, pool, position: without a config, where the file leaves them open.
    interpolation: how the position embedding is fitted to config.grid (`vitcore.posemb`). allow_nonfinite: take arrays with NaN or
    infinities. resample_patches: take a file of another patch size, its projection resampled (`posemb.fit_patches`).
    Raises ValueError, one line, that names every missing, extra and misshapen entry, what the file says of its model
    and the config says otherwise, or what is wrong with the file; OSError.
    """
    import jax

    alone = config is None
    if config is None:
        style, found, arrays = describe(path, heads=heads, grid=grid, pool=pool, position=position)
        if isinstance(found, ViTConfig) and not any(is_head(name, style) for name in usual_names(arrays)):
            found = dataclasses.replace(found, num_classes=0)
        config, grid = found, getattr(found, "grid", None)
    theirs = _with_patches_of(path, config) if resample_patches else config
    found = read(
        path, theirs, new_head=new_head, grid=grid, interpolation=interpolation, allow_nonfinite=allow_nonfinite
    )  # fmt: skip
    if theirs is not config:
        assert isinstance(config, ViTConfig)
        found["patch_embed"]["kernel"] = posemb.fit_patches(found["patch_embed"]["kernel"], config.patch_size)
    params = jax.tree.map(jnp.asarray, found)
    return (params, config) if alone else params


def _with_patches_of(path, config):
    """The configuration with the patch size of a file, on the same grid; itself where that is its own, or the model has no patches
    of pixels."""
    if not isinstance(config, ViTConfig) or not config.of_pixels:
        return config
    with weight_files.opened(os.fspath(path)) as stored:
        arrays = usual_names(stored)
        style = style_of_file(os.fspath(path), arrays)
        (kernel,) = (e for e in entries(config, style) if e.path == PATCHES)
        shape = arrays[kernel.name].shape if kernel.name in arrays else ()
    side = shape[0 if style.naming == "release" else -1] if len(shape) == 4 else 0
    if not 0 < side <= MOST_SIDE or side == config.patch_size:
        return config  # which says what is wrong with the file
    rows, columns = config.grid
    return dataclasses.replace(config, patch_size=side, image_size=(rows * side, columns * side))


def read(path, config, *, new_head: bool = False, grid=None, interpolation="corners", allow_nonfinite: bool = False):
    """`load` as numpy arrays, in host memory: for a caller who places them on a mesh."""
    path = os.fspath(path)
    if new_head and config.representation_size is not None:
        raise ValueError(
            "new_head=True drops the pre-logits layer with the head, the config has representation_size="
            f"{config.representation_size}: make it None"
        )
    with weight_files.opened(path) as stored:
        arrays = usual_names(stored)
        style = style_of_file(path, arrays)
        wanted = entries(config, style)
        if lost := nameless(config, style):
            raise WeightError(f"{path}: files of {style.naming} naming have no name for this config's {', '.join(lost)}")
        if new_head:
            dropped = {e.name for e in wanted if e.path[0] == "head"} | {n for n in arrays if is_head(n, style)}
            wanted = tuple(e for e in wanted if e.name not in dropped)
            arrays = {name: a for name, a in arrays.items() if name not in dropped}
        about = weight_about.read(path, weight_files.metadata(path))
        check(path, arrays, wanted, style, config)
        agrees(path, about, config, style)
        leaves = {leaf: np.empty(shape, np.float32) for leaf, shape in shapes(config).items()}
        if new_head:
            leaves |= {leaf.path: np.array(leaf.initial(None, leaf.shape)) for leaf in leaves_of(config) if leaf.path[0] == "head"}
        for entry in wanted:
            array = _as_float32(arrays[entry.name].read())
            if not (allow_nonfinite or np.isfinite(array).all()):
                count = int(array.size - np.isfinite(array).sum())
                raise WeightError(
                    f"{path}: {count:,} of the {array.size:,} numbers of {entry.name} are NaN or infinite: get another file, or "
                    "take them with --allow-nonfinite (allow_nonfinite=True in a program)"
                )
            if entry.path == POSITION:
                leaves[POSITION][:] = _position(path, array, config, style, grid, interpolation)
            else:
                entry.into(leaves[entry.path], array)
    return nested(leaves)


def save(
    path, params, config: ViTConfig | ResNetConfig, *, naming: Naming | None = None, dtype: str = "float32",
    classes=None, pixels: Pixels = HALF, data=None,
) -> None:  # fmt: skip
    """Writes parameters, whole or not at all: .npz in the release's layout, or .safetensors.

    naming: of a .safetensors: "timm" (default where it has a name for everything) or "transformers"; an .npz is "release". dtype:
    float32, or bfloat16, which rounds. The file says all of the config, and classes (names, of the head's classes in order), pixels
    (what the model wants) and data (what it was trained on, JSON-able), which `about` gives back. Reading the file back gives the
    same bits. Raises ValueError where params are not the config's; OSError.
    """
    form = weight_files.kind(path)
    naming = naming or ("release" if form == "npz" else naming_of(config))
    if naming not in get_args(Naming) or (form == "npz") != (naming == "release"):
        raise ValueError(f"naming={naming!r} for {path}: an .npz is 'release', a .safetensors 'timm' or 'transformers'")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: 'float32' or 'bfloat16' is required")
    arrays_of = {leaf: np.asarray(a, np.float32) for leaf, a in flat(params).items()}
    if (have := {leaf: a.shape for leaf, a in arrays_of.items()}) != shapes(config):
        wrong = sorted(leaf for leaf in have.keys() | shapes(config).keys() if have.get(leaf) != shapes(config).get(leaf))
        names = ", ".join("/".join(leaf) for leaf in wrong)
        raise ValueError(f"the parameters are not this config's: {names} differ: give the config they were made with")
    style = written(config, naming)
    if lost := nameless(config, style):
        better = naming_of(config)
        instead = "keep the run's checkpoint" if nameless(config, written(config, better)) else f"{better}'s .safetensors has them"
        raise ValueError(f"files of {naming} naming have no name for this config's {', '.join(lost)}: {instead}")
    kept = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    arrays = {e.name: e.to_file(arrays_of[e.path]).astype(kept) for e in entries(config, style)}
    about = {"format": "pt", weight_about.KEY: weight_about.text_of(config, classes=classes, wanted=pixels, data=data)}
    weight_files.write(path, arrays, about)


def describe(
    path, *, heads: int | None = None, grid: tuple[int, int] | None = None, pool: str | None = None, position: str | None = None
) -> tuple[Style, Any, dict[str, Stored]]:
    """A file's style, the configuration of its model, and its arrays (names, shapes, dtypes; not to be read). From headers alone.

    heads, grid, pool, position: as in `weight_infer.infer`, where the file does not say. Raises ValueError in one line; OSError.
    """
    path = os.fspath(path)
    with weight_files.opened(path) as stored:
        arrays = usual_names(stored)
        style, told = style_of_file(path, arrays), weight_about.read(path, weight_files.metadata(path))
        try:
            if told.config is not None:
                found = restored(told.config)
                if heads not in (None, told.heads):
                    raise ValueError(f"the file says {told.heads} heads, not {heads}")
                check(path, arrays, entries(found, style), style, found)
            else:
                said = grid or _grid_of(path, weight_files.metadata(path))
                found = infer(
                    {n: a.shape for n, a in arrays.items()}, style, heads=heads or told.heads, grid=said, pool=pool,
                    position=position,
                )  # fmt: skip
                gated = isinstance(found, ViTConfig) and found.entries.block.mlp == "gated_half"  # of which timm's says nothing
                known = told.gelu is not None and not (gated and style.naming == "timm")
                if style.naming != "release" and known and isinstance(found, ViTConfig):
                    found = dataclasses.replace(found, gelu=told.gelu)  # pyright: ignore[reportArgumentType]
                if style.naming != "release" and told.eps is not None and isinstance(found, ViTConfig):
                    found = dataclasses.replace(found, eps=told.eps)
        except WeightError:
            raise
        except ValueError as error:
            raise WeightError(f"{path}: {error}") from error
        return style, found, dict(arrays)


def about(path) -> weight_about.About:
    """What a file says of its model beside the arrays. Raises ValueError in one line; OSError."""
    path = os.fspath(path)
    with weight_files.opened(path):
        return weight_about.read(path, weight_files.metadata(path))


def convert(
    source, target, *, naming=None, dtype="float32", heads=None, grid=None, pool=None, position=None, allow_nonfinite=False
):
    """Reads one file, writes another; the model's configuration. heads, grid, pool, position: where the source does not say.
    allow_nonfinite: as in `load`."""
    _, config, arrays = describe(source, heads=heads, grid=grid, pool=pool, position=position)
    claimed, there = sum(4 * math.prod(a.shape) for a in arrays.values()), os.path.getsize(source)
    if claimed > 64 * there + 2**20:  # a model's shapes are not known beforehand here; weights hardly shrink when packed
        raise WeightError(f"{source} claims {claimed:,} bytes of arrays in {there:,} bytes of file: no weights are that empty")
    told = about(source)
    save(
        target, read(source, config, grid=grid or config.grid, allow_nonfinite=allow_nonfinite), config, naming=naming,
        dtype=dtype, classes=told.classes, pixels=told.pixels or HALF, data=told.data,
    )  # fmt: skip
    return config


def _position(path: str, array: np.ndarray, config, style: Style, grid, interpolation) -> np.ndarray:
    """The file's [1, T', D] as our [T, D]: the class slot put in or taken out, the patches fitted to the config's grid."""
    table = array.reshape(-1, config.width)
    ours = shapes(config)[POSITION][0] - config.grid[0] * config.grid[1]  # a slot for the class token, or none
    theirs = 0 if style.top_position else ours
    patches = len(table) - theirs
    square = math.isqrt(max(patches, 0)) ** 2 == patches and patches > 0
    said = grid or _grid_of(path, weight_files.metadata(path)) or _own_grid(path)
    if said is None and patches == config.grid[0] * config.grid[1] and (not square or config.grid[0] == config.grid[1]):
        said = config.grid
    if said is None and (not square or patches == config.grid[0] * config.grid[1]):
        what = f"both a square and the config's {config.grid[0]} x {config.grid[1]}" if square else "no square"
        raise WeightError(f"{path} has a position embedding of {patches} patches, {what}: say its (rows, columns) with grid=")
    rows, columns = said or (math.isqrt(patches),) * 2
    if rows * columns != patches:
        raise WeightError(f"{path} has a position embedding of {patches} patches, not {rows} x {columns}: say another grid")
    if ours and not theirs:  # added to the patches before the class token joins them: nothing is added to that
        table = np.concatenate([np.zeros((1, config.width), np.float32), table])
    return posemb.fit(table, grid=(rows, columns), to=config.grid, class_slots=ours, method=interpolation)


def _grid_of(path: str, about: Mapping[str, str]) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", about.get("vitcore.grid", ""))
    return (int(match[1]), int(match[2])) if match else None


def _own_grid(path: str) -> tuple[int, int] | None:
    told = weight_about.read(path, weight_files.metadata(path)).config
    return None if told is None else ViTConfig(**told).grid


def _as_float32(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == np.float32 else array.astype(np.float32)
