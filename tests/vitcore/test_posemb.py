"""Position embeddings on another grid, against scipy's zoom (which the release uses) and against interpolation written out."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from vitcore.posemb import fit, fit_patches

GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))


def table(grid, slots=0, width=5, seed=0):
    return np.random.default_rng(seed).standard_normal((slots + grid[0] * grid[1], width)).astype(np.float32)


@given(grid=GRIDS, to=GRIDS, slots=st.integers(0, 1))
def test_corners_are_scipys_zoom(grid, to, slots):
    position = table(grid, slots)
    found = fit(position, grid=grid, to=to, class_slots=slots)
    patches = position[slots:].reshape(*grid, -1).astype(np.float64)
    zoom = ndimage.zoom(patches, (to[0] / grid[0], to[1] / grid[1], 1), order=1)
    assert zoom.shape[:2] == to
    np.testing.assert_array_equal(found[:slots], position[:slots])
    # one row of output has no second corner to align: scipy divides by one less than nothing and takes the first, as here
    np.testing.assert_allclose(found[slots:], np.asarray(zoom).reshape(to[0] * to[1], -1), rtol=1e-6, atol=1e-6)


@given(grid=GRIDS, to=GRIDS)
def test_half_pixel_is_interpolation_between_the_centres_of_patches(grid, to):
    position = table(grid)
    found = fit(position, grid=grid, to=to, method="half-pixel").reshape(*to, -1)
    patches = position.reshape(*grid, -1).astype(np.float64)
    for axis in (0, 1):
        centres, wanted = (np.arange(grid[axis]) + 0.5) / grid[axis], (np.arange(to[axis]) + 0.5) / to[axis]
        patches = np.apply_along_axis(lambda line, c=centres, w=wanted: np.interp(w, c, line), axis, patches)
    np.testing.assert_allclose(found, patches, rtol=1e-6, atol=1e-6)


def test_the_two_methods_differ_and_both_keep_a_plane():
    grid, to = (4, 4), (7, 9)
    position = table(grid)
    assert np.abs(fit(position, grid=grid, to=to) - fit(position, grid=grid, to=to, method="half-pixel")).max() > 0.1
    ramp = np.linspace(0, 1, 4)[:, None] + np.zeros((4, 4))
    found = fit(ramp.reshape(16, 1), grid=grid, to=to).reshape(to)
    np.testing.assert_allclose(found, np.linspace(0, 1, 7)[:, None] + np.zeros(to), atol=1e-7)


def test_the_same_grid_is_the_same_bits():
    position = table((3, 5), 1)
    for method in ("corners", "half-pixel"):
        found = fit(position, grid=(3, 5), to=(3, 5), class_slots=1, method=method)
        assert found.tobytes() == position.tobytes()
        assert found is not position


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grid": (3, 4)}, r"\[17, 5\]: \[1 \+ 3 x 4, D\]"),
        ({"class_slots": 0}, r"\[0 \+ 4 x 4, D\]"),
        ({"method": "cubic"}, "method='cubic'"),
        ({"to": (0, 4)}, "0 x 4"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        fit(table((4, 4), 1), **({"grid": (4, 4), "to": (2, 2), "class_slots": 1} | change))


def resized(patches, side):
    """Patches [n, P, P, C] at another side, by jax's own resize."""
    return np.asarray(jax.image.resize(patches, (len(patches), side, side, patches.shape[3]), "linear", antialias=False))


@pytest.mark.parametrize("side", [5, 8, 12, 3])
def test_a_patch_projection_answers_to_resized_patches_as_it_did(side):
    """Upwards the products are the same for any patch; downwards none has a smaller error, by least squares over whole patches."""
    rng = np.random.default_rng(0)
    kernel, patches = rng.standard_normal((5, 5, 2, 4)), rng.standard_normal((7, 5, 5, 2))
    found = fit_patches(kernel, side)
    assert (found.shape, found.dtype) == ((side, side, 2, 4), np.float32)
    if side >= 5:
        want = np.einsum("nyxc,yxcd->nd", patches, kernel)
        np.testing.assert_allclose(np.einsum("nyxc,yxcd->nd", resized(patches, side), found), want, rtol=1e-4, atol=1e-4)
    units = np.eye(25).reshape(25, 5, 5, 1)  # patches of one pixel: their resizes are the matrix of the resize
    matrix = resized(units, side).reshape(25, side * side)
    best = np.linalg.lstsq(matrix.astype(np.float64), kernel.reshape(25, -1), rcond=None)[0]
    np.testing.assert_allclose(found.reshape(side * side, -1), best, rtol=1e-4, atol=1e-4)
