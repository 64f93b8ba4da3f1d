"""ResNets, hybrids and axial models as the trainer meets them: by their rows of Table 3, on meshes, resumed, opened again."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image
from sklearn.datasets import load_sample_images

import vitcore
from train import pretrain, recipes
from train.pretrain import Pretrain
from train.pretrained import open_pretrained
from train.step import StepOptions, make_init, make_train_step
from vitcore.families import fitted

# Of the row for "every ViT" on ImageNet the five of the paper. The rows that list two numbers of epochs have a recipe for each.
VITS = ("ViT-B/16", "ViT-B/32", "ViT-L/16", "ViT-L/32", "ViT-H/14")
ROWS = [(row, model) for row in recipes.TABLE_3 for model in (VITS if row.models == ("ViT-*",) else row.models)]
NAMED = [
    (name, model)
    for row, model in ROWS
    for name in (row.data, *(f"{row.data}-{epochs}ep" for epochs in row.epochs if len(row.epochs) > 1))
]
# The gradients of convolutions at 224 pixels take a CPU minutes; the parameters, gradients and Adam's two moments of ViT-H/14 are
# 10 GB, and as much again while they are saved.
LESS = {model: ("--image-size", 64) for _, model in ROWS if model.startswith("R")} | {"ViT-H/14": ("--depth", 4)}


@pytest.mark.parametrize(("name", "model"), NAMED)
def test_every_row_of_table_3_resolves(name, model):
    """The command line `--model M --recipe D`, without the run: its options, and the model that they make."""
    full = pretrain.resolve(Pretrain(model=model, recipe=name, data="folder:/nowhere"), examples=5000)
    config = pretrain.model_of(
        dataclasses.replace(full, head_bias=0.0) if hasattr(full, "head_bias") else full, classes=7, channels=3
    )
    assert (full.model, config.image_size, config.num_classes) == (model, 224, 7)
    assert full.learning_rate == recipes.recipe(name, model).base_lr
    assert config.representation_size == (None if "x" in model else config.width)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of JPEGs, 256 x 192 pixels cut out of scikit-learn's two photographs: 4 of each to train on, and 1 to validate."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("photographs")
    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):  # type: ignore[attr-defined]
        for k in range(5):
            top, left = (int(rng.integers(0, side - part)) for side, part in zip(pixels.shape, (192, 256), strict=False))
            place = root / ("val" if k == 4 else "train") / name
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[top : top + 192, left : left + 256]).save(place / f"{k}.jpg")
    return root


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("data", "model"),
    [(row.data, model) for row, model in ROWS],
)
def test_every_row_of_table_3_takes_its_first_steps(data, model, photographs, tmp_path, capsys):
    """`python -m train.pretrain --model M --recipe D --data folder:...`: two steps of two images with the recipe's size,
    augmentation, loss, rate and dropout, evaluations and saves; but for `LESS`."""
    argv = ["--model", model, "--recipe", data, "--data", f"folder:{photographs}", "--batch-size", 2, "--steps", 2]
    argv += ["--mesh", "1x1", "--log-every", 1, "--bad-share", 0, "--out", tmp_path / "run"]
    argv += LESS.get(model, ())
    assert pretrain.main([str(word) for word in argv]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # 4 GB of the largest
    assert f"{model} on folder:{photographs}: 8 training and 2 held-out images of 2 classes" in said
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    kept, of = json.loads((tmp_path / "run" / "config.json").read_text()), recipes.recipe(data, model)
    want = {"model": model, "recipe": data, "learning_rate": of.base_lr, "image_size": 64 if model.startswith("R") else 224}
    want |= {name: getattr(of, name) for name in ("weight_decay", "decay", "dropout", "loss")}
    assert {name: kept[name] for name in want} == want


def steps(config, shape, dropout_seed=3, **options):
    """Losses of three steps and the parameters after them, on a mesh."""
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    tx, how = optax.sgd(0.05), StepOptions(seed=dropout_seed, clip_norm=1.0, **options)
    state = make_init(config, mesh, tx, how)(jax.random.key(1))
    step = make_train_step(config, mesh, tx, how)
    rng, place, losses = np.random.default_rng(0), NamedSharding(mesh, P("data")), []
    for _ in range(3):
        images = rng.uniform(-1, 1, (8, *config.image_shape, config.channels)).astype(np.float32)
        labels = rng.integers(0, config.num_classes, 8)
        state, metrics = step(state, jax.device_put(images, place), jax.device_put(labels, place))
        losses.append(float(metrics["loss"]))
    return losses, jax.tree.map(np.asarray, state.params)


MODELS = {
    "resnet": vitcore.ResNetConfig(
        image_size=16, stem=vitcore.ResNetStem(depths=(1, 2), width_factor=0.5, form="pre"), num_classes=5, head_bias=-1.0
    ),
    "hybrid": vitcore.ViTConfig(
        image_size=16, patch_size=1, width=32, depth=2, mlp_dim=64, num_heads=4, num_classes=5, dropout=0.2,
        stem=vitcore.ResNetStem(depths=(1, 1), width_factor=0.5),
    ),
    "axial": vitcore.ViTConfig(
        image_size=16, patch_size=4, width=32, depth=2, mlp_dim=64, num_heads=4, num_classes=5, dropout=0.2, block="axial",
        pool="map",
    ),
}  # fmt: skip


@pytest.mark.slow  # logits and gradients on a mesh are fast tests (tests/vitcore/test_entries.py, test_resnet.py)
@pytest.mark.parametrize("name", MODELS)
def test_a_mesh_gives_the_losses_of_one_device(name):
    one, params = steps(MODELS[name], (1, 1))
    assert len(set(one)) == 3
    for shape in ((2, 2), (4, 1)):
        many, others = steps(MODELS[name], shape)
        np.testing.assert_allclose(many, one, rtol=1e-5)
        for (path, a), b in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(others), strict=True):
            assert np.abs(a - b).max() <= 1e-4 * max(np.abs(a).max(), 1e-3), (shape, path)


@pytest.mark.slow
def test_units_made_again_and_bfloat16_train(monkeypatch):
    kept, _ = steps(MODELS["resnet"], (1, 1))
    again, _ = steps(MODELS["resnet"], (1, 1), remat=1)
    np.testing.assert_allclose(again, kept, rtol=1e-6)
    rounded, _ = steps(MODELS["resnet"], (1, 1), dtype=jax.numpy.bfloat16)
    np.testing.assert_allclose(rounded, kept, rtol=0.05)


TINY = [
    "--batch-size",
    "16",
    "--steps",
    "4",
    "--eval-every",
    "4",
    "--checkpoint-every",
    "2",
    "--log-every",
    "1",
    "--image-size",
    "32",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("R14x0.5", ["--mesh", "2x2"]),
        ("R14+Nano/16", ["--mesh", "2x1", "--position", "relative"]),
        ("Axial-ViT-Nano/8", ["--mesh", "2x1"]),
        ("AxialResNet-14x0.5", ["--mesh", "2x2"]),
    ],
)
def test_a_run_resumes_bit_for_bit_and_opens_again(model, options, tmp_path, capsys):
    """Four steps on the digits, 32 pixels; the same with the second half done again. What the run keeps is a model that opens."""
    out = tmp_path / "run"
    assert pretrain.main(["--data", "digits", "--recipe", "digits", "--model", model, *TINY, *options, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert ("by XLA)" in said) == (model != "Axial-ViT-Nano/8")
    first = open_pretrained(str(out))
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(set(losses)) == 4
    shutil.rmtree(out / "checkpoints" / "4")
    assert pretrain.main(["--data", "digits", "--recipe", "digits", "--model", model, *TINY, *options, "--out", str(out)]) == 0
    assert "resuming at step 2" in capsys.readouterr().out
    again = open_pretrained(str(out))
    for (path, a), b in zip(jax.tree.leaves_with_path(first.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    larger = open_pretrained(str(out), image_size=64, num_classes=3)
    logits = vitcore.apply(larger.params, np.zeros((1, 64, 64, larger.config.channels), np.float32), larger.config)
    assert logits.shape == (1, 3)


@pytest.mark.parametrize(
    ("words", "argv"),
    [
        ("--dropout 0.1: R14x1 is a ResNet, which has no dropout", ["--model", "R14x1", "--dropout", "0.1"]),
        ("--pool gap: R14x1 is a ResNet, which has no pool", ["--model", "R14x1", "--pool", "gap"]),
        ("divides it by 32, at least that many pixels are required", ["--model", "R14x1"]),
        (
            "the groups of GroupNorm=32 is not divisible by the model axis",
            ["--model", "R14x1", "--image-size", "32", "--mesh", "1x3"],
        ),
        (
            "the heads of axial attention=8 is not divisible by the model axis",
            ["--model", "AxialResNet-14", "--image-size", "32", "--mesh", "1x3"],
        ),
        ("made again unit by unit", ["--model", "R14x1", "--image-size", "32", "--remat", "--remat-every", "2"]),
    ],
)
def test_what_a_resnet_cannot_is_said_in_one_line(words, argv, tmp_path, capsys):
    assert pretrain.main(["--recipe", "digits", *argv, "--steps", "1", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "changes",
    [
        {"position": position, "pool": pool}
        for position, pool in (("1d", "token"), ("1d-layers", "gap"), ("2d", "token"), ("2d-layers", "gap"), ("relative", "token"))
    ],
    ids=lambda c: c["position"],
)
def test_position_embeddings_are_fitted_to_another_grid(changes):
    """Corners stay where they were, the middle is linear between neighbours, and the same grid changes no bit."""
    config = vitcore.ViTConfig(image_size=16, patch_size=8, width=8, depth=2, mlp_dim=8, num_heads=2, num_classes=3, **changes)
    params = jax.tree.map(np.asarray, vitcore.init(jax.random.key(0), config))
    same = fitted(params, config, config)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    new = dataclasses.replace(config, image_size=24)
    out = fitted(params, config, new)
    old, slots = config.position, config.class_tokens
    if old.startswith("1d"):
        a, b = (p["patch_embed" if old == "1d" else "blocks"]["position"] for p in (params, out))
        a, b = (x[..., slots:, :].reshape(*x.shape[:-2], n, n, 8) for x, n in ((a, 2), (b, 3)))
        np.testing.assert_allclose(b[..., 1, 1, :], a.mean((-2, -3)), atol=1e-6)
        np.testing.assert_array_equal(b[..., ::2, ::2, :], a)
    elif old.startswith("2d"):
        where = "patch_embed" if old == "2d" else "blocks"
        for table in ("position_rows", "position_columns"):
            a, b = params[where][table], out[where][table]
            np.testing.assert_allclose(b[..., 1, :], a.mean(-2), atol=1e-6)
            np.testing.assert_array_equal(b[..., ::2, :], a)
    else:
        a, b = params["blocks"]["relative"], out["blocks"]["relative"]
        assert b.shape == (2, 2 * 9 - 1 + 1, 8)
        np.testing.assert_array_equal(b[:, [0, 8, 16, 17]], a[:, [0, 3, 6, 7]])  # the ends, no distance, and the class token's
    moved = [
        jax.tree_util.keystr(k)
        for (k, a), b in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(out), strict=True)
        if a is not b
    ]
    assert moved
    assert all("position" in name or "relative" in name for name in moved)
