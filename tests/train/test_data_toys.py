"""The toy tasks: alike each time, balanced, and tested on nothing that they train on."""

import numpy as np
import pytest

from train import vtab, vtab_results
from train.data import DataError, digits, open_source, toys
from train.options import parse


@pytest.mark.parametrize("task", toys.MAKERS)
def test_a_task_is_balanced_and_its_test_images_are_others(task):
    found, test = (toys.open_toys(task, split) for split in ("train", "val"))
    assert (len(found), len(test)) == (1000, 350)
    for source in (found, test):
        counts = np.bincount(source.labels(), minlength=len(source.classes))
        assert counts.max() - counts.min() <= 1
        assert isinstance(open_source(f"toys:{task}", "train"), toys.Toy)
        assert source[3].image.shape == (16, 16, 1)
        assert source[3].image.dtype == np.uint8
    seen = {image.tobytes() for image in found.images}
    assert not any(image.tobytes() in seen for image in test.images)
    toys._made.cache_clear()
    again = toys.open_toys(task, "train")
    assert (again.images == found.images).all()
    assert (again.targets == found.targets).all()


def test_labels_are_what_the_images_show():
    """What can be read off the pixels: quarters with ink, the place of the ink, and how wide it is."""
    count = toys.open_toys("count", "train")
    quarters = count.images[..., 0].reshape(-1, 2, 8, 2, 8).max((2, 4)).reshape(-1, 4)
    assert ((quarters > 0).sum(1) == count.targets + 1).all()
    place = toys.open_toys("place", "train")
    for image, label in zip(place.images[..., 0], place.targets, strict=True):
        y, x = 4 * (label // 3), 4 * (label % 3)
        assert image.sum() == image[y : y + 8, x : x + 8].sum() > 0
    size = toys.open_toys("size", "val")
    for image, label in zip(size.images[..., 0], size.targets, strict=True):
        rows, columns = np.nonzero(image)
        assert max(np.ptp(rows), np.ptp(columns)) + 1 <= 8 + 3 * label
    held_out = digits.load("val")
    turned = toys.open_toys("turn", "val")
    upright = {toys._resized(image[..., 0], 16).tobytes() for image in held_out.images}
    assert all(image[..., 0].tobytes() in upright for image, label in zip(turned.images, turned.targets, strict=True) if label == 0)


def test_what_there_is_not_is_said():
    with pytest.raises(DataError, match="has no task 'pets'; write toys:TASK, one of digits, "):
        open_source("toys:pets", "train")
    with pytest.raises(DataError, match="split is 'test'; the source 'toys' has the splits 'train' and 'val'"):
        open_source("toys:count", "test")


def test_the_tasks_of_vtab_s_toys_are_those_of_the_source():
    assert list(vtab_results.TOYS) == list(toys.MAKERS)
    args = parse(vtab.Vtab, "train.vtab", ["--init", "x", "--toys"])
    assert {at["data"] for at in vtab.places(args).values()} == {f"toys:{task}" for task in toys.MAKERS}
    with pytest.raises(ValueError, match="one of them"):
        vtab.places(parse(vtab.Vtab, "train.vtab", ["--init", "x", "--toys", "--data", "sets"]))
    with pytest.raises(ValueError, match="--tasks pets: the tasks are digits, "):
        vtab.places(parse(vtab.Vtab, "train.vtab", ["--init", "x", "--toys", "--tasks", "pets"]))
