"""RandAugment (Cubuk et al., 2020) as the authors' later recipes have it: N changes, each one of sixteen, at magnitude M.

Every change is applied, whatever it is, and the same one may come twice. At magnitude M of 10 (above 10 goes on likewise):

    AutoContrast, Equalize, Invert            no argument
    Rotate                                    +-30 M/10 degrees
    Posterize                                 int(4 M/10) bits stay of each byte
    Solarize                                  bytes from int(256 M/10) on are inverted
    SolarizeAdd                               int(110 M/10) is added to bytes below 128
    Color, Contrast, Brightness, Sharpness    blended with grey, one grey, black, a smoothed copy, by 0.1 + 1.8 M/10
    ShearX, ShearY                            +-0.3 M/10
    TranslateX, TranslateY                    +-100 M/10 pixels
    Cutout                                    a grey square of twice int(40 M/10) pixels, its centre anywhere

The sign is one or the other; what comes in at an edge is grey (128); pixels are taken by nearest neighbour. An oddity of theirs is
kept: Contrast's one grey is the number of pixels / 256, at most 255 (196 at 224 x 224), where their mean is meant. Images are
Pillow's, mode L or RGB, already cropped and resized.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter, ImageOps

DRAWS = 4  # of one change: which, sign, and Cutout's centre
GREY = 128


def randaugment(image: Image.Image, draws: np.ndarray, layers: int, magnitude: int) -> Image.Image:
    """`image` after `layers` changes; draws: float [DRAWS * layers] in [0, 1)."""
    changes = tuple(OPS.values())
    for which, sign, down, right in draws.reshape(layers, DRAWS).tolist():
        change = changes[int(which * len(changes))]
        image = change(image, magnitude / 10, -1.0 if sign < 0.5 else 1.0, (down, right))
    return image


def _fill(image: Image.Image):
    return GREY if image.mode == "L" else (GREY,) * 3


def _moved(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """The image whose pixel (x, y) is that of `image` at the place that the matrix names, by pixels and not by their centres."""
    a, b, c, d, e, f = matrix
    # Pillow asks for the place of (x + 1/2, y + 1/2) and takes the pixel there: the halves come off again
    shifted = (a, b, c + (1 - a - b) / 2, d, e, f + (1 - d - e) / 2)
    return image.transform(
        image.size, Image.Transform.AFFINE, shifted, Image.Resampling.NEAREST, fillcolor=_fill(image)
    )  # fmt: skip


def _blend(degenerate: Callable[[Image.Image], Image.Image]):
    def change(image, m, *_):
        return Image.blend(degenerate(image), image, 0.1 + 1.8 * m)

    return change


def _one_grey(image: Image.Image) -> Image.Image:
    grey = int(min(255.0, image.width * image.height / 256))
    return Image.new(image.mode, image.size, grey if image.mode == "L" else (grey,) * 3)


def _grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert(image.mode)


def _posterize(image: Image.Image, m: float, *_) -> Image.Image:
    shift = 8 - min(8, int(4 * m))
    return image.point([byte >> shift << shift for byte in range(256)] * len(image.getbands()))


def _solarize(image: Image.Image, m: float, *_) -> Image.Image:
    first = int(256 * m)
    return image.point([byte if byte < first else 255 - byte for byte in range(256)] * len(image.getbands()))


def _solarize_add(image: Image.Image, m: float, *_) -> Image.Image:
    more = int(110 * m)
    return image.point([min(255, byte + more) if byte < 128 else byte for byte in range(256)] * len(image.getbands()))


def _cutout(image: Image.Image, m: float, _, centre: tuple[float, float]) -> Image.Image:
    half = int(40 * m)
    y, x = int(centre[0] * image.height), int(centre[1] * image.width)
    image = image.copy()
    image.paste(_fill(image), (max(0, x - half), max(0, y - half), min(image.width, x + half), min(image.height, y + half)))
    return image


# each: (image, magnitude / 10, sign, centre in [0, 1)) -> image
OPS: dict[str, Callable[..., Image.Image]] = {
    "AutoContrast": lambda image, *_: ImageOps.autocontrast(image),
    "Equalize": lambda image, *_: ImageOps.equalize(image),
    "Invert": lambda image, *_: ImageOps.invert(image),
    "Rotate": lambda image, m, sign, _: image.rotate(sign * 30 * m, Image.Resampling.NEAREST, fillcolor=_fill(image)),
    "Posterize": _posterize,
    "Solarize": _solarize,
    "Color": _blend(_grey),
    "Contrast": _blend(_one_grey),
    "Brightness": _blend(lambda image: Image.new(image.mode, image.size)),
    "Sharpness": _blend(lambda image: image.filter(ImageFilter.SMOOTH)),
    "ShearX": lambda image, m, sign, _: _moved(image, (1, sign * 0.3 * m, 0, 0, 1, 0)),
    "ShearY": lambda image, m, sign, _: _moved(image, (1, 0, 0, sign * 0.3 * m, 1, 0)),
    "TranslateX": lambda image, m, sign, _: _moved(image, (1, 0, sign * 100 * m, 0, 1, 0)),
    "TranslateY": lambda image, m, sign, _: _moved(image, (1, 0, 0, 0, 1, sign * 100 * m)),
    "Cutout": _cutout,
    "SolarizeAdd": _solarize_add,
}
