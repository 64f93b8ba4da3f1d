"""Bad images: every kind of file that sets hold, replaced and counted, alike in every form, by any number of readers; and MixUp."""

import io
import logging
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

import train.data.decode as decoders
from tests.train.test_data_forms import environment_of, jpeg, write_folder, write_parquet, write_tar
from train.data import DataError, eval_batches, open_source, train_batches
from train.data.decode import MAX_BYTES, decode_bytes, decode_fast, decode_pillow, read_file
from train.data.mix import Mix, cutmix_boxes, mixed, mixup, mixup_shares
from train.data.sampling import replacements
from train.data.source import BadImage

GOOD, BAD = "good", "bad"


def photograph(width=120, height=90, **options):
    return jpeg(Image.fromarray(load_sample_images().images[0]).resize((width, height)), **options)  # type: ignore[attr-defined]


def png(picture, **options):
    data = io.BytesIO()
    picture.save(data, "PNG", **options)
    return data.getvalue()


def flipped(data, seed):
    """A few bits of the entropy-coded part changed."""
    rng, damaged = np.random.default_rng(seed), bytearray(data)
    for at in rng.integers(len(data) // 3, len(data) - 2, 4):
        damaged[at] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return photograph(exif=exif)


def animated():
    data = io.BytesIO()
    frames = [Image.new("RGB", (12, 10), colour) for colour in ("red", "blue")]
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:])
    return data.getvalue()


def bomb():
    return png(Image.new("1", (20000, 20000)))


RGB = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint32).reshape(40, 30, 3).astype(np.uint8))
# The seventeen kinds: what the file holds (or how it is made), and whether an image comes of it.
KINDS: dict[str, tuple[Any, str]] = {
    "truncated": (lambda: photograph()[:-300], BAD),
    "zero bytes": (lambda: b"", BAD),
    "wrong extension": (lambda: png(RGB), GOOD),  # a PNG named .jpg
    "bit-flipped": (lambda: flipped(png(RGB), 0), BAD),  # PNG has checksums; a JPEG may get through with odd pixels
    "bomb": (bomb, BAD),
    "16-bit": (lambda: png(Image.fromarray(np.full((9, 9), 40000, np.uint16))), GOOD),
    "palette": (lambda: png(RGB.convert("P")), GOOD),
    "alpha": (lambda: png(RGB.convert("RGBA")), GOOD),
    "grey": (lambda: jpeg(RGB.convert("L")), GOOD),
    "CMYK": (lambda: jpeg(RGB.convert("CMYK")), GOOD),
    "animated": (animated, GOOD),
    "EXIF-rotated": (rotated, GOOD),
    "1-pixel": (lambda: jpeg(Image.new("RGB", (1, 1))), GOOD),
    "huge aspect": (lambda: jpeg(Image.new("RGB", (20000, 2))), GOOD),
    "text": (lambda: b"<html>404</html>", BAD),
    "directory": ("mkdir", BAD),
    "unreadable": ("dangling", BAD),
    # and three more
    "pipe": ("fifo", BAD),
    "huge file": ("huge", BAD),
    "PNG cut": (lambda: png(RGB)[:200], BAD),
}


def place_bad(path, kind):
    content = KINDS[kind][0]
    path.unlink(missing_ok=True)
    if content == "mkdir":
        path.mkdir()
    elif content == "dangling":  # what root, too, cannot read
        path.symlink_to(path.parent / "nowhere")
    elif content == "fifo":
        os.mkfifo(path)
    elif content == "huge":
        with open(path, "wb") as file:
            file.truncate(MAX_BYTES + 1)
    else:
        path.write_bytes(content())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITCORE_CACHE", str(tmp_path / "cache"))


def stream(source, count=6, batch_size=8, **options: Any):
    settings: dict[str, Any] = dict(image_size=16, channels=3, batch_size=batch_size, seed=3, bad_share=1.0) | options
    with train_batches(source, **settings) as batches:
        return [next(batches) for _ in range(count)], batches.bad


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


# --- files ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_decoded_or_replaced_and_counted(tmp_path, caplog, kind, decoder):
    write_folder(tmp_path / "set", count=4)
    bad = tmp_path / "set" / "train" / "digit" / "2.jpg"
    place_bad(bad, kind)
    source = open_source(f"folder:{tmp_path / 'set'}", "train")
    index = next(i for i in range(len(source)) if source.example_name(i) == str(bad))
    caplog.set_level(logging.WARNING)
    batches, count = stream(source, count=3, batch_size=12, decoder=decoder)  # three epochs
    if KINDS[kind][1] == GOOD:
        assert count == 0
        assert source[index].image.shape[2] == 3
        return
    assert count == 3
    lines = [record.getMessage() for record in caplog.records if record.name == "train.data"]
    assert len(lines) == 1, "each is named once"
    assert str(bad) in lines[0]
    assert "\n" not in lines[0]
    other = next(int(i) for i in replacements(len(source), 3, index) if i != index)
    assert f"replaced by {source.example_name(other)}" in lines[0]
    # what stands in depends on seed and index alone: one more of its label in every epoch, one fewer of the bad one's
    labels = np.concatenate([b["label"] for b in batches]).reshape(3, 12)
    expected = np.bincount(np.where(np.arange(12) == index, source.labels()[other], source.labels()), minlength=3)
    for epoch in labels:
        np.testing.assert_array_equal(np.bincount(epoch, minlength=3), expected)


def test_a_bomb_costs_no_memory(tmp_path):
    """Pixels of 1.2 GB behind 50 KB, in a process that may take 200 MB more than it has."""
    (tmp_path / "bomb.png").write_bytes(bomb())
    code = """
import re, sys
from train.data.decode import decode
from train.data.source import BadImage
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
try:
    decode(sys.argv[1])
except BadImage as error:
    print("exceeds limit" in str(error), peak() - before < 50)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "bomb.png")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment_of(), timeout=60)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_large_images_are_not_kept_by_the_dozen(tmp_path):
    """A reader resizes what it has decoded before it decodes more, so a batch of large photographs needs the memory of one."""
    place = tmp_path / "set" / "train" / "a"
    place.mkdir(parents=True)
    for k in range(16):
        (place / f"{k}.jpg").write_bytes(jpeg(Image.new("RGB", (3000, 2500), (k, 0, 0)), quality=50))
    code = """
import re, sys
from train.data import open_source, train_batches
import grain
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
source = open_source(sys.argv[1], "train")
before = peak()
with train_batches(source, image_size=32, channels=3, batch_size=16, seed=0, threads=1) as batches:
    next(batches)
print(peak() - before)
"""
    command = [sys.executable, "-c", code, f"folder:{tmp_path / 'set'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment_of(), timeout=60)
    assert float(done.stdout) < 200, done.stdout + done.stderr  # one takes 30 MB as Pillow holds it, sixteen 480


def test_the_fast_path_gives_the_same_pixels(tmp_path):
    """To the last bit, on photographs of every subsampling; both are libjpeg-turbo with its exact transform."""
    photo = Image.fromarray(load_sample_images().images[1])  # type: ignore[attr-defined]
    for subsampling in (0, 1, 2):
        for quality in (30, 75, 98):
            for size in ((640, 427), (301, 203), (17, 9)):
                data = jpeg(photo.resize(size), quality=quality, subsampling=subsampling, progressive=quality == 75)
                found = decode_fast(data, "x")
                assert isinstance(found, np.ndarray), "simplejpeg decoded it"
                np.testing.assert_array_equal(found, np.asarray(decode_pillow(data, "x")))
    grey = jpeg(photo.convert("L"))
    np.testing.assert_array_equal(decode_fast(grey, "x"), np.asarray(decode_pillow(grey, "x")))
    for data in (rotated(), jpeg(RGB.convert("CMYK")), png(RGB), animated()):
        np.testing.assert_array_equal(np.asarray(decode_fast(data, "x")), np.asarray(decode_pillow(data, "x")))


@pytest.mark.parametrize("decode", [decode_fast, decode_pillow])
def test_the_parts_of_a_file_are_counted_once(decode, monkeypatch):
    """Also of what one decoder leaves to the other: a turned photograph, CMYK, no JPEG, a damaged one."""
    counted = []
    monkeypatch.setattr(decoders, "check_parts", counted.append)
    files = (photograph(), rotated(), jpeg(RGB.convert("CMYK")), png(RGB))
    for data in files:
        decode(data, "x")
    with pytest.raises(BadImage):
        decode(photograph()[:600], "x")
    assert counted == [*files, photograph()[:600]]


def test_the_fast_path_refuses_what_pillow_refuses():
    data, refused, passed = photograph(), 0, 0
    for seed in range(150):
        damaged = flipped(data, seed) if seed % 3 else data[: len(data) * (seed + 1) // 160]
        try:
            expected = np.asarray(decode_pillow(damaged, "x"))
        except BadImage:
            refused += 1
            with pytest.raises(BadImage):
                decode_fast(damaged, "x")
        else:
            passed += 1
            np.testing.assert_array_equal(np.asarray(decode_fast(damaged, "x")), expected)
    assert refused > 20
    assert passed > 20


def test_read_file_says_why(tmp_path):
    for kind, words in (
        ("directory", "Is a directory"),
        ("unreadable", "No such file"),
        ("pipe", "no regular file"),
        ("huge file", "more than"),
    ):
        path = tmp_path / kind
        place_bad(path, kind)
        held = len(os.listdir("/proc/self/fd"))
        with pytest.raises(BadImage, match=words) as error:
            read_file(str(path))
        assert str(path) in str(error.value)
        assert len(os.listdir("/proc/self/fd")) == held, "closed again"
    with pytest.raises(BadImage, match="the file is empty"):
        decode_bytes(b"", "x")


# --- the run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """A set of 36 images with three bad ones, as class folders, tar and parquet."""
    write_folder(tmp_path / "set", count=12)
    for name, kind in (("china/3.jpg", "truncated"), ("digit/0.jpg", "text"), ("flower/11.jpg", "zero bytes")):
        place_bad(tmp_path / "set" / "train" / name, kind)
    source = open_source(f"folder:{tmp_path / 'set'}", "train")
    write_tar(source, tmp_path / "tar" / "train")
    write_parquet(source, tmp_path / "parquet" / "train")
    return tmp_path


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_every_form_replaces_alike(damaged, form):
    folder = stream(open_source(f"folder:{damaged / 'set'}", "train"), count=9)
    assert folder[1] == 6  # two epochs of 36 in batches of 8
    other = stream(open_source(f"{form}:{damaged / form}", "train"), count=9)
    assert other[1] == 6
    assert_same(other[0], folder[0])


@pytest.mark.parametrize("options", [{}, {"mixup": 0.4}, {"pixels": "uint8", "mixup": 1.0}, {"subset": 20}])
def test_processes_threads_and_interruptions_change_nothing(damaged, options):
    source = open_source(f"tar:{damaged / 'tar'}", "train")
    whole, bad = stream(source, count=8, **options, threads=1)
    for count in (2, 4):
        parts = [stream(source, count=8, shard=(k, count), **options) for k in range(count)]
        assert sum(part[1] for part in parts) == bad
        joined = [
            {key: np.concatenate([b[key] for b in step]) for key in step[0]} for step in zip(*(p[0] for p in parts), strict=True)
        ]
        assert_same(joined, whole)
    again, _ = stream(source, count=5, state={"global_next_index": 24}, **options)
    assert_same(again, whole[3:])


WORKERS = """
import hashlib, json, sys
from train.data import open_source, train_batches
if __name__ == "__main__":
    source = open_source(sys.argv[1], "train")
    for workers, count in json.loads(sys.argv[2]):
        digest = []
        for k in range(count):
            with train_batches(source, image_size=16, channels=3, batch_size=16, seed=3, workers=workers, shard=(k, count),
                               threads=2, state={"global_next_index": 16}, bad_share=1.0, pixels="uint8", mixup=0.2) as batches:
                digest.append([next(batches) for _ in range(5)])
        steps = [[d[s][key].tobytes() for d in digest] for s in range(5) for key in ("image", "label", "share")]
        print(hashlib.sha256(b"".join(b"".join(step) for step in steps)).hexdigest())
"""


@pytest.mark.ci
@pytest.mark.slow
def test_workers_change_nothing_either(damaged, tmp_path):
    """0, 1 and 3 workers in 1, 2 and 4 processes: one order, from the middle of an epoch on, bad images and MixUp included."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    layouts = "[[0, 1], [1, 1], [3, 1], [0, 2], [3, 2], [0, 4]]"
    command = [sys.executable, str(script), f"tar:{damaged / 'tar'}", layouts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment_of())
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 6
    assert len({*done.stdout.split()}) == 1


def test_a_run_stops_above_the_share(damaged):
    source = open_source(f"folder:{damaged / 'set'}", "train")
    with pytest.raises(DataError) as error:
        stream(source, count=400, bad_share=0.01)
    found = re.match(
        r"(\d+) of (\d+) images of folder:.* could not be read, more than the 1.00% allowed; the last: cannot decode",
        str(error.value),
    )
    assert found
    assert int(found[1]) == 11  # of 3 in 36, before the first thousand were seen
    assert "\n" not in str(error.value)
    assert 3 * 88 <= stream(source, count=400, bad_share=0.1)[1] <= 3 * 89  # 88.9 epochs
    with pytest.raises(DataError, match=r"more than the 0\.00% allowed"):
        stream(source, bad_share=0.0)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="must lie in"):
            stream(source, bad_share=share)


def test_many_bad_images_are_counted_not_named(tmp_path, caplog):
    write_folder(tmp_path / "set", count=12)
    for path in (tmp_path / "set" / "train").rglob("*.jpg"):
        if path.parent.name != "china":
            path.write_bytes(b"")
    caplog.set_level(logging.WARNING)
    _, count = stream(open_source(f"folder:{tmp_path / 'set'}", "train"), count=9)
    assert count == 2 * 24
    lines = [record.getMessage() for record in caplog.records if record.name == "train.data"]
    assert len(lines) == 21
    assert "20 different bad images" in lines[-1]


def test_nothing_but_bad_images(tmp_path):
    write_folder(tmp_path / "set", count=2)
    for path in (tmp_path / "set" / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="the 16 images tried in its place are as bad") as error:
        stream(open_source(f"folder:{tmp_path / 'set'}", "train"))
    assert "\n" not in str(error.value)


def test_evaluation_leaves_bad_images_out(damaged, caplog):
    source = open_source(f"folder:{damaged / 'set'}", "train")
    weights, labels = [], []
    with eval_batches(source, image_size=16, channels=3, batch_size=10, bad_share=1.0) as batches:
        for batch in batches:
            weights.append(batch["weight"])
            labels.append(batch["label"])
            assert (batch["image"][batch["weight"] == 0] == 0).all()
            assert "bad" not in batch
        assert batches.bad == 3
    assert np.concatenate(weights).sum() == 33
    real = np.concatenate(weights)[:36] == 1
    np.testing.assert_array_equal(np.concatenate(labels)[:36][real], source.labels()[real])
    assert caplog.text.count("left out of the evaluation") == 3


# --- bytes and MixUp --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["inception", "none"])
def test_bytes_are_the_floats_before_they_are_scaled(damaged, augment):
    source = open_source(f"tar:{damaged / 'tar'}", "train")
    small, large = (stream(source, augment=augment, pixels=pixels)[0] for pixels in ("uint8", "float32"))
    for a, b in zip(small, large, strict=True):
        assert (a["image"].dtype, b["image"].dtype) == (np.uint8, np.float32)
        np.testing.assert_array_equal(a["image"] * np.float32(2 / 255) - np.float32(1), b["image"])
    evaluation = [next(iter(eval_batches(source, image_size=16, channels=3, batch_size=8, pixels=p))) for p in ("uint8", "float32")]
    real = evaluation[0]["weight"] == 1
    assert real.sum() == 7
    np.testing.assert_array_equal(evaluation[0]["image"][real] * np.float32(2 / 255) - np.float32(1), evaluation[1]["image"][real])
    digits = open_source("digits", "train")
    with train_batches(digits, image_size=8, channels=1, batch_size=8, seed=0, pixels="uint8") as batches:
        assert next(batches)["image"].dtype == np.float32, "the digits' augmentation lies between whole numbers"
    with pytest.raises(ValueError, match="unknown type of pixels 'float16'"):
        stream(source, pixels="float16")


def test_mixup_mixes_neighbours():
    images = np.stack([np.full((2, 2, 1), value, np.float32) for value in (0, 1, 10, 20)])
    mixed, other = mixup(images.copy(), np.array([4, 5, 6, 7], np.int32), np.array([0.75, 1, 0.5, 0.9], np.float32))
    np.testing.assert_allclose(mixed[:, 0, 0, 0], [0.25, 1, 15, 19], atol=1e-6)
    assert other.tolist() == [5, 4, 7, 6]
    bytes_mixed, _ = mixup((images * 10).astype(np.uint8), np.zeros(4, np.int32), np.array([0.75, 1, 0.5, 0.9], np.float32))
    assert bytes_mixed[:, 0, 0, 0].tolist() == [2, 10, 150, 190]  # 2.5 is rounded to even


@pytest.mark.parametrize("strength", [0.4, 1.0, 4.0])
def test_shares_follow_the_beta_distribution(strength):
    from scipy.stats import beta, kstest

    shares = mixup_shares(np.random.default_rng(0).random(4000), strength)
    assert shares.min() >= 0.5
    assert shares.max() <= 1
    folded = lambda x: beta(strength, strength).cdf(x) - beta(strength, strength).cdf(1 - x)  # noqa: E731
    assert kstest(shares, folded).pvalue > 1e-3


def test_mixup_in_a_run(damaged):
    source = open_source(f"tar:{damaged / 'tar'}", "train")
    plain, rows = stream(source)[0], stream(source, mixup=0.8, mixup_share="row")[0]
    for a, b in zip(plain, rows, strict=True):
        np.testing.assert_array_equal(a["label"], b["label"])
        np.testing.assert_array_equal(b["other_label"], b["label"].reshape(-1, 2)[:, ::-1].reshape(-1))
        share = b["share"][:, None, None, None]
        partner = a["image"].reshape(-1, 2, 16, 16, 3)[:, ::-1].reshape(a["image"].shape)
        np.testing.assert_allclose(b["image"], share * a["image"] + (1 - share) * partner, atol=1e-6)
    assert len({float(s) for b in rows for s in b["share"]}) == 48, "each row has a share of its own"
    batches = stream(source, mixup=0.8)[0]
    assert all(len(set(b["share"].tolist())) == 1 for b in batches), "one share a batch, as the authors have it"
    assert len({b["share"][0].item() for b in batches}) == len(batches)
    parts = [stream(source, mixup=0.8, shard=(i, 2))[0] for i in range(2)]
    for whole, *halves in zip(batches, *parts, strict=True):
        np.testing.assert_array_equal(whole["image"], np.concatenate([half["image"] for half in halves]))
        np.testing.assert_array_equal(whole["share"], np.concatenate([half["share"] for half in halves]))
    (odd,) = stream(source, count=1, batch_size=30, mixup=0.8)[0]  # 15 would be the largest group that divides it
    np.testing.assert_array_equal(odd["other_label"], odd["label"].reshape(-1, 2)[:, ::-1].reshape(-1))
    assert "share" not in plain[0]
    with pytest.raises(ValueError, match="make it even"):
        stream(source, batch_size=12, shard=(0, 4), mixup=0.5)
    with pytest.raises(ValueError, match="mixup -1"):
        stream(source, mixup=-1.0)
    with pytest.raises(ValueError, match="unknown share of MixUp 'image'; the known ones are batch, row"):
        stream(source, mixup=1.0, mixup_share="image")


def test_cutmix_takes_a_box_of_the_neighbour_and_as_much_of_its_label():
    images = np.stack([np.full((20, 30, 1), value, np.uint8) for value in (0, 1, 2, 3)] * 50)
    draws = np.random.default_rng(0).random((200, 4))
    found, other, share = mixed(images.copy(), np.arange(200), draws, Mix(cutmix=1.0))
    assert (other.reshape(-1, 2) == np.arange(200).reshape(-1, 2)[:, ::-1]).all()
    foreign = (found != images).reshape(200, -1)
    np.testing.assert_allclose(1 - foreign.mean(1), share, atol=1e-6)
    assert set(np.unique(found[0])) <= {0, 1}
    assert share.std() > 0.15
    assert (foreign.reshape(-1, 20, 30)[:, 0, 0].mean(), foreign.reshape(-1, 20, 30)[:, 10, 15].mean()) < (0.3, 0.9)
    boxes = cutmix_boxes(np.random.default_rng(1).random((20_000, 3)), 1.0, (100, 200))
    inside = (boxes[:, 0] > 0) & (boxes[:, 1] > 0) & (boxes[:, 2] < 100) & (boxes[:, 3] < 200)
    height, width = (boxes[:, 2] - boxes[:, 0])[inside], (boxes[:, 3] - boxes[:, 1])[inside]
    assert abs(width - 2 * height).max() <= 3, "the box has the image's shape"
    # uncut, its area is uniform: of boxes up to a tenth of the image nearly none is cut off
    assert abs((height * width < 2000).mean() * inside.mean() - 0.1) < 0.04


def test_with_both_one_of_the_two_is_drawn():
    images = np.stack([np.full((8, 8, 1), value, np.float32) for value in (0, 1)] * 400)
    draws = np.random.default_rng(0).random((800, 4))
    found, _, share = mixed(images.copy(), np.zeros(800, np.int32), draws, Mix(mixup=1.0, cutmix=1.0))
    blended = np.array([len(set(np.unique(image)) - {0, 1}) > 0 for image in found])
    assert 0.4 < blended.mean() < 0.6
    assert (share[blended] >= 0.5).all()
    assert share[~blended].min() < 0.5


def test_decoders_are_checked(damaged, monkeypatch):
    source = open_source(f"tar:{damaged / 'tar'}", "train")
    assert_same(stream(source, decoder="simplejpeg")[0], stream(source)[0])
    with pytest.raises(ValueError, match="unknown decoder 'cv2'; the known ones are pillow, simplejpeg"):
        stream(source, decoder="cv2")
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(DataError, match=r"pip install 'vitcore\[fast\]'"):
        stream(source, decoder="simplejpeg")


def test_the_decoder_by_default_is_simplejpeg_where_it_is_installed(damaged, monkeypatch):
    source = open_source(f"tar:{damaged / 'tar'}", "train")
    whole, used = stream(source)[0], []
    for name in ("decode_fast", "decode_pillow"):
        plain = getattr(decoders, name)
        monkeypatch.setattr(decoders, name, lambda *args, plain=plain, name=name: used.append(name) or plain(*args))
    assert_same(stream(source)[0], whole)
    assert used[0] == "decode_fast"
    decoders._fast_is_here.cache_clear()
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    used.clear()
    try:
        assert_same(stream(source)[0], whole)
    finally:
        decoders._fast_is_here.cache_clear()
    assert set(used) == {"decode_pillow"}
