"""Families that people use most: LayerScale, positions without a class slot, their files' names, and what is refused by name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import vitcore
from vitcore import weight_about, weight_checks, weight_names, weight_tree
from vitcore.normalisation import CLIP, HALF

SMALL: dict[str, Any] = dict(image_size=16, patch_size=4, width=32, depth=2, mlp_dim=64, num_heads=4, num_classes=3, gelu="erf")
SCALED = vitcore.ViTConfig(**SMALL, block="layerscale")


def moved(config):
    params = vitcore.init(jax.random.key(0), config)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])


def images():
    return jax.random.normal(jax.random.key(2), (2, 16, 16, 3))


def test_layer_scale_is_the_plain_block_with_scaled_outputs():
    """And it starts as nearly the identity, which the plain block does not."""
    params = moved(SCALED)
    blocks = dict(params["blocks"])
    for dense, scale in (("out", blocks.pop("scale1")), ("mlp_out", blocks.pop("scale2"))):
        blocks[dense] = {"kernel": blocks[dense]["kernel"] * scale[:, None], "bias": blocks[dense]["bias"] * scale}
    plain = vitcore.apply({**params, "blocks": blocks}, images(), vitcore.ViTConfig(**SMALL))
    np.testing.assert_allclose(vitcore.apply(params, images(), SCALED), plain, rtol=1e-5, atol=1e-6)
    fresh = vitcore.init(jax.random.key(0), SCALED)
    first, last = vitcore.features(fresh, images(), SCALED, blocks=(1, 2))
    assert 0 < np.abs(first - last).max() < 1e-3


def test_the_kernels_carry_layer_scale_registers_and_clip_s_stem_and_their_gradients():
    config = vitcore.ViTConfig(**SMALL, block="layerscale", registers=2, stem="clip", head_bias=None)

    def loss(ops):
        return jax.jit(jax.value_and_grad(lambda p: (vitcore.apply(p, images(), config, ops=ops) ** 2).sum()))(moved(config))

    for ours, plain in zip(jax.tree.leaves(loss(vitcore.INTERPRET)), jax.tree.leaves(loss(vitcore.REFERENCE)), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5 * float(jnp.abs(plain).max()))


def test_a_position_without_class_slot_leaves_the_class_token_alone():
    bare = vitcore.ViTConfig(**SMALL, position="1d-patches")
    params, whole = moved(bare), moved(vitcore.ViTConfig(**SMALL))
    table = jnp.concatenate([jnp.zeros((1, 32)), params["patch_embed"]["position"]])
    whole = {**params, "patch_embed": {**params["patch_embed"], "position": table}}
    np.testing.assert_allclose(
        vitcore.apply(params, images(), bare), vitcore.apply(whole, images(), vitcore.ViTConfig(**SMALL)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("position", ["1d", "1d-patches"])
@pytest.mark.parametrize("naming", ["timm", "transformers"])
def test_others_files_say_their_family(tmp_path, naming, position):
    """Without our metadata the names alone tell of LayerScale, of the class slot and of eps."""
    config = vitcore.ViTConfig(**SMALL, block="layerscale", position=position)
    params, path = moved(config), tmp_path / "w.safetensors"
    if naming == "transformers" and position != "1d":
        with pytest.raises(ValueError, match="no name for this config's patch_embed/position"):
            vitcore.save(path, params, config, naming=naming)
        return
    style = weight_names.written(config, naming)
    leaves = {tuple(k.key for k in at): np.asarray(a) for at, a in jax.tree_util.tree_leaves_with_path(params)}
    arrays = {e.name: np.ascontiguousarray(e.to_file(leaves[e.path])) for e in weight_names.entries(config, style)}
    if naming == "transformers":
        assert {"dinov2.encoder.layer.1.layer_scale2.lambda1", "dinov2.encoder.layer.0.norm1.weight"} <= set(arrays)
        arrays["dinov2.embeddings.mask_token"] = np.zeros((1, 32), np.float32)
    save_file(arrays, path)
    found, of = vitcore.load(path, heads=4)
    assert of == config
    jax.tree.map(np.testing.assert_array_equal, found, params)


def as_others_write(config, naming, path):
    """A file of the names and arrays alone, without our metadata; its parameters and names."""
    params = moved(config)
    leaves = {tuple(k.key for k in at): np.asarray(a) for at, a in jax.tree_util.tree_leaves_with_path(params)}
    found = weight_names.entries(config, weight_names.written(config, naming))
    arrays = {e.name: np.ascontiguousarray(e.to_file(leaves[e.path])) for e in found}
    save_file(arrays, path)
    return params, arrays


TOWERS = [
    ("timm", dict(block="layerscale", position="1d-patches", registers=2, num_classes=0), {"reg_token"}),
    (
        "transformers",
        dict(block="layerscale", registers=2, num_classes=0),
        {"dinov2_with_registers.embeddings.register_tokens", "dinov2_with_registers.embeddings.mask_token"},
    ),
    ("timm", dict(stem="clip", eps=1e-5), {"norm_pre.weight", "head.bias"}),
    (
        "transformers",
        dict(stem="clip", eps=1e-5, gelu="quick", head_bias=None),
        {"vision_model.pre_layrnorm.bias", "visual_projection.weight", "text_model.final_layer_norm.bias", "logit_scale"},
    ),
    ("timm", dict(pool="map", num_classes=0), {"attn_pool.latent", "attn_pool.kv.weight"}),
    (
        "transformers",
        dict(pool="map", gelu="tanh", num_classes=0),
        {"vision_model.head.probe", "vision_model.head.attention.in_proj_weight", "logit_bias", "text_model.head.weight"},
    ),
    ("transformers", dict(eps=1e-12, num_classes=0), {"decoder.decoder_norm.bias", "decoder.mask_token"}),
]


@pytest.mark.parametrize(("naming", "fields", "names"), TOWERS)
def test_registers_clip_siglip_and_mae_say_their_family(tmp_path, naming, fields, names):
    """By the names alone; what stands beside the encoder is left out and said; and out again the same bits."""
    config, path = vitcore.ViTConfig(**{**SMALL, **fields}), tmp_path / "w.safetensors"
    params, arrays = as_others_write(config, naming, path)
    beside = names - set(arrays)
    save_file(arrays | {name: np.zeros(3, np.float32) for name in beside}, path)
    read, found = vitcore.load(path, heads=4)
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, read, params)
    style, _, stored = weight_tree.describe(path, heads=4)
    assert bool(weight_checks.left_out(stored, style)) == bool(beside)
    vitcore.save(tmp_path / "ours.safetensors", read, found)
    again, of = vitcore.load(tmp_path / "ours.safetensors")
    assert of == config
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_registers_are_in_no_result():
    """Of features, maps and statistics, which agree with each other; what registers get is missing in the maps' rows."""
    config = vitcore.ViTConfig(**SMALL, registers=2)
    params = moved(config)
    (tokens,) = vitcore.features(params, images(), config, blocks=(1,))
    maps = vitcore.attention_maps(params, images(), config, blocks=(1,))
    found = vitcore.attention_statistics(params, images(), config, blocks=(1,), mean=True, row=True, distance=True)
    assert (tokens.shape, maps.shape) == ((2, 17, 32), (1, 2, 4, 17, 17))
    assert float(maps.sum(-1).max()) < 1
    np.testing.assert_allclose(found.mean, maps.mean(2), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.row, maps[..., 0, :], rtol=1e-4, atol=1e-6)
    far = vitcore.token_distances(config)[:17, :17]
    np.testing.assert_allclose(found.distance, (maps * far).sum((-1, -2)) / 16, rtol=1e-4)


def test_pixels_and_gelu_are_those_of_the_family(tmp_path):
    for naming, fields, wanted in (("timm", {"stem": "clip"}, CLIP), ("timm", {"pool": "map"}, HALF)):
        sides: dict[str, Any] = {**SMALL, **fields}
        config = vitcore.ViTConfig(**sides)
        assert weight_about.pixels_of("w.safetensors", weight_about.About(), naming, config)[0] == wanted
    for name, gelu in (
        ("vit_base_patch16_clip_quickgelu_224", "quick"),
        ("vit_base_patch16_siglip_224", "erf"),
        ("vit_so400m_patch16_siglip_256", "tanh"),
    ):
        (tmp_path / "config.json").write_text(f'{{"architecture": "{name}"}}')
        assert weight_about.read(str(tmp_path / "w.safetensors"), {}).gelu == gelu


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blocks.0.mlp.w12.weight", "SwiGLU"),
        ("rope_embed.periods", "own code"),
        ("rope.freqs", "rotary positions of another kind than DINOv3's"),
        ("blocks.0.mlp.norm.weight", "EVA-02"),
        ("dist_token", "distillation token"),
        ("fc_norm.weight", "fc_norm"),
    ],
)
def test_what_has_no_entry_is_refused_by_its_name(tmp_path, name, said):
    save_file(
        {"patch_embed.proj.weight": np.zeros((8, 3, 4, 4), np.float32), name: np.zeros(8, np.float32)}, tmp_path / "w.safetensors"
    )
    with pytest.raises(ValueError, match=f"w.safetensors: the model has .*{said}.*, which is not supported"):
        vitcore.load(tmp_path / "w.safetensors", heads=2)


def test_eps_is_that_of_the_file(tmp_path):
    config = vitcore.ViTConfig(**SMALL)
    vitcore.save(tmp_path / "ours.safetensors", moved(config), config, naming="transformers")
    from safetensors.numpy import load_file

    save_file(load_file(tmp_path / "ours.safetensors"), tmp_path / "w.safetensors")
    assert weight_tree.describe(tmp_path / "w.safetensors", heads=4)[1].eps == 1e-12
    (tmp_path / "config.json").write_text('{"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}')
    found = weight_tree.describe(tmp_path / "w.safetensors", heads=4)[1]
    assert (found.eps, found.gelu) == (1e-5, "quick")
    with pytest.raises(ValueError, match=r"of a model with eps=1e-06, not 0\.001"):
        vitcore.load(tmp_path / "ours.safetensors", vitcore.ViTConfig(**SMALL, eps=1e-3))
