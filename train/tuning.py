"""Fine-tuning from options to a finished run: what `train.finetune`, its sweep and `train.vtab` share.

full, session = prepare(Finetune(init=..., data=...), stop)
result = fine_tune(full, out, session)
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from train import distributed, job, recipes
from train.job import check_claim, say
from train.optimizers import WHOLE, SamOptions, named
from train.options import INIT_OPTIONS, PLACEMENT, ImageOptions, InitOptions, check_init, check_numbers, resolve_images
from train.signals import Stop
from vitcore.normalisation import HALF


@dataclass(frozen=True, kw_only=True)
class Finetune(InitOptions, SamOptions, ImageOptions):
    """Fine-tune a Vision Transformer. Whatever is not given comes from the recipe (paper Table 4)."""

    init: str = ""
    """What to start from: .npz, .safetensors, or the directory of a run. Required."""
    data: str = "digits"
    """digits, digits:5-9, folder:PATH, ...: as in train.pretrain."""
    split: str = "train"
    """Of the data: what to train on. Ranges and classes in brackets, as in train[:800]."""
    test_split: str = "val"
    """What to measure on."""
    recipe: str | None = None
    """imagenet, cifar10, cifar100, pets, flowers, vtab, imagenet-table2; mae-b, mae-l, deit3: ImageNet by AdamW; digits. Default:
    digits or imagenet."""
    dev: bool = False
    """Train on all but the recipe's share of --split, measure on that share."""
    sweep: bool = False
    """The grid on the dev split, then the best rate on all of --split, several times."""
    out: str | None = None
    """Directory of the run or sweep. Default: runs/ and a name made from the configuration."""
    config: str | None = None
    """A config.json whose values replace the defaults."""

    seed: int = 0
    """Of order, augmentation and dropout; the runs of a sweep take this and the following ones."""
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    """Of one run. Default: the third of the recipe's grid."""
    learning_rates: tuple[float, ...] = ()
    """The grid of a sweep. Default: the recipe's."""
    runs: int | None = None
    """Runs on all of --split at the end of a sweep."""
    warmup_steps: int | None = None
    clip_norm: float | None = None
    """Bound of the global gradient norm; 0 for none."""
    optimizer: Literal["sgd", "adamw", "lion", "adafactor", "muon"] | None = None
    """Default: the recipe's; Table 4's is sgd. The last three want --learning-rate, or a sweep's, where the recipe's is sgd."""
    momentum: float | None = None
    """Of sgd."""
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the momentum, or AdamW's first moment, is kept in."""
    weight_decay: float | None = None
    """Of all but sgd, of kernels: rate x decay x w."""
    layer_decay: float | None = None
    """Of all but sgd: by how much each block learns slower than the one behind it; 1 for none."""
    polyak: float | None = None
    """Decay of the parameters' running average, which is then what is measured; 0 for none."""
    dropout: float | None = None
    """Default: as the release fine-tunes the model, 0.1 for L/16, H/14, R50+B/16 and R50+L/32, 0 for others."""
    drop_path: float | None = None
    """Stochastic depth: the chance with which an image passes by a half of the last block, rising from 0 at the first.
    Default: the recipe's."""
    head_bias: float = 0.0
    """What the new head's bias starts at; its kernel starts at zero."""
    label_smoothing: float | None = None
    image_size: int | None = None
    interpolation: Literal["corners", "half-pixel"] = "corners"
    """How the position embedding is fitted to another resolution."""
    gelu: Literal["tanh", "erf", "quick", "silu"] | None = None
    """Default: tanh for the release's files and our runs, erf for timm's and transformers' naming."""


def resolve(args: Finetune, *, width: int | None = None, patch_size: int | None = None) -> Finetune:
    """`args` with every open value filled in from the recipe. width, patch_size: of the model, for imagenet-table2.

    Raises ValueError for unknown names and values out of range.
    """
    from train import data

    check_init(args.init)
    name = args.recipe or ("digits" if args.data.startswith("digits") else "imagenet")
    recipe = recipes.finetune_recipe(name, width=width, patch_size=patch_size)

    def given(value, default):
        return default if value is None else value

    check_numbers(args, positive="runs")
    args.check_sam()
    if args.seed >= 2**62:
        raise ValueError(f"--seed {args.seed}: a seed below 2**62 is required")
    if args.dev and args.sweep:
        raise ValueError("--dev and --sweep: a sweep makes its own dev split; give one of them")
    steps = given(args.steps, recipe.steps)
    rates = args.learning_rates or recipe.base_lrs
    rate = given(args.learning_rate, rates[min(2, len(rates) - 1)])
    momentum = given(args.momentum, recipe.momentum)
    if rate <= 0 or min(rates) <= 0 or not 0 <= momentum < 1:
        raise ValueError(f"--learning-rate {rate}, --momentum {momentum}: a rate above 0 and a share in [0, 1) are required")
    smoothing = given(args.label_smoothing, recipe.label_smoothing)
    if not 0 <= smoothing < 1 or given(args.clip_norm, 1.0) < 0:
        raise ValueError(f"--label-smoothing {smoothing}, --clip-norm {args.clip_norm}: [0, 1) and 0 or more are required")
    drop_path = given(args.drop_path, recipe.drop_path)
    if not 0 <= drop_path < 1:
        raise ValueError(f"--drop-path {drop_path}: a rate in [0, 1) is required")
    checked = dataclasses.replace(  # the recipe's own checks, on what the command line made of it
        recipe,
        steps=steps,
        base_lrs=rates,
        batch_size=given(args.batch_size, recipe.batch_size),
        # a run shorter than its recipe's warm-up keeps the warm-up's share of a tenth
        warmup_steps=given(args.warmup_steps, recipe.warmup_steps if recipe.warmup_steps < steps else steps // 10),
        image_size=given(args.image_size, recipe.image_size),
        polyak=given(args.polyak, recipe.polyak),
        runs=given(args.runs, recipe.runs),
    )
    every = max(1, steps // 20)
    return dataclasses.replace(
        args,
        config=None,
        init=os.path.abspath(args.init) if "://" not in args.init else args.init,
        data=data.absolute(args.data),
        recipe=name,
        steps=steps,
        batch_size=checked.batch_size,
        learning_rate=rate,
        learning_rates=tuple(rates) if args.sweep else (),
        runs=checked.runs if args.sweep else 1,
        warmup_steps=checked.warmup_steps,
        clip_norm=given(args.clip_norm, recipe.clip_norm),
        momentum=momentum,
        **_resolve_optimizer(args, recipe),
        label_smoothing=smoothing,
        drop_path=drop_path,
        polyak=checked.polyak,
        image_size=checked.image_size,
        **resolve_images(args, recipe),
        log_every=given(args.log_every, max(1, min(50, steps // 100))),
        eval_every=given(args.eval_every, every),
        checkpoint_every=given(args.checkpoint_every, every),
    )


def _resolve_optimizer(args: Finetune, recipe) -> dict:
    """The optimizer, and what sgd has not: None with it."""
    optimizer = args.optimizer or recipe.optimizer
    if optimizer == "sgd":
        if args.weight_decay or args.layer_decay not in (None, 1.0):
            raise ValueError(
                "--weight-decay and --layer-decay are not of --optimizer sgd, which this is: give another, adamw, or leave them out"
            )
        return {"optimizer": optimizer, "weight_decay": None, "layer_decay": None}
    others_rate = optimizer == "lion" or (optimizer != "adamw" and recipe.optimizer == "sgd")
    if others_rate and args.learning_rate is None and not args.learning_rates:
        raise ValueError(f"--optimizer {optimizer}: --learning-rate is required, for the recipe's are {recipe.optimizer}'s")
    if args.momentum_dtype != "float32" and optimizer in WHOLE:
        raise ValueError(f"--optimizer {optimizer} keeps its moments in float32: leave --momentum-dtype out")
    decay = recipe.weight_decay if args.weight_decay is None else args.weight_decay
    layers = recipe.layer_decay if args.layer_decay is None else args.layer_decay
    if decay < 0 or not 0 < layers <= 1:
        raise ValueError(f"--weight-decay {decay}, --layer-decay {layers}: 0 or more and a share in (0, 1] are required")
    return {"optimizer": optimizer, "weight_decay": decay, "layer_decay": layers}


def identity(args: Finetune) -> dict:
    """What makes a resolved run the run it is, and no other: JSON-able."""
    found = job.identity(args, PLACEMENT)
    return {key: value for key, value in found.items() if value or key not in INIT_OPTIONS}  # runs of before them


def dev_splits(split: str, share: float) -> tuple[str, str]:
    """What to train on and what to choose on, where `share` of a split is held out. The two share no image."""
    kept = f"{100 * (1 - share):.10g}%"
    return f"{split}[:{kept}]", f"{split}[{kept}:]"


# --- one run ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Session:
    """What all runs of a job share. pretrained: opened, with a new head. stored: as it was read."""

    mesh: Any
    where: str
    ops: Any
    pretrained: Any
    stop: Stop | None
    stored: Any

    @property
    def model(self) -> dict:
        """Which weights it is."""
        return self.stored.model


def prepare(args: Finetune, stop: Stop | None = None, stored: Any = None) -> tuple[Finetune, Session]:
    """The devices and the model of a job; the resolved options. stored: --init as `train.pretrained.store` has read it, where that
    has been done.

    Raises ValueError for whatever a user can mend.
    """
    from train.build import check_fit
    from train.data import open_source
    from train.pretrained import open_pretrained, store
    from train.shards import choose, laid_for, said
    from vitcore import families

    args.join()
    resolve(args)  # its errors first: they cost nothing
    classes = open_source(args.data, args.split).classes
    mesh, where = args.make_mesh()
    ops = args.choose_ops(mesh, where)
    stored = store(args.init) if stored is None else stored
    found = open_pretrained(stored, num_classes=len(classes), gelu=args.gelu, **args.told)
    full = resolve(args, width=found.config.width, patch_size=getattr(found.config, "patch_size", None))
    opened = open_pretrained(
        stored, image_size=full.image_size, num_classes=len(classes), head_bias=args.head_bias, gelu=args.gelu,
        interpolation=args.interpolation, **args.told,
    )  # fmt: skip
    full = dataclasses.replace(full, dropout=_dropout(args, opened.config), drop_path=_drop_path(full, args, opened.config))
    opened = opened._replace(config=families.changed(opened.config, dropout=full.dropout, drop_path=full.drop_path))
    gelu = getattr(opened.config, "gelu", args.gelu)
    full = dataclasses.replace(full, mesh=f"{mesh.shape['data']}x{mesh.shape['model']}", gelu=gelu)
    if opened.pixels != HALF:  # what the run wants of its pixels, kept with it
        full = dataclasses.replace(full, mean=opened.pixels.mean, std=opened.pixels.std)
    check_fit(full, opened.config, mesh, opened.about)
    shard = choose(full.shard, opened.config, mesh, full.dtype)
    mesh = laid_for(shard, mesh, opened.config)
    where += said(shard, mesh, opened.config)
    return full, Session(mesh=mesh, where=where, ops=ops, pretrained=opened, stop=stop, stored=stored)


def _dropout(args: Finetune, config) -> float:
    if not hasattr(config, "dropout"):
        if args.dropout:
            raise ValueError(f"--dropout {args.dropout}: {args.init} is a ResNet, which has no dropout: leave it out")
        return 0.0
    if args.dropout is not None:
        return args.dropout
    across = config.image_shape[0] // config.grid[0]  # pixels a token: of a hybrid its ResNet's
    return recipes.finetune_dropout(config.width, across, hybrid=not config.of_pixels)


def _drop_path(full: Finetune, args: Finetune, config) -> float:
    if hasattr(config, "drop_path"):
        return full.drop_path or 0.0
    if args.drop_path:
        raise ValueError(f"--drop-path {args.drop_path}: {args.init} is a ResNet, which has no such blocks: leave it out")
    return 0.0


def fine_tune(args: Finetune, out, session: Session, *, of_study: bool = False):
    """One run of resolved options in directory `out`: on args.split, measured on args.test_split. The loop's Result.

    of_study: refuse, with a ValueError, to go on with a run that began from other weights than the session's.
    """
    from train.build import make_run, start_from, step_options
    from train.data import check_classes, open_source
    from train.data.identity import check, seen, trained_on
    from train.loop import train
    from train.shards import choose

    full: Any = args
    source, held_out = open_source(full.data, full.split), open_source(full.data, full.test_split)
    check_classes(source, held_out)
    distributed.agree(images=seen(source, held_out))
    if line := trained_on(check(session.pretrained.data), held_out, full.init):
        say(line)
    who, config = identity(full), session.pretrained.config
    if (full.layer_decay or 1) < 1 and not hasattr(config, "depth"):
        raise ValueError(f"--layer-decay {full.layer_decay}: {full.init} is a ResNet, without a ViT's blocks: leave it out")
    began = job.model_of_run(out) or session.model
    if of_study and began != session.model:
        from train.pretrained import said_model

        raise ValueError(
            f"{out} began from {full.init} of {said_model(began)}, and this is {said_model(session.model)}: remove that run, or "
            "choose another --out"
        )
    rate, tx = make_optimizer(full, config)
    shard = choose(full.shard, config, session.mesh, full.dtype)
    spec = make_run(
        full, out, who, _described(full, config, began), sources=(source, held_out), config=config, mesh=session.mesh,
        tx=tx, learning_rate=rate, options=step_options(full, session.ops, shard, pixels=session.pretrained.pixels), early_stop=0,
        start=partial(start_from, session.pretrained, session.mesh, tx, polyak=bool(full.polyak), shard=shard),
    )  # fmt: skip
    if distributed.rank() == 0:
        check_claim(out, who)
    return train(spec, say, stop=session.stop)


def make_optimizer(full, config):
    """The schedule and the optimizer of resolved options."""
    from train.optim import adamw, schedule, sgd

    rate = schedule(base_lr=full.learning_rate, total_steps=full.steps, warmup_steps=full.warmup_steps, decay="cosine")
    if full.optimizer == "sgd":
        return rate, sgd(rate, momentum=full.momentum, dtype=full.momentum_dtype)
    decays = dict(weight_decay=full.weight_decay, layer_decay=full.layer_decay)
    if full.optimizer == "adamw":
        return rate, adamw(rate, depth=getattr(config, "depth", 0), mu_dtype=full.momentum_dtype, **decays)
    return rate, named(full.optimizer, rate, config, first_moment=full.momentum_dtype, **decays)


def _described(args: Finetune, config, began: dict) -> dict:
    """config.json of a run: its options, its model, which `train.pretrained` needs to open it, and which weights it began from."""
    options = json.loads(json.dumps(dataclasses.asdict(args)))
    return options | {"vit": dataclasses.asdict(config), job.BEGAN_FROM: began}


def model_held(path, held: dict | None) -> dict | None:
    """Which weights a study of several runs was begun with, of what its JSON file at `path` holds; None for a new one. A line says
    so where the file is from before that was kept."""
    if held is None:
        return None
    if "model" not in held and any(held.values()):
        say(f"{path} does not say of which weights its results are: those to come are of what --init is now")
    return held.get("model")
