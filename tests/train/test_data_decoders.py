"""Decoders against each other and against what was stored: orientation wherever it stands, transparency of every kind of PNG."""

import io
import resource
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from train.data import BadImage, open_source
from train.data.decode import DECODERS, MAX_WORK, decode_bytes

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)
PHOTO = np.asarray(Image.fromarray(RNG.integers(0, 255, (5, 7, 3), np.uint8)).resize((35, 25)))
WHITE = np.full(3, 255)


def saved(picture, kind, **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def every(data, name="x"):
    """What each decoder makes of a file, which is one thing."""
    found = {decoder: np.asarray(function(data, name)) for decoder, function in DECODERS.items()}
    first = found["pillow"]
    for image in found.values():
        np.testing.assert_array_equal(np.broadcast_to(image.reshape(*image.shape[:2], -1), first.shape), first)
    return first


# --- orientation --------------------------------------------------------------------------------------------------------------

TURNS = {  # EXIF's eight, as what a viewer shows of the stored [Y, X]
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a),
}  # fmt: skip


def exif(orientation, filler=0):
    """A block of EXIF with an orientation, and a maker's note of `filler` bytes."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    if filler:
        tags[0x927C] = bytes(filler)
    return tags.tobytes()


def xmp(orientation):
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        f'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>'
    ).encode()


def segment(marker, content):
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def with_segments(jpeg, *segments):
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("where", ["exif", "large exif", "exif behind 60 kB", "xmp", "png", "webp"])
def test_a_picture_is_upright_wherever_it_says_how(where, orientation):
    picture = Image.fromarray(PHOTO)
    plain = saved(picture, "JPEG")
    tags = exif(orientation)
    data = {
        "exif": lambda: with_segments(plain, segment(0xE1, tags)),
        "large exif": lambda: saved(picture, "JPEG", exif=exif(orientation, 60_000)),
        "exif behind 60 kB": lambda: with_segments(plain, segment(0xE2, bytes(60_000)), segment(0xE1, tags)),
        "xmp": lambda: with_segments(plain, segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(orientation))),
        "png": lambda: saved(picture, "PNG", exif=tags),
        "webp": lambda: saved(picture, "WEBP", exif=tags, lossless=True),
    }[where]()
    stored = decode_bytes(plain, "x") if "JFIF" in repr(data[:20]) or data[:2] == b"\xff\xd8" else PHOTO
    np.testing.assert_array_equal(every(data), TURNS[orientation](stored))


def test_damaged_tags_leave_a_picture_as_it_is_stored():
    data = saved(Image.fromarray(PHOTO), "JPEG")
    broken = with_segments(data, segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"))
    np.testing.assert_array_equal(every(broken), decode_bytes(data, "x"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}, {"optimize": True}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_every_kind_have_the_same_pixels(mode, options):
    every(saved(Image.fromarray(PHOTO).convert(mode), "JPEG", **options))


# --- transparency -------------------------------------------------------------------------------------------------------------


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(colour, depth, rows, *, palette=b"", transparent=None, width):
    """A PNG made by hand: rows are bytes as the file has them."""
    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0))
    out += chunk(b"PLTE", palette) if palette else b""
    out += chunk(b"tRNS", transparent) if transparent is not None else b""
    return out + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + chunk(b"IEND", b"")


def grey(*values):
    return np.array([[v] * 3 for v in values])[None]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(0, 1, [b"\x40"], width=2, transparent=b"\0\0"), grey(255, 255)),
        (png(0, 1, [b"\x40"], width=2, transparent=b"\0\1"), grey(0, 255)),
        (png(0, 2, [b"\x1b"], width=4, transparent=b"\0\1"), grey(0, 255, 170, 255)),
        (png(0, 4, [b"\x0f\x70"], width=3, transparent=b"\0\7"), grey(0, 255, 255)),
        (png(0, 8, [b"\x00\x07\x77"], width=3, transparent=b"\0\7"), grey(0, 255, 0x77)),
        (png(0, 16, [b"\x12\x34\x12\x35"], width=2, transparent=b"\x12\x34"), grey(255, 0x12)),
        (png(0, 16, [b"\x12\x34\xff\x35"], width=2), grey(0x12, 0xFF)),
        (png(2, 8, [b"\1\2\3\1\2\4"], width=2, transparent=b"\0\1\0\2\0\3"), np.array([[WHITE, (1, 2, 4)]])),
        (
            png(3, 1, [b"\x40"], width=2, palette=b"\x09\x09\x09\x50\x60\x70", transparent=b"\0"),
            np.array([[WHITE, (0x50, 0x60, 0x70)]]),
        ),
        (png(3, 8, [b"\0\1"], width=2, palette=b"\0\0\0\xc8\xc8\xc8", transparent=b"\x80\xff"), grey(127, 200)),
        (png(4, 8, [b"\x10\x00\x10\xff"], width=2), grey(255, 16)),
        (png(4, 16, [b"\x10\0\0\0\x10\0\xff\xff"], width=2), grey(255, 16)),
        (png(6, 8, [b"\1\2\3\0\1\2\3\xff"], width=2), np.array([[WHITE, (1, 2, 3)]])),
        (png(6, 16, [b"\1\0\2\0\3\0\0\0\1\0\2\0\3\0\xff\xff"], width=2), np.array([[WHITE, (1, 2, 3)]])),
    ],
    ids=["1", "1-one", "2", "4", "8", "16", "16-plain", "rgb", "palette-1", "palette-8", "la", "la-16", "rgba", "rgba-16"],
)
def test_transparency_of_every_kind_of_png_lies_over_white(data, expected):
    np.testing.assert_array_equal(every(data), expected)


@pytest.mark.parametrize("kind", ["WEBP", "GIF"])
def test_transparency_of_other_forms_lies_over_white(kind):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (200, 10, 20, 255)
    found = every(saved(Image.fromarray(rgba), kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert (found[2:] == 255).all()
    assert np.abs(found[:2].astype(int) - (200, 10, 20)).max() <= 8  # a GIF's palette is coarse


def test_strips_are_the_whole(monkeypatch):
    """What is converted in parts, for its memory, is what it would be at once."""
    rgba = Image.fromarray(RNG.integers(0, 255, (50, 30, 4), np.uint8))
    data = saved(rgba, "PNG")
    whole = decode_bytes(data, "x")
    monkeypatch.setattr("train.data.decode._STRIP", 70)
    np.testing.assert_array_equal(decode_bytes(data, "x"), whole)
    over = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    np.testing.assert_array_equal(whole, np.asarray(over))


# --- hostile files ------------------------------------------------------------------------------------------------------------


def test_a_jpeg_of_thousands_of_scans_is_a_bad_image_at_once():
    plain = saved(Image.new("RGB", (3000, 3000)), "JPEG", progressive=True)
    last = plain.rindex(b"\xff\xda")
    hostile = plain[:-2] + plain[last:-2] * 3000 + b"\xff\xd9"
    assert MAX_WORK < 3000 * 3000 * 3000
    for function in DECODERS.values():
        begun = time.perf_counter()
        with pytest.raises(BadImage, match=r"scans of 9,000,000 pixels would take too long"):
            function(hostile, "x.jpg")
        assert time.perf_counter() - begun < 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["JPEG RGB", "PNG RGBA", "PNG P", "PNG I;16", "JPEG turned"])
def test_the_largest_pictures_take_the_memory_that_is_stated(tmp_path, kind):
    """89 million pixels, less one row, in a process of its own: 0.8 GB, which the docstring of train.data.decode says."""
    side, (form, mode) = (9459, 9459), kind.split(" ")
    mode = "RGB" if mode == "turned" else mode
    options = {"exif": exif(6)} if kind == "JPEG turned" else {"transparency": 0} if mode == "P" else {}
    Image.new(mode, side).save(tmp_path / "x", form, **options)
    script = (
        "import resource, sys\nfrom train.data.decode import decode_pillow, read_file\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert decode_pillow(read_file(sys.argv[1]), 'x').size == (9459, 9459)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x")], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 0.8e9


def test_a_parquet_that_names_one_image_many_times_takes_the_memory_of_one(tmp_path):
    big, rows = RNG.bytes(2**20), 2_000_000
    image = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([big]))
    table = pa.table({"image": image, "label": np.zeros(rows, np.int64)})
    pq.write_table(table, tmp_path / "train-0.parquet", store_schema=False, dictionary_pagesize_limit=2**30, row_group_size=rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="more than it has bytes"):
        open_source(f"parquet:{tmp_path}", "train")
    few = pa.table({"image": image[:3000], "label": np.zeros(3000, np.int64)})  # 3 GB written out
    pq.write_table(few, tmp_path / "train-0.parquet", store_schema=False, dictionary_pagesize_limit=2**30)
    assert open_source(f"parquet:{tmp_path}", "train").encoded(7).data == big  # type: ignore[attr-defined]
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 5e8
