"""Stochastic depth: by the image, its half block and the key; the same on any mesh and in any ops, off without a key."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import vitcore
from vitcore.drop_path import ATTENTION, MLP, DropPath, rates

SMALL = dict(image_size=8, channels=1, num_classes=5, representation_size=None, depth=2)
CONFIG = vitcore.variant("ViT-Nano/4", **SMALL, drop_path=0.5, dropout=0.1)
IMAGES = jax.random.uniform(jax.random.key(1), (8, 8, 8, 1), minval=-1)


def params_of(config):
    params = vitcore.init(jax.random.key(0), config)
    head = params["head"]["kernel"]
    return params | {"head": {**params["head"], "kernel": jax.random.normal(jax.random.key(2), head.shape)}}


def logits(config, params, images=IMAGES, key: int | None = 3, ops=vitcore.REFERENCE):
    drawn = None if key is None else jax.random.key(key)
    return np.asarray(jax.jit(partial(vitcore.apply, config=config, ops=ops))(params, images, dropout_key=drawn))


def test_what_is_left_out_is_made_up_for_in_the_mean():
    p, count = 0.3, 40_000
    m = {half: np.asarray(DropPath(jnp.float32(p), jnp.int32(7), 0).multiplier(half, count)).ravel() for half in (ATTENTION, MLP)}
    for found in m.values():
        np.testing.assert_allclose(np.unique(found), [0, 1 / (1 - p)], rtol=1e-6)
        assert abs(found.mean() - 1) < 4 * np.sqrt(p / (1 - p) / count)
    assert abs(np.corrcoef(m[ATTENTION], m[MLP])[0, 1]) < 4 / np.sqrt(count)  # the halves are drawn apart
    tail = DropPath(jnp.float32(p), jnp.int32(7), 39_990).multiplier(MLP, 10)
    np.testing.assert_array_equal(np.ravel(tail), m[MLP][-10:])  # an image's draw goes by its global index
    np.testing.assert_array_equal(np.ravel(DropPath(p, 7, 0, 3).multiplier(MLP, 9)), np.repeat(m[MLP][:3], 3))


def test_the_rate_rises_to_the_last_block():
    config = vitcore.variant("ViT-Nano/4", drop_path=0.3)
    np.testing.assert_allclose(rates(config), [0, 0.1, 0.2, 0.3], rtol=1e-6)


@pytest.mark.parametrize(
    "kind", [{}, {"block": "layerscale"}, {"block": "axial", "pool": "gap"}, {"position": "relative"}], ids=str
)
def test_an_image_that_is_left_out_passes_by(kind, monkeypatch):
    """With every half left out a model is one whose blocks add nothing; with none left out it is the model itself."""
    config = vitcore.variant("ViT-Nano/4", **SMALL, drop_path=0.5, **kind)
    params = params_of(config)
    whole = logits(config, params, key=None)
    assert np.abs(logits(config, params) - whole).max() > 1e-3

    def nothing_added(keys, leaf):
        out = {"out", "mlp_out"} & {key.key for key in keys}
        return jnp.zeros_like(leaf) if keys[0].key == "blocks" and out else leaf

    for value, expected in ((0.0, logits(config, jax.tree.map_with_path(nothing_added, params), key=None)), (1.0, whole)):
        monkeypatch.setattr(DropPath, "multiplier", lambda self, half, count, value=value: jnp.full((count, 1, 1), value))
        np.testing.assert_allclose(logits(config, params), expected, rtol=1e-5, atol=1e-5)


def test_it_is_off_without_a_key_and_goes_by_the_key():
    params = params_of(CONFIG)
    plain = vitcore.variant("ViT-Nano/4", **SMALL)
    np.testing.assert_array_equal(logits(CONFIG, params, key=None), logits(plain, params, key=None))
    assert np.abs(logits(CONFIG, params, key=3) - logits(CONFIG, params, key=4)).max() > 1e-3


@pytest.mark.parametrize(("data", "model"), [(2, 1), (1, 2), (4, 2)])
def test_any_mesh_leaves_out_the_same(data, model):
    params = params_of(CONFIG)
    mesh = jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: data * model])
    run = jax.jit(vitcore.apply_on(mesh, CONFIG, ops=vitcore.REFERENCE))
    np.testing.assert_allclose(run(params, IMAGES, jax.random.key(3)), logits(CONFIG, params), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [0, 2])
def test_the_kernels_agree_with_the_reference(remat):
    """Values and gradients, with dropout inside the halves: it drops the output bias too."""
    params = params_of(CONFIG)

    @partial(jax.jit, static_argnames="ops")
    def run(params, ops):
        def loss(params):
            return jnp.square(vitcore.apply(params, IMAGES, CONFIG, ops=ops, remat=remat, dropout_key=jax.random.key(3))).sum()

        return jax.value_and_grad(loss)(params)

    (value, found), (expected, wanted) = run(params, vitcore.INTERPRET), run(params, vitcore.REFERENCE)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()), found, wanted)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match=r"drop_path=.*: a rate in \[0, 1\) is required"):
        vitcore.variant("ViT-Nano/4", drop_path=rate)
