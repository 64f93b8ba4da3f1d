"""`apply_on` and its like on meshes as programs have them: other names, one axis or three, Auto or Explicit, `jax.set_mesh`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding

import vitcore
from vitcore.sharding import MeshShape

CONFIG = vitcore.ViTConfig(
    image_size=8, patch_size=4, width=16, depth=1, mlp_dim=32, num_heads=2, num_classes=5, dropout=0.2, drop_path=0.3
)
IMAGES = jax.random.uniform(jax.random.key(1), (8, 8, 8, 3), minval=-1)
KEY = jax.random.key(3)

MESHES = {
    "auto": (dict(fsdp=2, tp=2), ("fsdp", "tp"), AxisType.Auto),
    "explicit": (dict(fsdp=2, tp=2), ("fsdp", "tp"), AxisType.Explicit),
    "the other way round": (dict(tp=2, fsdp=2), ("fsdp", "tp"), AxisType.Auto),
    "three, one replicated": (dict(fsdp=2, stage=2, tp=2), ("fsdp", "tp"), AxisType.Explicit),
    "data on two": (dict(dcn=2, fsdp=2, tp=2), (("dcn", "fsdp"), "tp"), AxisType.Auto),
    "data alone": (dict(batch=4), ("batch", None), AxisType.Explicit),
    "model alone": (dict(tp=2), (None, "tp"), AxisType.Auto),
    "the usual ones of three": (dict(data=2, model=2, expert=2), ("data", "model"), AxisType.Auto),
}


@pytest.fixture(scope="module")
def params():
    found = vitcore.init(jax.random.key(0), CONFIG)
    return found | {"head": {**found["head"], "kernel": jax.random.normal(jax.random.key(2), found["head"]["kernel"].shape)}}


def mesh_of(name):
    sizes, axes, kind = MESHES[name]
    count = int(np.prod(list(sizes.values())))
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes), devices=jax.devices()[:count]), axes


FAST = ("explicit", "three, one replicated", "data alone")


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MESHES])
def test_what_comes_out_is_what_one_device_gives(params, name):
    mesh, axes = mesh_of(name)
    specs = vitcore.partition_specs(CONFIG, mesh, axes=axes)
    placed = jax.device_put(params, jax.tree.map(partial(NamedSharding, mesh), specs, is_leaf=lambda x: not isinstance(x, dict)))
    run = jax.jit(vitcore.apply_on(mesh, CONFIG, ops=vitcore.REFERENCE, axes=axes))
    expected = vitcore.apply(params, IMAGES, CONFIG, ops=vitcore.REFERENCE, dropout_key=KEY)
    np.testing.assert_allclose(run(placed, IMAGES, KEY), expected, rtol=1e-5, atol=1e-5)
    shape = MeshShape.of(mesh, axes)
    split = placed["blocks"]["mlp_in"]["kernel"].addressable_shards[0].data.size
    assert split * shape.data * shape.model == params["blocks"]["mlp_in"]["kernel"].size  # the specs are of those axes


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("explicit", marks=pytest.mark.ci), "data on two"])
def test_gradients_features_and_maps_under_set_mesh(params, name):
    mesh, axes = mesh_of(name)
    on: dict[str, Any] = dict(ops=vitcore.REFERENCE, axes=axes)
    alone: dict[str, Any] = dict(ops=vitcore.REFERENCE)

    def loss(apply, params):
        return jnp.square(apply(params, IMAGES, dropout_key=KEY)).sum()

    expected = jax.jit(jax.grad(partial(loss, partial(vitcore.apply, config=CONFIG, **alone))))(params)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(partial(loss, vitcore.apply_on(mesh, CONFIG, **on))))(params)
        features = jax.jit(vitcore.features_on(mesh, CONFIG, **on))(params, IMAGES)
        maps = jax.jit(vitcore.attention_maps_on(mesh, CONFIG, **on))(params, IMAGES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()), found, expected)
    np.testing.assert_allclose(features, vitcore.features(params, IMAGES, CONFIG, **alone), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(maps, vitcore.attention_maps(params, IMAGES, CONFIG, **alone), rtol=1e-4, atol=1e-5)


def test_a_mesh_without_devices_has_the_same_specs():
    mesh, axes = mesh_of("explicit")
    abstract = AbstractMesh((2, 2), ("fsdp", "tp"))
    assert vitcore.partition_specs(CONFIG, abstract, axes=axes) == vitcore.partition_specs(CONFIG, mesh, axes=axes)


@pytest.mark.parametrize("axes", [("data", "model"), ("fsdp", "fsdp"), ("fsdp",), ("fsdp", "tp", "x")], ids=str)
def test_names_that_the_mesh_has_not_are_refused(axes):
    mesh, _ = mesh_of("auto")
    with pytest.raises(ValueError, match=r"of a mesh with the axes \('fsdp', 'tp'\): \(data axis, model axis\) of its names"):
        vitcore.apply_on(mesh, CONFIG, axes=axes)
    with pytest.raises(ValueError, match="of its names are required"):
        vitcore.partition_specs(CONFIG, mesh, axes=axes)


@pytest.mark.slow
def test_a_resnet_too(params):
    config = vitcore.variant("R50x1", image_size=32, num_classes=4)
    weights = vitcore.init(jax.random.key(0), config)
    images = jax.random.uniform(jax.random.key(1), (4, 32, 32, 3), minval=-1)
    mesh, axes = mesh_of("three, one replicated")
    found = jax.jit(vitcore.features_on(mesh, config, axes=axes))(weights, images)
    expected = jax.jit(partial(vitcore.features, config=config))(weights, images)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
