"""The dropout mask: its rate, its independence, and that it belongs to the element and not to the way the array is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dropout
from kernels.dropout import Dropout

SITES = (dropout.EMBEDDING, dropout.ATTENTION_OUT, dropout.MLP_HIDDEN, dropout.MLP_OUT)
N = 512


def mask(rate=0.5, key=1, site=dropout.MLP_HIDDEN, row=0, column=0, rows=N, columns=N):
    ones = jnp.ones((1, rows, columns), jnp.float32)
    return np.asarray(dropout.apply(ones, Dropout(rate, jnp.int32(key), row), site, column))[0] != 0


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate(rate):
    for key in range(3):
        dropped = 1 - mask(rate, key).mean()
        assert abs(dropped - rate) < 5 * (rate * (1 - rate)) ** 0.5 / N  # five standard deviations of N*N draws
    per_row, per_column = 1 - mask(rate).mean(1), 1 - mask(rate).mean(0)
    assert np.abs(per_row - rate).max() < 0.12
    assert np.abs(per_column - rate).max() < 0.12


def agreement(a, b):
    """Correlation of two masks of rate one half, in standard deviations of independent ones."""
    return abs(2 * (a == b).mean() - 1) * a.size**0.5


def test_neighbours_layers_sites_and_steps_are_independent():
    m = mask()
    assert agreement(m[:, 1:], m[:, :-1]) < 5
    assert agreement(m[1:], m[:-1]) < 5
    assert agreement(m[1:, 1:], m[:-1, :-1]) < 5
    assert agreement(m, m.T) < 5, "rows and columns are hashed alike"
    for key in (0, 2, 3, -1):
        assert agreement(m, mask(key=key)) < 5, f"keys 1 and {key}"
    masks = [mask(site=site) for site in SITES]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert agreement(a, b) < 5


def test_a_mask_belongs_to_the_element():
    """Any split of rows (examples) and columns sees the part of the whole mask that it holds."""
    whole = mask()
    np.testing.assert_array_equal(mask(row=100, rows=50), whole[100:150])
    np.testing.assert_array_equal(mask(column=384, columns=128), whole[:, 384:])
    ones = jnp.ones((4, N // 4, N), jnp.float32)
    folded = dropout.apply(ones, Dropout(0.5, jnp.int32(1)), dropout.MLP_HIDDEN)
    np.testing.assert_array_equal(np.asarray(folded).reshape(N, N) != 0, whole)


def test_kept_values_are_scaled_and_zero_rate_is_the_identity():
    x = jnp.full((1, 8, 8), 3.0)
    dropped = np.asarray(dropout.apply(x, Dropout(0.25, jnp.int32(1)), dropout.MLP_OUT))
    assert set(np.unique(dropped)) <= {0.0, 4.0}
    assert dropout.apply(x, Dropout(0.0, jnp.int32(1)), dropout.MLP_OUT) is x
    assert dropout.apply(x, None, dropout.MLP_OUT) is x


def test_rows_lose_what_the_same_rows_of_images_lose():
    """`apply_rows` keeps [B * T, K]; rows behind the tokens shift no other's mask."""
    x = jax.random.normal(jax.random.key(0), (3, 6, 16))
    here = Dropout(0.4, jnp.int32(7), 11, 3)
    for tokens in (None, 6, 5):
        expected = dropout.apply(x, here, dropout.MLP_HIDDEN, 32, tokens=tokens)
        found = dropout.apply_rows(x.reshape(18, 16), 6, here, dropout.MLP_HIDDEN, 32, tokens=tokens)
        np.testing.assert_array_equal(np.asarray(found).reshape(x.shape), expected)
        assert 0 < (np.asarray(found) == 0).sum() < found.size
