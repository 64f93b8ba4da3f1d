"""The pictures of `vitcore.inspect`, one function each; matplotlib is imported where something is drawn."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

LABELLED = 14  # most rows or columns of a grid whose panels are drawn one by one


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def png(figure) -> bytes:
    """A figure as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    return data.getvalue()


def _bare(axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def filters(values: np.ndarray, shares: np.ndarray) -> Any:
    """Filters [K, P, P, C], each scaled to its own range (grey is zero), with its share of the variance."""
    columns = min(7, len(values))
    rows = math.ceil(len(values) / columns)
    figure = _figure(1.25 * columns + 0.3, 1.45 * rows + 0.6)
    figure.suptitle(f"Patch projection: first {len(values)} principal components, share of variance")
    for i, (one, share) in enumerate(zip(values, shares, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        shown = 0.5 + 0.5 * one / (np.abs(one).max() or 1.0)
        axes.imshow(shown[..., 0] if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"{share:.1%}", fontsize=8)
        _bare(axes)
    return figure


def positions(similar: np.ndarray) -> Any:
    """Similarities [rows, columns, rows, columns]: a panel for each patch, at its place, of the similarity to all others."""
    rows, columns = (list(dict.fromkeys(np.linspace(0, n - 1, min(n, LABELLED)).round().astype(int))) for n in similar.shape[:2])
    figure = _figure(0.62 * len(columns) + 1.8, 0.62 * len(rows) + 1.2)
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    drawn: Any = None
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            axes = grid[i, j]
            drawn = axes.imshow(similar[row, column], vmin=-1, vmax=1, cmap="viridis", interpolation="nearest")
            _bare(axes)
            if j == 0:
                axes.set_ylabel(str(row + 1), fontsize=8)
            if i == len(rows) - 1:
                axes.set_xlabel(str(column + 1), fontsize=8)
    figure.colorbar(drawn, ax=grid, label="cosine similarity")
    figure.suptitle("Position embedding similarity", fontsize=11)
    figure.supxlabel("patch column", fontsize=9)
    figure.supylabel("patch row", fontsize=9)
    return figure


def distances(of_heads: np.ndarray, images: int, image_shape: tuple[int, int]) -> Any:
    """Mean attention distances [L, N] in pixels over the blocks, a point a head, and the line of their mean."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    blocks = np.arange(1, len(of_heads) + 1)
    figure = _figure(6.4, 4.2)
    axes = figure.add_subplot()
    shades = colormaps["turbo"](np.linspace(0.03, 0.97, of_heads.shape[1]))
    for n in range(of_heads.shape[1]):
        axes.scatter(blocks, of_heads[:, n], s=22, color=shades[n], alpha=0.8, label=f"head {n + 1}")
    axes.plot(blocks, of_heads.mean(1), color="0.3", lw=1, label="mean of heads")
    axes.set_xlabel("block")
    axes.set_ylabel("mean attention distance (pixels)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"{image_shape[0]} x {image_shape[1]} pixels, mean over {images} image{'s' * (images != 1)}", fontsize=10)
    axes.legend(fontsize=7, ncols=1 + of_heads.shape[1] // 9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def rollout(images: np.ndarray, weights: np.ndarray, names: Sequence[str]) -> Any:
    """uint8 images [B, Y, X, C] beside themselves, bright where the attention [B, rows, columns] is, each to its own largest."""
    from matplotlib.cm import ScalarMappable
    from PIL import Image

    pairs = min(3, len(images))
    rows = math.ceil(len(images) / pairs)
    figure = _figure(4.2 * pairs + 0.9, 2.3 * rows + 0.6)
    grid = figure.subplots(rows, 2 * pairs, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for i, (image, weight) in enumerate(zip(images, weights, strict=True)):
        left, right = grid[i // pairs, 2 * (i % pairs) :][:2]
        share = Image.fromarray((weight / (weight.max() or 1.0)).astype(np.float32))
        share = np.asarray(share.resize(image.shape[1::-1], Image.Resampling.BILINEAR))[..., None]
        colours = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
        left.imshow(colours, interpolation="nearest")
        left.set_title(names[i].rpartition("/")[2][-28:], fontsize=8)
        right.imshow((colours * share).astype(np.uint8), interpolation="nearest")
        right.set_title("attention", fontsize=8)
    scale = ScalarMappable(cmap="gray")
    scale.set_clim(0, 1)
    figure.colorbar(scale, ax=grid, label="attention, share of the largest")
    figure.suptitle("Attention rollout", fontsize=11)
    return figure
