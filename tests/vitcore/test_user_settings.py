"""The library under the settings of JAX that a program around it may have: the same values and gradients, on every kind of ops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import vitcore

SIZES = dict(image_size=8, patch_size=4, width=16, depth=1, mlp_dim=32, num_heads=2, num_classes=5)
MODELS = {
    "encoder": dict(dropout=0.1, drop_path=0.2, representation_size=8),
    "relative": dict(position="relative", dropout=0.1),
    "axial": dict(block="axial", pool="gap", drop_path=0.2),
    "rotary": dict(
        position="rope", block="layerscale-gated", gelu="silu", qkv_bias="qv", registers=2, dropout=0.1, width=128
    ),  # as wide as the kernel wants
    "map": dict(block="layerscale", pool="map", position="2d", registers=2),
}
SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "debug nans": lambda: jax.debug_nans(True),
    "transfer guard": lambda: jax.transfer_guard("disallow"),
}
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def models():
    made = {}
    for name, own in MODELS.items():
        config = vitcore.ViTConfig(**SIZES | own)
        params = vitcore.init(jax.random.key(0), config)
        kernel = params["head"]["kernel"]  # of zeros, nothing would have a gradient
        params["head"]["kernel"] = jax.random.normal(jax.random.key(2), kernel.shape)
        made[name] = config, params, jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1)
    return made


def gradient(config, ops, **options):
    """A compiled function (params, images) -> (value, gradients); the gradient is taken around a jit, so of what is traced late."""

    def loss(params, images):
        run = jax.jit(partial(vitcore.apply, config=config, ops=ops, **options))
        return jnp.square(run(params, images, dropout_key=KEY)).sum()

    return jax.jit(jax.value_and_grad(loss))


def check(model, ops, setting):
    config, params, images = model
    expected = gradient(config, ops)(params, images)
    with SETTINGS[setting]():
        found = gradient(config, ops)(params, images)
        jax.block_until_ready(found)
    assert np.abs(expected[1]["blocks"] and jax.tree.leaves(expected[1]["blocks"])[0]).max() > 0
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


FAST = ("x64", "rank promotion")


@pytest.mark.parametrize("setting", [s if s in FAST else pytest.param(s, marks=pytest.mark.slow) for s in SETTINGS])
def test_values_and_gradients_of_the_reference(models, setting):
    check(models["encoder"], vitcore.REFERENCE, setting)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "encoder"])
def test_values_and_gradients_of_other_models(models, name, setting):
    check(models[name], vitcore.REFERENCE, setting)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [pytest.param(s, marks=pytest.mark.ci if s in ("x64",) else ()) for s in SETTINGS])
@pytest.mark.parametrize("name", ["encoder", "relative", "rotary"])
def test_values_and_gradients_of_the_kernels(models, name, setting):
    check(models[name], vitcore.INTERPRET, setting)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["x64", "rank promotion", "strict dtypes"])
@pytest.mark.parametrize("generation", ["v3", pytest.param("v5e", marks=pytest.mark.ci), "7x"])
def test_the_kernels_are_lowered(generation, setting):
    """For TPUs that are not here: with a kernel for each half, forward and backward."""
    config = vitcore.ViTConfig(
        image_size=32, patch_size=8, width=128, depth=1, mlp_dim=256, num_heads=2, num_classes=5, dropout=0.1
    )
    params = jax.eval_shape(lambda: vitcore.init(jax.random.key(0), config))
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    ops = vitcore.fused(generation)
    with SETTINGS[setting]():
        text = gradient(config, ops, dtype=jnp.bfloat16).trace(params, images).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 4


def test_a_program_for_a_tpu_that_is_not_here_holds_the_kernels():
    """`jax.export` for the platform, with ops that name the generation; those of this process's TPU say so where there is none."""
    config = vitcore.ViTConfig(image_size=32, patch_size=8, width=128, depth=1, mlp_dim=256, num_heads=2, num_classes=5)
    params = jax.eval_shape(lambda: vitcore.init(jax.random.key(0), config))
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)

    def exported(ops):
        forward = jax.jit(partial(vitcore.apply, config=config, ops=ops, dtype=jnp.bfloat16))
        return jax.export.export(forward, platforms=("tpu",))(params, images).mlir_module().count("tpu_custom_call")

    assert exported(vitcore.fused("v5e")) >= 2
    with pytest.raises(ValueError, match=r"vitcore.fused\('v5e'\) to compile for a TPU that is not here"):
        exported(vitcore.FUSED)
    with pytest.raises(ValueError, match=r"fused\('v8'\): a generation of TPUs is required, one of v2, v3"):
        vitcore.fused("v8")


@pytest.mark.parametrize("setting", ["rank promotion", "strict dtypes"])
def test_parameters_features_and_a_mesh(models, setting):
    config, params, images = models["encoder"]
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    expected = vitcore.features(params, images, config)
    with SETTINGS[setting]():
        fresh = vitcore.init(jax.random.key(0), config)
        features = jax.jit(partial(vitcore.features, config=config, dtype=jnp.bfloat16))(params, images)
        logits = jax.jit(vitcore.apply_on(mesh, config))(params, images)
    np.testing.assert_array_equal(fresh["patch_embed"]["kernel"], params["patch_embed"]["kernel"])
    np.testing.assert_allclose(features, expected, atol=0.1)
    assert logits.shape == (2, 5)


def test_a_batch_of_no_images_gives_no_results(models):
    config, params, images = models["encoder"]
    none = images[:0]
    value, gradients = gradient(config, vitcore.INTERPRET)(params, none)
    assert value == 0
    assert not any(np.any(a) for a in jax.tree.leaves(gradients))
    assert vitcore.apply(params, none, config).shape == (0, 5)
    assert np.shape(vitcore.features(params, none, config)) == (0, 16)
    assert [a.shape for a in vitcore.features(params, none, config, blocks=(1,))] == [(0, 5, 16)]
    with pytest.raises(ValueError, match="images are none"):
        vitcore.attention_maps(params, none, config)
    with pytest.raises(ValueError, match="images are none"):
        vitcore.attention_statistics(params, none, config, mean=True)
