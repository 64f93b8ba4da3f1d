"""Sources: what the digits and class folders hold, every form of image file, and one clear line for everything that is wrong."""

import io
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from train.data import SOURCES, DataError, digits, open_source
from train.data.decode import decode


def one_line(error, *parts):
    """The message is one line and says all of `parts`."""
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


def gradient(y=12, x=20):
    """uint8 [y, x, 3]: red grows downwards, green to the right, blue is constant: a rotation or a swap of channels shows."""
    image = np.empty((y, x, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = np.linspace(0, 255, y)[:, None], np.linspace(0, 255, x)[None, :], 77
    return image


@pytest.fixture
def folder(tmp_path):
    """Class folders of the digits 0, 1 and 2: PNGs in train, JPEGs in val."""
    for split, suffix, count in (("train", "png", 6), ("val", "jpg", 3)):
        source = digits.load(split)
        for label in range(3):
            place = tmp_path / split / f"class{label}"
            place.mkdir(parents=True)
            for k, i in enumerate(np.flatnonzero(source.labels() == label)[:count]):
                Image.fromarray(source.images[i, :, :, 0]).resize((24, 20)).save(place / f"{k}.{suffix}")
    return tmp_path


# --- the digits -------------------------------------------------------------------------------------------------------------


def test_digits_are_split_four_to_one_within_each_class():
    from sklearn.datasets import load_digits

    train, val = digits.load("train"), digits.load("val")
    assert len(train) + len(val) == 1797 == len({*train.numbers.tolist(), *val.numbers.tolist()})
    for label in range(10):
        held_out, kept = (val.labels() == label).sum(), (train.labels() == label).sum()
        assert held_out == (held_out + kept) // 5
    ink, target = map(np.asarray, load_digits(return_X_y=True))
    for source in (train, val):
        np.testing.assert_array_equal(source.labels(), target[source.numbers])
        np.testing.assert_allclose(source.images.reshape(-1, 64) / 255, ink[source.numbers] / 16, atol=0.5 / 255)
        assert {int(source.images.min()), int(source.images.max())} == {0, 255}


def test_digits_examples():
    source = digits.load("train")
    example = source[3]
    assert example.image.shape == (8, 8, 1)
    assert example.image.dtype == np.uint8
    assert example.label == source.labels()[3]
    assert type(example.label) is int
    assert example.name == f"digits/{source.numbers[3]}"
    assert source.classes == tuple("0123456789")


# --- class folders ----------------------------------------------------------------------------------------------------------


def test_folder_lists_every_image_under_its_class(folder):
    train, val = open_source(f"folder:{folder}", "train"), open_source(f"folder:{folder}", "val")
    assert train.classes == val.classes == ("class0", "class1", "class2")
    assert (len(train), len(val)) == (18, 9)
    names = [train[i].name for i in range(len(train))]
    assert len(set(names)) == 18
    for i, name in enumerate(names):
        example = train[i]
        assert os.path.basename(os.path.dirname(name)) == train.classes[example.label]
        assert example.image.shape == (20, 24, 3)
        np.testing.assert_array_equal(example.image, np.asarray(Image.open(name).convert("RGB")))
    assert val[0].image.shape == (20, 24, 3)


def test_folder_takes_three_extensions_in_any_case_and_leaves_the_rest(folder):
    place = folder / "train" / "class1"
    Image.fromarray(gradient()).save(place / "a.JPG")
    Image.fromarray(gradient()).save(place / "b.jpeg")
    (place / "notes.txt").write_text("not an image")
    (place / ".hidden.png").write_text("not an image")
    (folder / "train" / "README").write_text("not a class")
    assert len(open_source(f"folder:{folder}", "train")) == 20


@pytest.mark.parametrize("spec", ["digits", "folder"])
def test_sources_travel_to_workers(spec, folder):
    source = open_source(spec if spec == "digits" else f"folder:{folder}", "val")
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == len(source)
    np.testing.assert_array_equal(copy[2].image, source[2].image)


# --- files ------------------------------------------------------------------------------------------------------------------


def saved(tmp_path, image, name="x.png", **options):
    path = str(tmp_path / name)
    image.save(path, **options)
    return path


def test_decode_png_is_exact_and_jpeg_close(tmp_path):
    rgb = gradient()
    np.testing.assert_array_equal(decode(saved(tmp_path, Image.fromarray(rgb))), rgb)
    jpeg = decode(saved(tmp_path, Image.fromarray(rgb), "x.jpg", quality=95, subsampling=0))
    assert np.abs(jpeg.astype(int) - rgb).max() <= 16


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_decode_other_modes_give_rgb(tmp_path, mode):
    picture = Image.fromarray(gradient()).convert(mode)
    path = saved(tmp_path, picture, "x.jpg" if mode in ("CMYK", "YCbCr") else "x.png")
    found = decode(path)
    assert found.shape == (12, 20, 3)
    assert found.dtype == np.uint8
    if mode in ("L", "1", "P"):
        np.testing.assert_array_equal(found, np.asarray(picture.convert("RGB")))
    else:  # through JPEG: the colours, not their inverse
        assert np.abs(found.astype(int) - gradient()).mean() < 12


def test_decode_16_bit_is_scaled_not_clipped(tmp_path):
    deep = np.linspace(0, 65535, 12 * 20).reshape(12, 20).astype(np.uint16)
    found = decode(saved(tmp_path, Image.fromarray(deep)))
    np.testing.assert_array_equal(found, np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_decode_lays_transparency_over_white(tmp_path, mode):
    rgba = np.zeros((4, 6, 4), np.uint8)  # black, left half transparent
    rgba[:, 3:, 3] = 255
    path = str(tmp_path / "x.png")
    if mode == "P":
        picture = Image.fromarray(rgba[:, :, 3] // 255)
        picture = picture.convert("P")
        picture.putpalette([0, 0, 0] * 256)
        picture.save(path, transparency=0)
    else:
        Image.fromarray(rgba).convert(mode).save(path)
    found = decode(path)
    assert (found[:, :3] == 255).all()
    assert (found[:, 3:] == 0).all()


@pytest.mark.parametrize("orientation", range(10))  # 1 to 8 are defined; the others mean nothing
def test_decode_applies_exif_rotation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(gradient()), exif=exif)
    with Image.open(path) as image:
        np.testing.assert_array_equal(decode(path), np.asarray(ImageOps.exif_transpose(image)))
    if orientation == 6:  # to be shown turned by 90 degrees clockwise
        np.testing.assert_array_equal(decode(path), np.rot90(gradient(), -1))


@pytest.mark.filterwarnings("ignore:Metadata Warning")  # the module's filter does so outside of pytest
def test_decode_survives_damaged_exif(tmp_path):
    """A maker's name that is a number: Pillow cannot write such a block, but the pixels and the rotation are whole."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x0132] = "maker", 6, "date" * 40
    damaged = exif.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x0f\x00\x05")  # of the type "fraction"
    assert damaged != exif.tobytes()
    path = saved(tmp_path, Image.fromarray(gradient()), "x.jpg", exif=damaged)
    assert decode(path).shape == (20, 12, 3)
    with Image.open(path) as image, pytest.raises((AttributeError, TypeError, ValueError)):
        ImageOps.exif_transpose(image)  # what makes this test one


def test_decode_takes_the_first_frame_and_goes_by_content(tmp_path):
    frames = [Image.fromarray(np.full((5, 7, 3), value, np.uint8)) for value in (10, 200)]
    path = str(tmp_path / "x.jpg")
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])
    found = decode(path)
    assert found.shape == (5, 7, 3)
    assert (found == 10).all()


def bad_file(kind, place):
    """Writes a file that is no image, in one way or another, and returns its path."""
    path = place / "bad.png"
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(whole, "PNG")
    if kind == "directory":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to(place / "nowhere")
    elif kind == "bomb":
        Image.new("1", (20000, 20000)).save(path)
    elif kind == "mild bomb":  # above Pillow's limit, below twice that: only a warning to Pillow
        Image.new("1", (10000, 10000)).save(path)
    else:
        content = {"empty": b"", "text": b"<html>not found</html>", "truncated": whole.getvalue()[:2000]}[kind]
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty", "the file is empty"),
        ("text", "its content is none of JPEG, PNG"),
        ("truncated", "truncated"),
        ("directory", "directory"),
        ("dangling", "No such file"),
        ("bomb", "exceeds limit"),
        ("mild bomb", "exceeds limit"),
    ],
)
def test_bad_file_is_one_line_with_its_name(tmp_path, kind, words):
    path = bad_file(kind, tmp_path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.filterwarnings("error", category=Image.DecompressionBombWarning)  # pytest resets the filter of the module
        with pytest.raises(DataError) as error:
            decode(str(path))
    one_line(error, path, words, "repair or remove")
    assert not seen


def test_the_bomb_filter_is_set_by_the_module():
    code = """
import warnings
import train.data.decode
from PIL import Image, ImageOps
print([action for action, _, category, *_ in warnings.filters if category is Image.DecompressionBombWarning])
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "['error']"


def test_bit_flips_never_escape_as_another_error(tmp_path):
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpg"):
        whole = io.BytesIO()
        Image.fromarray(gradient(40, 40)).save(whole, "JPEG" if suffix == "jpg" else "PNG")
        refused = []
        for _ in range(100):
            damaged = np.frombuffer(whole.getvalue(), np.uint8).copy()
            for at in rng.integers(0, len(damaged), 3):
                damaged[at] ^= np.uint8(1 << rng.integers(8))
            path = tmp_path / f"x.{suffix}"
            path.write_bytes(damaged.tobytes())
            try:
                found = decode(str(path))
            except DataError as error:
                refused.append(str(error))
            else:
                assert found.dtype == np.uint8
                assert found.shape[2] == 3
        assert refused
        assert all(str(path) in message and "\n" not in message for message in refused)


# --- what is wrong with a source --------------------------------------------------------------------------------------------


def test_unknown_source_lists_the_known():
    with pytest.raises(DataError) as error:
        open_source("imagenet", "train")
    one_line(error, "'imagenet'", *(scheme.usage for scheme in SOURCES.values()))


@pytest.mark.parametrize("spec", ["folder", "folder:"])
def test_folder_without_a_path(spec):
    with pytest.raises(DataError) as error:
        open_source(spec, "train")
    one_line(error, "needs a path", "folder:PATH")


def test_digits_take_classes_and_no_path():
    with pytest.raises(DataError) as error:
        open_source("digits:here", "train")
    one_line(error, "digits/train has no class here")


def test_unknown_split():
    with pytest.raises(ValueError, match="'train' and 'val'"):
        open_source("digits", "test")


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_folders(tmp_path, folder, split):
    with pytest.raises(DataError) as error:
        open_source(f"folder:{tmp_path / 'nowhere'}", split)
    one_line(error, tmp_path / "nowhere" / split, "No such file or directory", "train/<class>/")
    (folder / "val").rename(folder / "held-out")
    with pytest.raises(DataError) as error:
        open_source(f"folder:{folder}", "val")
    one_line(error, folder / "val", "No such file or directory")
    assert len(open_source(f"folder:{folder}", "train[:50%]")) == 9  # train/ alone will do: it can be cut


def test_a_folder_to_measure_on_may_be_called_validation_stand_alone_or_have_no_splits(folder, tmp_path):
    """As others publish them: PATH/validation/<class>, PATH/val/<class> without train, PATH/<class>."""
    val: Any = open_source(f"folder:{folder}", "val")
    pictures = [bytes(val.encoded(k).data) for k in range(3)]

    def found(path):
        source: Any = open_source(f"folder:{path}", "val")
        assert source.classes == ("class0", "class1", "class2")
        return source.name, [bytes(source.encoded(k).data) for k in range(3)]

    (folder / "val").rename(folder / "validation")
    assert found(folder) == (f"folder:{folder}/validation", pictures)
    (tmp_path / "alone").mkdir()
    (folder / "validation").rename(tmp_path / "alone" / "val")
    assert found(tmp_path / "alone") == (f"folder:{tmp_path}/alone/val", pictures)
    assert found(tmp_path / "alone" / "val") == (f"folder:{tmp_path}/alone/val", pictures)
    with pytest.raises(DataError, match="cannot read the folder"):
        open_source(f"folder:{tmp_path}/alone/val", "train")  # which nobody has said is to be trained on


def test_folder_is_a_file(tmp_path):
    (tmp_path / "train").write_text("")
    with pytest.raises(DataError) as error:
        open_source(f"folder:{tmp_path}", "train")
    one_line(error, tmp_path / "train", "Not a directory")


def test_empty_folders(tmp_path, folder):
    (tmp_path / "e" / "train").mkdir(parents=True)
    (tmp_path / "e" / "val").mkdir()
    with pytest.raises(DataError) as error:
        open_source(f"folder:{tmp_path / 'e'}", "train")
    one_line(error, tmp_path / "e" / "train", "no class folders")
    for file in (folder / "val" / "class1").iterdir():
        file.unlink()
    with pytest.raises(DataError) as error:
        open_source(f"folder:{folder}", "val")
    one_line(error, folder / "val" / "class1", "no .jpg, .jpeg, .jpe, .jfif, .png, .webp, .gif or .bmp files")


@pytest.mark.parametrize("split", ["train", "val"])
def test_class_folders_that_differ_are_named(folder, split):
    (folder / "val" / "class2").rename(folder / "val" / "class9")
    with pytest.raises(DataError) as error:
        open_source(f"folder:{folder}", split)
    one_line(error, "only train/ has class2", "only val/ has class9")


def test_many_differing_classes_are_cut_short(folder):
    for k in range(20):
        (folder / "val" / f"extra{k:02d}").mkdir()
    with pytest.raises(DataError) as error:
        open_source(f"folder:{folder}", "train")
    assert "extra04 and 15 more" in one_line(error, "only val/ has extra00")
    assert "only train/" not in str(error.value)
