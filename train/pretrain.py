"""Pre-train a ViT: `python -m train.pretrain`.

    python -m train.pretrain --mesh 8x4                                             the embedded digits, today, on any machine
    python -m train.pretrain --mesh 8x4 --model ViT-B/16 --data folder:PATH --recipe imagenet --dtype bfloat16

A recipe (paper Table 3, `train/recipes.py`) supplies what is not said on the command line. A run leaves one directory:
config.json (everything resolved: `--config FILE` runs it again), metrics.jsonl, curves.png, checkpoints/. The same command
again resumes; another mesh may take over, anything else that changes the result is another run and wants another --out.
"""

import dataclasses
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from train import mesh as meshes
from train import recipes


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pre-train a Vision Transformer. Whatever is not given comes from the recipe (paper Table 3)."""

    model: str | None = None
    """ViT-{Nano,Ti,S,B,L,H}/PATCH. Default: ViT-Nano/4 for the digits, ViT-B/16 otherwise."""
    data: str = "digits"
    """digits, or folder:PATH with train/CLASS/*.jpg and val/CLASS/*.jpg."""
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
    threads: int | None = None
    """That read and decode images. Default: by the source."""
    workers: int = 0
    """Processes that do it instead."""
    log_every: int | None = None
    eval_every: int | None = None
    """Steps between validations. Default: about twenty in a run."""
    checkpoint_every: int | None = None
    """Steps between checkpoints. Default: as validations."""
    keep: int = 3
    """Newest checkpoints that stay."""


# What may differ between a run and its continuation: where and how it runs, not what it computes.
PLACEMENT = {
    *(
        "out",
        "config",
        "mesh",
        "ops",
        "remat",
        "accumulate",
        "threads",
        "workers",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep",
    ),
    *("steps_per_epoch", "epochs"),
}


def resolve(args: Pretrain, *, examples: int) -> Pretrain:
    """`args` with every open value filled in from the recipe: what config.json holds. examples: training images there are.

    Raises ValueError for unknown names and values that do not fit together.
    """
    from vitcore.config import variant

    digits = args.data == "digits"
    model = args.model or ("ViT-Nano/4" if digits else "ViT-B/16")
    name = args.recipe or ("digits" if digits else "imagenet")
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
        "checkpoint_every",
        "keep",
        "threads",
        "image_size",
    ):
        if (value := getattr(args, option)) is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value}: a positive number is required")
    for option in ("seed", "subset_seed", "early_stop", "workers", "warmup_steps", "representation_size"):
        if (value := getattr(args, option)) is not None and value < 0:
            raise ValueError(f"--{option.replace('_', '-')} {value}: zero or a positive number is required")
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
    return {key: value for key, value in dataclasses.asdict(args).items() if key not in PLACEMENT}


def directory(args: Pretrain) -> Path:
    """Where the run lives: --out, or runs/MODEL-DATA-HASH, the same for the same resolved configuration."""
    if args.out:
        return Path(args.out)
    digest = hashlib.sha256(json.dumps(identity(args), sort_keys=True).encode()).hexdigest()[:8]
    data = args.data.partition(":")[0] + ("-" + Path(args.data.partition(":")[2]).name if ":" in args.data else "")
    return Path("runs") / f"{args.model}-{data}-{digest}".replace("/", "_")


def claim(out: Path, args: Pretrain) -> None:
    """Make the run's directory and put config.json there. Raises ValueError where it holds another run, OSError as it comes."""
    path = out / "config.json"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: a directory, new or this run's own, is required")
    if path.exists():
        try:
            held = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): restore it, or choose another --out") from None
        mine = identity(args)
        other = [key for key in mine if held.get(key) != mine[key]]
        if other:
            what = ", ".join(f"{key} {held.get(key)} there, {mine[key]} now" for key in other[:3])
            raise ValueError(
                f"--out {out} holds another run ({what}): choose another --out, or give that run's options to continue it"
            )
    out.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.tmp")
    partial.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(args, out=str(out))), indent=2) + "\n")
    os.replace(partial, path)


def main(argv: list[str] | None = None) -> int:
    """The job. Returns the exit code: 0, or 2 with one line on stderr for whatever a user can mend."""
    try:
        run(parse(sys.argv[1:] if argv is None else argv))
    except (ValueError, NotImplementedError, OSError) as error:
        if os.environ.get("VITCORE_TRACEBACK"):
            raise
        print(f"train.pretrain: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.pretrain: interrupted; the same command resumes from the latest checkpoint", file=sys.stderr)
        return 130
    return 0


def parse(argv: list[str]) -> Pretrain:
    """The command line, over the values of --config FILE where that is given."""
    import tyro

    default = Pretrain()
    for i, word in enumerate(argv):
        path = argv[i + 1] if word == "--config" and i + 1 < len(argv) else word[9:] if word.startswith("--config=") else None
        if path:
            try:
                values = json.loads(Path(path).read_text())
            except ValueError as error:
                raise ValueError(f"--config {path} is not JSON ({error}): give the config.json of a run") from None
            known = {field.name for field in dataclasses.fields(Pretrain)}
            if not isinstance(values, dict) or (unknown := set(values) - known):
                what = f"has no option {', '.join(sorted(unknown))}" if isinstance(values, dict) else "holds no options"
                raise ValueError(f"--config {path}: train.pretrain {what}: give the config.json of a run")
            default = dataclasses.replace(default, **values)
    return tyro.cli(Pretrain, args=argv, default=default, prog="python -m train.pretrain", description=Pretrain.__doc__)


def run(args: Pretrain) -> None:
    """Train as `args` say; prints where, what and how it went."""
    shape = meshes.parse(args.mesh) if args.mesh else None
    meshes.prepare(shape)

    import jax.numpy as jnp

    from train.data import eval_batches, open_source, train_batches
    from train.loop import Run, train
    from train.step import StepOptions
    from vitcore.ops import BY_NAME
    from vitcore.ops import resolve as resolve_ops
    from vitcore.sharding import MeshShape, check_mesh

    source, held_out = open_source(args.data, "train"), open_source(args.data, "val")
    full: Any = resolve(args, examples=len(source))  # every value is there now, which the types of Pretrain cannot say
    mesh, where = meshes.make(shape)
    parts = mesh.shape["data"] * full.accumulate
    if full.batch_size % parts:
        raise ValueError(
            f"--batch-size {full.batch_size} is not divisible by the data axis of {mesh.shape['data']} "
            f"times --accumulate {full.accumulate}: use a multiple of {parts}"
        )
    ops = resolve_ops(None if full.ops == "auto" else BY_NAME[full.ops])
    if ops is BY_NAME["fused"] and mesh.devices.flat[0].platform != "tpu":
        raise ValueError(f"--ops fused runs on a TPU, {where} here: use --ops reference, or --ops interpret to try the kernels")
    config = _model(full, classes=len(source.classes), channels=source[0].image.shape[2])
    check_mesh(config, MeshShape.of(mesh))
    learning_rate, tx = _optimizer(full)
    images = dict(image_size=full.image_size, channels=config.channels, threads=full.threads)
    batches = train_batches(
        source, batch_size=full.batch_size, seed=full.seed, augment=full.augment,
        subset=full.subset, subset_seed=full.subset_seed, workers=full.workers, **images,
    )  # fmt: skip
    eval_size = min(full.batch_size, -(-len(held_out) // mesh.shape["data"]) * mesh.shape["data"])

    out = directory(full)
    claim(out, full)
    named = next(name for name, known in BY_NAME.items() if known is ops)
    print(
        f"{full.model} on {full.data}: {len(source)} training and {len(held_out)} held-out images of {len(source.classes)} classes"
    )
    print(f"{where}; ops: {named}; {full.steps} steps of {full.batch_size} images; recipe {full.recipe}; {out}", flush=True)
    options = StepOptions(
        ops=ops, dtype=jnp.dtype(full.dtype), remat=full.remat, accumulate=full.accumulate, loss=full.loss,
        label_smoothing=full.label_smoothing, clip_norm=full.clip_norm or None, polyak=full.polyak, seed=full.seed,
    )  # fmt: skip
    result = train(
        Run(
            directory=out,
            config=config,
            mesh=mesh,
            tx=tx,
            learning_rate=learning_rate,
            options=options,
            batches=batches,
            validation=lambda: eval_batches(held_out, batch_size=eval_size, preprocess=full.preprocess, **images),
            batch_size=full.batch_size,
            total_steps=full.steps,
            log_every=full.log_every,
            eval_every=full.eval_every,
            checkpoint_every=full.checkpoint_every,
            keep=full.keep,
            early_stop=full.early_stop,
            config_json=dataclasses.asdict(full),
        ),
        say=lambda line: print(line, flush=True),
    )
    if result.steps > result.started:
        print(f"{result.steps - result.started} steps in {result.seconds:.0f} s, {result.images_per_second:,.0f} images/s")
    ended = f"stopped early at step {result.steps}" if result.stopped_early else f"finished at step {result.steps}"
    best = f"; best {result.best.accuracy:.2%} at step {result.best.step}" if result.best.accuracy > result.accuracy else ""
    print(f"{ended}: {result.correct} of {result.count} held-out images right, {result.accuracy:.2%}{best}; {out / 'curves.png'}")


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
    sys.exit(main())
