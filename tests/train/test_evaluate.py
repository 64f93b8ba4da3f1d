"""Evaluation: each image once on any mesh, the published label forms, and what is written."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import vitcore
from train import evaluate, frozen, scores
from train import mesh as meshes
from train.data import open_source
from train.fewshot import ridge, targets
from train.frozen import Reader, make_predict, put_params
from vitcore.pixels import to_unit
from vitcore.sharding import MeshShape

CONFIG = vitcore.variant("ViT-Nano/4", image_size=8, channels=1, num_classes=10)


@pytest.fixture(scope="module")
def params():
    """Weights that tell the digits apart a little: a ridge regression on random features."""
    params = jax.jit(lambda: vitcore.init(jax.random.key(0), CONFIG))()
    train = open_source("digits", "train")
    x = np.stack([train[i].image for i in range(400)]).astype(np.float32) / 127.5 - 1
    y = np.asarray(jax.jit(lambda x: vitcore.features(params, x, CONFIG))(x))
    kernel = ridge(y, targets(train.labels()[:400], 10), l2=1.0)
    return {**params, "head": {"kernel": kernel.astype(np.float32), "bias": np.zeros(10, np.float32)}}


@pytest.fixture(scope="module")
def truth(params):
    """Logits of the held-out digits on one device, in their order; labels."""
    test = open_source("digits", "val")
    x = np.stack([test[i].image for i in range(len(test))]).astype(np.float32) / 127.5 - 1
    return np.asarray(jax.jit(lambda x: vitcore.apply(params, x, CONFIG))(x)), test.labels()


@pytest.fixture
def file(params, tmp_path):
    vitcore.save(tmp_path / "w.npz", params, CONFIG)
    return tmp_path / "w.npz"


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("batch", [8, 64, 1000])
def test_every_image_once_in_order_on_any_mesh(params, truth, shape, batch):
    logits, labels = truth
    mesh, _ = meshes.make(MeshShape(*shape))
    predict = make_predict(CONFIG, mesh)
    placed = put_params(params, CONFIG, mesh)
    best, found, _ = Reader(batch_size=batch).all(lambda x: predict(placed, x), open_source("digits", "val"), CONFIG, mesh)
    np.testing.assert_array_equal(found, labels)  # 355 images: no batch and no mesh divides them
    assert best.shape == (355, 5)
    differ = (best != np.argsort(-logits, kind="stable")[:, :5]).any(1)
    margins = -np.diff(-np.sort(-logits)[:, :6]).max(1)
    assert not (differ & (margins > 1e-3)).any()
    assert differ.mean() < 0.05


def test_bytes_travel_and_the_decoder_is_the_one_asked_for(file, tmp_path, monkeypatch):
    for folder in (tmp_path / "d" / split / name for split in ("train", "val") for name in "0123456789"):
        folder.mkdir(parents=True)
        Image.new("L", (8, 8), 25 * int(folder.name)).save(folder / "0.jpg")
    make, seen = frozen.Feed, []

    def feed(batches, place):
        seen.append((batches._rows.decoder, batches._rows.dtype))
        return make(batches, place)

    monkeypatch.setattr(frozen, "Feed", feed)
    argv = ["--init", str(file), "--data", f"folder:{tmp_path / 'd'}", "--mesh", "3x1", "--out", str(tmp_path / "e")]
    assert evaluate.main([*argv, "--decoder", "simplejpeg", "--batch-size", "8"]) == 0  # three devices: 9 at a time
    assert seen == [("simplejpeg", np.uint8)]


def test_images_are_brought_to_size_as_asked(tmp_path):
    """Wide images, light on the left: whole in one way, their middle in the other."""
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
    wide = np.zeros((64, 192), np.uint8)
    wide[:, :64] = 255
    Image.fromarray(wide).save(tmp_path / "val" / "a" / "0.png")
    mesh, _ = meshes.make(MeshShape(1, 1))
    source = open_source(f"folder:{tmp_path}", "val")
    light = {}
    for name, antialias in (("resize", False), ("resize", True), ("resize-center", True), ("center", False)):
        reader = Reader(batch_size=1, preprocess=name, antialias=antialias)
        light[name, antialias] = float(reader.all(lambda x: to_unit(x).mean((1, 2, 3)), source, CONFIG, mesh)[0][0])
    assert light["resize", False] == pytest.approx(-1 / 4, abs=0.01)  # three of eight columns, which see a pixel each
    assert light["resize", True] == pytest.approx(-1 / 3, abs=0.01)
    assert light["resize-center", True] == pytest.approx(2 * (1 / 3) / (8 / 9) - 1, abs=0.02)  # 8 of 9 columns, from the left
    assert light["center", False] < -0.8


def test_of_fewer_classes_than_five_all_are_given():
    config = vitcore.variant("ViT-Nano/4", image_size=8, channels=1, num_classes=3)
    mesh, _ = meshes.make(MeshShape(2, 1))
    params = put_params(jax.jit(lambda: vitcore.init(jax.random.key(0), config))(), config, mesh)
    assert make_predict(config, mesh)(params, np.zeros((2, 8, 8, 1), np.float32)).shape == (2, 3)


def test_the_head_reads_what_is_behind_the_hidden_layer():
    config = vitcore.variant("ViT-Nano/4", image_size=8, channels=1, num_classes=3, representation_size=24)
    mesh, _ = meshes.make(MeshShape(2, 2))
    params = jax.jit(lambda: vitcore.init(jax.random.key(0), config))()
    x = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1)).astype(np.float32)
    y = np.asarray(vitcore.features(params, x, config))
    found = np.asarray(frozen.make_features(config, mesh)(put_params(params, config, mesh), x))
    hidden = np.tanh(y @ np.asarray(params["pre_logits"]["kernel"]) + np.asarray(params["pre_logits"]["bias"]))
    assert np.abs(hidden - y @ np.asarray(params["pre_logits"]["kernel"])).max() > 0.01  # the tanh is felt
    np.testing.assert_allclose(found, hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mesh", ["1x1", "8x1", "2x2"])
def test_the_job_prints_and_writes(file, truth, tmp_path, capsys, mesh):
    logits, labels = truth
    assert evaluate.main(["--init", str(file), "--mesh", mesh, "--batch-size", "64", "--out", str(tmp_path / "e")]) == 0
    right = int((logits.argmax(1) == labels).sum())
    in_five = int((np.argsort(-logits)[:, :5] == labels[:, None]).any(1).sum())
    assert 100 < right < in_five <= 355
    printed = capsys.readouterr().out
    held = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert abs(held["top1"]["right"] - right) <= 1
    assert abs(held["top5"]["right"] - in_five) <= 1
    assert held["top1"]["counted"] == held["images"] == 355
    assert f"top-1: {held['top1']['right']} of 355 right, {held['top1']['accuracy']:.2%}" in printed
    assert sum(one["counted"] for one in held["classes"].values()) == 355
    assert sum(one["right"] for one in held["classes"].values()) == held["top1"]["right"]
    a, b, n = held["confused"][0]
    assert abs(n - ((labels == int(a)) & (logits.argmax(1) == int(b))).sum()) <= 1
    picture = np.asarray(Image.open(tmp_path / "e" / "confusion.png").convert("RGB"))
    assert picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_predictions_of_every_image_as_a_table(file, truth, tmp_path, capsys):
    import pyarrow.parquet as pq

    logits, labels = truth
    argv = ["--init", str(file), "--mesh", "2x1", "--batch-size", "64", "--out", str(tmp_path / "e"), "--predictions"]
    assert evaluate.main([*argv, str(tmp_path / "p.csv")]) == evaluate.main([*argv, str(tmp_path / "p.parquet")]) == 0
    assert f"{tmp_path / 'p.csv'}: 355 predictions" in capsys.readouterr().out
    lines = [line.split(",") for line in (tmp_path / "p.csv").read_text().splitlines()]
    assert lines[0] == ["name", "label", *(f"{what}{k}" for k in range(1, 6) for what in ("top", "score"))]
    source = open_source("digits", "val")
    assert [line[0] for line in lines[1:]] == [source.example_name(i) for i in range(355)]
    assert [line[1] for line in lines[1:]] == [source.classes[i] for i in labels]
    odds = np.exp(logits - logits.max(1, keepdims=True))
    odds /= odds.sum(1, keepdims=True)
    scores = np.array([[float(line[3 + 2 * k]) for k in range(5)] for line in lines[1:]])
    np.testing.assert_allclose(scores, -np.sort(-odds)[:, :5], atol=1e-4)
    assert np.mean([line[2] == source.classes[i] for line, i in zip(lines[1:], logits.argmax(1), strict=True)]) > 0.99
    table = pq.read_table(tmp_path / "p.parquet").to_pydict()
    assert list(table) == lines[0]
    assert table["top1"] == [line[2] for line in lines[1:]]
    np.testing.assert_allclose(table["score2"], scores[:, 1], rtol=1e-6)
    for name, words in (("p.txt", ".csv or .parquet is required"), ("no/p.csv", "is no directory")):
        assert evaluate.main([*argv, str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err


def test_top_and_confusion_by_hand():
    best = np.array([[0, 1, 2], [1, 0, 2], [2, 1, 0], [0, 2, 1]])
    labels = np.array([0, 0, 1, 1])
    assert scores.top(best, labels, 1).tolist() == [True, False, False, False]
    assert scores.top(best, labels, 2).tolist() == [True, True, True, False]
    assert scores.confusion(best[:, 0], labels, 3).tolist() == [[1, 1, 0], [1, 0, 1], [0, 0, 0]]


# --- ReaL -------------------------------------------------------------------------------------------------------------------


def test_real_skips_empty_sets_and_goes_by_the_numbers(tmp_path):
    (tmp_path / "real.json").write_text(json.dumps([[3], [], [1, 2], [0, 5]]))
    real = scores.read_real(str(tmp_path / "real.json"))
    names = [f"/x/n0/ILSVRC2012_val_{n:08d}.JPEG" for n in (3, 1, 2, 4)]
    labels = scores.real_labels(real, names, 10)
    assert labels == [[1, 2], [3], [], [0, 5]]
    assert scores.real_accuracy(np.array([[2], [4], [4], [5]]), labels) == (2, 3)
    for bad, words in (
        (["cat.jpg"], "cat.jpg has no place"),
        (["a_val_00000005.JPEG"], "among the 4"),
        (["a_val_00000000.JPEG"], "4"),
    ):
        with pytest.raises(ValueError, match=words):
            scores.real_labels(real, bad, 10)
    with pytest.raises(ValueError, match="know class 5, the model has 5 classes"):
        scores.real_labels(real, names, 5)


def test_real_through_the_job(file, truth, tmp_path, capsys):
    """The digits as a folder under ImageNet's names; every second image has labels, of which the prediction is one, or is not."""
    logits, labels = truth
    best = logits.argmax(1)
    test = open_source("digits", "val")
    order = np.random.default_rng(0).permutation(100)
    real: list[list[int]] = [[] for _ in range(100)]
    for split in ("train", "val"):
        for c in range(10):
            (tmp_path / "d" / split / str(c)).mkdir(parents=True)
            Image.fromarray(test[0].image[:, :, 0]).save(tmp_path / "d" / split / str(c) / "ILSVRC2012_val_00000001.png")
    for i, n in enumerate(order):
        Image.fromarray(test[i].image[:, :, 0]).save(tmp_path / "d" / "val" / str(labels[i]) / f"ILSVRC2012_val_{n + 1:08d}.png")
        if n % 2:
            real[n] = [int(best[i]), 11 % 10] if n % 4 == 1 else [int(best[i] + 1) % 10]
    for c in range(10):  # image 1 stands once
        path = tmp_path / "d" / "val" / str(c) / "ILSVRC2012_val_00000001.png"
        if c != labels[np.flatnonzero(order == 0)[0]]:
            path.unlink()
    (tmp_path / "real.json").write_text(json.dumps(real))
    argv = ["--init", str(file), "--data", f"folder:{tmp_path / 'd'}", "--mesh", "2x1", "--real", str(tmp_path / "real.json")]
    assert evaluate.main(argv) == 0
    assert "ReaL: 25 of 50 right, 50.00%" in capsys.readouterr().out


# --- ObjectNet --------------------------------------------------------------------------------------------------------------


def mappings(path):
    path.mkdir()
    files = {
        "folder_to_objectnet_label.json": {
            "alarm_clock": "Alarm clock",
            "rug": "Doormat",
            "plate_rack": "Dish rack",
            "spoon": "Spoon",
        },
        "objectnet_to_imagenet_1k.json": {"Alarm clock": "analog clock; digital clock", "Doormat": "doormat, welcome mat"},
        "pytorch_to_imagenet_2012_id.json": {"409": 2, "530": 0, "539": 1},
    }
    for name, held in files.items():
        (path / name).write_text(json.dumps(held))
    (path / "imagenet_to_label_2012_v2").write_text("digital clock\ndoormat, welcome mat\nanalog clock\n")
    return str(path)


def test_objectnet_s_published_mappings(tmp_path):
    mapped = scores.read_objectnet(mappings(tmp_path / "mappings"))
    assert mapped == {"alarm_clock": [409, 530], "rug": [539]}
    classes = ("alarm_clock", "rug", "spoon")
    best = np.array([[530, 1, 2, 3, 4], [1, 409, 2, 3, 4], [409, 1, 2, 3, 539], [409, 1, 2, 3, 4]])
    labels = np.array([0, 0, 1, 2])
    assert scores.objectnet_accuracy(best, labels, classes, mapped, 1) == (1, 3)
    assert scores.objectnet_accuracy(best, labels, classes, mapped, 5) == (3, 3)
    (tmp_path / "map.json").write_text(json.dumps(mapped))
    assert scores.read_objectnet(str(tmp_path / "map.json")) == mapped
    with pytest.raises(ValueError, match="none of the folders spoon"):
        scores.objectnet_accuracy(best, labels, ("spoon", "fork", "knife"), mapped, 1)
    for bad in ({}, {"a": []}, {"a": [1000]}, {"a": "x"}, [1]):
        (tmp_path / "map.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match="is no class map of ObjectNet"):
            scores.read_objectnet(str(tmp_path / "map.json"))
    (tmp_path / "mappings" / "pytorch_to_imagenet_2012_id.json").write_text('{"409": 2}')
    with pytest.raises(ValueError, match="mappings do not fit together"):
        scores.read_objectnet(str(tmp_path / "mappings"))


def test_objectnet_through_the_job(tmp_path, capsys):
    """Folders of images with a red border; the model sees the inside alone."""
    config = vitcore.variant("ViT-Nano/4", image_size=8, num_classes=1000)
    params = jax.tree.map(np.array, jax.jit(lambda: vitcore.init(jax.random.key(0), config))())
    params["head"]["bias"][[409, 539]] = 2, 1
    vitcore.save(tmp_path / "w.npz", params, config)
    for split in ("train", "val"):
        for name in ("alarm_clock", "rug", "spoon"):
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for i in range(2):
                image = np.full((12, 12, 3), (255, 0, 0), np.uint8)
                image[1:-1, 1:-1] = 40 * i
                Image.fromarray(image).save(tmp_path / "d" / split / name / f"{i}.png")
    argv = ["--init", str(tmp_path / "w.npz"), "--data", f"folder:{tmp_path / 'd'}", "--mesh", "2x1"]
    assert evaluate.main([*argv, "--objectnet", mappings(tmp_path / "mappings"), "--out", str(tmp_path / "e")]) == 0
    printed = capsys.readouterr().out
    assert "ObjectNet top-1: 2 of 4 right, 50.00%" in printed
    assert "ObjectNet top-5: 4 of 4 right, 100.00%" in printed
    source = open_source(f"folder:{tmp_path / 'd'}", "val")
    trimmed = evaluate.Trimmed(source)
    assert trimmed[1].image.shape == (10, 10, 3)
    assert trimmed[1].image.max() == 40
    assert trimmed.classes == source.classes


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--init is required"),
        (["--init", "W", "--data", "digits:5-9"], "the model has 10 classes, digits"),
        (["--init", "W", "--real", "/no/real.json"], "/no/real.json"),
        (["--init", "W", "--real", "W"], "is not JSON"),
        (["--init", "W", "--real", "R"], "has no place among the 1 of the ReaL labels"),
        (["--init", "W", "--objectnet", "M"], "--objectnet requires ImageNet's 1000"),
        (["--init", "W", "--real", "R", "--objectnet", "M"], "give one of them"),
        (["--init", "W", "--batch-size", "0"], "--batch-size 0"),
        (["--init", "W", "--ops", "fused"], "--ops fused runs on a TPU"),
        (["--init", "W", "--mesh", "1x8"], "num_heads=4 is not divisible"),
    ],
)
def test_a_mistake_is_one_line(file, argv, words, tmp_path, capsys):
    (tmp_path / "real.json").write_text("[[1]]")
    known = {"W": str(file), "R": str(tmp_path / "real.json"), "M": ""}
    if "M" in argv:
        known["M"] = mappings(tmp_path / "mappings")
    assert evaluate.main([known.get(a) or a for a in argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("train.evaluate: error: ")
    assert said.count("\n") == 1
    assert words in said
