"""Weights in the arrays of all layers: the same values and gradients as with each layer's own, and where that cannot be, those."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import stacked
from kernels.device import DEVICES
from kernels.launch import Launch
from kernels.mlp.reference import MLPWeights
from kernels.mlp.tpu import mlp_half
from vitcore import ViTConfig, apply, init, stacks
from vitcore.ops import fused

CONFIG = ViTConfig(image_size=16, patch_size=8, width=128, depth=2, mlp_dim=128, num_heads=2, num_classes=4)
LAYERSCALE = replace(CONFIG, block="layerscale")


def launch(device: str) -> Launch:
    return Launch(device=DEVICES[device], interpret=True)


def gradients(config, ops, images=2, remat=0):
    params = init(jax.random.key(0), config)
    params["head"]["kernel"] = jax.random.normal(jax.random.key(2), params["head"]["kernel"].shape)
    x = jax.random.uniform(jax.random.key(1), (images, 16, 16, 3), minval=-1.0)

    def loss(params):
        return jnp.square(apply(params, x, config, ops=ops, dtype=jnp.float32, remat=remat)).sum()

    return jax.jit(jax.value_and_grad(loss))(params)


def same(a, b):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * float(jnp.abs(y).max()), err_msg=str(path))


@pytest.mark.parametrize("device", [pytest.param("v3", marks=pytest.mark.slow), pytest.param("v5e", marks=pytest.mark.slow)])
def test_a_gradient_in_place_is_the_gradient(device):
    ops = fused(launch(device))
    assert ops.stacked
    here = ops._replace(unrolled=("forward",))
    same(gradients(CONFIG, here), gradients(CONFIG, here._replace(stacked=False)))


@pytest.mark.slow
def test_what_a_block_changes_is_no_slice_any_more():
    """LayerScale folds its scales into two of the four kernels: these are arrays of their own, the others lie in place."""
    here = fused(launch("v3"))._replace(unrolled=("forward",))
    same(gradients(LAYERSCALE, here), gradients(LAYERSCALE, here._replace(stacked=False)))


def stack(write: bool):
    weights = MLPWeights(*(jnp.ones(s) for s in ((128,), (128,), (128, 256), (256,), (256, 128), (128,))))
    arrays = {name: jnp.stack([getattr(weights, name)] * 3) for name in ("in_kernel", "out_kernel")}
    kind = stacked.Stacked if write else stacked.Lent
    at = jnp.full(1, 1, jnp.int32)
    return weights._replace(**{name: kind(a, at, getattr(weights, name)) for name, a in arrays.items()})


def test_a_lent_array_is_read_and_its_weight_differentiated():
    x, where = jax.random.normal(jax.random.key(0), (2, 24, 128)), launch("v3")

    def loss(weights):
        y: Any = mlp_half(x, weights, launch=where)
        return jnp.square(y).sum()

    lent, plain = jax.grad(loss, allow_int=True)(stack(write=False)), jax.grad(loss)(stacked.apart(stack(write=False)))
    for name in ("in_kernel", "out_kernel"):
        assert not getattr(lent, name).array.any()
        np.testing.assert_allclose(getattr(lent, name).one, getattr(plain, name), rtol=1e-5)


@pytest.mark.parametrize("images", [2, stacked.WRITTEN_TOKENS // 24 + 1])
def test_gradients_are_in_place_while_there_is_room(images):
    """A large batch gets the sum alone, and no array of all layers' gradients from the first on."""
    x = jax.ShapeDtypeStruct((images, 24, 128), jnp.float32)
    y = jax.eval_shape(lambda x: mlp_half(x, stack(write=True), launch=launch("v5e")), x)
    assert isinstance(y, tuple) == (images == 2)


def test_a_loop_lends_its_kernels():
    """Where the layers are a loop each finds its kernels in the arrays of all; the gradient is that of the slices, once."""
    keys = jax.random.split(jax.random.key(0), 2)
    layers = {name: jax.random.normal(key, (3, 8, 8)) for name, key in zip(("in_kernel", "out_kernel"), keys, strict=True)}
    x = jnp.ones((2, 8))

    def run(layers, read):
        def block(x, layer, places):
            w = layer[0]
            found, paths = places.found(MLPWeights(*[w.get(n, x) for n in MLPWeights._fields]))
            assert len(paths) == 2
            for kernel in (found.in_kernel, found.out_kernel):
                assert isinstance(kernel, stacked.Lent)
                x = x @ read(kernel)
            return x

        return stacks.looped(block, x, (layers, None), 3).sum()

    lent = jax.value_and_grad(run)(layers, lambda kernel: kernel.array[kernel.at[0]])
    own = jax.value_and_grad(run)(layers, lambda kernel: kernel.one)
    np.testing.assert_allclose(lent[0], own[0], rtol=1e-6)
    assert not any(g.any() for g in lent[1].values())
    assert all(g.any() for g in own[1].values())


@pytest.mark.slow
def test_a_loop_that_reads_in_place_has_the_same_gradients():
    ops = fused(launch("v3"))
    assert ops.stacked
    assert "forward" not in ops.unrolled
    same(gradients(CONFIG, ops), gradients(CONFIG, ops._replace(stacked=False)))
