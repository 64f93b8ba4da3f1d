"""Fine-tune a ViT: `python -m train.finetune`.

    python -m train.finetune --init ViT-B_16.npz --data folder:/data/cifar100 --recipe cifar100
    python -m train.finetune --init ViT-B_16.npz --data folder:/data/cifar100 --recipe cifar100 --sweep
    python -m train.finetune --init runs/NAME --data digits:5-9 --learning-rate 0.1

A recipe (paper Table 4, `train/recipes.py`) supplies what is not said. The whole pre-training head gives way to a linear one that
starts at zero; the position embedding is fitted to the new resolution. One run trains on --split and is measured on --test-split;
with --dev it trains on all but the recipe's share of --split and is measured on that share. --sweep does what the paper does: every
learning rate of the grid on the dev split, the best one then on all of --split, three times, with other seeds.

A run leaves what pre-training leaves, and resumes likewise. A sweep is a directory of runs with sweep.json, sweep.md and sweep.png;
each of its runs resumes, and those that are done are not done again.
"""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from train import distributed, job, recipes
from train.job import check_claim, end, guard, locked, say, stopped
from train.options import PLACEMENT, TrainOptions, check_init, check_numbers, parse
from train.signals import Stop, interruptible


@dataclass(frozen=True, kw_only=True)
class Finetune(TrainOptions):
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
    """imagenet, cifar10, cifar100, pets, flowers, vtab, imagenet-table2, digits. Default: digits or imagenet."""
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
    momentum: float | None = None
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the momentum is kept in."""
    polyak: float | None = None
    """Decay of the parameters' running average, which is then what is measured; 0 for none."""
    dropout: float = 0.0
    label_smoothing: float = 0.0
    image_size: int | None = None
    interpolation: Literal["corners", "half-pixel"] = "corners"
    """How the position embedding is fitted to another resolution."""
    gelu: Literal["tanh", "erf"] | None = None
    """Default: tanh for the release's files and our runs, erf for timm's and transformers' naming."""
    augment: Literal["inception", "digits", "none"] | None = None
    preprocess: Literal["resize", "center"] = "resize"


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
    if not 0 <= args.label_smoothing < 1 or given(args.clip_norm, 1.0) < 0:
        raise ValueError(
            f"--label-smoothing {args.label_smoothing}, --clip-norm {args.clip_norm}: [0, 1) and 0 or more are required"
        )
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
        polyak=checked.polyak,
        image_size=checked.image_size,
        log_every=given(args.log_every, max(1, min(50, steps // 100))),
        eval_every=given(args.eval_every, every),
        checkpoint_every=given(args.checkpoint_every, every),
    )


def identity(args: Finetune) -> dict:
    """What makes a resolved run the run it is, and no other: JSON-able."""
    return job.identity(args, PLACEMENT)


def directory(args: Finetune):
    """Where the run lives: --out, or runs/finetune-INIT-RECIPE-HASH."""
    return job.directory(args.out, f"finetune-{Path(args.init).stem}-{args.recipe}", identity(args))


def dev_splits(split: str, share: float) -> tuple[str, str]:
    """What to train on and what to choose on, where `share` of a split is held out. The two share no image."""
    kept = f"{100 * (1 - share):.10g}%"
    return f"{split}[:{kept}]", f"{split}[{kept}:]"


def sgd(learning_rate, *, momentum: float, dtype: str):
    """`train.optim.sgd`, its momentum kept in a dtype and worked on in float32 (as `train.optim` keeps Adam's first moment)."""
    import jax.numpy as jnp
    import optax

    from train import optim

    if dtype == "float32":
        return optim.sgd(learning_rate, momentum=momentum)
    trace = optax.trace(decay=momentum)

    def kept(state, dtype):
        return state._replace(trace=optax.tree.cast(state.trace, dtype))

    def update(updates, state, params=None):
        updates, state = trace.update(updates, kept(state, jnp.float32), params)
        return updates, kept(state, dtype)

    held = optax.GradientTransformation(lambda params: kept(trace.init(params), dtype), update)
    return optax.chain(held, optax.scale_by_learning_rate(learning_rate))


# --- one run ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all runs of a job share. pretrained: opened, with a new head."""

    mesh: Any
    where: str
    ops: Any
    pretrained: Any
    stop: Stop | None


def prepare(args: Finetune, stop: Stop | None = None) -> tuple[Finetune, Bench]:
    """The devices and the model of a job; the resolved options.

    Raises ValueError for whatever a user can mend.
    """
    from train.build import check_fit
    from train.data import open_source
    from train.pretrained import open_pretrained

    args.join()
    resolve(args)  # its errors first: they cost nothing
    classes = open_source(args.data, args.split).classes
    mesh, where = args.make_mesh()
    ops = args.choose_ops(mesh, where)
    found = open_pretrained(args.init, num_classes=len(classes), gelu=args.gelu)
    full = resolve(args, width=found.config.width, patch_size=found.config.patch_size)
    opened = open_pretrained(
        args.init, image_size=full.image_size, num_classes=len(classes), gelu=args.gelu, interpolation=args.interpolation
    )
    opened = opened._replace(config=dataclasses.replace(opened.config, dropout=args.dropout))
    full = dataclasses.replace(full, mesh=f"{mesh.shape['data']}x{mesh.shape['model']}", gelu=opened.config.gelu)
    check_fit(full, opened.config, mesh, opened.about)
    return full, Bench(mesh=mesh, where=where, ops=ops, pretrained=opened, stop=stop)


def fine_tune(args: Finetune, out, bench: Bench):
    """One run of resolved options in directory `out`: on args.split, measured on args.test_split. The loop's Result."""
    from train.build import make_run, step_options
    from train.data import check_classes, open_source
    from train.loop import train
    from train.optim import schedule

    full: Any = args
    source, held_out = open_source(full.data, full.split), open_source(full.data, full.test_split)
    check_classes(source, held_out)
    rate = schedule(base_lr=full.learning_rate, total_steps=full.steps, warmup_steps=full.warmup_steps, decay="cosine")
    tx = sgd(rate, momentum=full.momentum, dtype=full.momentum_dtype)
    who, config = identity(full), bench.pretrained.config
    spec = make_run(
        full, out, who, _described(full, config), sources=(source, held_out), config=config, mesh=bench.mesh,
        tx=tx, learning_rate=rate, options=step_options(full, bench.ops), early_stop=0,
        start=lambda: _start(bench.pretrained, bench.mesh, tx, polyak=bool(full.polyak)),
    )  # fmt: skip
    if distributed.rank() == 0:
        check_claim(out, who)
    return train(spec, say, stop=bench.stop)


def _start(pretrained, mesh, tx, *, polyak: bool):
    """The TrainState at step 0 with pretrained parameters."""
    import jax.numpy as jnp

    from train.frozen import put_params
    from train.step import TrainState, shardings, state_specs

    def rest(params):
        average = jax.tree.map(jnp.copy, params) if polyak else None
        return TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), tx.init(params), average)

    specs = state_specs(pretrained.config, mesh, tx, polyak=polyak)
    return jax.jit(rest, out_shardings=shardings(mesh, specs))(put_params(pretrained.params, pretrained.config, mesh))


def _described(args: Finetune, config) -> dict:
    """config.json of a run: its options, and its model, which `train.pretrained` needs to open it."""
    return json.loads(json.dumps(dataclasses.asdict(args))) | {"vit": dataclasses.asdict(config)}


# --- the job ----------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The job. Returns the exit code: 0, or 2 with one line on stderr for whatever a user can mend."""
    words = sys.argv[1:] if argv is None else argv

    def work(stop):
        run(parse(Finetune, "train.finetune", words), stop)

    return guard("train.finetune", work)


def run(args: Finetune, stop: Stop | None = None):
    """Fine-tune, or sweep, as `args` say. The Result of a run, or the summary of a sweep; None where it was asked to stop."""
    from train.sweep import dev_run, sweep

    full, bench = prepare(args, stop)
    out = directory(full)
    distributed.agree(
        configuration=identity(full), code=distributed.code_hash(), versions=distributed.versions(), model=bench.pretrained.about
    )
    say(f"{bench.pretrained.about} on {full.data}, {full.split}; {bench.where}; recipe {full.recipe}; {out}")
    if full.sweep:
        return sweep(full, out, bench)
    if full.dev:
        full = dev_run(full)
    with locked(out):
        result = fine_tune(full, out, bench)
    if stopped(result, out):
        return None
    say(
        f"finished at step {result.steps}: {result.correct} of {result.count} images of {full.test_split} right, "
        f"{result.accuracy:.2%}; {out / 'curves.png'}"
    )
    return result


if __name__ == "__main__":
    interruptible()
    end(main())
