"""From resolved options to what the loop takes: what pre-training and fine-tuning share."""

import contextlib
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels.attention.hopper.plan import refuses
from train import distributed
from train import mesh as meshes
from train.data import Source, eval_batches, train_batches
from train.data import identity as identity_of_data
from train.data.suspects import Reading
from train.feed import Kept
from train.files import parse_json, text_of
from train.frozen import put_params
from train.job import agree, claim, say
from train.loop import Run
from train.optimizers import WHOLE
from train.step import StepOptions, TrainState, shardings, state_specs
from vitcore import families, keep
from vitcore.config import ViTConfig
from vitcore.ops import BY_NAME, GPU, Ops
from vitcore.sharding import Shard, check_mesh


def check_fit(full, config: ViTConfig, mesh: Mesh, name: str) -> None:
    """Raises ValueError where the model, the batch and the mesh of resolved options do not fit. name: of the model, for people."""
    check_mesh(config, meshes.shape_of(mesh))
    if getattr(config, "pool", "") == "none":
        raise ValueError(f"{name} has pool 'none', a representation for each token: classes of images want one, e.g. --pool gap")
    parts = meshes.shape_of(mesh).data * full.accumulate
    if full.batch_size % parts:
        raise ValueError(
            f"--batch-size {full.batch_size} is not divisible by the data axis of {parts // full.accumulate} "
            f"times --accumulate {full.accumulate}: use a multiple of {parts}"
        )
    if full.remat and full.remat_every > 1 and not isinstance(config, ViTConfig):
        raise ValueError(f"--remat-every {full.remat_every}: {name} is made again unit by unit, use 1")
    if full.remat and config.depth % full.remat_every:
        raise ValueError(f"--remat-every {full.remat_every}: {name} has {config.depth} blocks, a divisor of that is required")


def step_options(full, ops: Ops, shard: Shard, **own) -> StepOptions:
    """How a step of resolved options is taken. shard: of `train.shards.choose`. own: what only one of the jobs has."""
    return StepOptions(
        shard=shard, whole=full.optimizer in WHOLE, sam=full.sam,
        ops=ops, dtype=jnp.dtype(full.dtype), remat=full.remat_every if full.remat else 0, accumulate=full.accumulate,
        label_smoothing=full.label_smoothing, clip_norm=full.clip_norm or None, polyak=full.polyak, seed=full.seed, **own,
    )  # fmt: skip


def name_of_ops(ops: Ops, config, full, mesh) -> str:
    """The ops by name, what of the model does not go through them or not through our kernels, with the reason, and what a training
    step of the resolved options keeps."""
    dtype = full.dtype
    name = next(name for name, known in BY_NAME.items() if known is ops)
    if apart := families.family_of(config).by_xla(config, ops, dtype, getattr(config, "num_heads", 1) // mesh.shape["model"]):
        name += f" ({' and '.join(apart)} by XLA)"
    if ops is GPU and isinstance(config, ViTConfig) and config.block == "encoder":
        rows = config.tokens + ops.padding(config.tokens)
        if why := refuses(jnp.dtype(dtype), config.width // config.num_heads, rows):
            name += f" (attention without our kernel: {why})"
    images = full.batch_size // full.accumulate // meshes.shape_of(mesh).data
    kept = keep.choose(ops, config, images, dtype, meshes.shape_of(mesh), remat=full.remat, average=bool(full.polyak))[1]
    return ", ".join(filter(None, (name, keep.described(kept))))


def _known(out, identity: dict, sources: tuple[Source, Source], *, accept: bool) -> tuple[tuple[Source, Source], dict]:
    """The sources as the run in `out` goes on with them, and what it is to keep of them. Every process of a job calls it.

    Raises ValueError where the run, if there is one, has seen other classes or images, unless `accept`; OSError.
    """
    config, here = out / "config.json", True
    held = None
    if distributed.rank() == 0 and config.exists():
        with contextlib.suppress(ValueError):  # damaged: `check_claim` says so
            held = parse_json(text_of(config))
        here = isinstance(held, dict) and all(held.get(key) == value for key, value in identity.items())
    held, here = distributed.broadcast([held.get(identity_of_data.KEY, {}) if here and held else None, here])
    if held is None or not here:  # a new run; or another one's, which `check_claim` refuses
        return sources, identity_of_data.seen(*sources)
    sources, data_seen, lines = identity_of_data.continued(
        identity_of_data.check(held or None), *sources, where=str(out), accept=accept
    )  # fmt: skip
    for line in lines:
        say(line)
    return sources, data_seen


# Up to so many cores threads read. They bring what a CPU takes; on 4 and 8 cores beside a GPU they brought a third to three
# quarters of what as many processes of torch's did.
FEW_CORES_OF_A_CPU, FEW_CORES = 8, 2
MOST_WORKERS = 28  # of 32 cores; more were not tried, and each takes about a second to start
KEPT_BYTES = 1 << 30  # of a validation set, at most, that a process holds in memory between evaluations: 7,000 images of 224 pixels
MANY_IMAGES = 8192  # of a validation set, from which processes read it: threads bring some 1,200 a second, whatever the cores


def cores() -> int:
    """The processor cores that this process may use, which a container or a job's script may have made fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reading_processes(asked: int | None, source: Source, *, platform: str) -> int:
    """The processes that read and decode: those asked for, or with None what suits the source, the cores that we may use and what
    devices of this platform take. An eighth of the cores is left to the process that joins their batches."""
    if asked is not None:
        return asked
    few = FEW_CORES_OF_A_CPU if platform == "cpu" else FEW_CORES
    return 0 if source.decoded or cores() <= few else min(MOST_WORKERS, cores() - max(1, cores() // 8))


def make_run(
    full, out, identity: dict, described: dict, *, sources: tuple[Source, Source], config: ViTConfig, mesh: Mesh,
    data: dict[str, Any] | None = None, **own,
) -> Run:  # fmt: skip
    """The `Run` of resolved options in directory `out`.

    identity, described: what a continuation must share, and the whole of config.json. sources: to train on, to measure on. data:
    arguments of `train_batches`, and own: fields of `Run`, that only one of the jobs has.
    """
    kinds = zip(("training images", "held-out images"), sources, strict=True)
    seen = {f"their {kind}": [source.name, len(source), list(source.classes)] for kind, source in kinds}
    agree(full, **{"--out": str(out)} | seen)
    (source, held_out), data_seen = _known(out, identity, sources, accept=full.accept_data)
    described = described | {identity_of_data.KEY: data_seen, "accept_data": False}  # the answer to one question, once
    reading = Reading(out, (source, held_out), decoder=full.decoder, seconds=full.step_timeout)
    platform = mesh.devices.flat[0].platform
    images: dict[str, Any] = dict(
        image_size=full.image_size, channels=config.channels, threads=full.threads, shard=meshes.data_shard(mesh),
        decoder=full.decoder, pixels="uint8", bad_share=full.bad_share, reading=reading,
    )  # fmt: skip
    batches = train_batches(
        source, batch_size=full.batch_size, seed=full.seed, augment=full.augment, how=full.how,
        workers=reading_processes(full.workers, source, platform=platform),
        mixup=full.mixup, cutmix=full.cutmix, mixup_share=full.mixup_share or "batch", repeats=full.repeats, **images, **data or {},
    )  # fmt: skip
    # Processes take seconds to start; fewer images have been read by threads in that time.
    workers = reading_processes(full.workers, held_out, platform=platform) if len(held_out) >= MANY_IMAGES else 0
    size = meshes.whole_rows(min(full.batch_size // full.accumulate, len(held_out)), mesh)
    return Run(
        directory=out,
        config=config,
        mesh=mesh,
        batches=batches,
        reading=reading,
        validation=Kept(
            lambda: eval_batches(held_out, batch_size=size, preprocess=full.preprocess, how=full.how, workers=workers, **images),
            KEPT_BYTES,
        ),
        batch_size=full.batch_size,
        total_steps=full.steps,
        log_every=full.log_every,
        eval_every=full.eval_every,
        checkpoint_every=full.checkpoint_every,
        keep=full.keep,
        keep_every=full.keep_every,
        config_json=described,
        identity=identity,
        claim=partial(claim, out, identity, described),
        step_timeout=full.step_timeout,
        bad_steps=full.bad_steps,
        checkpoint_wait=full.checkpoint_wait,
        tensorboard=full.tensorboard,
        profile=full.profile,
        **own,
    )


def start_from(pretrained, mesh, tx, *, polyak: bool, shard: Shard = "parameters"):
    """The TrainState at step 0 with the parameters of a `train.pretrained.Pretrained`."""

    def rest(params):
        average = jax.tree.map(jnp.copy, params) if polyak else None
        return TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), tx.init(params), average)

    specs = state_specs(pretrained.config, mesh, tx, polyak=polyak, shard=shard)
    return jax.jit(rest, out_shardings=shardings(mesh, specs))(put_params(pretrained.params, pretrained.config, mesh))
