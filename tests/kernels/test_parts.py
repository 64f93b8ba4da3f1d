"""Parts of a batch: every image once, in place, the sums added up."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import parts


@pytest.mark.parametrize(("b", "t", "limit", "n"), [(6, 10, 20, 3), (6, 10, 59, 2), (7, 10, 60, 1), (1, 50, 20, 1), (8, 10, 80, 1)])
def test_count_cuts_evenly_or_not_at_all(b, t, limit, n):
    """7 images have no divisor but 1 and 7: parts of one image would be much shorter than asked."""
    assert parts.count(b, t, limit) == n


@pytest.mark.parametrize("n", [1, 2, 3])
def test_backward_puts_dx_in_place_and_adds_sums(n):
    x, dy = np.arange(24.0).reshape(6, 2, 2), np.ones((6, 2, 2))

    def step(first, dy):
        images = first + jnp.arange(6 // n)
        dx = dy[images] * 2 + jnp.asarray(x)[images]
        return dy.at[images].set(dx), (dx.sum(), images.sum())

    dx, (total, images) = parts.backward(step, n, jnp.asarray(x), jnp.asarray(dy))
    np.testing.assert_array_equal(dx, 2 + x)
    assert (float(total), int(images)) == ((2 + x).sum(), 15)


def test_forward_fills_every_image():
    x = jnp.arange(12.0).reshape(6, 1, 2)
    y = parts.forward(lambda first, y: y.at[first + jnp.arange(2)].set(x[first + jnp.arange(2)] + 1), 3, x)
    np.testing.assert_array_equal(y, x + 1)
