"""DINOv2-giant and DINOv3: their files by the names alone, what looks like them and is not, and what models of them can do."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vitcore
from kernels.attention.rotary.reference import Turn
from kernels.device import DEVICES
from kernels.launch import Launch
from tests.vitcore.test_families import as_others_write, moved
from vitcore import dino, keep, vit, weight_names
from vitcore.normalisation import IMAGENET
from vitcore.ops import fused
from vitcore.weight_about import About, pixels_of
from vitcore.weight_infer import infer
from vitcore.weights import describe

SMALL: dict[str, Any] = dict(image_size=16, patch_size=4, width=32, depth=2, mlp_dim=48, num_heads=4, num_classes=0)
V3: dict[str, Any] = dict(position="rope", registers=2, eps=1e-5, gelu="erf", block="layerscale", qkv_bias="qv")
GATED: dict[str, Any] = dict(block="layerscale-gated", gelu="silu")
MODEL = vitcore.ViTConfig(**SMALL, **V3 | GATED)

FILES = [
    ("timm", {}, {"blocks.1.gamma_1", "blocks.0.attn.v_bias", "blocks.0.mlp.fc1.bias"}),
    ("timm", GATED | {"qkv_bias": "none"}, {"blocks.0.mlp.fc1_g.weight", "blocks.1.mlp.fc1_x.bias", "blocks.0.gamma_2"}),
    ("transformers", GATED, {"layer.0.mlp.gate_proj.weight", "layer.1.attention.q_proj.bias", "embeddings.patch_embeddings.bias"}),
    ("transformers", {"qkv_bias": "none"}, {"layer.0.mlp.up_proj.weight", "layer.1.attention.o_proj.bias", "norm.weight"}),
]


def images(config, count=2):
    return jax.random.normal(jax.random.key(2), (count, *config.image_shape, 3))


@pytest.mark.parametrize(("naming", "fields", "names"), FILES, ids=["timm", "timm-gated", "transformers-gated", "transformers"])
def test_dinov3_s_files_say_what_they_are(tmp_path, naming, fields, names):
    """By the names alone, but for the grid, of which nothing in them says anything; and out again the same bits."""
    config, path = vitcore.ViTConfig(**SMALL, **V3 | fields), tmp_path / "w.safetensors"
    params, arrays = as_others_write(config, naming, path)
    assert names <= set(arrays)
    assert not any("k_proj.bias" in name or "k_bias" in name or "pos" in name for name in arrays)
    read, found = vitcore.load(path, heads=4, grid=(4, 4))
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert vitcore.load(path, heads=4)[1].image_size == 224
    assert pixels_of("w.safetensors", About(), naming, found)[0] == IMAGENET
    vitcore.save(tmp_path / "ours.safetensors", read, found, naming=naming)
    again, of = vitcore.load(tmp_path / "ours.safetensors")
    assert of == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    still = replace(config, position="none")
    for file in (path, tmp_path / "ours.safetensors"):
        with pytest.raises(ValueError, match="of a model with position='rope', not 'none'"):
            vitcore.load(file, still)
    if naming == "transformers":  # the names of its modules in memory
        loaded = load_file(path)
        save_file({f"model.{n}" if n.startswith("layer.") else n: a for n, a in loaded.items()}, tmp_path / "modules.safetensors")
        jax.tree.map(np.testing.assert_array_equal, vitcore.load(tmp_path / "modules.safetensors", config), params)


@pytest.mark.parametrize("naming", ["timm", "transformers"])
def test_dinov2_giant_s_files_say_what_they_are(tmp_path, naming):
    """Both projections of the gated MLP in one array; whatever config.json says of its activation."""
    config, path = vitcore.ViTConfig(**SMALL, **GATED), tmp_path / "w.safetensors"
    params, arrays = as_others_write(config, naming, path)
    packed = "blocks.0.mlp.fc1.weight" if naming == "timm" else "dinov2.encoder.layer.0.mlp.weights_in.weight"
    np.testing.assert_array_equal(arrays[packed][:48], np.asarray(params["blocks"]["mlp_gated"]["kernel"])[0, 0].T)
    said = '{"architecture": "vit_giant_patch14_dinov2"}' if naming == "timm" else '{"hidden_act": "gelu", "use_swiglu_ffn": true}'
    for beside in ("{}", said):
        (tmp_path / "config.json").write_text(beside)
        read, found = vitcore.load(path, heads=4)
        assert found == config
    jax.tree.map(np.testing.assert_array_equal, read, params)
    with pytest.raises(ValueError, match="no name for this config's blocks/"):
        vitcore.save(tmp_path / "w.npz", params, config)


def test_heads_are_those_of_the_named_model():
    """H+ has the sides of ViT-H and other heads; a file says neither."""
    sizes = [("DINOv3", name) for name in dino.SIZES["3"]] + [("DINOv2", "g")]
    for version, name in sizes:
        fields = dino.SIZES[version[-1]][name]
        config = vitcore.variant(f"{version}-{name}/{16 if version == 'DINOv3' else 14}")
        found = {e.name: e.shape for e in weight_names.entries(config, weight_names.written(config, "timm"))}
        style = weight_names.style_of(found)
        assert style is not None
        assert infer(found, style, grid=config.grid) == config
        assert config.num_heads == fields["num_heads"]


LOOKALIKES = {
    "pos_embed": r"EVA's blocks beside a position embedding \(EVA-02, BEiT\)",
    "blocks.0.attn.qkv.bias": "rotary positions of another kind than DINOv3's",
    "blocks.0.attn.q_proj.weight": "EVA-02's blocks",
    "blocks.0.attn.relative_position_bias_table": r"BEiT",
    "blocks.0.attn.q_norm.weight": "normalised queries and keys",
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_has_dinov3_s_names_and_is_not_dinov3_is_refused(tmp_path, name):
    path = tmp_path / "w.safetensors"
    _, arrays = as_others_write(vitcore.ViTConfig(**SMALL, **V3), "timm", path)
    save_file(arrays | {name: np.zeros((1, 17, 32), np.float32)}, path)
    with pytest.raises(ValueError, match=LOOKALIKES[name]):
        vitcore.load(path, heads=4)
    del arrays["reg_token"]
    save_file(arrays, path)
    with pytest.raises(ValueError, match="another kind than DINOv3's"):
        vitcore.load(path, heads=4)


def test_rotary_positions_take_any_grid():
    """The same weights at any image size; the middle of an image is turned by nothing; what is no patch is left as it is."""
    params = moved(MODEL)
    for size in (16, (8, 20)):
        config = vitcore.ViTConfig(**SMALL | {"image_size": size}, **V3 | GATED)
        assert np.shape(vitcore.features(params, images(config), config)) == (2, 32)
    cos, sin = Turn(1, 3, 1).table(7, 8)
    assert cos.shape == (7, 4)
    np.testing.assert_array_equal((cos[[0, 2, 4, 5, 6]], sin[[0, 2, 4, 5, 6]]), (np.ones((5, 4)), np.zeros((5, 4))))
    np.testing.assert_allclose(sin[3], np.sin([0, 0, 2 * np.pi * 2 / 3, 2 * np.pi * 2 / 30]), atol=1e-12)
    with pytest.raises(ValueError, match="3 tokens for rotary positions of 1 x 3 patches behind 1 others: at least 4"):
        Turn(1, 3, 1).table(3, 8)


def test_maps_features_and_statistics_agree_with_each_other():
    """Maps pushed through by hand give the next half block, which without the turn they do not."""
    config = vitcore.ViTConfig(**SMALL, **V3)
    params, x = moved(config), images(config)
    maps = vitcore.attention_maps(params, x, config, blocks=(1, 2))
    found = vitcore.attention_statistics(params, x, config, blocks=(1, 2), mean=True, row=True, distance=True)
    np.testing.assert_allclose(found.mean, maps.mean(2), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.row, maps[..., 0, :], rtol=1e-4, atol=1e-6)
    still = replace(config, position="none")
    assert np.abs(vitcore.attention_maps(params, x, still, blocks=(1,)) - maps[:1]).max() > 1e-3
    a, b = vitcore.features(params, x, config, blocks=(1, 2))
    assert a.shape == b.shape == (2, 17, 32)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [1, pytest.param(2, marks=pytest.mark.ci)])
def test_blocks_made_again_give_the_same_gradients(remat):
    params, x = moved(MODEL), images(MODEL)

    def gradient(**options):
        return jax.jit(jax.grad(lambda p: jnp.square(vitcore.apply(p, x, MODEL, ops=vitcore.REFERENCE, **options)).sum()))(params)

    for a, b in zip(jax.tree.leaves(gradient(remat=remat)), jax.tree.leaves(gradient()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


def test_a_run_says_what_xla_does_and_keeps_no_hidden_layer_of_a_gated_mlp():
    ops = fused(Launch(device=DEVICES["v5e"]))
    swiglu, plain = vitcore.variant("DINOv3-S+/16"), vitcore.variant("DINOv3-B/16")
    assert vit.by_xla(plain, ops, "bfloat16", 12) == ()
    assert vit.by_xla(swiglu, ops, "bfloat16", 6) == ("the gated MLP",)
    assert vit.by_xla(swiglu, vitcore.REFERENCE, "bfloat16", 6) == ("rotary positions", "the gated MLP")
    assert vit.by_xla(plain, ops, "bfloat16", 3) == ("rotary positions",)  # 192 columns on a device of a model axis of four
    assert keep.choose(ops, swiglu, 8, "bfloat16", None, remat=0)[1] == ()
    assert [kept.what for kept in keep.choose(ops, plain, 8, "bfloat16", None, remat=0)[1]] == ["the hidden layer"]


def test_a_file_s_description_says_its_family(tmp_path):
    path = tmp_path / "w.safetensors"
    as_others_write(vitcore.ViTConfig(**SMALL, **V3 | GATED), "transformers", path)
    (tmp_path / "config.json").write_text('{"hidden_act": "silu", "num_attention_heads": 2, "layer_norm_eps": 1e-5}')
    style, found, _ = describe(path)
    assert (style.form, found.num_heads, found.gelu, found.position) == ("dinov3", 2, "silu", "rope")
