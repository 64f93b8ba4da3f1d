"""The jobs on data: pack (restart, checksums, resizing), inspect, dedup; and batches on a mesh."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.train.test_data_forms import environment_of, jpeg, write_folder
from train.data import DataError, dedup, eval_batches, open_source, train_batches
from train.data import inspect as inspecting
from train.data import pack as packing
from train.data.device import on_mesh
from train.data.job import run_job
from train.feed import Feed
from vitcore.pixels import to_unit


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITCORE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "set", count=8)
    write_folder(tmp_path / "set", "val", count=2)
    return tmp_path / "set"


def job(module, options, *argv):
    """The exit code of a job that is run as a user would."""
    return run_job(options, module.run, module.__name__, [str(word) for word in argv])


def said(capsys, *parts):
    captured = capsys.readouterr()
    for part in parts:
        assert str(part) in captured.out + captured.err
    return captured


# --- pack -------------------------------------------------------------------------------------------------------------------


def pack(*argv):
    return job(packing, packing.Pack, *argv)


def test_pack_keeps_the_order_and_the_files(folder, tmp_path, capsys):
    assert pack(f"folder:{folder}", tmp_path / "p", "--shard-images", 7, "--workers", 1) == 0
    said(capsys, "train.json: 24 images in 4 shards", "val.json: 6 images in 1 shards")
    for split in ("train", "val"):
        source, packed = open_source(f"folder:{folder}", split), open_source(f"arrayrecord:{tmp_path / 'p'}", split)
        assert packed.classes == source.classes
        for i in range(len(source)):
            assert packed.encoded(i)[:2] == source.encoded(i)[:2]  # type: ignore[attr-defined]
            assert source.example_name(i).endswith(packed.example_name(i))
    assert not [*(tmp_path / "p").glob("*.tmp"), *(tmp_path / "p").glob("*.progress.jsonl")]
    assert pack(f"folder:{folder}", tmp_path / "p", "--shard-images", 7) == 0
    said(capsys, "complete already")
    assert pack(f"folder:{folder}", tmp_path / "p", "--shard-images", 8) == 2
    said(capsys, "is of another set (shard_images 7 there, 8 now)")


def test_pack_makes_the_shorter_side_smaller_and_leaves_small_images(tmp_path, capsys):
    place = tmp_path / "set" / "train" / "a"
    place.mkdir(parents=True)
    photo = Image.fromarray(load_sample_images().images[0])  # type: ignore[attr-defined]
    (place / "0.jpg").write_bytes(jpeg(photo.resize((200, 100))))
    (place / "1.jpg").write_bytes(small := jpeg(photo.resize((90, 40))))
    photo.resize((80, 160)).save(place / "2.png")
    (place / "3.jpg").write_bytes(b"no image")
    assert pack(f"folder:{tmp_path / 'set'}", tmp_path / "p", "--splits", "train", "--shorter-side", 50, "--workers", 1) == 0
    said(capsys, "3 images in 1 shards", "1 left out (train.bad.txt)")
    packed: Any = open_source(f"arrayrecord:{tmp_path / 'p'}", "train")
    assert [packed[i].image.shape for i in range(3)] == [(50, 100, 3), (40, 90, 3), (100, 50, 3)]
    assert packed.encoded(1).data == small
    assert [packed.encoded(i).data[:4] for i in (0, 2)] == [b"\xff\xd8\xff\xe0", b"\x89PNG"]
    expected = np.asarray(photo.resize((200, 100)).resize((100, 50), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(packed[0].image - expected).mean() < 6  # two JPEGs lie between
    assert "3.jpg" in (tmp_path / "p" / "train.bad.txt").read_text()


def test_pack_takes_parts_and_names(folder, tmp_path):
    assert pack(f"folder:{folder}", tmp_path / "p", "--splits", "train[:75%]", "train[75%:]=minival", "--workers", 1) == 0
    assert len(open_source(f"arrayrecord:{tmp_path / 'p'}", "train")) == 18
    assert len(open_source(f"arrayrecord:{tmp_path / 'p'}", "minival")) == 6


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["folder:SET"], "required and not given: STR Folder of the shards"),
        (["folder:SET", "OUT", "--workers", "0"], "--workers 0: a positive number is required"),
        (["folder:SET", "OUT", "--quality", "0"], "--quality 0"),
        (["folder:SET", "OUT", "--step-timeout", "-3"], "--step-timeout -3: zero, for none, or a positive number is required"),
        (["folder:SET", "OUT", "--splits", "train", "train[:5]"], "two would have the same name"),
        (["folder:SET", "OUT", "--splits", "test"], "cannot read the folder"),
        (["folders:SET", "OUT"], "unknown data source"),
    ],
)
def test_mistakes_of_pack_are_one_line(folder, tmp_path, capsys, argv, words):
    assert pack(*[word.replace("SET", str(folder)).replace("OUT", str(tmp_path / "p")) for word in argv]) == 2
    captured = said(capsys, words)
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("train.data.pack: error: ")


def test_pack_stops_where_most_is_bad(folder, tmp_path, capsys):
    for path in list((folder / "train").rglob("*.jpg"))[::2]:
        path.write_bytes(b"")
    assert pack(f"folder:{folder}", tmp_path / "p", "--workers", 1, "--splits", "train", "--bad-share", "0.001") == 2
    said(capsys, "12 of 24 images", "more than 0.10%")
    assert not (tmp_path / "p" / "train.json").exists()


def digests(place):
    return {shard["file"]: shard["sha256"] for shard in json.loads((place / "train.json").read_text())["shards"]}


@pytest.mark.parametrize("left", ["shards", "half a line", "a shard lost", "half a shard"])
def test_pack_continues_what_was_interrupted(folder, tmp_path, capsys, monkeypatch, left):
    """Stopped after three shards, in every state that a kill may leave; then finished: the same shards as in one go."""
    options = ["--splits", "train", "--shard-images", 4, "--workers", 1]
    assert pack(f"folder:{folder}", tmp_path / "whole", *options) == 0
    written = packing.write_shard
    count = iter(range(100))
    monkeypatch.setattr(
        packing, "write_shard", lambda shard: written(shard) if next(count) < 3 else (_ for _ in ()).throw(OSError("stop"))
    )
    place = tmp_path / "p"
    assert pack(f"folder:{folder}", place, *options) == 2
    monkeypatch.setattr(packing, "write_shard", written)
    kept = 3
    if left == "half a line":
        with open(place / "train.progress.jsonl", "a") as file:
            file.write('{"shard": 3, "file": "train-0000')
    elif left != "shards":
        victim = place / "train-00001-of-00006.arrayrecord"
        victim.unlink() if left == "a shard lost" else victim.write_bytes(victim.read_bytes()[:100])
        kept = 2
    (place / "train-00003-of-00006.arrayrecord.tmp").write_bytes(b"left behind")
    capsys.readouterr()
    assert pack(f"folder:{folder}", place, *options) == 0
    said(capsys, f"{kept} of them from before")
    assert digests(place) == digests(tmp_path / "whole")
    assert sorted(path.name for path in place.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert (
        open_source(f"arrayrecord:{place}", "train")[20].name == open_source(f"arrayrecord:{tmp_path / 'whole'}", "train")[20].name
    )


@pytest.mark.faults
def test_pack_survives_kills(folder, tmp_path):
    """SIGKILL at four moments, two processes at work; the fifth call finishes, and the shards are those of an unbroken call."""
    options = ["--splits", "train", "--shard-images", "1", "--workers", "2"]
    command = [sys.executable, "-m", "train.data.pack", f"folder:{folder}"]
    subprocess.run(
        [*command, str(tmp_path / "whole"), *options], check=True, env=environment_of(), capture_output=True, timeout=120
    )
    place = tmp_path / "p"
    for shards in (1, 5, 9, 15):
        process = subprocess.Popen([*command, str(place), *options], env=environment_of(), start_new_session=True)
        deadline = time.monotonic() + 60
        while len([*place.glob("*.arrayrecord")]) < shards:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(place), *options], check=True, env=environment_of(), capture_output=True, timeout=120)
    assert digests(place) == digests(tmp_path / "whole")


# --- inspect ----------------------------------------------------------------------------------------------------------------


def test_inspect_says_what_there_is_and_draws_it(folder, tmp_path, capsys):
    (folder / "train" / "china" / "3.jpg").write_bytes(b"")
    assert job(inspecting, inspecting.Inspect, f"folder:{folder}", "--out", tmp_path / "sheet.png", "--rows", 4) == 0
    captured = said(
        capsys,
        "24 images, 3 classes",
        "china 8, digit 8, flower 8",
        "bad images: 1 of 24 read (4.17%)",
        "china/3.jpg: the file is empty",
    )
    assert "height 48 to 80" in captured.out
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    assert pixels.shape[1] == 8 * (inspecting.TILE + 4)
    assert pixels.shape[0] == 16 + 4 * (inspecting.TILE + 20)
    tiles = [pixels[32 : 32 + inspecting.TILE, k * 148 : k * 148 + inspecting.TILE] for k in range(8)]
    assert all(tile.std() > 5 for tile in tiles), "every column shows something"
    assert all(np.abs(a - b).max() > 20 for a, b in itertools.pairwise(tiles[2:])), "each epoch another crop"


def test_the_sheet_shows_what_a_run_sees(folder, tmp_path):
    """The augmented images of the sheet are those of the batches, epoch by epoch."""
    source = open_source(f"folder:{folder}", "train")
    args = inspecting.Inspect(src="", rows=24, image_size=inspecting.TILE, seed=9)
    page = np.asarray(inspecting.sheet(source, args))
    with train_batches(source, image_size=inspecting.TILE, channels=3, batch_size=24, seed=9, pixels="uint8") as batches:
        first = [next(batches)["image"] for _ in range(2)]
    for epoch, images in enumerate(first):
        known = {image.tobytes() for image in images}
        x = (2 + epoch) * (inspecting.TILE + 4)
        tops = [16 + row * (inspecting.TILE + 20) + 16 for row in range(24)]
        assert {page[top : top + inspecting.TILE, x : x + inspecting.TILE].tobytes() for top in tops} == known


def test_inspect_verifies_the_checksums_of_a_packed_set(folder, tmp_path, capsys):
    assert pack(f"folder:{folder}", tmp_path / "p", "--splits", "train", "--workers", 1, "--shard-images", 10) == 0
    look = lambda: job(inspecting, inspecting.Inspect, f"arrayrecord:{tmp_path / 'p'}", "--out", tmp_path / "s.png", "--rows", 2)  # noqa: E731
    assert look() == 0
    said(capsys, "all 3 shards are as they were packed")
    shard = tmp_path / "p" / "train-00001-of-00003.arrayrecord"
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    assert look() == 2
    said(capsys, f"{shard} is not what was packed")


@pytest.mark.parametrize("what", ["a label", "the manifest", "a label's length"])
def test_labels_and_manifest_of_a_packed_set_are_under_a_checksum(folder, tmp_path, what):
    assert pack(f"folder:{folder}", tmp_path / "packed", "--splits", "train", "--workers", "1") == 0
    labels, manifest = tmp_path / "packed" / "train.labels", tmp_path / "packed" / "train.json"
    assert len(open_source(f"arrayrecord:{tmp_path / 'packed'}", "train")) == 24
    if what == "a label":
        labels.write_bytes(bytes([labels.read_bytes()[0] ^ 1]) + labels.read_bytes()[1:])
    elif what == "a label's length":
        labels.write_bytes(labels.read_bytes()[:-4])
    else:
        manifest.write_text(manifest.read_text().replace("china", "chine"))
    with pytest.raises(DataError, match=r"SHA-256 differs|not of the 24 records"):
        open_source(f"arrayrecord:{tmp_path / 'packed'}", "train")


def test_labels_of_another_set_beside_a_shard_are_noticed(folder, tmp_path):
    """A set packed by an earlier version has no checksum of its labels; each record has its own."""
    assert pack(f"folder:{folder}", tmp_path / "packed", "--splits", "train", "--workers", "1") == 0
    manifest = json.loads((tmp_path / "packed" / "train.json").read_text())
    held = {key: value for key, value in manifest.items() if key not in ("sha256", "labels_sha256")}
    (tmp_path / "packed" / "train.json").write_text(json.dumps(held))
    labels = np.fromfile(tmp_path / "packed" / "train.labels", "<i4")
    labels[::-1].tofile(tmp_path / "packed" / "train.labels")
    source = open_source(f"arrayrecord:{tmp_path / 'packed'}", "train")
    with pytest.raises(DataError, match="they are not of one set"):
        source[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rows", "0"], "--rows 0"),
        (["--split", "what"], "cannot read the folder"),
        (["--out", "sheet"], "--out sheet: a name that ends in the form of a picture is required, as in --out inspect.png"),
        (["--out", "sheet.txt"], "--out sheet.txt: a name that ends"),
    ],
)
def test_mistakes_of_inspect_are_one_line(folder, capsys, argv, words):
    assert job(inspecting, inspecting.Inspect, f"folder:{folder}", *argv) == 2
    assert said(capsys, words).err.count("\n") == 1


# --- dedup ------------------------------------------------------------------------------------------------------------------


def photographs(count, seed=0):
    """Different views of the two photographs: parts of 200 x 150 pixels anywhere."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        photo = Image.fromarray(load_sample_images().images[k % 2])  # type: ignore[attr-defined]
        left, top = int(rng.integers(0, 440)), int(rng.integers(0, 277))
        yield photo.crop((left, top, left + 200, top + 150))


def test_dedup_finds_copies_rescaled_and_recompressed_and_nothing_else(tmp_path, capsys):
    views = list(photographs(24))
    for split, part in (("train", views), ("val", views[:6])):
        place = tmp_path / "set" / split / "a"
        place.mkdir(parents=True)
        for k, view in enumerate(part):
            if split == "val":  # the same pictures, as other people would have stored them
                size = [(200, 150), (100, 75), (400, 300), (180, 150), (200, 150), (120, 90)][k]
                view = view.resize(size, Image.Resampling.LANCZOS)
                view = view.convert("L") if k == 4 else view
            (place / f"{k:02d}.jpg").write_bytes(jpeg(view, quality=90 if split == "train" else 60))
    out = tmp_path / "dedup"
    assert job(dedup, dedup.Dedup, f"folder:{tmp_path / 'set'}", "--against", f"folder:{tmp_path / 'set'}", "--out", out) == 0
    said(capsys, "6 of 24 images are within 6 bits", f"train[without={out / 'removed.json'}]")
    report = json.loads((out / "removed.json").read_text())
    assert [Path(name).name for name in report["removed"]] == [f"{k:02d}.jpg" for k in range(6)]
    assert all(Path(pair["name"]).name == Path(pair["like"]).name for pair in report["pairs"])
    with Image.open(out / "pairs.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 20
    rest = open_source(f"folder:{tmp_path / 'set'}", f"train[without={out / 'removed.json'}]")
    assert [Path(rest.example_name(i)).name for i in range(len(rest))] == [f"{k:02d}.jpg" for k in range(6, 24)]


def test_nearest_compares_every_pair():
    rng = np.random.default_rng(0)
    a, b = (np.ma.masked_array(rng.integers(0, 2**64, n, np.uint64), mask=np.zeros(n, bool)) for n in (300, 70))
    b[3] = np.uint64(int(a.data[5]) ^ 0b101)
    b[4] = a.data[5]
    a[7] = b[4] = np.ma.masked  # not readable: their hashes mean nothing
    best, index = dedup.nearest(a, b)
    expected = np.bitwise_count(a.data[:, None] ^ b.data[None, :])
    expected[:, 4] = 65
    np.testing.assert_array_equal(best, np.where(np.arange(300) == 7, 65, expected.min(axis=1)))
    assert (best[5], index[5]) == (2, 3)


def test_an_image_is_no_duplicate_of_itself(tmp_path):
    """A set against itself: of two copies the first stays, and nothing else goes."""
    for i, picture in enumerate(photographs(4)):
        (tmp_path / "set" / "train" / "a").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "set" / "train" / "a" / f"{i}.png")
    shutil.copy(tmp_path / "set" / "train" / "a" / "1.png", tmp_path / "set" / "train" / "a" / "9.png")
    words = [f"folder:{tmp_path / 'set'}", "--against", f"folder:{tmp_path / 'set'}@train", "--out", str(tmp_path / "out")]
    assert job(dedup, dedup.Dedup, *words, "--workers", "1", "--distance", "0") == 0
    report = json.loads((tmp_path / "out" / "removed.json").read_text())
    assert [os.path.basename(name) for name in report["removed"]] == ["9.png"]
    assert os.path.basename(report["pairs"][0]["like"]) == "1.png"


def test_dedup_without_its_library_or_against_nothing(folder, capsys, monkeypatch):
    assert job(dedup, dedup.Dedup, f"folder:{folder}", "--against", f"folder:{folder}@what") == 2
    assert said(capsys, "cannot read the folder").err.count("\n") == 1
    assert job(dedup, dedup.Dedup, f"folder:{folder}", "--against", "digits", "--distance", 40) == 2
    said(capsys, "--distance 40")
    monkeypatch.setitem(sys.modules, "imagehash", None)
    assert job(dedup, dedup.Dedup, f"folder:{folder}", "--against", "digits") == 2
    said(capsys, "pip install 'vitcore[dedup]'")


# --- on the mesh ------------------------------------------------------------------------------------------------------------


def mesh(data, model=1):
    return Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (2, 4)])
@pytest.mark.parametrize("options", [{"pixels": "uint8"}, {"pixels": "float32"}, {"pixels": "uint8", "mixup": 0.3}])
def test_batches_on_a_mesh_are_those_of_the_host(folder, shape, options):
    source = open_source(f"folder:{folder}", "train")
    settings: dict[str, Any] = dict(image_size=16, channels=3, batch_size=16, seed=1)
    with train_batches(source, **settings, **options | {"pixels": "float32"}) as batches:
        expected = [next(batches) for _ in range(3)]
    with Feed(train_batches(source, **settings, **options), on_mesh(mesh(*shape))) as feed:
        for host in expected:
            batch = feed.next()
            assert batch["image"].dtype == options["pixels"]  # it travels as it is on the host
            image = to_unit(batch["image"])
            assert image.dtype == np.float32
            assert len(image.sharding.device_set) == shape[0] * shape[1]
            assert image.addressable_shards[0].data.shape[0] == 16 // shape[0]
            atol = 1 / 255 if "mixup" in options else 1.2e-7  # mixed bytes are rounded again
            np.testing.assert_allclose(image, host["image"], atol=atol)
            label = batch["label"]
            if "mixup" in options:
                label, other, share = label
                np.testing.assert_array_equal(other, host["other_label"])
                np.testing.assert_array_equal(share, host["share"])
            np.testing.assert_array_equal(label, host["label"])
            assert batch.keys() == {"image", "label"}


def test_the_state_is_that_of_what_was_handed_out(folder):
    source = open_source(f"folder:{folder}", "train")

    def feed(state=None):
        batches = train_batches(source, image_size=16, channels=3, batch_size=8, seed=1, pixels="uint8", state=state)
        return Feed(batches, on_mesh(mesh(2)))

    with feed() as batches:
        assert batches.state == {"global_next_index": 0}
        taken = [batches.next() for _ in range(5)]
        state = batches.state
        assert state == {"global_next_index": 40}
        following = batches.next()
    for at, image in ((state, following["image"]), ({"global_next_index": 16}, taken[2]["image"])):
        with feed(at) as again:
            assert again.state == at
            np.testing.assert_array_equal(again.next()["image"], image)


def test_the_next_batch_is_on_the_mesh_before_it_is_asked_for(folder):
    source, placed, place = open_source(f"folder:{folder}", "train"), [], on_mesh(mesh(2))

    def seen(batch):
        placed.append((threading.current_thread(), place(batch)))
        return placed[-1][1]

    with Feed(train_batches(source, image_size=16, channels=3, batch_size=8, seed=1, pixels="uint8"), seen) as feed:
        feed.next()
        deadline = time.monotonic() + 20
        while (len(placed) < 2 or not placed[1][1]["image"].is_ready()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(placed) == 2
        assert placed[1][0] is not threading.current_thread()
        assert feed.next(more=False) is placed[1][1]


def test_an_evaluation_on_a_mesh_counts_every_image_once(folder):
    source = open_source(f"folder:{folder}", "train")
    batches = eval_batches(source, image_size=16, channels=3, batch_size=16, pixels="uint8")
    with Feed(batches, on_mesh(mesh(4))) as feed:
        found = [batch for batch in iter(feed.next, None)]
    assert [float(batch["weight"].sum()) for batch in found] == [16, 8]
    labels = np.concatenate([np.asarray(batch["label"]) for batch in found])
    np.testing.assert_array_equal(labels[:24], source.labels())


def test_the_ends_of_the_range_are_exact():
    found = np.asarray(to_unit(jax.numpy.arange(256, dtype=np.uint8)))
    assert (found[0], found[-1]) == (-1, 1)
    np.testing.assert_allclose(found, np.arange(256) * np.float32(2 / 255) - np.float32(1), atol=1.2e-7)
