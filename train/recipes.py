"""Tables 3 and 4 of the paper as data: how each model is pre-trained on each data set, and fine-tuned.

A recipe is what stays fixed from run to run: data size, epochs, learning rate, decay, regularisation, loss. What a run adds
(model, mesh, seed, directory) is the job's. Source: Dosovitskiy et al., ICLR 2021, Table 3 and appendix B.1; (release) and
(later) mark what the authors' public code adds where the paper is silent.
"""

import difflib
from dataclasses import dataclass, replace
from typing import Literal

IMAGENET_EXAMPLES = 1_281_167
IMAGENET21K_EXAMPLES = 14_197_122
JFT_EXAMPLES = 303_000_000  # the paper's "303M high-resolution images"
DIGITS_EXAMPLES = 1_442  # four fifths of each class of scikit-learn's 1797; the rest is held out


def steps_of(epochs: int, examples: int, batch_size: int) -> int:
    """Updates that are `epochs` passes over `examples` images, rounded, at least one."""
    return max(1, round(epochs * examples / batch_size))


@dataclass(frozen=True, kw_only=True)
class ImageFields:
    """What a recipe says of the images: the fields of `train.options.ImageOptions`. The defaults are the authors'."""

    crop: Literal["tensorflow", "torchvision"] = "tensorflow"
    antialias: bool = False
    randaugment: tuple[int, int] = (0, 0)
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_share: Literal["batch", "row"] = "batch"
    erase: float = 0.0
    preprocess: Literal["resize", "resize-center", "center"] = "resize"


@dataclass(frozen=True, kw_only=True)
class Recipe(ImageFields):
    """One way to pre-train. Frozen; `dataclasses.replace` changes a field and checks it again.

    examples: training images of the data set. epochs: passes over them. base_lr: peak learning rate. decay: its shape after the
    warm-up, linear to linear_end or cosine to 0. warmup_steps: linear rise from 0. weight_decay: of kernels only, in the form
    weight_decay_form (`train.optim.optimizer`). dropout: rate in [0, 1). clip_norm: global gradient norm, None = never clipped.
    label_smoothing: share of the target spread evenly over the classes, softmax only (the paper names no value: 0). loss: softmax
    (one label an image) or sigmoid (any number of labels). head_bias: initial bias of the classifier where the loss is the sigmoid,
    which so starts at "none of them" and not at "half of them" (`first_bias`). b1, b2, eps: Adam's. first_moment: dtype
    Adam's first moment is kept in (bfloat16: later). pool, position: of the model, as in `vitcore.ViTConfig`.
    """

    name: str
    examples: int
    epochs: int
    base_lr: float
    decay: Literal["linear", "cosine"]
    weight_decay: float
    dropout: float
    batch_size: int = 4096
    warmup_steps: int = 10_000
    image_size: int = 224
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    loss: Literal["softmax", "sigmoid"] = "softmax"
    head_bias: float = 0.0
    linear_end: float = 1e-5
    weight_decay_form: Literal["adamw", "independent"] = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    first_moment: Literal["float32", "bfloat16"] = "float32"
    pool: str = "token"
    position: str = "1d"

    def __post_init__(self):
        for field in ("examples", "epochs", "batch_size", "image_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} in recipe {self.name!r}: must be at least 1")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} in recipe {self.name!r}: must not be negative")
        if not 0 <= self.dropout < 1 or not 0 <= self.label_smoothing < 1:
            rates = f"dropout={self.dropout}, label_smoothing={self.label_smoothing}"
            raise ValueError(f"{rates} in recipe {self.name!r}: must be in [0, 1)")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm={self.clip_norm} in recipe {self.name!r}: must be positive, or None for no clipping")
        if self.loss == "sigmoid" and self.label_smoothing:
            raise ValueError(f"label_smoothing={self.label_smoothing} in recipe {self.name!r}: only softmax smooths labels")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run: `epochs` passes, to the nearest whole batch (later), at least one."""
        return steps_of(self.epochs, self.examples, self.batch_size)

    def first_bias(self, loss: str) -> float:
        """What the classifier's bias starts at under a loss: head_bias for the sigmoid, 0 for softmax, which no shift changes.

        A sigmoid over V classes with bias 0 costs V log 2, 12,678 for JFT's 18,291: its first steps are so large that a run does
        not recover. With -10 it costs 10.8.
        """
        return self.head_bias if loss == "sigmoid" else 0.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of Table 3: the models it names (a trailing * stands for anything), and every number of epochs it lists."""

    models: tuple[str, ...]
    data: str
    epochs: tuple[int, ...]
    base_lr: float
    decay: Literal["linear", "cosine"]
    weight_decay: float
    dropout: float


def _row(models, data, epochs, base_lr, decay, weight_decay, dropout) -> Row:
    return Row(models=models, data=data, epochs=epochs, base_lr=base_lr, decay=decay, weight_decay=weight_decay, dropout=dropout)


TABLE_3 = (
    _row(("ViT-B/16", "ViT-B/32"), "jft", (7,), 8e-4, "linear", 0.1, 0.0),
    _row(("ViT-L/32",), "jft", (7,), 6e-4, "linear", 0.1, 0.0),
    _row(("ViT-L/16",), "jft", (7, 14), 4e-4, "linear", 0.1, 0.0),
    _row(("ViT-H/14",), "jft", (14,), 3e-4, "linear", 0.1, 0.0),
    _row(("R50x1", "R50x2"), "jft", (7,), 1e-3, "linear", 0.1, 0.0),
    _row(("R101x1",), "jft", (7,), 8e-4, "linear", 0.1, 0.0),
    _row(("R152x1", "R152x2"), "jft", (7,), 6e-4, "linear", 0.1, 0.0),
    _row(("R50+ViT-B/16", "R50+ViT-B/32"), "jft", (7,), 8e-4, "linear", 0.1, 0.0),
    _row(("R50+ViT-L/32",), "jft", (7,), 2e-4, "linear", 0.1, 0.0),
    _row(("R50+ViT-L/16",), "jft", (7, 14), 4e-4, "linear", 0.1, 0.0),
    _row(("ViT-B/16", "ViT-B/32"), "imagenet21k", (90,), 1e-3, "linear", 0.03, 0.1),
    _row(("ViT-L/16", "ViT-L/32"), "imagenet21k", (30, 90), 1e-3, "linear", 0.03, 0.1),
    _row(("ViT-*",), "imagenet", (300,), 3e-3, "cosine", 0.3, 0.1),
)

# What a data set brings to all of its rows. Clipping on ImageNet only (Table 3's caption); JFT and ImageNet-21k label an image
# with several classes, hence the sigmoid (later), and the head bias: -10 (release), which the later code takes for JFT as well, and
# -6.9, about -log 1000, where ImageNet is trained with the sigmoid (later; the paper does not name ImageNet's loss).
DATA = {
    "jft": dict(examples=JFT_EXAMPLES, loss="sigmoid", head_bias=-10.0),
    "imagenet21k": dict(examples=IMAGENET21K_EXAMPLES, loss="sigmoid", head_bias=-10.0),
    "imagenet": dict(examples=IMAGENET_EXAMPLES, clip_norm=1.0, head_bias=-6.9),
}

# Not of the paper: the default run, small enough for two CPU cores.
DIGITS = Recipe(
    name="digits", examples=DIGITS_EXAMPLES, epochs=107, base_lr=2e-3, decay="cosine", weight_decay=0.1, dropout=0.1,
    batch_size=128, warmup_steps=100, image_size=8, clip_norm=1.0, antialias=True, mixup_share="row",
)  # fmt: skip

# Beyer, Zhai and Kolesnikov, "Better plain ViT baselines for ImageNet-1k" (arXiv:2205.01580), as in the authors' later code: S/16
# on train[:99%]. Published: 76.5 % after 90 epochs, 80.0 % after 300; others who ran it found 76.7 to 76.9 and 79.75. Images are
# measured with their shape kept (preprocess center), where Table 3's recipes resize to the square.
PLAIN = Recipe(
    name="plain", examples=1_268_355, epochs=90, base_lr=1e-3, decay="cosine", weight_decay=1e-4, weight_decay_form="independent",
    dropout=0.0, batch_size=1024, clip_norm=1.0, first_moment="bfloat16", randaugment=(2, 10), mixup=0.2, pool="gap",
    position="sincos2d", preprocess="center",
)  # fmt: skip
PLAIN_RECIPES = {"plain": PLAIN, "plain-300ep": replace(PLAIN, name="plain-300ep", epochs=300)}


def default_model(name: str, *, masked: bool = False) -> str:
    """The model that a recipe is for, where there is one. masked: for masked patch prediction, to which digits of four patches show
    too little."""
    if masked and name == "digits":
        return "ViT-Nano/2"
    return "ViT-Nano/4" if name == "digits" else "ViT-S/16" if name in PLAIN_RECIPES else "ViT-B/16"


def names() -> tuple[str, ...]:
    """Every name `recipe` knows. Where Table 3 lists two numbers of epochs, "DATA-Nep" picks one of them."""
    listed = {f"{row.data}-{epochs}ep" for row in TABLE_3 if len(row.epochs) > 1 for epochs in row.epochs}
    return ("digits", *DATA, *sorted(listed), *PLAIN_RECIPES)


def recipe(name: str, model: str) -> Recipe:
    """The recipe of a name, for a model.

    name: "digits" (any model), "plain" (any ViT), or a data set of Table 3: "jft", "imagenet21k", "imagenet". Where a row lists two
    numbers of epochs the bare name takes the first, and "jft-14ep", "imagenet21k-90ep" say which. model: a variant's name,
    "ViT-B/16". A hybrid without a row of its own takes that of its ViT ("Hybrid models are trained with the exact setup as their
    ViT counterparts", B.1). Raises ValueError, nearest names shown, for a name, a model or a number of epochs that the table lacks.

        >>> recipe("imagenet", "ViT-B/16").base_lr
        0.003
    """
    if name == "digits":
        return DIGITS
    if name in PLAIN_RECIPES:
        if not model.startswith("ViT-"):
            raise ValueError(f"recipe {name!r} trains plain ViTs, and {model!r} is none: give ViT-S/16, or another --recipe")
        return PLAIN_RECIPES[name]
    data, _, asked = name.partition("-")
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4) or names()
        raise ValueError(f"unknown recipe {name!r}: the nearest are {', '.join(near)}")
    rows = [row for row in TABLE_3 if row.data == data]
    row = _find(rows, model) or _find(rows, model.removeprefix("R50+"))
    if row is None:
        known = tuple(known for row in rows for known in row.models)
        near = difflib.get_close_matches(model, known, n=3, cutoff=0.4) or known
        raise ValueError(f"Table 3 trains no {model!r} on {data}: the nearest are {', '.join(near)}; or take another --recipe")
    epochs = row.epochs[0] if not asked else int(asked.removesuffix("ep"))
    if epochs not in row.epochs:
        listed = " or ".join(map(str, row.epochs))
        raise ValueError(f"recipe {name!r}: Table 3 trains {model!r} on {data} for {listed} epochs, not {epochs}")
    return Recipe(
        name=name,
        epochs=epochs,
        base_lr=row.base_lr,
        decay=row.decay,
        weight_decay=row.weight_decay,
        dropout=row.dropout,
        **DATA[data],
    )


def _find(rows, model: str) -> Row | None:
    for row in rows:
        if any(model.startswith(known[:-1]) if known.endswith("*") else model == known for known in row.models):
            return row
    return None


# --- fine-tuning: Table 4 -----------------------------------------------------------------------------------------------------

GRID = (0.001, 0.003, 0.01, 0.03)


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(ImageFields):
    """One way to fine-tune: cosine decay, and by default SGD with momentum and no weight decay. Frozen, checked.

    steps: updates. base_lrs: the grid of peak learning rates; the first is not the best, a sweep finds that. dev_share: part of the
    training images on which the sweep chooses. warmup_steps: linear rise from 0 (500: release; 100 for runs of 500 steps: later).
    runs: on all of train after the choice, whose mean and deviation count. polyak: decay of the parameters' average, 0 for none.
    optimizer, and weight_decay and layer_decay of adamw: see `train.optim`.
    drop_path: `ViTConfig.drop_path`.
    """

    name: str
    steps: int
    base_lrs: tuple[float, ...]
    dev_share: float
    warmup_steps: int = 500
    batch_size: int = 512
    momentum: float = 0.9
    clip_norm: float = 1.0
    image_size: int = 384
    runs: int = 3
    polyak: float = 0.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    label_smoothing: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self):
        if not 0 <= self.warmup_steps < self.steps or min(self.batch_size, self.image_size, self.runs) < 1:
            raise ValueError(
                f"steps={self.steps}, warmup_steps={self.warmup_steps}, batch_size={self.batch_size}, "
                f"image_size={self.image_size}, runs={self.runs} in recipe {self.name!r}: "
                "positive numbers and a warm-up shorter than the run are required"
            )
        if not self.base_lrs or min(self.base_lrs) <= 0 or not 0 < self.dev_share < 1 or not 0 <= self.polyak < 1:
            raise ValueError(
                f"base_lrs={self.base_lrs}, dev_share={self.dev_share}, polyak={self.polyak} in recipe {self.name!r}: "
                "rates above 0, a share in (0, 1) and a decay in [0, 1) are required"
            )


def _finetune(name, steps, base_lrs, dev_share, **more) -> FinetuneRecipe:
    return FinetuneRecipe(name=name, steps=steps, base_lrs=base_lrs, dev_share=dev_share, **more)


# Table 4, and the shares of train that appendix B.1.1 holds out to choose on; VTAB chooses on 200 of its 1000 images.
TABLE_4 = {
    recipe.name: recipe
    for recipe in (
        _finetune("imagenet", 20_000, (0.003, 0.01, 0.03, 0.06), 0.01),
        _finetune("cifar100", 10_000, GRID, 0.02),
        _finetune("cifar10", 10_000, GRID, 0.02),
        _finetune("pets", 500, GRID, 0.1, warmup_steps=100),
        _finetune("flowers", 500, GRID, 0.1, warmup_steps=100),
        _finetune("vtab", 2_500, (0.01,), 0.2),
    )
}

# Not of the paper: ImageNet by AdamW, after what MAE (B: 83.6 %, L: 85.9 %) and DeiT-III publish; DeiT-III's stochastic depth goes
# with the model's size, and this is its B's. What they have and this has not: a RandAugment of other changes whose magnitude of 9
# varies, bicubic resizing, crops of 8 % at least, a cosine that ends at 1e-6, and MAE's head on the mean of the patches.
_ADAMW = dict(
    batch_size=1024, clip_norm=0.0, image_size=224, runs=1, optimizer="adamw", label_smoothing=0.1, mixup=0.8, cutmix=1.0,
    randaugment=(2, 9), antialias=True, crop="torchvision", preprocess="center",
)  # fmt: skip
_EPOCH = IMAGENET_EXAMPLES / 1024
ADAMW = {
    recipe.name: recipe
    for recipe in (
        _finetune("mae-b", round(100 * _EPOCH), (2e-3,), 0.01, warmup_steps=round(5 * _EPOCH), erase=0.25,
                  weight_decay=0.05, layer_decay=0.65, drop_path=0.1, **_ADAMW),
        _finetune("mae-l", round(50 * _EPOCH), (4e-3,), 0.01, warmup_steps=round(5 * _EPOCH), erase=0.25,
                  weight_decay=0.05, layer_decay=0.75, drop_path=0.2, **_ADAMW),
        _finetune("deit3", round(40 * _EPOCH), (1e-5,), 0.01, warmup_steps=round(10 * _EPOCH),
                  weight_decay=0.1, drop_path=0.15, **_ADAMW | {"batch_size": 512}),
    )
}  # fmt: skip

# Table 2's ImageNet runs: higher resolutions for the two largest models, and averaged parameters (appendix B.1.1).
TABLE_2_POLYAK = 0.9999
TABLE_2_SIZES = {"L/16": 512, "H/14": 518}

# In fine-tuning the release drops out in these models, by (width, pixels a patch, whether a ResNet stands before it): L/16, H/14,
# R50+B/16 and R50+L/32; in B/16, B/32 and L/32 it does not.
RELEASE_DROPOUT = {(1024, 16, False): 0.1, (1280, 14, False): 0.1, (768, 16, True): 0.1, (1024, 32, True): 0.1}


def finetune_dropout(width: int, patch_size: int, *, hybrid: bool = False) -> float:
    """The dropout with which the release fine-tunes a model; 0 for one that it does not have."""
    return RELEASE_DROPOUT.get((width, patch_size, hybrid), 0.0)


# Not of the paper: the digits that pre-training has not seen, within a minute on two CPU cores. Of 8x8 pixels, and 144 a class.
DIGITS_FINETUNE = _finetune(
    "digits", 300, (0.01, 0.03, 0.1, 0.3), 0.1, warmup_steps=30, batch_size=128, image_size=8, antialias=True, mixup_share="row",
)  # fmt: skip


def finetune_recipe(name: str, *, width: int | None = None, patch_size: int | None = None) -> FinetuneRecipe:
    """The fine-tuning recipe of a name: a row of Table 4, "imagenet-table2", one of ADAMW, or "digits".

    width, patch_size: of the model, which imagenet-table2 asks for: L/16 (width 1024) takes 512 pixels, H/14 (width 1280) 518,
    others 384. Raises ValueError, with the nearest names, for one there is not.

        >>> finetune_recipe("cifar100").steps
        10000
    """
    known = {"digits": DIGITS_FINETUNE, **TABLE_4, **ADAMW}
    if name in known:
        return known[name]
    if name == "imagenet-table2":
        model = {1024: "L", 1280: "H"}.get(width or 0, "?") + f"/{patch_size}"
        size = TABLE_2_SIZES.get(model, TABLE_4["imagenet"].image_size)
        return replace(TABLE_4["imagenet"], name=name, image_size=size, polyak=TABLE_2_POLYAK)
    near = difflib.get_close_matches(name, [*known, "imagenet-table2"], n=3, cutoff=0.4) or [*known, "imagenet-table2"]
    raise ValueError(f"unknown fine-tuning recipe {name!r}: the nearest are {', '.join(near)}")
