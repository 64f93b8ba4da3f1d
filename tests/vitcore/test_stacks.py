"""Weights in the arrays of all layers: the same values and gradients as with each layer's own, and where it cannot be as well."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.device import DEVICES
from kernels.launch import Launch
from vitcore import ViTConfig, apply, init
from vitcore.ops import fused

CONFIG = ViTConfig(image_size=16, patch_size=8, width=128, depth=3, mlp_dim=256, num_heads=2, num_classes=4)
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


@pytest.mark.parametrize("device", ["v3", "v5e"])
def test_a_gradient_in_place_is_the_gradient(device):
    ops = fused(launch(device))
    assert ops.stacked
    here = ops._replace(unrolled=("forward",))
    same(gradients(CONFIG, here), gradients(CONFIG, here._replace(stacked=False)))
