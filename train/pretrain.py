"""Pre-train a ViT: `python -m train.pretrain`.

    python -m train.pretrain --mesh 8x4                                             the embedded digits, today, on any machine
    python -m train.pretrain --mesh 8x4 --model ViT-B/16 --data folder:PATH --recipe imagenet --dtype bfloat16

    python -m train.pretrain --objective masked                                     masked patch prediction, without labels

A recipe (paper Table 3, `train/recipes.py`) supplies what is not said on the command line. A run leaves one directory:
config.json (everything resolved: `--config FILE` runs it again), metrics.jsonl, curves.png, checkpoints/. The same command
again resumes; another mesh may take over, anything else that changes the result is another run and wants another --out.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules load, an interrupt ends the process without a traceback

import dataclasses
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from train import code, distributed, job, masked, options
from train.defaults import resolve as resolve
from train.job import check_claim, end, guard, locked, say, stopped
from train.optimizers import SamOptions, named
from train.options import ImageOptions
from train.shape import AblationOptions, shape_of
from train.signals import Stop, interruptible


@dataclass(frozen=True, kw_only=True)
class Pretrain(AblationOptions, SamOptions, ImageOptions):
    """Pre-train a Vision Transformer. Whatever is not given comes from the recipe (paper Table 3)."""

    model: str | None = None
    """ViT-{Nano,Ti,S,B,L,H}/PATCH. Default: ViT-Nano/4 for the digits, ViT-S/16 for plain, ViT-B/16 otherwise."""
    data: str = "digits"
    """digits, digits:0-4, folder:PATH, tar:PATTERN, arrayrecord:PATTERN, tfds:NAME, parquet:PATTERN, cifar:PATH."""
    train_split: str = "train"
    """Part of the data to train on: train, train[:99%], train[classes=0-4], train[without=removed.json]."""
    val_split: str = "val"
    """Part to validate on: val, test, train[99%:]."""
    init: str | None = None
    """Start from these parameters instead of fresh ones: a run's directory, .npz or .safetensors of the same model and classes. The
    schedule begins anew. Default: fresh ones."""
    allow_nonfinite: bool = False
    """Take weights of --init that hold NaN or infinities."""
    objective: Literal["classes", "masked"] = "classes"
    """classes: the images' labels. masked: patches of the image that the model does not see, without labels (paper B.1.2); leaves
    masked.png as well. Of the recipe it keeps data, epochs and batch; rate, warm-up and decay are its own."""
    masked_target: Literal["mean", "small", "pixels"] | None = None
    """Of masked. mean: a patch's mean colour in 3 bits a channel. small: the colours of the patch reduced to 4x4. pixels: all of
    the patch, by L2. Default: mean."""
    corrupt: float | None = None
    """Of masked: the share of the patches that is corrupted. Default: 0.5."""
    recipe: str | None = None
    """digits, imagenet, imagenet21k, jft, or with the epochs where Table 3 lists two: jft-14ep; plain, plain-300ep: a later
    baseline. Default: digits or imagenet."""
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

    image_size: int | None = None
    pool: str | None = None
    """How tokens become one vector: token (class token), gap (mean), map (attention pooling) or first (the first patch). Default:
    the recipe's or the model's own."""
    position: str | None = None
    """Position embedding (paper Table 8): none, 1d, 2d, relative, rope, sincos2d or 1d-patches; 1d and 2d with -layers have a
    table in each layer, with -shared one for all layers. Default: the recipe's or 1d."""
    representation_size: int | None = None
    """Width of the tanh layer before the head; 0 for none. Default: the model's width, as in the paper; of a ResNet none."""
    dropout: float | None = None
    drop_path: float | None = None
    """Stochastic depth: the chance with which an image passes by a half of the last block, rising from 0 at the first.
    Default: 0."""
    gelu: Literal["tanh", "erf", "quick", "silu"] | None = None
    """Default: the model's own, tanh but for DINO's."""
    eps: float | None = None
    """Of every layer norm of a ViT: 1e-6 in the release and timm, 1e-12 in transformers' ViT, 1e-5 in CLIP and DINOv3. Default: the
    model's own, 1e-6 but for DINOv3's."""

    optimizer: Literal["lion", "adafactor", "muon"] | None = None
    """In place of Adam. adafactor and muon take Adam's rate and decay, lion wants --learning-rate and --weight-decay: a rate some 5
    times smaller and a decay as much larger."""
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
    head_bias: float | None = None
    """What the classifier's bias starts at. Default: with the sigmoid the recipe's (-10 for jft and imagenet21k), else 0."""
    label_smoothing: float | None = None
    polyak: float = 0.0
    """Decay of the parameters' running average, which is then what is validated; 0 for none."""

    subset: int | None = None
    """Train on this many images, drawn at random."""
    subset_seed: int = 0
    early_stop: int = 0
    """Stop after this many validations without a better accuracy; 0 for never."""

    fewshot_every: int | None = None
    """Steps between few-shot evaluations (train.fewshot) of the model as it is. Default: none."""
    keep: int = 3


PLACEMENT = options.PLACEMENT | {"epochs", "fewshot_every"}


def identity(args: Pretrain) -> dict:
    """What makes a resolved run the run it is, and no other: JSON-able."""
    return job.identity(args, PLACEMENT - {"eval_every"} if args.early_stop else PLACEMENT)  # early stopping counts evaluations


def directory(args: Pretrain):
    """Where the run lives: --out, local or gs://, or runs/MODEL-DATA-HASH, the same for the same resolved configuration."""
    data = args.data.partition(":")[0] + ("-" + Path(args.data.partition(":")[2]).name if ":" in args.data else "")
    return job.directory(args.out, f"{args.model}-{data}", identity(args))


def main(argv: list[str] | None = None) -> int:
    """The job. Returns the exit code: 0, or 2 with one line on stderr for whatever a user can mend."""

    def work(stop):
        run(parse(sys.argv[1:] if argv is None else argv), stop)

    return guard("train.pretrain", work)


def parse(argv: list[str]) -> Pretrain:
    """The command line, after the values of --config FILE where that is given. ValueError, in one line, for what does not parse."""
    return options.parse(Pretrain, "train.pretrain", argv)


def run(args: Pretrain, stop: Stop | None = None):
    """Train as `args` say; prints where, what and how it went, on process 0. stop: who is asked to stop. The loop's Result."""
    args.join()

    from train.build import check_fit, make_run, name_of_ops, step_options
    from train.data import check_classes, open_source
    from train.data.identity import seen
    from train.loop import train
    from train.shards import better, choose, laid_for, said

    source, held_out = open_source(args.data, args.train_split), open_source(args.data, args.val_split)
    check_classes(source, held_out)
    resolved = resolve(args, examples=len(source))
    mesh, where = args.make_mesh()
    # every value is there now, which the types of Pretrain cannot say
    full: Any = dataclasses.replace(
        resolved, mesh=f"{mesh.shape['data']}x{mesh.shape['model']}", augment=args.augment or source.augment
    )
    ops = full.choose_ops(mesh, where)
    config = model_of(full, classes=len(source.classes), channels=source[0].image.shape[2] if source.decoded else 3)
    check_fit(full, config, mesh, full.model)
    rate, tx = _optimizer(full, config)
    shard = choose(full.shard, config, mesh, full.dtype)
    mesh = laid_for(shard, mesh, config)
    start, pixels, found = _start(full, config, mesh, tx, shard)
    model = None if found is None else found.model
    if found is not None and full.objective == "classes":
        source, held_out = _numbered(full, source, held_out, found)
    out, who, how = directory(full), identity(full), step_options(full, ops, shard, loss=full.loss, **pixels)
    began = {} if model is None else {job.BEGAN_FROM: job.model_of_run(out) or model}
    distributed.agree(code=code.digest(), versions=code.versions(), images=seen(source, held_out), model=model)
    spec = make_run(
        full, out, who, dataclasses.asdict(full) | began, sources=(source, held_out), config=config, mesh=mesh,
        data=dict(subset=full.subset, subset_seed=full.subset_seed),
        tx=tx, learning_rate=rate, options=how, early_stop=full.early_stop, start=start,
        **_fewshot(full, config, mesh, source, held_out, how), **masked.finish(full, config, mesh, held_out, how, out),
    )  # fmt: skip
    if distributed.rank() == 0:
        check_claim(out, who)
    named = name_of_ops(ops, config, full, mesh)
    of = masked.about(full, config) or f"of {len(source.classes)} classes"
    say(f"{full.model} on {full.data}: {len(source)} training and {len(held_out)} held-out images {of}")
    where += said(shard, mesh, config)
    say(f"{where}; ops: {named}; {full.steps} steps of {full.batch_size} images; recipe {full.recipe}; {out}")
    if line := better(config, mesh, full.batch_size // full.accumulate, asked=full.shard, dtype=full.dtype):
        say(line)
    with locked(out):
        result = train(spec, say, stop=stop)
    _report(result, out, masked.counted(full.objective))
    return result


def _numbered(full, source, held_out, found) -> tuple[Any, Any]:
    """The two sets with the numbers that their classes have in --init's head. ValueError for others, but with --accept-data."""
    from train.data import by_names
    from train.data.identity import check, trained_on

    numbered = [by_names(one, found.classes, full.init, accept=full.accept_data) for one in (source, held_out)]
    for line in dict.fromkeys([*(line for _, line in numbered), trained_on(check(found.data), held_out, full.init)]):
        if line:
            say(line)
    return numbered[0][0], numbered[1][0]


def _start(full, config, mesh, tx, shard) -> tuple[Any, dict[str, Any], Any]:
    """What --init starts from, as `Run` takes it; the pixels it wants, as `StepOptions` do; it as `train.pretrained.Pretrained`.
    ValueError for another model."""
    if full.init is None:
        return None, {}, None
    from train.build import start_from
    from train.pretrained import open_pretrained, store

    found = open_pretrained(
        store(full.init), image_size=full.image_size, gelu=full.gelu, masked=full.objective == "masked",
        allow_nonfinite=full.allow_nonfinite,
    )  # fmt: skip
    same = {"dropout": 0.0, "drop_path": 0.0, "head_bias": 0.0}
    has, wants = (dataclasses.asdict(c) | same | masked.described(c) for c in (found.config, config))
    if other := [f"{name} {has[name]} there, {wants[name]} here" for name in wants if has[name] != wants[name]]:
        raise ValueError(
            f"--init {full.init} is another model ({', '.join(other[:3])}): give the options that it has, or put a new head on it "
            "with train.finetune"
        )
    start = partial(start_from, found._replace(config=config), mesh, tx, polyak=bool(full.polyak), shard=shard)
    return start, {"pixels": found.pixels}, found


def _fewshot(full, config, mesh, source, held_out, how) -> dict[str, Any]:
    """The measurement of --fewshot-every, as `Run` takes it."""
    if full.fewshot_every is None:
        return {}
    from train.fewshot import probe

    measure = probe(
        config, mesh, source, held_out, antialias=full.antialias, threads=full.threads, decoder=full.decoder,
        ops=how.ops, dtype=how.dtype,
    )  # fmt: skip
    return {
        "probe": lambda state: measure(state.params if state.average is None else state.average),
        "probe_every": full.fewshot_every,
    }


def _report(result, out, counted: tuple[str, str]) -> None:
    """How a run went, in a line or two; ends the process where a thread would keep it."""
    if result.steps > result.started:
        say(f"{result.steps - result.started} steps in {result.seconds:.0f} s, {result.images_per_second:,.0f} images/s")
    if stopped(result, out):
        return
    ended = f"stopped early at step {result.steps}" if result.stopped_early else f"finished at step {result.steps}"
    best = f"; best {result.best.accuracy:.2%} at step {result.best.step}" if result.best.accuracy > result.accuracy else ""
    skipped = f"; {result.skipped} steps were skipped" if result.skipped else ""
    what, picture = counted
    right = f"{result.correct} of {result.count} {what} right, {result.accuracy:.2%}"
    say(f"{ended}: {right}{best}{skipped}; {out / picture}")


def model_of(full, *, classes: int, channels: int):
    """The configuration of resolved options."""
    from vitcore import families

    return families.named(
        full.model,
        image_size=full.image_size,
        num_classes=0 if full.objective == "masked" else classes,
        representation_size=full.representation_size or None,
        pool=full.pool,
        position=full.position,
        dropout=full.dropout,
        drop_path=full.drop_path,
        gelu=full.gelu,
        eps=full.eps,
        channels=channels,
        head_bias=full.head_bias,
        masked=masked.of(full),
        **shape_of(vars(full)),
    )


def _optimizer(full, config):
    """The schedule and the optimizer of resolved options."""
    from train.optim import optimizer, schedule, sgd

    recipe = masked.recipe_of(full, full.recipe, full.model)
    rate = schedule(
        base_lr=full.learning_rate,
        total_steps=full.steps,
        warmup_steps=full.warmup_steps,
        decay=full.decay,
        linear_end=min(recipe.linear_end, full.learning_rate),
    )
    if full.sgd is not None:
        return rate, sgd(rate, momentum=full.sgd, weight_decay=full.weight_decay, dtype=full.first_moment)
    if full.optimizer is not None:
        return rate, named(full.optimizer, rate, config, weight_decay=full.weight_decay, first_moment=full.first_moment)
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
