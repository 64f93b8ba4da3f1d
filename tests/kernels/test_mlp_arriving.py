"""The MLP half where VMEM is plenty: its weights come a hidden tile at a time, rounded on the way, and normalised rows stay."""

from dataclasses import replace
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.device import DEVICES
from kernels.dropout import Dropout
from kernels.launch import Launch
from kernels.mlp import tpu
from kernels.mlp.plan import Shape, plan
from tests.kernels.test_mlp import RESIDENT, STRICT, arrays, cut, judge, mlp_half

ROOMY = replace(RESIDENT, roomy=True, keep=True)


@pytest.mark.parametrize("name", DEVICES)
def test_one_core_of_128_mib_has_room(name):
    """v5e and v6e; on v5p and 7x, whose grids two cores may share, weights come as blocks."""
    for keep in (False, True):
        chosen = plan(Shape(32, 200, 768, 3072, 2), DEVICES[name], keep=keep)
        assert getattr(chosen.forward, "roomy", False) == (name in ("v5e", "v6e"))
        assert chosen.rounds == (keep and name in ("v5e", "v6e"))


def test_nothing_that_a_padded_row_holds_reaches_a_gradient():
    judge(arrays(3, 17, 32, 256), STRICT, cut(ROOMY), dropout=Dropout(0.2, jnp.int32(5)))


def test_weights_arrive_before_they_are_read_and_rows_that_all_exist_need_no_mask():
    """Two row tiles of two hidden tiles of two spans; memory that nothing was written to is NaN, and a copy in flight a race."""
    t = replace(ROOMY, images=1, rows=16, stride=16, hidden=256, spans=2)
    judge(arrays(2, 16, 32, 512), STRICT, cut(t), dropout=Dropout(0.2, jnp.int32(5)))


def test_float32_weights_are_rounded_as_they_arrive():
    """Where the products take bfloat16: no cast outside the kernels, and what a cast outside would give."""
    launch = Launch(device=DEVICES["v5e"], interpret=True)
    args = arrays(2, 16, 32, 512, jnp.bfloat16)
    chosen = cut(replace(ROOMY, images=1, rows=16, stride=16, hidden=256))
    run = partial(mlp_half, launch=launch, plan=chosen)
    rounded = tuple(a.astype(jnp.bfloat16) if a.ndim == 2 else a for a in args)
    with mock.patch.object(tpu, "cast", side_effect=AssertionError("weights are cast outside")):
        y, pullback = jax.vjp(run, *args)
        gradients = pullback(y)
    z, plain = jax.vjp(run, *rounded)
    for ours, theirs in zip((y, *gradients), (z, *plain(z)), strict=True):
        np.testing.assert_array_equal(ours.astype(theirs.dtype), theirs)


def test_rows_up_to_the_stride_are_not_taken_for_existing_ones():
    assert not replace(ROOMY, images=2, rows=17, stride=32).whole(2, 17)
    assert replace(ROOMY, images=2, rows=17, stride=17).whole(2, 17)
