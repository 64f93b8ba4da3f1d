"""DINOv2, DeiT-III, SigLIP and CLIP through the jobs: a mesh with a model axis gives the losses of one device."""

import json
from typing import Any

import jax
import numpy as np
import pytest

import vitcore
from train import finetune, pretrain
from train.pretrained import open_pretrained

SMALL: dict[str, Any] = dict(image_size=8, patch_size=4, width=32, depth=2, mlp_dim=64, num_heads=4, num_classes=10, channels=1)
SHAPE = "--model ViT-Nano/4 --width 32 --depth 2 --mlp-dim 64 --num-heads 4 --representation-size 0"
TINY = "--recipe digits --batch-size 16 --steps 4 --eval-every 4 --checkpoint-every 4 --log-every 1 --warmup-steps 0"
DIGITS = tuple("0123456789")

# The model, what others call their file of it, and the options by which pre-training makes the same.
FAMILIES = {
    "DINOv2 with registers": (
        dict(block="layerscale", registers=4, gelu="erf"),
        "transformers",
        "--block layerscale --registers 4 --gelu erf",
    ),
    "DeiT-III": (
        dict(block="layerscale", position="1d-patches", gelu="erf"),
        "timm",
        "--block layerscale --position 1d-patches --gelu erf",
    ),
    "SigLIP": (dict(pool="map"), "timm", "--pool map"),
    "CLIP": (dict(stem="clip", gelu="quick", eps=1e-5), "timm", "--stem clip --gelu quick --eps 1e-5"),
}


def weights_of(changes, naming, path):
    """A file with every leaf far from where it starts: LayerScale's of 1e-5 would hide its blocks, a head of zeros all."""
    config = vitcore.ViTConfig(**(SMALL | changes))
    params = vitcore.init(jax.random.key(0), config)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = jax.tree.unflatten(tree, [a + 0.2 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])
    vitcore.save(path, params, config, naming=naming, classes=DIGITS)
    return config


def losses(job, out, *words) -> list[float]:
    assert job.main([*map(str, words), "--out", str(out)]) == 0
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in found] + [line["val_loss"] for line in found if "val_loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("job", [pretrain, finetune], ids=["pretrain", "finetune"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.ci] * (name == "CLIP")) for name in FAMILIES])
def test_a_family_trains_on_a_model_axis_as_on_one_device(name, job, tmp_path):
    changes, naming, options = FAMILIES[name]
    config, path = weights_of(changes, naming, tmp_path / "w.safetensors"), tmp_path / "w.safetensors"
    own = f"{SHAPE} {options} --learning-rate 1e-4" if job is pretrain else "--data digits --learning-rate 1e-2"
    words = [*f"{TINY} {own} --drop-path 0.2 --init".split(), path]
    one, many = (losses(job, tmp_path / mesh, *words, "--mesh", mesh) for mesh in ("1x1", "2x2"))
    assert len(set(one)) == 5
    np.testing.assert_allclose(many, one, rtol=1e-5)
    opened = open_pretrained(str(tmp_path / "2x2"))
    for field in ("block", "stem", "registers", "pool", "position", "gelu", "eps"):
        assert getattr(opened.config, field) == getattr(config, field), field
