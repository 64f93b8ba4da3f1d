"""Attention along lines in kernels: exact as the einsum in value and gradients, and XLA's where lines do not fit."""

from functools import partial

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention.lines import reference, tpu
from kernels.device import DEVICES
from kernels.launch import Launch
from tests import oracle


def launch(device="v3"):
    return Launch(device=DEVICES[device], interpret=True)


def arguments(m, length, heads, d, dtype):
    draw = np.random.default_rng(length * d + m).standard_normal
    relative = jnp.asarray(draw((2 * d, 2 * length - 1)) * 0.5, jnp.float32)
    return jnp.asarray(draw((m, length, 2 * heads * d)), dtype), relative


def check(m, length, heads, d, dtype, device="v3"):
    ours = partial(tpu.attention, heads=heads, launch=launch(device))
    args = arguments(m, length, heads, d, dtype)
    assert oracle.kernels_in(ours, *args) == ["attention_lines_forward"]
    oracle.check(ours, partial(reference.attention, heads=heads), args, names=("qkv", "relative"))


@settings(max_examples=4)
@given(
    m=st.sampled_from([1, 3, 130]),
    length=st.sampled_from([1, 2, 5, 7, 14]),
    heads=st.sampled_from([8, 2]),
    d=st.sampled_from([2, 8, 36]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    device=st.sampled_from(["v3", "v5e"]),
)
def test_it_agrees(m, length, heads, d, dtype, device):
    check(m, length, heads, d, dtype, device)
