"""Exported models: the same logits for any batch, in a process that has nothing of ours; mistakes in one line."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcore
from vitcore import export

pytest.importorskip("flatbuffers")

CONFIG = vitcore.ViTConfig(
    image_size=(8, 16), patch_size=4, width=24, depth=2, mlp_dim=20, num_heads=2, num_classes=5, representation_size=6
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    fresh = jax.jit(lambda: vitcore.init(jax.random.key(0), CONFIG))()
    return {**fresh, "head": {**fresh["head"], "kernel": jax.random.normal(jax.random.key(1), (6, 5))}}


def images(batch, config=CONFIG):
    return jax.random.uniform(jax.random.key(batch), (batch, *config.image_shape, 3), minval=-1)


def test_any_batch_gives_the_models_logits(params, tmp_path):
    (tmp_path / "m").write_bytes(export.export(params, CONFIG, dtype=jnp.bfloat16))
    model = export.load(tmp_path / "m")
    assert set(model.platforms) == {"cpu", "cuda", "tpu"}
    for batch in (1, 3):
        ours = jax.jit(lambda x: vitcore.apply(params, x, CONFIG, ops=vitcore.REFERENCE, dtype=jnp.bfloat16))(images(batch))
        assert np.abs(ours).max() > 0.1
        np.testing.assert_allclose(jax.jit(model.call)(images(batch)), ours, rtol=1e-5, atol=1e-5)


def test_one_batch_is_that_batch(params, tmp_path):
    (tmp_path / "m").write_bytes(export.export(params, CONFIG, batch=2, platforms=("cpu",)))
    model = export.load(tmp_path / "m")
    assert model.call(images(2)).shape == (2, 5)
    with pytest.raises(ValueError, match="batch=0"):
        export.export(params, CONFIG, batch=0)
    with pytest.raises(Exception, match="3"):
        model.call(images(3))


def test_it_runs_without_this_package(tmp_path):
    """The command, then a process outside this directory with jax alone: the example of the docstring."""
    config = vitcore.variant("ViT-Nano/4", image_size=8, num_classes=5)
    params = jax.jit(lambda: vitcore.init(jax.random.key(0), config))()
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (64, 5))
    vitcore.save(tmp_path / "w.safetensors", params, config)
    assert export.main([str(tmp_path / "w.safetensors"), str(tmp_path / "m"), "--gelu", "tanh"]) == 0
    np.save(tmp_path / "x.npy", images(3, config))
    code = (
        "import sys, jax, numpy\n"
        "from jax import export\n"
        "with open('m', 'rb') as file: model = export.deserialize(bytearray(file.read()))\n"
        "numpy.save('y.npy', jax.jit(model.call)(numpy.load('x.npy')))\n"
        "assert not any(name.startswith(('vitcore', 'kernels')) for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    want = vitcore.apply(params, images(3, config), config, ops=vitcore.REFERENCE)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), want, rtol=1e-5, atol=1e-5)


def test_the_command(tmp_path, capsys):
    config = vitcore.variant("ViT-Nano/4", image_size=8, num_classes=5)
    vitcore.save(tmp_path / "w.npz", jax.jit(lambda: vitcore.init(jax.random.key(0), config))(), config)
    out = str(tmp_path / "m")
    assert export.main([str(tmp_path / "w.npz"), out, "--image-size", "16", "--platforms", "cpu"]) == 0
    assert "images ['B', 16, 16, 3] -> logits [B, 5]; cpu" in capsys.readouterr().out
    assert export.main(["--try", out, "--batch", "4"]) == 0
    assert "images [4, 16, 16, 3] -> logits [4, 5]" in capsys.readouterr().out
    (tmp_path / "cut").write_bytes((tmp_path / "m").read_bytes()[:500])
    for argv, words in (
        (["--try", str(tmp_path / "cut")], "is no exported model"),
        (["--try", str(tmp_path / "none")], "No such file"),
        ([], "SOURCE and TARGET are required"),
        ([str(tmp_path / "w.npz"), out, "--batch", "0"], "batch=0"),
        ([str(tmp_path / "cut"), out], ".npz or .safetensors is required"),
    ):
        assert export.main(argv) == 2
        said = capsys.readouterr().err
        assert said.startswith("vitcore.export: error: ")
        assert said.count("\n") == 1
        assert words in said
