"""Image files to uint8 RGB, with Pillow. Whatever is wrong with a file comes out as one DataError that names it.

Grey, palette, CMYK and 16-bit files become 8-bit RGB; transparency is laid over white, as a viewer shows it; an EXIF rotation
is applied; of an animation the first frame counts. Larger images than Pillow's own limit against decompression bombs are refused.
"""

import os
import warnings

import numpy as np
from PIL import ExifTags, Image

from train.data.source import DataError

# By content, not by extension: sets hold PNGs named .JPEG, and phones write .jpg files that are MPO, which the JPEG plugin reads.
# These four are what Pillow loads at once; its rarer plugins are slow to try and written with less care against hostile files.
FORMATS = ("JPEG", "PNG", "GIF", "BMP")

# Pillow only warns between one and two times its limit. A filter set once is safe with threads; catch_warnings is not.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# What it says about damaged EXIF tags concerns nobody here, and would break into the progress line.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL.TiffImagePlugin")


def check_header(path: str) -> None:
    """Reads enough of a file to know that it is an image of a sane size; some 0.1 ms. Raises DataError."""
    try:
        with Image.open(path, formats=FORMATS):
            pass
    except Exception as error:  # Pillow's plugins raise nearly anything
        raise _refusal(path, error) from error


def decode(path: str) -> np.ndarray:
    """The image in a file as uint8 [Y, X, 3]. Raises DataError."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            return np.asarray(_rgb(_upright(image)))
    except Exception as error:  # as above
        raise _refusal(path, error) from error


def _refusal(path: str, error: Exception) -> DataError:
    if isinstance(error, Image.UnidentifiedImageError):
        reason = "the file is empty" if os.path.getsize(path) == 0 else f"its content is none of {', '.join(FORMATS)}"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"cannot decode the image {path}: {reason}; repair or remove the file")


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
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
