# pyright: reportMissingImports=false
"""The peers' models are ours in size and compute our logits from the same weights, and run, each in its own process."""

import sys

import numpy as np
import pytest

from bench.device_study import start
from bench.peers.on_torch import _parameters, _StandIn, build
from vitcore import apply, load, variant

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(("model", "count"), [("ViT-B/16", 86_567_656), ("ViT-L/32", 306_535_400), ("ViT-H/14", 632_045_800)])
def test_parameters_are_those_of_the_paper(model, count):
    assert _parameters(variant(model)) == count


@pytest.fixture
def forgotten(monkeypatch):
    """timm's stand-in for torchvision, which transformers would ask for its version, goes when the test does."""
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, _StandIn)])
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_peer_s_weights_give_its_logits(library, tmp_path, forgotten):
    """The model that is timed, not one like it. Both take GELU exactly. transformers' norms add 1e-12 to a variance where ours add
    1e-6: this alone moves the logits of such small activations by 1e-4, so the test sets it to ours."""
    import torch
    from safetensors.torch import save_file

    model, config = build({"library": library, "model": "ViT-Ti/16", "size": 48}, torch.device("cpu"))
    model = model.eval()
    x = np.random.default_rng(0).uniform(-1, 1, (2, 48, 48, 3)).astype(np.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, torch.nn.LayerNorm):
                norm.eps = 1e-6
        for w in model.parameters():  # the head is zero in timm, the class token in both
            w += 0.02 * torch.randn(w.shape)
        out = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    expected = (out if isinstance(out, torch.Tensor) else out.logits).numpy()
    save_file({name: w.contiguous() for name, w in model.state_dict().items()}, tmp_path / "w.safetensors")
    ours = variant("ViT-Ti/16", image_size=48, num_classes=config.num_classes, gelu="erf")
    found = apply(load(tmp_path / "w.safetensors", ours), x, ours)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("library", ["timm", "transformers"])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_peer_runs(library, mode):
    request = dict(
        task="sweep", library=library, model="ViT-Ti/16", size=32, mode=mode, dtype="float32", platform="cpu", compile="off"
    )
    found, error = start({**request, "batches": [2], "seconds": 0.05, "budget": 60, "data": 1}, seconds=120)
    assert not error
    assert found[0]["images_per_second"] > 0
