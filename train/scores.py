"""What predictions are worth: top-1 and top-5, ReaL, ObjectNet, class by class; and the confusion matrix as a picture.

ReaL (Beyer et al. 2020): real.json, a list with one list of ImageNet labels for each of the 50,000 validation images, in the
order of their numbers; a prediction is right if its top-1 is among them, images with an empty list do not count.
ObjectNet (Barbu et al. 2019): folders of objects, of which 113 correspond to one or more ImageNet classes; a prediction over
ImageNet's classes is right if it is among those of its folder; other folders do not count.
"""

import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from train.files import parse_json, text_of, write_picture


def top(best: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """bool [K]: whether the label is among the first k of best [K, 5]."""
    return (best[:, :k] == labels[:, None]).any(1)


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """int [V, V]: images of class (row) that were taken for class (column)."""
    return np.bincount(labels.astype(np.int64) * classes + predicted, minlength=classes**2).reshape(classes, classes)


# --- ReaL -------------------------------------------------------------------------------------------------------------------


def read_real(path: str) -> list[list[int]]:
    """real.json. ValueError, one line, for what is none."""
    held = _json(path)
    if not isinstance(held, list) or not all(isinstance(one, list) and all(isinstance(i, int) for i in one) for one in held):
        raise ValueError(f"{path} is no real.json: a list with a list of labels for every validation image is required")
    return held


def real_labels(real: list[list[int]], names: list[str], classes: int) -> list[list[int]]:
    """The labels of the images of these names, in their order: ILSVRC2012_val_00000001.JPEG has the first. ValueError for a name
    without a number or past the list, or for a label that is no class."""
    out = []
    for name in names:
        number = re.search(r"val_0*(\d+)\.\w+$", os.path.basename(name)) or re.search(r"val_0*(\d+)$", os.path.basename(name))
        if number is None or not 1 <= int(number[1]) <= len(real):
            raise ValueError(
                f"the image {name} has no place among the {len(real)} of the ReaL labels: names like "
                "ILSVRC2012_val_00000001.JPEG are required, which say which is which"
            )
        out.append(real[int(number[1]) - 1])
    if worst := [label for labels in out for label in labels if not 0 <= label < classes]:
        raise ValueError(f"the ReaL labels know class {worst[0]}, the model has {classes} classes: ImageNet's 1000 are required")
    return out


def real_accuracy(best: np.ndarray, labels: list[list[int]]) -> tuple[int, int]:
    """(right, counted)."""
    right = [int(first) in one for first, one in zip(best[:, 0], labels, strict=True) if one]
    return sum(right), len(right)


# --- ObjectNet --------------------------------------------------------------------------------------------------------------


def read_objectnet(path: str) -> dict[str, list[int]]:
    """{folder: ImageNet classes in the order of their WordNet ids}, for the folders that have any.

    path: a JSON file of just that, or the `mappings` directory of the published set: folder_to_objectnet_label.json,
    objectnet_to_imagenet_1k.json (names with "; " between), imagenet_to_label_2012_v2 (a line of names for each class) and
    pytorch_to_imagenet_2012_id.json (our class to that line). ValueError in one line for what is not of that form; OSError.
    """
    if os.path.isdir(path):
        folders, names = (_json(os.path.join(path, n)) for n in ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"))
        ids = _json(os.path.join(path, "pytorch_to_imagenet_2012_id.json"))
        lines = text_of(os.path.join(path, "imagenet_to_label_2012_v2")).splitlines()
        try:
            line_of = {line.strip(): i for i, line in enumerate(lines) if line.strip()}
            ours = {int(line): int(mine) for mine, line in ids.items()}
            labels = {label: [ours[line_of[n.strip()]] for n in text.split(";")] for label, text in names.items()}
            held: Any = {folder: sorted(labels[label]) for folder, label in folders.items() if label in labels}
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}: the ObjectNet mappings do not fit together ({type(error).__name__}: {error})") from None
    else:
        held = _json(path)
    good = isinstance(held, dict) and all(
        isinstance(v, list) and v and all(isinstance(i, int) and 0 <= i < 1000 for i in v) for v in held.values()
    )
    if not good or not held:
        raise ValueError(
            f"{path} is no class map of ObjectNet: {{folder: [ImageNet classes]}}, or its mappings folder, is required"
        )
    return held


def objectnet_accuracy(best: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], mapped: dict[str, list[int]], k: int):
    """(right, counted) of top-k. labels: of the folders, whose names are `classes`. ValueError where none is in the map."""
    known = np.array([name in mapped for name in classes])
    if not known.any():
        raise ValueError(
            f"none of the folders {', '.join(classes[:3])}, ... is in the ObjectNet class map: give the set's own folders"
        )
    right = np.zeros((len(classes), 1000), bool)
    for i, name in enumerate(classes):
        right[i, mapped.get(name, [])] = True
    counts = known[labels]
    hits = np.asarray(right[labels[:, None], best[:, :k]]).any(axis=1)
    return int((hits & counts).sum()), int(counts.sum())


def _json(path: str):
    try:
        return parse_json(text_of(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({str(error).splitlines()[0]}): get it again") from None


# --- picture ----------------------------------------------------------------------------------------------------------------

MOST_WRITTEN = 30  # classes up to which every cell gets its number


def draw(matrix: np.ndarray, classes: tuple[str, ...], path: Path, title: str) -> None:
    """Confusion matrix (each row as shares of its class) and the accuracy of every class, sorted, to a PNG; whole or not at all."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    counts = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, counts, out=np.zeros(matrix.shape), where=counts > 0)
    figure = Figure(figsize=(13, 6.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    image = left.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=left, format=PercentFormatter(xmax=1.0), shrink=0.8)
    if len(classes) <= MOST_WRITTEN:
        left.set_xticks(range(len(classes)), list(classes), rotation=90)
        left.set_yticks(range(len(classes)), list(classes))
        for row, column in zip(*np.nonzero(matrix), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            left.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=7, color=color)
    left.set(xlabel="predicted", ylabel="class", title=title)
    seen = np.flatnonzero(counts[:, 0])
    accuracy = shares[seen, seen]
    order = np.argsort(accuracy, kind="stable")
    right.bar(range(len(seen)), accuracy[order], color="tab:blue", width=0.9 if len(seen) <= MOST_WRITTEN else 1.0)
    if len(seen) <= MOST_WRITTEN:
        right.set_xticks(range(len(seen)), [classes[i] for i in seen[order]], rotation=90)
    right.axhline(np.trace(matrix) / max(1, matrix.sum()), color="tab:orange", linewidth=1, label="all images")
    right.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    right.set(ylim=(0, 1), xlabel="class, the hardest first", title="Accuracy of each class")
    right.legend(frameon=False)
    right.spines[["top", "right"]].set_visible(False)
    write_picture(figure, path)
