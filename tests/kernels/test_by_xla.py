"""Passes that a plan leaves to XLA: which they are, and that a half made of both is the half."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import by_xla
from kernels.attention import plan as attention
from kernels.attention.tiling import Shape
from kernels.by_xla import ByXLA
from kernels.device import DEVICES
from kernels.dropout import Dropout
from kernels.launch import Launch
from kernels.mlp import plan as mlp
from kernels.mlp import reference, tpu
from kernels.patch_embed import tpu as patch_embed
from tests import oracle

XLA = ByXLA(reason="a test")
CPU = Launch(device=DEVICES["v3"], interpret=True)


def chosen(device: str, t: int, d: int, heads: int) -> list[bool]:
    """Which are XLA's: the attention half's forward and backward pass, the MLP half's."""
    half = attention.choose(Shape(32, t, d, heads, d // heads, jnp.dtype(jnp.bfloat16)), DEVICES[device])
    other = mlp.choose(mlp.Shape(32, t, d, 4 * d, 2), DEVICES[device])
    return [isinstance(p, ByXLA) for p in (half.forward, half.backward, other.forward, other.backward)]


@pytest.mark.parametrize(
    ("device", "t", "d", "heads", "expected"),
    [
        ("v3", 200, 768, 12, (False, False, False, False)),
        ("v3", 200, 1024, 16, (False, False, False, False)),
        ("v3", 264, 1280, 16, (False, False, False, False)),
        ("v5e", 264, 1280, 16, (False, False, False, False)),
        ("v3", 17, 768, 12, (True, False, True, False)),
        ("v5e", 17, 768, 12, (True, False, True, False)),
        ("v5e", 5, 768, 12, (True, True, True, True)),
    ],
    ids=["B/16", "L/16", "H/14", "H/14 on v5e", "17 tokens", "17 tokens on v5e", "5 tokens"],
)
def test_what_is_left_to_xla(device, t, d, heads, expected):
    assert tuple(chosen(device, t, d, heads)) == expected


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_a_half_of_both_is_the_half(which, monkeypatch):
    """One pass by XLA, the other by kernels, the batch in parts: value, masks of dropout and every gradient."""
    monkeypatch.setattr(by_xla, "ROWS", 50)
    random = np.random.default_rng(0)
    shapes = (4, 21, 48), (48,), (48,), (48, 128), (128,), (128, 48), (48,)
    args = [jnp.asarray(random.standard_normal(s) * 0.3, jnp.float32) for s in shapes]
    plan = replace(mlp.plan(mlp.Shape(4, 21, 48, 128, 4), CPU.device), **{which: XLA})
    dropout = Dropout(0.3, jnp.int32(5), 1000, 77)
    ours = partial(oracle.flat(tpu.mlp_half, reference.MLPWeights), dropout=dropout, launch=CPU, plan=plan)
    oracle.check(ours, partial(oracle.flat(reference.mlp_half, reference.MLPWeights), dropout=dropout), args)

    value, both = (oracle.kernels_in(f, *args) for f in (ours, jax.grad(lambda *a: ours(*a).sum(), argnums=(0, 3))))
    assert ("mlp_half_forward" in value) == (which == "backward")
    assert ("mlp_half_backward" in both) == (which == "forward")


@pytest.mark.parametrize(("size", "kernels"), [(64, []), (224, ["patch_embed"])], ids=["5 tokens", "50 tokens"])
def test_few_patches_are_left_to_xla(size, kernels):
    shapes = (2, size, size, 3), (32, 32, 3, 64), (64,), (64,), ((size // 32) ** 2 + 1, 64)
    args = [jnp.zeros(s, jnp.float32) for s in shapes]
    for launch in (Launch(device=DEVICES["v3"]), Launch(device=DEVICES["v5e"])):
        assert oracle.kernels_in(partial(patch_embed.patch_embed, launch=launch), *args) == kernels
    assert oracle.kernels_in(partial(patch_embed.patch_embed, launch=CPU), *args) == ["patch_embed"]  # interpreted, to try it


def test_weights_are_rounded_as_the_cast_rounds_them():
    """What keeps XLA from casting all layers' weights at once changes no value: of kernels in bfloat16, and of nothing else."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((3, 48, 128)), jnp.float32)
    weights = reference.MLPWeights(w[0, 0], w[0, 0], w[0], w[1, 0], w[1].T, w[2, 0])
    found, same = by_xla.unhoisted(weights, jnp.dtype(jnp.bfloat16)), by_xla.unhoisted(weights, jnp.dtype(jnp.float32))
    for name, a, b, c in zip(weights._fields, weights, found, same, strict=True):
        cast = a.astype(jnp.bfloat16).astype(jnp.float32) if name.endswith("kernel") else a
        np.testing.assert_array_equal(b, cast, name)
        np.testing.assert_array_equal(c, a, name)
