# pyright: reportMissingImports=false
"""Registers, the towers of CLIP and SigLIP and MAE's encoder beside transformers' and timm's models with random weights.

Each way: our file into their model, and the file that they write, by `vitcore.load(path)` alone. Marker `peers`, as test_peers.py.
"""

import json
from typing import Any

import numpy as np
import pytest

import vitcore
from tests.vitcore.test_peers import SMALL, agree, images_of, random_params, timm_model
from tests.vitcore.test_peers import timm as timm
from tests.vitcore.test_peers import torch as torch
from vitcore.positions import sincos2d

pytestmark = pytest.mark.peers

SHAPES = {"small": SMALL, "ViT-S/14": {field: getattr(vitcore.variant("ViT-S/14", image_size=56), field) for field in SMALL}}


def config_of(shape, **more):
    """Four by four patches, and an MLP that is four times as wide, as transformers' DINOv2 says it."""
    sides = SHAPES[shape] | {"mlp_dim": 4 * SHAPES[shape]["width"]}
    return vitcore.ViTConfig(image_size=4 * sides["patch_size"], **sides, **({"num_classes": 0, "gelu": "erf"} | more))


def shape_of(config, **more) -> dict[str, Any]:
    return dict(
        hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_dim, image_size=config.image_shape[0], patch_size=config.patch_size, **more,
    )  # fmt: skip


def channels_first(torch, config):
    return torch.from_numpy(images_of(config).transpose(0, 3, 1, 2).copy())


def both_ways(torch, tmp_path, kind, options, config, answer, *, lost=(), **read):
    """Our parameters in transformers' model, whose answer is ours; the model's own file, read by its path alone."""
    params = random_params(config)
    (tmp_path / "config.json").write_text(json.dumps(options.to_dict()))
    vitcore.save(tmp_path / "model.safetensors", params, config, naming="transformers")
    model, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert (set(report["missing_keys"]), set(report["unexpected_keys"]), set(report["mismatched_keys"])) == (
        set(lost),
        set(),
        set(),
    )
    ours = vitcore.apply(params, images_of(config), config)
    agree(ours, answer(model.eval()(channels_first(torch, config))))
    model.save_pretrained(tmp_path / "theirs")
    found_params, found = vitcore.load(tmp_path / "theirs" / "model.safetensors", **read)
    assert found == config
    for a, b in zip(*(map(np.asarray, _leaves(tree)) for tree in (found_params, params)), strict=True):
        np.testing.assert_array_equal(a, b)


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


@pytest.mark.parametrize("shape", SHAPES)
def test_dinov2_with_registers_of_transformers(torch, tmp_path, shape):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = config_of(shape, block="layerscale", registers=4)
    sides = shape_of(config, num_register_tokens=4, mlp_ratio=4)
    del sides["intermediate_size"]
    both_ways(
        torch, tmp_path, Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**sides), config,
        lambda out: out.pooler_output, lost=["embeddings.mask_token"],
    )  # fmt: skip


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize(("shape", "gelu"), [("small", "quick_gelu"), ("ViT-S/14", "gelu")])
def test_clip_of_transformers(torch, tmp_path, shape, gelu, projected):
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    head = dict(num_classes=24, head_bias=None) if projected else {}
    config = config_of(shape, stem="clip", eps=1e-5, **head, gelu="quick" if gelu == "quick_gelu" else "erf")
    both_ways(
        torch, tmp_path, CLIPVisionModelWithProjection if projected else CLIPVisionModel,
        CLIPVisionConfig(**shape_of(config, hidden_act=gelu, projection_dim=24)), config,
        lambda out: out.image_embeds if projected else out.pooler_output,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_siglip_of_transformers(torch, tmp_path, shape):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = config_of(shape, pool="map", gelu="tanh")
    options = SiglipVisionConfig(**shape_of(config))
    both_ways(torch, tmp_path, SiglipVisionModel, options, config, lambda out: out.pooler_output)


@pytest.mark.parametrize("shape", SHAPES)
def test_mae_of_transformers(torch, tmp_path, shape):
    """With its decoder, which is no part of the encoder, and its fixed positions, which are a parameter of the file."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

    config = config_of(shape, eps=1e-12)
    decoder: dict[str, Any] = dict(
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32
    )
    torch.manual_seed(0)
    whole = ViTMAEForPreTraining(ViTMAEConfig(**shape_of(config), **decoder, initializer_range=0.1, mask_ratio=0.0))
    table = np.pad(sincos2d(*config.grid, config.width), ((1, 0), (0, 0)))
    whole.vit.embeddings.position_embeddings.copy_(torch.from_numpy(table)[None])
    whole.save_pretrained(tmp_path)
    read, found = vitcore.load(tmp_path / "model.safetensors")
    assert found == config
    np.testing.assert_array_equal(read["patch_embed"]["position"], table)
    model = ViTMAEModel.from_pretrained(tmp_path).eval()
    noise = torch.arange(16.0).repeat(2, 1)  # nothing is shuffled
    agree(vitcore.apply(read, images_of(config), config), model(channels_first(torch, config), noise=noise).last_hidden_state[:, 0])


TIMM = {
    "registers": (
        dict(block="layerscale", position="1d-patches", registers=4),
        dict(init_values=1e-5, reg_tokens=4, no_embed_class=True),
    ),
    "clip": (dict(stem="clip", eps=1e-5, num_classes=24), dict(pre_norm=True)),
    "siglip": (dict(pool="map"), dict(class_token=False, global_pool="map")),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", TIMM)
def test_families_of_timm(torch, timm, tmp_path, family, shape):
    from functools import partial

    from safetensors.torch import load_file, save_file

    fields, options = TIMM[family]
    config = config_of(shape, **fields)
    params = random_params(config)
    model = timm_model(timm, config, norm_layer=partial(torch.nn.LayerNorm, eps=config.eps), **options)
    vitcore.save(tmp_path / "ours.safetensors", params, config)
    model.load_state_dict(load_file(tmp_path / "ours.safetensors"), strict=True)
    agree(vitcore.apply(params, images_of(config), config), model(channels_first(torch, config)))
    save_file(model.state_dict(), tmp_path / "theirs.safetensors")
    read, found = vitcore.load(tmp_path / "theirs.safetensors", heads=config.num_heads)
    assert found == config
    for a, b in zip(_leaves(read), _leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
