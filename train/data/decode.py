"""Image files to RGB, with Pillow or, where that is asked for, simplejpeg. What is wrong with a file is one BadImage that names it.

Grey, palette, CMYK and 16-bit files become 8-bit RGB; transparency is laid over white, as a viewer shows it; an EXIF rotation
is applied; of an animation the first frame counts. What would take too much memory is refused before it is taken: files above
MAX_BYTES, and images above Pillow's own limit against decompression bombs (89 million pixels, 0.36 GB while one is decoded).
"""

import io
import os
import stat
import warnings
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image

from train.data.source import BadImage, DataError

# By content, not by extension: sets hold PNGs named .JPEG, and phones write .jpg files that are MPO, which the JPEG plugin reads.
# These four are what Pillow loads at once; its rarer plugins are slow to try and written with less care against hostile files.
FORMATS = ("JPEG", "PNG", "GIF", "BMP")

MAX_BYTES = 256 * 2**20  # of one encoded image; the largest JPEG of ImageNet has 15 MB

# Pillow only warns between one and two times its limit. A filter set once is safe with threads; catch_warnings is not.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# What it says about damaged EXIF tags concerns nobody here, and would break into the progress line.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL.TiffImagePlugin")

Picture = np.ndarray | Image.Image  # uint8 [Y, X, C], C 1 or 3; or Pillow's own, of mode L or RGB


def read_file(path: str) -> bytes:
    """A file's content. Raises BadImage: missing, no file, not readable, above MAX_BYTES."""
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever. Through open, which also closes what it refuses
        # (a directory); a descriptor of our own stayed open.
        with open(path, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError("it is no regular file")
            check_size(status.st_size, path)
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
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            return _rgb(_upright(image))
    except Exception as error:  # Pillow's plugins raise nearly anything
        raise _refusal(name, error, size=len(data)) from error


_EXIF = b"Exif\0\0"


def decode_fast(data: bytes, name: str) -> Picture:
    """JPEGs through simplejpeg: libjpeg-turbo, as Pillow has it, so the same pixels to the last bit, in a fifth less time.

    What it does not decode to the end without a complaint, and what is not plain (no JPEG, an EXIF block, CMYK, huge), goes
    to Pillow: so the two agree on which images are bad, too. Raises BadImage.
    """
    import simplejpeg

    if data[:2] == b"\xff\xd8" and _EXIF not in data[:4096]:
        try:
            y, x, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours in ("YCbCr", "Gray") and int(y) * int(x) <= (Image.MAX_IMAGE_PIXELS or 0):
                return simplejpeg.decode_jpeg(data)
        except ValueError:
            pass  # damaged, or as unusual as that: Pillow decides
    return decode_pillow(data, name)


DECODERS: dict[str, Callable[[bytes, str], Picture]] = {"pillow": decode_pillow, "simplejpeg": decode_fast}


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


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
        grey = np.clip(np.asarray(image), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
