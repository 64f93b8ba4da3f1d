"""A file of weights says what its model is: GELU, heads, class names, pixels; what a stranger's file does not say is asked for."""

import json
import os
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vitcore
from vitcore import weight_about, weight_files, weight_tree, weights
from vitcore.normalisation import CLIP, HALF, IMAGENET, Pixels, normalise, pixels

CONFIG = vitcore.ViTConfig(
    image_size=(8, 16), patch_size=4, width=32, depth=2, mlp_dim=24, num_heads=4, num_classes=3, gelu="tanh", pool="gap"
)
CLASSES = ("cat", "dog", "é\udce9")  # one of them from a folder whose name is no UTF-8
FORMS = [("w.npz", None), ("w.safetensors", "timm"), ("w.safetensors", "transformers")]


def params_of(config, seed=0):
    shapes = jax.eval_shape(lambda: vitcore.init(jax.random.key(0), config))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), shapes)


def strange(path, to):
    """A file as others write it: without what ours say."""
    if str(path).endswith(".npz"):
        with np.load(path) as file:
            np.savez(to, **file)
    else:
        save_file(load_file(path), to)
    return to


@pytest.mark.parametrize(("name", "naming"), FORMS)
def test_all_of_a_model_comes_back_from_its_file(tmp_path, name, naming):
    params, wanted = params_of(CONFIG), IMAGENET
    data = {"classes": list(CLASSES), "train": {"images": 7}}
    vitcore.save(tmp_path / name, params, CONFIG, naming=naming, classes=CLASSES, pixels=wanted, data=data)
    found, config = vitcore.load(tmp_path / name)
    assert config == CONFIG
    assert jax.tree.all(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == b.tobytes(), found, params))
    told = weight_tree.about(tmp_path / name)
    assert (told.classes, told.pixels, told.data, told.gelu, told.heads) == (CLASSES, wanted, data, "tanh", 4)
    again = tmp_path / "again.safetensors"
    weight_tree.convert(tmp_path / name, again)  # and on through a conversion
    assert weight_tree.about(again) == told


@pytest.mark.parametrize(("name", "naming"), FORMS[1:])
def test_a_model_of_tanh_does_not_come_back_as_erf(tmp_path, name, naming):
    vitcore.save(tmp_path / name, params_of(CONFIG), CONFIG, naming=naming)
    assert weight_tree.describe(tmp_path / name)[1].gelu == "tanh"
    other = vitcore.ViTConfig(**{**vars(CONFIG), "gelu": "erf"})
    with pytest.raises(ValueError, match="of a model with gelu='tanh', not 'erf'"):
        vitcore.load(tmp_path / name, other)


@pytest.mark.parametrize(("width", "depth", "mlp", "heads"), [(32, 1, 64, 4), (1408, 1, 64, 16), (768, 3, 64, 12)])
@pytest.mark.parametrize("naming", ["timm", "transformers"])
def test_the_number_of_heads_is_never_guessed(tmp_path, capsys, naming, width, depth, mlp, heads):
    config = vitcore.ViTConfig(
        image_size=8, patch_size=4, width=width, depth=depth, mlp_dim=mlp, num_heads=heads, num_classes=2, gelu="erf"
    )
    vitcore.save(tmp_path / "ours.safetensors", params_of(config), config, naming=naming)
    path = strange(tmp_path / "ours.safetensors", tmp_path / "w.safetensors")
    assert weights.main(["show", str(path)]) == 2
    assert "the number of heads is not in the file" in capsys.readouterr().err
    assert weights.main(["show", str(path), "--heads", str(heads)]) == 0
    assert f"num_heads={heads}" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": heads, "hidden_act": "gelu_new"}))  # as on the hub
    eps = 1e-12 if naming == "transformers" else 1e-6
    assert weight_tree.describe(path)[1] == vitcore.ViTConfig(**{**vars(config), "gelu": "tanh", "eps": eps})


def test_a_named_size_has_its_heads(tmp_path):
    config = vitcore.variant("ViT-Nano/4", image_size=8, num_classes=2, gelu="erf")
    vitcore.save(tmp_path / "ours.safetensors", params_of(config), config)
    assert weight_tree.describe(strange(tmp_path / "ours.safetensors", tmp_path / "w.safetensors"))[1] == config


@pytest.mark.parametrize(
    ("beside", "name", "naming", "expected", "words"),
    [
        ({}, "model", "release", HALF, "pixels [-1, 1]"),
        ({}, "model", "timm", HALF, "a guess: --mean and --std"),
        ({}, "deit_base", "timm", IMAGENET, "ImageNet's by the name of the file"),
        ({}, "clip_vision", "timm", CLIP, "CLIP's by the name"),
        ({}, "siglip", "timm", HALF, "SigLIP's by the name"),
        ({"preprocessor_config.json": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}}, "deit", "timm", HALF, "pixels [-1, 1]"),
        (
            {"config.json": {"pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}}},
            "m",
            "timm",
            Pixels((0.1,) * 3, (0.2,) * 3),
            "0.1",
        ),
        ({"config.json": ["no model"]}, "model", "timm", HALF, "a guess"),
    ],
)
def test_what_pixels_a_file_of_others_wants(tmp_path, beside, name, naming, expected, words):
    (tmp_path / name).mkdir()
    for file, content in beside.items():
        (tmp_path / name / file).write_text(json.dumps(content))
    path = str(tmp_path / name / "w.safetensors")
    found, said = weight_about.pixels_of(path, weight_about.read(path, {}), naming)
    assert found == expected
    assert words in said


def test_pixels_are_normalised_as_torchvision_does_it():
    values = np.arange(256, dtype=np.float32)[None, :, None, None].repeat(3, 3)
    unit = values * np.float32(2 / 255) - 1
    assert normalise(unit, HALF) is unit
    for wanted in (IMAGENET, CLIP, Pixels((0.2,), (0.7,))):
        expected = (values.astype(np.float64) / 255 - np.array(wanted.mean)) / np.array(wanted.std)
        np.testing.assert_allclose(normalise(unit, wanted), expected, atol=1e-6)
    with pytest.raises(ValueError, match="images have 1 channels, mean and std 3"):
        normalise(unit[..., :1], CLIP)


@pytest.mark.parametrize(("mean", "std"), [([0.5], [0]), ([0.5] * 2, [0.5] * 2), ([0.5], []), (["x"], [1]), ([float("nan")], [1])])
def test_pixels_that_are_none(mean, std):
    with pytest.raises(ValueError, match="one or three numbers each"):
        pixels(mean, std)


@pytest.mark.parametrize("dtype", [">f4", ">f2", ">f8", "<f8", "<f2"])
def test_arrays_of_any_byte_order_are_read(tmp_path, dtype):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.integers(-9, 9, a.shape).astype(np.float32), params_of(CONFIG))
    vitcore.save(tmp_path / "ours.npz", params, CONFIG)
    with np.load(tmp_path / "ours.npz") as file:
        np.savez(tmp_path / "w.npz", **{name: a.astype(dtype) for name, a in file.items()})
    found = vitcore.load(tmp_path / "w.npz", CONFIG)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), found, params))
    with weight_files.opened(tmp_path / "w.npz") as arrays:
        assert all(array.read().dtype == array.dtype and array.dtype.isnative for array in arrays.values())


def test_an_integer_in_place_of_floats_is_told_what_to_do(tmp_path):
    vitcore.save(tmp_path / "ours.npz", params_of(CONFIG), CONFIG)
    with np.load(tmp_path / "ours.npz") as file:
        np.savez(tmp_path / "w.npz", **{**file, "head/bias": np.zeros(3, np.int32)})
    with pytest.raises(
        ValueError, match=r"no floats in head/bias int32 \(float16, bfloat16, float32 and float64 are read: convert"
    ):
        vitcore.load(tmp_path / "w.npz", CONFIG)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["w.npz", "w.safetensors"])
def test_weights_that_are_not_finite_are_refused(tmp_path, name, value):
    params = params_of(CONFIG)
    params["head"]["bias"][1] = value
    vitcore.save(tmp_path / name, params, CONFIG)
    with pytest.raises(ValueError, match=r"1 of the 3 numbers of head.bias are NaN or infinite"):
        vitcore.load(tmp_path / name, CONFIG)
    found = vitcore.load(tmp_path / name, CONFIG, allow_nonfinite=True)
    np.testing.assert_array_equal(found["head"]["bias"], params["head"]["bias"])


def test_what_a_file_says_is_checked(tmp_path):
    vitcore.save(tmp_path / "w.safetensors", params_of(CONFIG), CONFIG)
    arrays = load_file(tmp_path / "w.safetensors")
    for told, words in (
        ("{", "damaged or of another version"),
        (json.dumps({"format": 2}), "format 2"),
        (json.dumps({"format": 1, "config": {"width": 5}, "mean": [0.5], "std": [0.5]}), "damaged or of another version"),
        (weight_about.text_of(vitcore.variant("ViT-Nano/4"), classes=None, wanted=HALF, data=None), "is not this config's model"),
    ):
        save_file(arrays, tmp_path / "w.safetensors", metadata={weight_about.KEY: told})
        with pytest.raises(ValueError, match=words):
            vitcore.load(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="2 class names for a head of 3 classes"):
        vitcore.save(tmp_path / "w.safetensors", params_of(CONFIG), CONFIG, classes=("a", "b"))


def test_the_comment_of_an_npz_is_bounded(tmp_path):
    many = vitcore.ViTConfig(**{**vars(CONFIG), "num_classes": 40_000})
    rng = np.random.default_rng(0)
    names = [rng.bytes(8).hex() for _ in range(40_000)]
    with pytest.raises(ValueError, match=r"do not fit into an .npz"):
        vitcore.save(tmp_path / "w.npz", params_of(many), many, classes=names)
    assert not list(tmp_path.iterdir())
    vitcore.save(tmp_path / "w.npz", params_of(CONFIG), CONFIG, classes=CLASSES)
    with zipfile.ZipFile(tmp_path / "w.npz", "a") as archive:
        archive.comment = b"somebody else's"
    assert weight_tree.about(tmp_path / "w.npz") == weight_about.About()
    with zipfile.ZipFile(tmp_path / "w.npz", "a") as archive:
        archive.comment = b"vitcore:AAAA"
    with pytest.raises(ValueError, match="damaged"):
        vitcore.load(tmp_path / "w.npz")


def test_a_pipe_is_no_file_of_weights(tmp_path):
    os.mkfifo(tmp_path / "w.npz")
    with pytest.raises(ValueError, match="is no regular file"):
        vitcore.load(tmp_path / "w.npz", CONFIG)


@pytest.mark.parametrize(
    ("field", "value"), [("width", np.int64(32)), ("image_size", np.int32(8)), ("image_size", (np.int64(8), 16))]
)
def test_integers_of_numpy_make_a_config(field, value):
    config = vitcore.ViTConfig(**{**vars(CONFIG), field: value})
    hash(config)
    json.dumps(vars(config))


@pytest.mark.parametrize("value", [8.0, (8.0, 16), "8", (8, 16, 3), True])
def test_what_is_no_size_is_refused(value):
    with pytest.raises(ValueError, match=r"image_size=.*: a positive integer, or two of them"):
        vitcore.ViTConfig(**{**vars(CONFIG), "image_size": value})


def release(config, **changes):
    """The arrays of a file of the release for a model, by name."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        vitcore.save(f"{place}/w.npz", params_of(config), config)
        with np.load(f"{place}/w.npz") as file:
            return dict(file) | changes


TOKEN = vitcore.ViTConfig(image_size=16, patch_size=4, width=32, depth=2, mlp_dim=24, num_heads=4, num_classes=3)


def test_a_position_embedding_in_the_encoder_is_read(tmp_path):
    """As the authors' later code wrote it for some months of 2021, with an optimizer's state beside the parameters."""
    arrays = release(TOKEN)
    old, new = "Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding"
    renamed = {f"opt/target/{new if name == old else name}": a for name, a in arrays.items()}
    np.savez(tmp_path / "w.npz", **renamed, **{"opt/state/step": np.int32(7), "chrono/accum_train_time": np.float32(1)})
    found, config = vitcore.load(tmp_path / "w.npz")
    assert config == TOKEN
    np.testing.assert_array_equal(found["patch_embed"]["position"], arrays[old][0])


def test_of_two_towers_that_of_the_images_is_read(tmp_path):
    arrays = release(TOKEN)
    texts = {"params/txt/Embed_0/embedding": np.zeros((8, 4), np.float32), "params/t": np.zeros(1), "params/b": np.zeros(1)}
    np.savez(tmp_path / "w.npz", **{f"params/img/{name}": a for name, a in arrays.items()}, **texts)
    found, config = vitcore.load(tmp_path / "w.npz")
    assert config == TOKEN
    np.testing.assert_array_equal(found["head"]["kernel"], arrays["head/kernel"])


def test_a_file_without_a_head_is_a_model_without_one(tmp_path):
    arrays = {name: a for name, a in release(TOKEN).items() if not name.startswith("head/")}
    np.savez(tmp_path / "w.npz", **arrays)
    found, config = vitcore.load(tmp_path / "w.npz")
    assert config == vitcore.ViTConfig(**{**vars(TOKEN), "num_classes": 0})
    assert np.shape(vitcore.features(found, np.zeros((1, 16, 16, 3), np.float32), config)) == (1, 32)


def test_what_a_file_leaves_open_is_asked_for_and_given(tmp_path):
    config = vitcore.ViTConfig(**{**vars(TOKEN), "pool": "gap"})
    np.savez(tmp_path / "w.npz", **release(config))
    with pytest.raises(ValueError, match="no name says which: say pool="):
        vitcore.load(tmp_path / "w.npz")
    assert vitcore.load(tmp_path / "w.npz", pool="gap")[1] == config
