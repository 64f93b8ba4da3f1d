"""The peers' models are ours in size, and run, each in its own process."""

import pytest

from bench.device_study import start
from bench.peers.on_torch import _parameters
from vitcore import variant

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(("model", "count"), [("ViT-B/16", 86_567_656), ("ViT-L/32", 306_535_400), ("ViT-H/14", 632_045_800)])
def test_parameters_are_those_of_the_paper(model, count):
    assert _parameters(variant(model)) == count


@pytest.mark.parametrize("library", ["timm", "transformers"])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_peer_runs(library, mode):
    request = dict(
        task="sweep", library=library, model="ViT-Ti/16", size=32, mode=mode, dtype="float32", platform="cpu", compile="off"
    )
    found, error = start({**request, "batches": [2], "seconds": 0.05, "budget": 60, "data": 1}, seconds=120)
    assert not error
    assert found[0]["images_per_second"] > 0
