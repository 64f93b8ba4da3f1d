# pyright: reportMissingImports=false
"""DINOv2-giant and DINOv3 beside transformers' and timm's models with random weights; marker `peers`, as test_peers.py."""

from functools import partial
from typing import Any

import numpy as np
import pytest

import vitcore
from tests.vitcore.test_peers import agree, images_of, random_params
from tests.vitcore.test_peers import timm as timm
from tests.vitcore.test_peers import torch as torch
from tests.vitcore.test_peers_families import _leaves, both_ways, channels_first, shape_of

pytestmark = pytest.mark.peers

SIZES: dict[str, dict[str, Any]] = {
    "small": dict(width=96, depth=3, mlp_dim=256, num_heads=4, patch_size=16, image_size=64),
    "wide": dict(width=384, depth=4, mlp_dim=1024, num_heads=6, patch_size=16, image_size=(64, 96)),  # F as DINOv2 says it
}
BOTH = ["small", pytest.param("wide", marks=pytest.mark.slow)]
V3 = dict(position="rope", registers=4, eps=1e-5, num_classes=0)
SWIGLU = dict(block="layerscale-gated", gelu="silu")
PLAIN = dict(block="layerscale", gelu="erf")


def config_of(size, **fields) -> vitcore.ViTConfig:
    return vitcore.ViTConfig(**{**SIZES[size], **fields})


def square(size):
    return {"image_size": 64} if isinstance(SIZES[size]["image_size"], tuple) else {}


@pytest.mark.parametrize("size", BOTH)
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_giant_of_transformers(torch, tmp_path, size, registers):
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = config_of(size, num_classes=0, registers=registers, **SWIGLU, **square(size))
    sides = shape_of(config, mlp_ratio=4, use_swiglu_ffn=True)
    del sides["intermediate_size"]
    kinds = (Dinov2WithRegistersModel, partial(Dinov2WithRegistersConfig, num_register_tokens=4))
    kind, options = kinds if registers else (Dinov2Model, Dinov2Config)
    both_ways(
        torch, tmp_path, kind, options(**sides), config, lambda out: out.pooler_output, lost=["embeddings.mask_token"]
    )  # fmt: skip


@pytest.mark.parametrize("size", BOTH)
@pytest.mark.parametrize("mlp", ["plain", "swiglu"])
@pytest.mark.parametrize("bias", ["qv", "none"])
def test_dinov3_of_transformers(torch, tmp_path, size, mlp, bias):
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = config_of(size, qkv_bias=bias, **V3, **(SWIGLU if mlp == "swiglu" else PLAIN))
    has = bias == "qv"
    options = DINOv3ViTConfig(
        **shape_of(config), num_register_tokens=4, use_gated_mlp=mlp == "swiglu", query_bias=has, value_bias=has,
        hidden_act="silu" if mlp == "swiglu" else "gelu",
    )  # fmt: skip
    both_ways(
        torch, tmp_path, DINOv3ViTModel, options, config, lambda out: out.pooler_output, lost=["embeddings.mask_token"],
        grid=config.grid,  # of which a file without positions says nothing
    )  # fmt: skip


def timm_eva(config, **options):
    from timm.layers.norm import LayerNorm
    from timm.models.eva import Eva

    return Eva(
        img_size=config.image_shape, patch_size=config.patch_size, embed_dim=config.width, depth=config.depth,
        num_heads=config.num_heads, mlp_ratio=config.mlp_dim / config.width, num_classes=config.num_classes,
        dynamic_img_size=True, init_values=1e-5, rope_type="dinov3", rope_temperature=100, rope_rotate_half=True,
        use_rot_pos_emb=True, use_abs_pos_emb=False, num_reg_tokens=4, use_fc_norm=False, global_pool="token",
        norm_layer=partial(LayerNorm, eps=1e-5), **options,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("size", BOTH)
@pytest.mark.parametrize("mlp", ["plain", "swiglu"])
@pytest.mark.parametrize("bias", ["qv", "none"])
def test_dinov3_of_timm(torch, timm, tmp_path, size, mlp, bias):
    config = config_of(size, qkv_bias=bias, **V3, **(SWIGLU if mlp == "swiglu" else PLAIN))
    model = timm_eva(config, qkv_bias=bias == "qv", swiglu_mlp=mlp == "swiglu", swiglu_align_to=8)
    as_timm_s(torch, tmp_path, model, config)


@pytest.mark.parametrize("size", BOTH)
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_giant_of_timm(torch, timm, tmp_path, size, registers):
    from timm.layers.mlp import SwiGLUPacked

    config = config_of(
        size, num_classes=0, registers=registers, position="1d-patches" if registers else "1d", **SWIGLU, **square(size)
    )
    model = timm.VisionTransformer(
        img_size=config.image_shape, patch_size=config.patch_size, embed_dim=config.width, depth=config.depth,
        num_heads=config.num_heads, mlp_ratio=2 * config.mlp_dim / config.width + 1e-4, num_classes=0, init_values=1e-5,
        mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU, reg_tokens=registers, no_embed_class=bool(registers),
    ).eval()  # fmt: skip
    as_timm_s(torch, tmp_path, model, config)


def as_timm_s(torch, tmp_path, model, config):
    """Our file into the model, whose answer is ours; its own file, read without our metadata, is ours bit by bit."""
    from safetensors.torch import load_file, save_file

    params = random_params(config)
    vitcore.save(tmp_path / "ours.safetensors", params, config)
    model.load_state_dict(load_file(tmp_path / "ours.safetensors"), strict=True)
    agree(vitcore.apply(params, images_of(config), config), model(channels_first(torch, config)))
    save_file(model.state_dict(), tmp_path / "theirs.safetensors")
    grid = {"grid": config.grid} if config.position == "rope" else {}
    read, found = vitcore.load(tmp_path / "theirs.safetensors", heads=config.num_heads, **grid)
    assert found == config
    for a, b in zip(_leaves(read), _leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["DINOv3-S/16", "DINOv3-S+/16", "DINOv3-H+/16", "DINOv3-7B/16", "DINOv2-g/14"])
def test_named_models_have_the_parameters_of_timm_s(torch, timm, name):
    """But for the biases of q and v, which timm's usual DINOv3 leaves out because they are zero in the files."""
    import timm as package

    theirs = {
        "DINOv3-S/16": "vit_small_patch16_dinov3_qkvb", "DINOv3-S+/16": "vit_small_plus_patch16_dinov3_qkvb",
        "DINOv3-H+/16": "vit_huge_plus_patch16_dinov3_qkvb", "DINOv3-7B/16": "vit_7b_patch16_dinov3",
        "DINOv2-g/14": "vit_giant_patch14_dinov2",
    }[name]  # fmt: skip
    from vitcore.weight_names import entries, written

    config = vitcore.variant(name)
    with torch.device("meta"):
        model = package.create_model(theirs, num_classes=0)
    ours = {entry.name: entry.shape for entry in entries(config, written(config, "timm"))}
    assert ours == {name: tuple(array.shape) for name, array in model.state_dict().items()}
