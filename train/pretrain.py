"""Pre-train a ViT: `python -m train.pretrain`.

    python -m train.pretrain --mesh 8x4                                             the embedded digits, today, on any machine
    python -m train.pretrain --mesh 8x4 --model ViT-B/16 --data folder:PATH --recipe imagenet --dtype bfloat16

A recipe (paper Table 3, `train/recipes.py`) supplies what is not said on the command line. A run leaves one directory:
config.json (everything resolved: `--config FILE` runs it again), metrics.jsonl, curves.png, checkpoints/. The same command
again resumes; another mesh may take over, anything else that changes the result is another run and wants another --out.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules load, an interrupt ends the process without a traceback

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from train import distributed, options, recipes
from train import mesh as meshes
from train.job import JOB_PLACEMENT, JobOptions, check_claim, end, guard, locked, place
from train.job import claim as put_claim
from train.signals import Stop, interruptible


@dataclass(frozen=True, kw_only=True)
class Pretrain(JobOptions):
    """Pre-train a Vision Transformer. Whatever is not given comes from the recipe (paper Table 3)."""

    model: str | None = None
    """ViT-{Nano,Ti,S,B,L,H}/PATCH. Default: ViT-Nano/4 for the digits, ViT-B/16 otherwise."""
    data: str = "digits"
    """digits, digits:0-4, folder:PATH, tar:PATTERN, arrayrecord:PATTERN, tfds:NAME, parquet:PATTERN, cifar:PATH."""
    train_split: str = "train"
    """Part of the data to train on: train, train[:99%], train[classes=0-4], train[without=removed.json]."""
    val_split: str = "val"
    """Part to validate on: val, test, train[99%:]."""
    recipe: str | None = None
    """digits, imagenet, imagenet21k, jft, or with the epochs where Table 3 lists two: jft-14ep. Default: digits or imagenet."""
    mesh: str | None = None
    """DATAxMODEL devices, e.g. 8x4. A CPU with fewer simulates them. Default: all devices on the data axis."""
    out: str | None = None
    """Directory of the run. Default: runs/ and a name made from the configuration."""
    config: str | None = None
    """A config.json whose values replace the defaults."""

    seed: int = 0
    """Of initial values, order, augmentation and dropout."""
    steps: int | None = None
    """Updates in all."""
    epochs: int | None = None
    """Passes over the training images; used where --steps is not given."""
    batch_size: int | None = None
    """Images of one update, over all devices."""
    accumulate: int = 1
    """Parts in which a batch is worked through, one after the other."""

    image_size: int | None = None
    pool: Literal["token", "gap"] = "token"
    representation_size: int | None = None
    """Width of the tanh layer before the head; 0 for none. Default: the model's width, as in the paper."""
    dropout: float | None = None
    gelu: Literal["tanh", "erf"] = "tanh"

    learning_rate: float | None = None
    warmup_steps: int | None = None
    decay: Literal["linear", "cosine"] | None = None
    weight_decay: float | None = None
    weight_decay_form: Literal["adamw", "independent"] | None = None
    """adamw: rate x decay x w. independent: rate / peak rate x decay x w."""
    clip_norm: float | None = None
    """Bound of the global gradient norm; 0 for none."""
    first_moment: Literal["float32", "bfloat16"] | None = None
    loss: Literal["softmax", "sigmoid"] | None = None
    label_smoothing: float | None = None
    polyak: float = 0.0
    """Decay of the parameters' running average, which is then what is validated; 0 for none."""

    decoder: Literal["pillow", "simplejpeg"] = "pillow"
    """simplejpeg: the same pixels, faster; wants the extra [fast]."""
    mixup: float = 0.0
    """Strength of MixUp, shares being drawn from Beta(a, a); 0 for none."""
    bad_share: float = 0.01
    """Images that cannot be read are replaced and logged; where they are a larger share, the run stops."""
    augment: Literal["inception", "digits", "none"] | None = None
    """Default: what suits the data."""
    preprocess: Literal["resize", "center"] = "resize"
    """Of validation images: resized to the square, or shorter side and central crop."""
    subset: int | None = None
    """Train on this many images, drawn at random."""
    subset_seed: int = 0
    early_stop: int = 0
    """Stop after this many validations without a better accuracy; 0 for never."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and matmul operands; parameters, sums and optimizer are float32."""
    ops: Literal["auto", "reference", "fused", "interpret"] = "auto"
    """reference: einsum through XLA. fused: the Pallas kernels, on a TPU. interpret: the kernels anywhere, slowly."""
    remat: bool = False
    """Keep only the blocks' inputs for the backward pass: more images fit, a third more arithmetic."""
    remat_every: int = 1
    """With --remat: keep every n-th block's input only, n a divisor of the blocks. 2: an eighth more arithmetic again."""
    threads: int | None = None
    """That read and decode images. Default: by the source."""
    workers: int = 0
    """Processes that do it instead."""
    log_every: int | None = None
    eval_every: int | None = None
    """Steps between validations. Default: about twenty in a run."""
    fewshot_every: int | None = None
    """Steps between few-shot evaluations (train.fewshot) of the model as it is. Default: none."""
    checkpoint_every: int | None = None
    """Steps between checkpoints. Default: as validations."""
    keep: int = 3
    """Newest checkpoints that stay."""
    keep_every: int | None = None
    """Checkpoints of steps that are multiples of this stay as well."""


# What may differ between a run and its continuation: where and how it runs, not what it computes.
PLACEMENT = JOB_PLACEMENT | frozenset(
    [
        "out",
        "config",
        "mesh",
        "ops",
        "remat",
        "remat_every",
        "accumulate",
        "threads",
        "workers",
        "decoder",
        "bad_share",
        "log_every",
        "eval_every",
        "fewshot_every",
        "checkpoint_every",
        "keep",
        "keep_every",
        "epochs",
    ],
)


def resolve(args: Pretrain, *, examples: int) -> Pretrain:
    """`args` with every open value filled in from the recipe: what config.json holds. examples: training images there are.

    Raises ValueError for unknown names and values that do not fit together.
    """
    from train.data import absolute
    from vitcore.config import variant

    digits = args.data.partition(":")[0] == "digits"
    model = ("ViT-Nano/4" if digits else "ViT-B/16") if args.model is None else args.model
    name = ("digits" if digits else "imagenet") if args.recipe is None else args.recipe
    variant(model, image_size=_patch(model))  # an unknown model is the first thing to say
    recipe = recipes.recipe(name, model)

    def given(value, default):
        return default if value is None else value

    if args.subset is not None and not 1 <= args.subset <= examples:
        raise ValueError(f"--subset {args.subset}: {args.data} has {examples} training images, choose 1 to {examples}")
    for option in (
        "steps",
        "epochs",
        "batch_size",
        "accumulate",
        "log_every",
        "eval_every",
        "fewshot_every",
        "checkpoint_every",
        "keep",
        "keep_every",
        "threads",
        "image_size",
        "remat_every",
    ):
        if (value := getattr(args, option)) is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value}: a positive number is required")
    for option in ("seed", "subset_seed", "early_stop", "workers", "warmup_steps", "representation_size"):
        if (value := getattr(args, option)) is not None and value < 0:
            raise ValueError(f"--{option.replace('_', '-')} {value}: zero or a positive number is required")
    for option, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{option.replace('_', '-')} {value}: a finite number is required")
    if max(args.seed, args.subset_seed) >= 2**63:
        raise ValueError(f"--seed {args.seed}, --subset-seed {args.subset_seed}: seeds below 2**63 are required")
    if not 0 <= args.polyak < 1:
        raise ValueError(f"--polyak {args.polyak}: a decay in [0, 1) is required")
    batch = given(args.batch_size, recipe.batch_size)
    epochs = given(args.epochs, recipe.epochs)
    steps = given(args.steps, max(1, epochs * (args.subset or examples) // batch))
    every = max(1, steps // 20)
    # a run shorter than its recipe's warm-up keeps the warm-up's share of a tenth
    warmup = given(args.warmup_steps, recipe.warmup_steps if recipe.warmup_steps < steps else steps // 10)
    rate = given(args.learning_rate, recipe.base_lr)
    form = given(args.weight_decay_form, recipe.weight_decay_form)
    # Table 3's decay is adamw's, multiplied by the rate; the independent form's value of the same strength has the peak rate in it
    weight_decay = given(args.weight_decay, recipe.weight_decay * (rate if form == "independent" else 1.0))
    loss = given(args.loss, recipe.loss)
    smoothing = given(args.label_smoothing, recipe.label_smoothing if loss == recipe.loss else 0.0)
    checked = dataclasses.replace(  # the recipe's own checks, on what the command line made of it
        recipe,
        dropout=given(args.dropout, recipe.dropout),
        clip_norm=given(args.clip_norm, recipe.clip_norm) or None,
        label_smoothing=smoothing,
        loss=loss,
        batch_size=batch,
        warmup_steps=warmup,
        image_size=given(args.image_size, recipe.image_size),
    )
    return dataclasses.replace(
        args,
        config=None,
        data=absolute(args.data),
        model=model,
        recipe=name,
        steps=steps,
        epochs=None,
        batch_size=batch,
        image_size=checked.image_size,
        representation_size=given(args.representation_size, variant(model, image_size=_patch(model)).width),
        dropout=checked.dropout,
        learning_rate=rate,
        warmup_steps=warmup,
        decay=given(args.decay, recipe.decay),
        weight_decay=weight_decay,
        weight_decay_form=form,
        clip_norm=checked.clip_norm or 0.0,
        first_moment=given(args.first_moment, recipe.first_moment),
        loss=loss,
        label_smoothing=smoothing,
        log_every=given(args.log_every, max(1, min(50, steps // 100))),
        eval_every=given(args.eval_every, every),
        checkpoint_every=given(args.checkpoint_every, every),
    )


def _patch(model: str) -> int:
    """Some image side that a model of this name accepts: its patch."""
    tail = model.rpartition("/")[2]
    return int(tail) if tail.isdigit() and int(tail) else 16


def identity(args: Pretrain) -> dict:
    """What makes a resolved run the run it is, and no other: JSON-able."""
    placement = PLACEMENT - {"eval_every"} if args.early_stop else PLACEMENT  # early stopping counts evaluations
    return {key: value for key, value in dataclasses.asdict(args).items() if key not in placement}


def directory(args: Pretrain):
    """Where the run lives: --out, local or gs://, or runs/MODEL-DATA-HASH, the same for the same resolved configuration."""
    if args.out is not None:
        return place(args.out)
    digest = hashlib.sha256(json.dumps(identity(args), sort_keys=True).encode()).hexdigest()[:8]
    data = args.data.partition(":")[0] + ("-" + Path(args.data.partition(":")[2]).name if ":" in args.data else "")
    return place("runs") / f"{args.model}-{data}-{digest}".replace("/", "_")


def claim(out, args: Pretrain) -> None:
    """Make the run's directory and put config.json there. Raises ValueError where it holds another run, OSError as it comes."""
    put_claim(out, identity(args), dataclasses.asdict(args))


def main(argv: list[str] | None = None) -> int:
    """The job. Returns the exit code: 0, or 2 with one line on stderr for whatever a user can mend."""
    return guard("train.pretrain", lambda stop: run(parse(sys.argv[1:] if argv is None else argv), stop))


def parse(argv: list[str]) -> Pretrain:
    """The command line, after the values of --config FILE where that is given. ValueError, in one line, for what does not parse."""
    return options.parse(Pretrain, "train.pretrain", argv)


def run(args: Pretrain, stop: Stop | None = None) -> None:
    """Train as `args` say; prints where, what and how it went, on process 0. stop: who is asked to stop."""
    shape = None if args.mesh is None else meshes.parse(args.mesh)
    args.join()
    meshes.prepare(shape, distributed.count())

    import jax.numpy as jnp

    from train.data import check_classes, eval_batches, open_source, train_batches
    from train.loop import Run, train
    from train.step import StepOptions
    from vitcore.ops import BY_NAME
    from vitcore.ops import resolve as resolve_ops
    from vitcore.sharding import MeshShape, check_mesh

    source, held_out = open_source(args.data, args.train_split), open_source(args.data, args.val_split)
    check_classes(source, held_out)
    resolved = resolve(args, examples=len(source))
    mesh, where = meshes.make(shape)
    # every value is there now, which the types of Pretrain cannot say
    full: Any = dataclasses.replace(
        resolved, mesh=f"{mesh.shape['data']}x{mesh.shape['model']}", augment=args.augment or source.augment
    )
    parts = mesh.shape["data"] * full.accumulate
    if full.batch_size % parts:
        raise ValueError(
            f"--batch-size {full.batch_size} is not divisible by the data axis of {mesh.shape['data']} "
            f"times --accumulate {full.accumulate}: use a multiple of {parts}"
        )
    ops = resolve_ops(None if full.ops == "auto" else BY_NAME[full.ops])
    if ops is BY_NAME["fused"] and mesh.devices.flat[0].platform != "tpu":
        raise ValueError(f"--ops fused runs on a TPU, {where} here: use --ops reference, or --ops interpret to try the kernels")
    config = _model(full, classes=len(source.classes), channels=source[0].image.shape[2] if source.decoded else 3)
    check_mesh(config, MeshShape.of(mesh))
    if full.remat and config.depth % full.remat_every:
        raise ValueError(f"--remat-every {full.remat_every}: {full.model} has {config.depth} blocks, a divisor of that is required")
    learning_rate, tx = _optimizer(full)
    distributed.agree(configuration=identity(full), code=distributed.code_hash())
    images = dict(
        image_size=full.image_size, channels=config.channels, threads=full.threads, shard=meshes.data_shard(mesh),
        decoder=full.decoder, pixels="uint8", bad_share=full.bad_share,
    )  # fmt: skip
    batches = train_batches(
        source, batch_size=full.batch_size, seed=full.seed, augment=full.augment,
        subset=full.subset, subset_seed=full.subset_seed, workers=full.workers, mixup=full.mixup, **images,
    )  # fmt: skip
    eval_size = min(full.batch_size // full.accumulate, -(-len(held_out) // mesh.shape["data"]) * mesh.shape["data"])

    out, first = directory(full), distributed.rank() == 0
    say = partial(print, flush=True) if first else lambda *_: None
    named = next(name for name, known in BY_NAME.items() if known is ops)
    if first:
        check_claim(out, identity(full))
    say(f"{full.model} on {full.data}: {len(source)} training and {len(held_out)} held-out images of {len(source.classes)} classes")
    say(f"{where}; ops: {named}; {full.steps} steps of {full.batch_size} images; recipe {full.recipe}; {out}")
    how = StepOptions(
        ops=ops, dtype=jnp.dtype(full.dtype), remat=full.remat_every if full.remat else 0, accumulate=full.accumulate,
        loss=full.loss, label_smoothing=full.label_smoothing, clip_norm=full.clip_norm or None, polyak=full.polyak, seed=full.seed,
    )  # fmt: skip
    job = Run(
        directory=out,
        config=config,
        mesh=mesh,
        tx=tx,
        learning_rate=learning_rate,
        options=how,
        batches=batches,
        validation=lambda: eval_batches(held_out, batch_size=eval_size, preprocess=full.preprocess, **images),
        batch_size=full.batch_size,
        total_steps=full.steps,
        log_every=full.log_every,
        eval_every=full.eval_every,
        checkpoint_every=full.checkpoint_every,
        keep=full.keep,
        keep_every=full.keep_every,
        early_stop=full.early_stop,
        config_json=dataclasses.asdict(full),
        identity=identity(full),
        claim=lambda: claim(out, full),
        **_fewshot(full, config, mesh, source, held_out, how),
        step_timeout=full.step_timeout,
        bad_steps=full.bad_steps,
        checkpoint_wait=full.checkpoint_wait,
    )
    with locked(out) if first else contextlib.nullcontext():
        result = train(job, say, stop=stop)
    _report(result, out, say)


def _fewshot(full, config, mesh, source, held_out, how) -> dict[str, Any]:
    """The measurement of --fewshot-every, as `Run` takes it."""
    if full.fewshot_every is None:
        return {}
    from train.fewshot import probe

    measure = probe(config, mesh, source, held_out, preprocess=full.preprocess, threads=full.threads, ops=how.ops, dtype=how.dtype)
    return {
        "probe": lambda state: measure(state.params if state.average is None else state.average),
        "probe_every": full.fewshot_every,
    }


def _report(result, out, say) -> None:
    """How a run went, in a line or two; ends the process where a thread would keep it."""
    if result.steps > result.started:
        say(f"{result.steps - result.started} steps in {result.seconds:.0f} s, {result.images_per_second:,.0f} images/s")
    if result.asked_to_stop:
        say(f"asked to stop at step {result.steps}: the same command resumes there; {out}")
        if result.stuck:
            end(0, now=True)
        return
    ended = f"stopped early at step {result.steps}" if result.stopped_early else f"finished at step {result.steps}"
    best = f"; best {result.best.accuracy:.2%} at step {result.best.step}" if result.best.accuracy > result.accuracy else ""
    skipped = f"; {result.skipped} steps were skipped" if result.skipped else ""
    right = f"{result.correct} of {result.count} held-out images right, {result.accuracy:.2%}"
    say(f"{ended}: {right}{best}{skipped}; {out / 'curves.png'}")


def _model(full, *, classes: int, channels: int):
    """The ViTConfig of resolved options."""
    from vitcore.config import variant

    return variant(
        full.model,
        image_size=full.image_size,
        num_classes=classes,
        representation_size=full.representation_size or None,
        pool=full.pool,
        dropout=full.dropout,
        gelu=full.gelu,
        channels=channels,
        head_bias=recipes.recipe(full.recipe, full.model).head_bias if full.loss == "sigmoid" else 0.0,
    )


def _optimizer(full):
    """The schedule and the optimizer of resolved options."""
    from train.optim import optimizer, schedule

    recipe = recipes.recipe(full.recipe, full.model)
    rate = schedule(
        base_lr=full.learning_rate,
        total_steps=full.steps,
        warmup_steps=full.warmup_steps,
        decay=full.decay,
        linear_end=min(recipe.linear_end, full.learning_rate),
    )
    tx = optimizer(
        rate,
        base_lr=full.learning_rate,
        weight_decay=full.weight_decay,
        weight_decay_form=full.weight_decay_form,
        b1=recipe.b1,
        b2=recipe.b2,
        eps=recipe.eps,
        first_moment=full.first_moment,
    )
    return rate, tx


if __name__ == "__main__":
    interruptible()
    end(main())
