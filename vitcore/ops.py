"""Ops: the functions a model calls, as one record passed as one static argument. A new device is a new record, nothing else."""

from collections.abc import Callable
from functools import cache, partial, wraps
from typing import NamedTuple

import jax

from kernels.attention import gpu as attention_gpu
from kernels.attention import reference as attention
from kernels.attention import tpu as attention_tpu
from kernels.attention.hopper.plan import not_hopper
from kernels.attention.lines import reference as attention_lines
from kernels.attention.lines import tpu as attention_lines_tpu
from kernels.attention.relative import reference as attention_relative
from kernels.attention.relative import tpu as attention_relative_tpu
from kernels.attention.rotary import reference as attention_rotary
from kernels.attention.rotary import tpu as attention_rotary_tpu
from kernels.attention.statistics import reference as attention_statistics
from kernels.attention.statistics import tpu as attention_statistics_tpu
from kernels.by_xla import FEW_TOKENS
from kernels.device import DEVICES, SUBLANES, Device
from kernels.launch import Launch, here
from kernels.layer_norm import reference as layer_norm
from kernels.layer_norm import tpu as layer_norm_tpu
from kernels.mlp import gated as mlp_gated
from kernels.mlp import gpu as mlp_gpu
from kernels.mlp import reference as mlp
from kernels.mlp import tpu as mlp_tpu
from kernels.patch_embed import gpu as patch_embed_gpu
from kernels.patch_embed import reference as patch_embed
from kernels.patch_embed import tpu as patch_embed_tpu


class Keeping(NamedTuple):
    """What an op can keep for the backward pass beside its input.

    op: its field of `Ops`. what: is kept, for people. run: takes the op's place. bytes: (images, tokens, a ViTConfig, devices of
    the model axis, dtype) -> the HBM that a call keeps; None for shapes that it cannot keep it for.
    """

    op: str
    what: str
    run: Callable
    bytes: Callable


class Ops(NamedTuple):
    """What a ViT is made of; each function has the signature and meaning of that of its name in `kernels/*/reference.py`.

    multiple: the model pads its tokens to a multiple of this, once, and half blocks take `tokens=`, how many of T are real. It
    does not where there are at most `unpadded`.
    unrolled: the programs, of "forward", "train" (a training step) and "remat" (a step that rematerialises its blocks), in which
    the blocks are compiled one after the other instead of as one loop. Without a loop, what the backward pass needs stays where
    it was made and is freed after its use; a loop copies it into and out of arrays with a layer axis. stacked: the half blocks take
    kernels as `kernels.stacked.Stacked`, and return the arrays of those that they took. keeps: the checkpoint
    policy of a block on a mesh, whose gathered weights are gathered again for the backward pass: it says yes to what these ops
    save when there is no checkpoint around them. None says yes to everything but gathered weights, which suits ops that decide
    inside a `custom_vjp` what they save, and ops that leave it to differentiation.
    paced: in unrolled blocks on a data axis, the sums of a block's gradients run beside the backward pass of the next block and are
    done before that of the one behind begins. XLA on a GPU, left alone, puts all of them behind the last block, where nothing is
    left to run beside them, and keeps the gradients till then.
    alone: () -> whether nothing should run beside the kernels, since they hold all multiprocessors of a device: a collective that
    takes some of these makes a kernel beside it wait for as long as it takes itself. Blocks then wait for each other's gradients
    alone, which are summed behind the last, but where parameters come layer by layer, for lack of memory (shard="parameters").
    relative_half: the half with relative positions, by default `kernels/attention/relative/reference.py`. relative_by_xla:
    why XLA does it for a `tiling.Shape`, "" where a kernel does.
    rotary_half, rotary_by_xla: likewise the half with rotary positions, by default `kernels/attention/rotary/reference.py`.
    lines, lines_by_xla: likewise attention along lines, of an AxialResNet; why, for a `lines.plan.LineShape`.
    gated_half: a gated MLP half, for which nobody has a kernel: `kernels/mlp/reference.py`, or what keeps less of it
    (`kernels/mlp/gated.py`).
    attention_statistics: `kernels/attention/statistics/reference.py` of a block. No logits need it, and by default XLA
    does it.
    bytes: whether patch_embed takes uint8 images and, with them, `dtype=` of the tokens and `rows=`, to which
    they are padded.
    keeping: what a training step may keep where memory is plentiful, the first to be kept first (`vitcore/keep.py`). device: () ->
    whose memory that is; None where nothing is known of it.
    """

    patch_embed: Callable
    attention_half: Callable
    mlp_half: Callable
    layer_norm: Callable
    multiple: int = 1
    unpadded: int = 0
    unrolled: tuple[str, ...] = ()
    stacked: bool = False
    keeps: Callable | None = None
    paced: bool = False
    alone: Callable[[], bool] = lambda: False
    relative_half: Callable = attention_relative.attention_half
    relative_by_xla: Callable = lambda shape: "these ops have no kernel for them"
    rotary_half: Callable = attention_rotary.attention_half
    rotary_by_xla: Callable = lambda shape: "these ops have no kernel for them"
    lines: Callable = attention_lines.attention
    lines_by_xla: Callable = lambda shape: "these ops have no kernel for them"
    gated_half: Callable = mlp.gated_half
    attention_statistics: Callable = attention_statistics.attention_statistics
    bytes: bool = False
    keeping: tuple[Keeping, ...] = ()
    device: Callable[[], Device] | None = None

    def padding(self, tokens: int) -> int:
        """The rows that the model adds to so many tokens."""
        return -tokens % self.multiple if tokens > self.unpadded else 0


FUNCTIONS = tuple(name for name in Ops._fields if name not in Ops._field_defaults)  # without the model's settings
KEPT = ("keeping", "device")
OTHERS = (
    "relative_half",
    "relative_by_xla",
    "rotary_half",
    "rotary_by_xla",
    "lines",
    "lines_by_xla",
    "attention_statistics",
)  # that have the reference where nothing is said

_KERNELS = (
    patch_embed_tpu.patch_embed,
    attention_tpu.attention_half,
    mlp_tpu.mlp_half,
    layer_norm_tpu.layer_norm,
    attention_relative_tpu.attention_half,
    attention_relative_tpu.by_xla,
    attention_rotary_tpu.attention_half,
    attention_rotary_tpu.by_xla,
    attention_lines_tpu.attention,
    attention_lines_tpu.by_xla,
    attention_statistics_tpu.attention_statistics,
)


def _kernels(started: Callable, launch: Callable[[], Launch]) -> Ops:
    def of_mlp(images, tokens, config, parts, dtype):
        return mlp_tpu.kept_bytes(images, tokens, config.width, config.mlp_dim // parts, dtype, launch=launch())

    def of_attention(images, tokens, config, parts, dtype):
        heads = config.num_heads // parts
        width = config.width // config.num_heads
        return attention_tpu.kept_bytes(images, tokens, config.width, heads, width, dtype, launch=launch())

    keeping = (
        Keeping("mlp_half", "the hidden layer", started(partial(mlp_tpu.mlp_half, keep=True)), of_mlp),
        Keeping(
            "attention_half",
            "q, k, v and what they attend to",
            started(partial(attention_tpu.attention_half, keep=True)),
            of_attention,
        ),
    )
    functions = dict(zip((*FUNCTIONS, *OTHERS), map(started, _KERNELS), strict=True))
    # whole tiles of 8 rows: in HBM they are there anyway, and [B, T, D] as [B T, D], which products like best, is a view
    return Ops(
        **functions, gated_half=mlp_gated.gated_half, multiple=SUBLANES, unpadded=FEW_TOKENS, stacked=True, keeping=keeping,
        device=lambda: launch().device,
    )  # fmt: skip


@cache
def fused(launch: Launch | str) -> Ops:
    """The Pallas kernels, started as `launch` says: for another device than the one present, or interpreted.

    launch: or the name of a TPU generation, "v5e", to lower and compile for it where it is not. ValueError for an unknown one.
    """
    if isinstance(launch, str):
        known = [device.name for device in DEVICES.values() if device.topology]
        if launch not in known:
            raise ValueError(f"fused({launch!r}): a generation of TPUs is required, one of {', '.join(known)}")
        return fused(Launch(device=DEVICES[launch]))
    return _kernels(lambda kernel: partial(kernel, launch=launch), lambda: launch)


def _on_the_tpu(kernel):
    @wraps(getattr(kernel, "func", kernel))
    def run(*args, **options):
        if (platform := jax.default_backend()) != "tpu":
            raise ValueError(
                f"the fused ops run on a TPU, the devices are {platform}: use the reference ops, interpret to try the kernels, or "
                "vitcore.fused('v5e') to compile for a TPU that is not here"
            )
        return kernel(*args, launch=here(), **options)

    return run


# Plain einsum, compiled by XLA: the specification, and the path of every platform without kernels.
REFERENCE = Ops(patch_embed.patch_embed, attention.attention_half, mlp.mlp_half, layer_norm.layer_norm)
# Our kernels on Hopper; elsewhere cuDNN's attention, and products that read and write the activations' dtype. With `bytes=True`,
# which is not the default since it gains nothing in whole models (LOG.md, 2026-11-28), Hopper's patch embedding reads bytes.
GPU = Ops(
    patch_embed_gpu.patch_embed,
    attention_gpu.attention_half,
    mlp_gpu.mlp_half,
    layer_norm.layer_norm,
    multiple=attention_gpu.TOKENS,
    unrolled=("forward", "train"),
    keeps=attention_gpu.keeps,
    paced=True,
    alone=lambda: not_hopper() is None,
)
# The kernels, compiled for the TPU that is present. Forward, a loop costs them nothing, and needs less memory.
FUSED = _kernels(_on_the_tpu, here)._replace(unrolled=("train", "remat"))
# The kernels as plain JAX operations, on any platform: slow, for trying and testing them.
INTERPRET = fused(Launch(device=DEVICES["cpu"], interpret=True))

BY_NAME = {"reference": REFERENCE, "gpu": GPU, "fused": FUSED, "interpret": INTERPRET}


def resolve(ops: Ops | None) -> Ops:
    """The ops to run: those given, or with None what suits the platform: FUSED on a TPU, GPU on a GPU, REFERENCE elsewhere."""
    if ops is None:
        return {"tpu": FUSED, "gpu": GPU}.get(jax.default_backend(), REFERENCE)
    return ops


def for_training(ops: Ops | None) -> Ops:
    """`resolve`, for the forward pass of a training step."""
    ops = resolve(ops)
    unrolled = set(ops.unrolled) - {"forward"} | ({"forward"} if "train" in ops.unrolled else set())
    return ops._replace(unrolled=tuple(sorted(unrolled)))
