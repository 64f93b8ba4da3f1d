"""Image files to RGB, with Pillow or, where that is asked for, simplejpeg. What is wrong with a file is one BadImage that names it.

Grey, palette, CMYK and 16-bit files become 8-bit RGB; transparency is laid over white, as a viewer shows it; a rotation that
EXIF or XMP asks for is applied; of an animation the first frame counts. What would take too much memory or time is refused
before it is taken: files above MAX_BYTES, images above Pillow's own limit against decompression bombs (89 million pixels, of
which one takes up to 0.8 GB while it is decoded), JPEGs whose scans, each of which goes over the image again, come to more
than MAX_WORK, and files of more parts than a decoder gets through in time (`train/data/parts.py`).
"""

import io
import os
import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import ExifTags, Image

from train.data.files import open_regular
from train.data.parts import check_parts
from train.data.source import BadImage, DataError

# By content, not by extension: sets hold PNGs named .JPEG, and phones write .jpg files that are MPO, which the JPEG plugin reads.
# These are what sets hold; Pillow's rarer plugins are slow to try and written with less care against hostile files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# The endings by which files, and members of archives, are taken for images; of two that differ in nothing else, the first counts.
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp")

MAX_BYTES = 256 * 2**20  # of one encoded image; the largest JPEG of ImageNet has 15 MB

MAX_WORK = (
    2**32
)  # scans x pixels of a JPEG: some 4 ns each, so 17 s. A progressive JPEG has ten scans; hostile ones have thousands.

# Pillow only warns between one and two times its limit. A filter set once is safe with threads; catch_warnings is not.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# What it says about damaged EXIF tags concerns nobody here, and would break into the progress line.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL.TiffImagePlugin")

Picture = np.ndarray | Image.Image  # uint8 [Y, X, C], C 1 or 3; or Pillow's own, of mode L or RGB


def read_file(path: str) -> bytes:
    """A file's content. Raises BadImage: missing, no file, not readable, above MAX_BYTES."""
    try:
        with open_regular(path) as file:
            check_size(os.fstat(file.fileno()).st_size, path)
            return file.read()
    except OSError as error:
        raise _refusal(path, error, size=None) from error


def check_size(size: int, name: str) -> None:
    """Raises BadImage for an encoded image of `size` bytes that is too large to be one."""
    if size > MAX_BYTES:
        raise BadImage(f"cannot decode the image {name}: it has {size:,} bytes, more than {MAX_BYTES:,}; repair or remove it")


def decode(path: str) -> np.ndarray:
    """The image in a file as uint8 [Y, X, 3]. Raises BadImage."""
    return decode_bytes(read_file(path), path)


def decode_bytes(data: bytes, name: str) -> np.ndarray:
    """The image that a file's content encodes, as uint8 [Y, X, 3]. Raises BadImage."""
    return np.asarray(decode_pillow(data, name))


def decode_pillow(data: bytes, name: str) -> Image.Image:
    """`decode_bytes` without a last copy: Pillow's own image, of mode RGB. Raises BadImage."""
    _check_parts(data, name)
    return _by_pillow(data, name)


def _check_parts(data: bytes, name: str) -> None:
    try:
        check_parts(data)
    except Exception as error:
        raise _refusal(name, error, size=len(data)) from error


def _by_pillow(data: bytes, name: str) -> Image.Image:
    """`decode_pillow` of a file whose parts were counted."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if data[:2] == b"\xff\xd8":
                _check_work(data, image.width * image.height)
            image.load()
            turn, rgb = _turn(image), _rgb(image, data)
    except Exception as error:  # Pillow's plugins raise nearly anything
        raise _refusal(name, error, size=len(data)) from error
    return rgb if turn is None else rgb.transpose(turn)


def decode_fast(data: bytes, name: str) -> Picture:
    """JPEGs through simplejpeg: libjpeg-turbo, as Pillow has it, so the same pixels to the last bit, in a fifth less time.

    What it does not decode to the end without a complaint, and what is not plain (no JPEG, one that may say how to turn it, CMYK,
    huge), goes to Pillow: so the two agree on which images are bad, too. Raises BadImage.
    """
    import simplejpeg

    _check_parts(data, name)
    try:
        if _plain_jpeg(data):
            y, x, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours in ("YCbCr", "Gray") and int(y) * int(x) <= (Image.MAX_IMAGE_PIXELS or 0):
                _check_work(data, int(y) * int(x))
                return simplejpeg.decode_jpeg(data)
    except ValueError:
        pass  # damaged, or as unusual as that: Pillow decides
    return _by_pillow(data, name)


def _plain_jpeg(data: bytes) -> bool:
    """Whether this is a JPEG without a segment in which EXIF or XMP, of any size and at any place, could stand."""
    if data[:2] != b"\xff\xd8":
        return False
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker = data[at + 1]
        if marker in (0xDA, 0xE1):  # the first scan; APP1
            return marker == 0xDA
        at += 1 if marker == 0xFF else 2 if marker == 0x01 or 0xD0 <= marker <= 0xD7 else 2 + (data[at + 2] << 8 | data[at + 3])
    return False


def _check_work(data: bytes, pixels: int) -> None:
    scans = data.count(b"\xff\xda")
    if scans * pixels > MAX_WORK:
        raise ValueError(f"its {scans:,} scans of {pixels:,} pixels would take too long")


@cache
def _fast_is_here() -> bool:
    try:
        import simplejpeg  # noqa: F401
    except ImportError:
        return False
    return True


def decode_auto(data: bytes, name: str) -> Picture:
    """`decode_fast` where simplejpeg is installed, else `decode_pillow`: the same pixels. Raises BadImage."""
    return (decode_fast if _fast_is_here() else decode_pillow)(data, name)


DECODERS: dict[str, Callable[[bytes, str], Picture]] = {"pillow": decode_pillow, "simplejpeg": decode_fast, "auto": decode_auto}


def check_decoder(name: str) -> None:
    """Raises ValueError for an unknown decoder, DataError for one that is not installed."""
    if name not in DECODERS:
        raise ValueError(f"unknown decoder {name!r}; the known ones are {', '.join(DECODERS)}")
    if name == "simplejpeg":
        try:
            import simplejpeg  # noqa: F401
        except ImportError as error:
            raise DataError("the decoder 'simplejpeg' is not installed; pip install 'vitcore[fast]', or use 'pillow'") from error


def _refusal(name: str, error: Exception, *, size: int | None) -> BadImage:
    if isinstance(error, BadImage):
        return error
    if isinstance(error, Image.UnidentifiedImageError):
        reason = "the file is empty" if size == 0 else f"its content is none of {', '.join(FORMATS)}"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
    return BadImage(f"cannot decode the image {name}: {reason}; repair or remove the file")


# By the EXIF orientation. Not ImageOps.exif_transpose: it also writes the EXIF block anew, and damaged tags then raise.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged tags, which Pillow reads with any exception: the picture is as it is stored
        return None


_STRIP = 2**22  # pixels that are converted at a time where that takes copies


def _rgb(image: Image.Image, data: bytes) -> Image.Image:
    """`image`, of any mode, as RGB over white. data: the file, for what Pillow does not say."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if not image.mode.startswith("I") and not image.has_transparency_data:
        return image.convert("RGB")
    key = image.info.get("transparency")
    depth = data[24] if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 24 else 8
    out = Image.new("RGB", image.size)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
            out.paste(_grey_16(strip, key), (0, top))
        elif image.mode in ("1", "L", "RGB"):
            out.paste(_keyed(strip, key, depth), (0, top))
        else:
            strip = strip.convert("RGBA")
            out.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), (0, top))
    return out


def _grey_16(image: Image.Image, key) -> Image.Image:
    values = np.clip(np.asarray(image), 0, 65535)
    grey = (values >> 8).astype(np.uint8)
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _keyed(image: Image.Image, key, depth: int) -> Image.Image:
    """RGB with white where a grey or colour image has the value `key`, which is in units of the file's `depth`, unlike pixels."""
    pixels = np.array(image.convert("RGB"))
    scale = 255 / (2 ** min(depth, 8) - 1)
    values = [round((v >> 8 if depth == 16 else v) * scale) for v in (key if isinstance(key, tuple) else (key,) * 3)]
    pixels[(pixels == np.array(values)).all(axis=2)] = 255
    return Image.fromarray(pixels)
