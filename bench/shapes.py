"""The named shapes that benchmarks and compile tests share: what the model sizes of the paper look like to a kernel."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from vitcore import ViTConfig, variant


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model at an image size; the letters of an op follow from its config."""

    name: str
    model: str
    image_size: int

    @property
    def config(self) -> ViTConfig:
        return variant(self.model, image_size=self.image_size, num_classes=1000)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """What to say of a name that is none of `known`: the nearest of them, then all."""
    near = difflib.get_close_matches(name, known := list(known), 1, cutoff=0.5)
    guess = f": did you mean {near[0]!r}?" if near else ";"
    return f"unknown {what} {name!r}{guess} known: {', '.join(known)}"


def shape(name: str) -> Shape:
    """The shape called MODEL@PIXELS, such as B/16@224."""
    model, image_size = name.split("@")
    return Shape(name=name, model=f"ViT-{model}", image_size=int(image_size))


SHAPES = {
    name: shape(name) for name in ("B/16@224", "L/16@224", "H/14@224", "B/16@384", "L/16@384", "B/16@512", "L/16@512", "H/14@518")
}
OPS = ("patch_embed", "attention", "attention_half", "mlp_half", "layer_norm")
KEEPING = ("attention_half", "mlp_half")  # those that can keep more than x for the backward pass


def flops(op: str, config: ViTConfig, batch: int, *, backward: bool = False, image: bool = False) -> int:
    """FLOPs of the matrix products that an op must do, two a multiply-add; recomputation is not counted, nor are other operations.

    backward: forward and backward together, each product having two more behind it (one for a patch embedding, two with `image`).
    """
    c = config
    rows, d = batch * c.tokens, c.width
    grid_y, grid_x = c.grid
    products = {
        "patch_embed": 2 * batch * grid_y * grid_x * c.patch_size**2 * c.channels * d,
        "attention": 4 * rows * c.tokens * d,
        "attention_half": 2 * rows * d * 4 * d + 4 * rows * c.tokens * d,
        "mlp_half": 4 * rows * d * c.mlp_dim,
        "layer_norm": 0,
    }[op]
    return products * ((3 if image or op != "patch_embed" else 2) if backward else 1)


def model_flops(config: ViTConfig, batch: int, *, train: bool = False) -> int:
    """FLOPs of the matrix products of a whole forward pass, or of a training step (three times as many)."""
    blocks = config.depth * (flops("attention_half", config, batch) + flops("mlp_half", config, batch))
    rest = flops("patch_embed", config, batch) + 2 * batch * config.feature_size * config.num_classes
    return (blocks + rest) * (3 if train else 1)
