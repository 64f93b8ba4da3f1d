"""A job's command line: a frozen dataclass of options, filled from --config FILE and then from the words given.

What jobs share of it: JobOptions (train/job.py) <- MeshOptions, a model on a mesh <- TrainOptions, a model that is trained.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from jax.sharding import Mesh

from train import distributed
from train import mesh as meshes
from train.files import parse_json, text_of
from train.job import BEFORE, BEGAN_FROM, JobOptions, guard
from train.metrics import need_tensorboard
from train.signals import Watchdog
from vitcore import command_line
from vitcore.normalisation import pixels
from vitcore.ops import BY_NAME, Ops
from vitcore.ops import resolve as resolve_ops

if TYPE_CHECKING:
    from train.data.augment import How

Options = TypeVar("Options")


@dataclass(frozen=True, kw_only=True)
class MeshOptions(JobOptions):
    """What every job with a model has besides: the devices, the numbers and the code it runs in, and how images are read."""

    mesh: str | None = None
    """DATAxMODEL devices, e.g. 8x4. A CPU with fewer simulates them. Default: all devices on the data axis."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and matmul operands; parameters, sums and optimizer are float32."""
    ops: Literal["auto", "reference", "fused", "interpret"] = "auto"
    """reference: einsum through XLA. fused: the Pallas kernels, on a TPU. interpret: the kernels anywhere, slowly."""
    decoder: Literal["auto", "pillow", "simplejpeg"] = "auto"
    """Of JPEGs. simplejpeg: the same pixels, faster; wants the extra [fast]. auto: simplejpeg where it is installed."""
    threads: int | None = None
    """That read and decode images. Default: by the source."""

    def join(self) -> None:
        """As `JobOptions.join`; JAX then knows what devices to simulate, should there be only a CPU."""
        shape = None if self.mesh is None else meshes.parse(self.mesh)
        super().join()
        meshes.prepare(shape, distributed.count())

    def make_mesh(self) -> tuple[Mesh, str]:
        """The mesh, and one line that says what it lies on."""
        return meshes.make(None if self.mesh is None else meshes.parse(self.mesh))

    def choose_ops(self, mesh: Mesh, where: str) -> Ops:
        """What --ops names. ValueError for a TPU's kernels elsewhere. where: what the mesh lies on."""
        ops = resolve_ops(None if self.ops == "auto" else BY_NAME[self.ops])
        if ops is BY_NAME["fused"] and mesh.devices.flat[0].platform != "tpu":
            raise ValueError(f"--ops fused runs on a TPU, {where} here: use --ops reference, or --ops interpret to try the kernels")
        return ops


@dataclass(frozen=True, kw_only=True)
class TrainOptions(MeshOptions):
    """What every job that trains has besides. Nothing here but the dtype changes what is computed."""

    accumulate: int = 1
    """Parts in which a batch is worked through, one after the other."""
    shard: Literal["auto", "parameters", "optimizer", "none"] = "auto"
    """What the data axis splits. parameters: them and the optimizer, brought together layer by layer. optimizer: a step holds
    a copy of the parameters. none: all is whole everywhere. auto: as much as the model's size wants."""
    remat: bool = False
    """Keep only the blocks' inputs for the backward pass: more images fit, a third more arithmetic."""
    remat_every: int = 1
    """With --remat: keep every n-th block's input only, n a divisor of the blocks. 2: an eighth more arithmetic again."""
    workers: int | None = None
    """Processes that read and decode images instead of threads. Default: none for images that lie decoded in memory, on 2 cores,
    and on 8 where a CPU trains; else on seven of eight cores, 16 at most."""
    bad_share: float = 0.01
    """Images that cannot be read are replaced and logged; where they are a larger share, the run stops."""
    log_every: int | None = None
    """Steps between records. Default: a hundredth of the run, 50 at most."""
    eval_every: int | None = None
    """Steps between validations. Default: about twenty in a run."""
    checkpoint_every: int | None = None
    """Steps between checkpoints. Default: as validations."""
    accept_data: bool = False
    """Go on with a run though the classes or images are not those that it has seen. The run keeps what it saw before."""
    keep: int = 2
    """Newest checkpoints that stay."""
    keep_every: int | None = None
    """Checkpoints of steps that are multiples of this stay as well."""
    tensorboard: bool = False
    """Write TensorBoard's event files into the run's tensorboard/ as well; wants the extra [tensorboard]."""
    profile: tuple[int, int] | None = None
    """Trace from one step to another with JAX's profiler, 20 25, into the run's profile/: opens in Perfetto and in XProf."""


@dataclass(frozen=True, kw_only=True)
class ImageOptions(TrainOptions):
    """What jobs that train by a recipe have besides: what is done to the images. None: as the recipe has it."""

    augment: Literal["inception", "digits", "none"] | None = None
    """inception: a crop, resized, and a flip. Default: what suits the data."""
    crop: Literal["tensorflow", "torchvision"] | None = None
    """The rule of the inception crop: the authors', which takes smaller parts, or that of torchvision."""
    antialias: bool | None = None
    """Whether shrinking an image averages over its pixels. The authors interpolate between the four nearest: no."""
    randaugment: tuple[int, int] | None = None
    """Changes of every image, and their magnitude: 2 10. 0 0 for none."""
    mixup: float | None = None
    """Strength of MixUp, shares being drawn from Beta(a, a); 0 for none."""
    cutmix: float | None = None
    """Strength of CutMix, likewise; with both, one of the two is drawn each time."""
    mixup_share: Literal["batch", "row"] | None = None
    """Whether all images of a batch are mixed in one share, as the authors have it, or each in its own."""
    erase: float | None = None
    """Share of the images of which a box is replaced by noise (random erasing); 0 for none."""
    repeats: int = 1
    """Times that an image comes, each time augmented anew, with as many fewer images in an epoch (repeated augmentation): 3 in
    DeiT."""
    preprocess: Literal["resize", "resize-center", "center"] | None = None
    """Of images that are measured. resize: to the square. resize-center: to 256/224 of it, and the middle. center: the shorter side
    to 256/224 of it, averaging, and the middle."""

    @property
    def how(self) -> "How":
        """Of resolved options, as the loader takes it."""
        from train.data.augment import How

        randaugment = self.randaugment if self.randaugment and self.randaugment[0] else None
        return How(antialias=bool(self.antialias), crop=self.crop or "tensorflow", randaugment=randaugment, erase=self.erase or 0.0)


def _kind(augment: str | None, data: str) -> str:
    return augment or ("digits" if data.partition(":")[0] == "digits" else "inception")


def resolve_images(args: "ImageOptions", recipe) -> dict:
    """The fields of ImageOptions with every open value filled in from a recipe's of the same names; None where there is nothing to
    choose. Raises ValueError where they do not fit together."""

    def given(name: str):
        return getattr(recipe, name) if getattr(args, name) is None else getattr(args, name)

    found = {
        name: given(name) for name in ("crop", "antialias", "randaugment", "mixup", "cutmix", "mixup_share", "erase", "preprocess")
    }
    if min(found["mixup"], found["cutmix"]) < 0:
        raise ValueError(f"--mixup {found['mixup']}, --cutmix {found['cutmix']}: strengths of 0 or more are required")
    if not 0 <= found["erase"] <= 1:
        raise ValueError(f"--erase {found['erase']}: a share in [0, 1] is required")
    layers, magnitude = found["randaugment"]
    if min(layers, magnitude) < 0:
        raise ValueError(f"--randaugment {layers} {magnitude}: two numbers of 0 or more are required")
    kind = _kind(args.augment, getattr(args, "data", ""))
    if args.repeats > 1 and kind == "none":
        raise ValueError(f"--repeats {args.repeats}: with --augment none an image is the same each time: leave one of them out")
    if kind != "inception":
        if args.crop is not None or (layers and args.randaugment is not None) or args.erase:
            raise ValueError(f"--crop, --randaugment and --erase belong to --augment inception, and this is {kind}: leave them out")
        found["crop"], found["randaugment"], found["erase"] = None, (0, 0), 0.0
    if not found["mixup"] and not found["cutmix"]:
        found["mixup_share"] = None
    return found


TRAIN_OPTIONS = tuple(field.name for field in dataclasses.fields(TrainOptions))
# What may differ between a run and its continuation: where and how it runs, not what it computes.
PLACEMENT = frozenset(TRAIN_OPTIONS) - {"dtype"} | {"out", "config"}
_POSITIVE = (
    "repeats accumulate remat_every log_every eval_every checkpoint_every keep keep_every threads batch_size image_size steps"
)
_NATURAL = "seed workers warmup_steps"


def check_numbers(args, *, positive: str = "", natural: str = "") -> None:
    """Raises ValueError for a number that is not finite, or out of range: positive, or zero at least. None passes.

    positive, natural: names of options that only this job has, beside those that several do.
    """

    def values(several: str, own: str):
        names = [*(name for name in several.split() if hasattr(args, name)), *own.split()]
        return [(name, value) for name in names if (value := getattr(args, name)) is not None]

    for option, value in values(_POSITIVE, positive):
        if value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value}: a positive number is required")
    for option, value in values(_NATURAL, natural):
        if value < 0:
            raise ValueError(f"--{option.replace('_', '-')} {value}: zero or a positive number is required")
    for option, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{option.replace('_', '-')} {value}: a finite number is required")
    if getattr(args, "tensorboard", False):
        need_tensorboard()
    if (steps := getattr(args, "profile", None)) is not None and not 1 <= steps[0] <= steps[1]:
        raise ValueError(f"--profile {steps[0]} {steps[1]}: a first and a last step are required, from 1")
    if not 0 <= (share := getattr(args, "bad_share", 0)) <= 1:
        raise ValueError(f"--bad-share {share}: a share in [0, 1] is required")


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """What a job that starts from a file of weights is told where the file does not say it."""

    heads: int | None = None
    """Heads of the model in --init, where the file does not say."""
    init_pool: Literal["gap", "first"] | None = None
    """How the model in --init makes one vector of its tokens, where the file has no class token and does not say."""
    init_position: Literal["sincos2d", "none"] | None = None
    """The fixed position embedding of the model in --init, or none, where the file holds no embedding and does not say."""
    mean: tuple[float, ...] = ()
    """Of the pixels that the model in --init wants, values in [0, 1]: 0.485 0.456 0.406. Default: as the file says, or 0.5."""
    std: tuple[float, ...] = ()
    """Deviation of the pixels, likewise: 0.229 0.224 0.225. Default: likewise, or 0.5."""
    allow_nonfinite: bool = False
    """Take weights of --init that hold NaN or infinities."""

    @property
    def told(self) -> dict:
        """The arguments of `open_pretrained`. Raises ValueError for what is out of range."""
        if self.heads is not None and self.heads < 1:
            raise ValueError(f"--heads {self.heads}: a positive number is required")
        if bool(self.mean) != bool(self.std):
            raise ValueError("--mean and --std belong together: give both")
        wanted = pixels(self.mean, self.std) if self.mean else None
        return {
            "heads": self.heads,
            "pool": self.init_pool,
            "position": self.init_position,
            "pixels": wanted,
            "allow_nonfinite": self.allow_nonfinite,
        }


INIT_OPTIONS = tuple(field.name for field in dataclasses.fields(InitOptions))


def check_init(init: str | None) -> None:
    """Raises ValueError where a job that starts from a model is given none."""
    if not init:
        raise ValueError("--init is required: an .npz, a .safetensors or the directory of a run")


# --- the command line -------------------------------------------------------------------------------------------------------


def measuring(cls: type[Options], program: str, run: Callable[[Options], object], argv: list[str] | None) -> int:
    """A job that measures and saves nothing on its way: its options, `run` under its watchdog, its exit code."""
    words = sys.argv[1:] if argv is None else argv

    def work(stop):
        args: Any = parse(cls, program, words)
        with Watchdog(args.step_timeout):
            run(args)

    return guard(program, work, saves=False)


def parse(cls: type[Options], program: str, argv: list[str]) -> Options:
    """The command line, after the values of --config FILE where `cls` has that option and it is given.

    program: the module, "train.finetune". Raises ValueError, in one line, for what does not parse; SystemExit(0) for --help.
    """
    before: list[str] = []
    if any(field.name == "config" for field in dataclasses.fields(cls)):  # pyright: ignore[reportArgumentType]
        for i, word in enumerate(argv):
            if word == "--config" or word.startswith("--config="):
                path = argv[i + 1] if word == "--config" and i + 1 < len(argv) else word.partition("=")[2]
                before = as_options(cls, program, path)
    return command_line.parsed(cls, program, [*before, *argv])


def as_options(cls, program: str, path: str) -> list[str]:
    """A config.json as the words of a command line: they are then checked as such."""
    try:
        values = parse_json(text_of(path))
    except ValueError as error:
        raise ValueError(f"--config {path} is not JSON ({error}): give the config.json of a run") from None
    known = {field.name: field for field in dataclasses.fields(cls)}
    if isinstance(values, dict):
        for name in ("data_seen", BEGAN_FROM):  # what a run knows of its images and its start, not options
            values.pop(name, None)
        before = {key: value for key, value in BEFORE.items() if key in known}  # a run of before there was such an option
        if _kind(values.get("augment"), str(values.get("data"))) != "inception":
            before.pop("crop", None)
        values = before | values
    if isinstance(values, dict) and "init" in values:
        values.pop("vit", None)  # what a fine-tuned model is, for who opens it: made from the rest
    if not isinstance(values, dict) or (unknown := set(values) - set(known)):
        what = f"has no option {', '.join(sorted(unknown))}" if isinstance(values, dict) else "holds no options"
        raise ValueError(f"--config {path}: {program} {what}: give the config.json of a run")
    words = []
    for key, value in values.items():
        option = key.replace("_", "-")
        if isinstance(value, bool) and isinstance(known[key].default, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            words += [f"--{option}", *map(str, value)] if value else []
        elif value is not None:
            words += [f"--{option}", str(value)]
    return words
