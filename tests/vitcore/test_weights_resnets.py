"""Weights of hybrids, BiT ResNets, attention pooling and fixed position embeddings: the published names, in and out."""

from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vitcore
from vitcore import families, parameters, weights
from vitcore.posemb import fit_patches
from vitcore.resnet import ResNetStem
from vitcore.weight_tree import WeightError

SMALL: Any = dict(image_size=16, patch_size=4, width=16, depth=2, mlp_dim=24, num_heads=2, num_classes=3)
STEM = ResNetStem(depths=(1, 2), width_factor=0.5)
MODELS = {
    "hybrid": vitcore.ViTConfig(**{**SMALL, "patch_size": 1}, stem=STEM, representation_size=16),
    "map": vitcore.ViTConfig(**SMALL, pool="map"),
    "gap": vitcore.ViTConfig(**SMALL, pool="gap"),
    "sincos2d": vitcore.ViTConfig(**SMALL, position="sincos2d"),
    "post": vitcore.ResNetConfig(image_size=32, stem=STEM, num_classes=3),
    "pre": vitcore.ResNetConfig(image_size=32, stem=ResNetStem(depths=(1, 2), width_factor=0.5, form="pre"), num_classes=3),
}


def noisy(config):
    rng = np.random.default_rng(1)
    return parameters.nested({leaf.path: rng.standard_normal(leaf.shape).astype(np.float32) for leaf in families.leaves(config)})


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("name", "file"), [(n, "m.npz") for n in MODELS] + [(n, "m.safetensors") for n in ("hybrid", "post", "pre", "gap")]
)
def test_round_trips_are_bit_exact(name, file, tmp_path):
    config, params = MODELS[name], noisy(MODELS[name])
    path = tmp_path / file
    vitcore.save(path, params, config)
    same(params, vitcore.load(path, config))
    again = tmp_path / f"again-{file}"
    vitcore.save(again, vitcore.load(path, config), config)
    a, b = (dict(np.load(p)) if file.endswith("npz") else load_file(p) for p in (path, again))
    assert a.keys() == b.keys()
    same(a, b)


def save_bare(path, config):
    """The file without what ours say of their model beside the arrays: as the releases are."""
    vitcore.save(path, noisy(config), config)
    if path.suffix == ".npz":
        arrays = dict(np.load(path))
        np.savez(path, **arrays)
    else:
        save_file(load_file(path), path)


def names(name, file, tmp_path):
    save_bare(tmp_path / file, MODELS[name])
    _, found, arrays = weights.describe(tmp_path / file, heads=2)
    return found, {n: a.shape for n, a in arrays.items()}


def test_a_hybrids_names_are_the_releases(tmp_path):
    found, arrays = names("hybrid", "m.npz", tmp_path)
    assert found == MODELS["hybrid"]
    assert arrays["conv_root/kernel"] == (7, 7, 3, 32)
    assert arrays["gn_root/scale"] == (32,)
    assert arrays["block1/unit1/conv_proj/kernel"] == (1, 1, 32, 128)
    assert arrays["block2/unit2/conv2/kernel"] == (3, 3, 64, 64)
    assert arrays["block2/unit1/gn_proj/bias"] == (256,)
    assert "block2/unit2/conv_proj/kernel" not in arrays
    assert arrays["embedding/kernel"] == (1, 1, 256, 16)
    assert arrays["Transformer/posembed_input/pos_embedding"] == (1, 5, 16)


def test_a_resnets_names_are_the_releases(tmp_path):
    found, arrays = names("pre", "m.npz", tmp_path)
    assert found.stem == MODELS["pre"].stem
    assert arrays["resnet/root_block/standardized_conv2d/kernel"] == (7, 7, 3, 32)
    assert arrays["resnet/block1/unit01/a/proj/standardized_conv2d/kernel"] == (1, 1, 32, 128)
    assert arrays["resnet/block2/unit02/b/standardized_conv2d/kernel"] == (3, 3, 64, 64)
    assert arrays["resnet/block2/unit02/c/group_norm/gamma"] == (64,)
    assert arrays["resnet/group_norm/beta"] == (256,)
    assert arrays["resnet/head/conv2d/kernel"] == (1, 1, 256, 3)
    found, arrays = names("post", "m.npz", tmp_path)
    assert found.stem == STEM
    assert {"conv_root/kernel", "block2/unit2/gn3/scale", "head/kernel"} <= arrays.keys()
    found, arrays = names("pre", "m.safetensors", tmp_path)
    assert found.stem == MODELS["pre"].stem
    assert arrays["stages.1.blocks.1.conv2.weight"] == (64, 64, 3, 3)
    assert arrays["head.fc.weight"] == (3, 256, 1, 1)
    found, arrays = names("hybrid", "m.safetensors", tmp_path)
    assert found.stem == STEM
    assert arrays["patch_embed.backbone.stages.0.blocks.0.downsample.conv.weight"] == (128, 32, 1, 1)


def test_the_later_layout_of_a_preactivation_resnet_is_read(tmp_path):
    """block1/unit01/conv1/kernel, norms as (1, 1, 1, C), the head a matrix, all below params/."""
    config, params = MODELS["pre"], noisy(MODELS["pre"])
    flat = {}
    root, norm, head = params["stem"]["root"]["conv"]["kernel"], params["stem"]["norm"], params["head"]
    flat["root_block/conv_root/kernel"] = root
    flat |= {f"norm-pre-head/{w}": norm[w].reshape(1, 1, 1, -1) for w in norm} | {f"head/{w}": head[w] for w in head}
    for block, unit, tree, at in ((1, 1, "first", None), (2, 1, "first", None), (2, 2, "rest", 0)):
        for layer, parts in params["stem"][f"stage{block}"][tree].items():
            for w, a in parts.items():
                a = a if at is None else a[at]
                flat[f"block{block}/unit{unit:02d}/{layer}/{w}"] = a if w == "kernel" else a.reshape(1, 1, 1, -1)
    np.savez(tmp_path / "later.npz", **{f"params/{k}": v for k, v in flat.items()})
    same(params, vitcore.load(tmp_path / "later.npz", config))
    assert weights.describe(tmp_path / "later.npz")[1].stem == config.stem


def test_what_a_file_cannot_say_is_asked_for(tmp_path):
    for name, words in (
        ("gap", "its pool is 'gap' or 'first' or 'none'"),
        ("sincos2d", "its position is 'rope' or 'sincos2d' or 'none'"),
    ):
        save_bare(tmp_path / "m.npz", MODELS[name])
        with pytest.raises(WeightError, match=words) as caught:
            weights.describe(tmp_path / "m.npz")
        assert "\n" not in str(caught.value)
    vitcore.save(tmp_path / "m.safetensors", noisy(MODELS["gap"]), MODELS["gap"])  # where there is room for it, it is written
    assert weights.describe(tmp_path / "m.safetensors")[1].pool == "gap"


def test_what_no_file_holds_is_refused(tmp_path):
    for changes, words in (
        ({"position": "2d"}, "no name for this config's patch_embed/position_columns, patch_embed/position_rows"),
        ({"position": "relative"}, "blocks/relative"),
        ({"block": "axial", "pool": "gap"}, "blocks/row/norm1/scale"),
    ):
        config = vitcore.ViTConfig(**SMALL, **changes)  # pyright: ignore
        with pytest.raises(ValueError, match=words):
            vitcore.save(tmp_path / "m.npz", noisy(config), config)
        assert not (tmp_path / "m.npz").exists()
    np.savez(tmp_path / "mixer.npz", **{"stem/kernel": np.zeros((4, 4, 3, 8)), "MixerBlock_0/LayerNorm_0/scale": np.zeros(8)})
    with pytest.raises(WeightError, match="an MLP-Mixer"):
        weights.describe(tmp_path / "mixer.npz")


def test_a_new_head_on_a_resnet(tmp_path):
    config, params = MODELS["pre"], noisy(MODELS["pre"])
    vitcore.save(tmp_path / "m.npz", params, config)
    new = vitcore.ResNetConfig(image_size=64, stem=config.stem, num_classes=5, head_bias=-2.0)
    got = vitcore.load(tmp_path / "m.npz", new, new_head=True)
    same(params["stem"], got["stem"])
    assert not np.asarray(got["head"]["kernel"]).any()
    assert (np.asarray(got["head"]["bias"]) == -2).all()


@pytest.mark.parametrize("file", ["m.npz", "m.safetensors"])
def test_a_file_of_another_patch_size_is_resampled_where_asked(file, tmp_path):
    """All else is the file's; the same patch size changes no bit; and what is said without the option."""
    config = vitcore.ViTConfig(**{**SMALL, "image_size": 16, "patch_size": 4})
    new = vitcore.ViTConfig(**{**SMALL, "image_size": 24, "patch_size": 6})
    params = noisy(config)
    vitcore.save(tmp_path / file, params, config)
    same(params, vitcore.load(tmp_path / file, config, resample_patches=True))
    got = vitcore.load(tmp_path / file, new, resample_patches=True)
    kernel = got["patch_embed"].pop("kernel")
    np.testing.assert_array_equal(kernel, fit_patches(params["patch_embed"].pop("kernel"), 6))
    same(params, got)
    with pytest.raises(WeightError, match=r"misshapen.*resample_patches=True") as caught:
        vitcore.load(tmp_path / file, new)
    assert "\n" not in str(caught.value)
    large = vitcore.ViTConfig(**{**SMALL, "image_size": 32, "patch_size": 4})
    assert vitcore.load(tmp_path / file, large, resample_patches=True)["patch_embed"]["position"].shape[0] == large.tokens


def test_the_root_alone_has_timms_names(tmp_path):
    config = vitcore.ViTConfig(**{**SMALL, "image_size": 32, "patch_size": 4, "stem": vitcore.ResNetStem(depths=())})
    params = noisy(config)
    vitcore.save(tmp_path / "m.safetensors", params, config)
    arrays = weights.describe(tmp_path / "m.safetensors")[2]
    assert {"patch_embed.backbone.conv.weight", "patch_embed.backbone.norm.bias", "patch_embed.proj.weight"} <= arrays.keys()
    save_bare(tmp_path / "bare.safetensors", config)
    assert weights.describe(tmp_path / "bare.safetensors", heads=2)[1].stem == config.stem
