"""A model as one file that runs without this package: `python -m vitcore.export`.

    python -m vitcore.export ViT-B_16.npz vit.stablehlo                         any batch size, on CPU, GPU and TPU
    python -m vitcore.export model.safetensors vit.stablehlo --batch 8 --dtype bfloat16
    python -m vitcore.export --try vit.stablehlo                                loads it and runs it on random images

The file is StableHLO, serialized by `jax.export` with its compatibility guarantees (six months backward), the weights inside as
constants. It is a function images float32 [B, Y, X, C] in [-1, 1] -> logits float32 [B, V]; B stays open (a symbol) unless
--batch says one. It holds the reference ops, which XLA compiles anywhere: the Pallas kernels are chosen for one batch and one
device. Whoever loads it needs jax and flatbuffers, and nothing of ours:

    import jax
    from jax import export

    with open("vit.stablehlo", "rb") as file:
        model = export.deserialize(bytearray(file.read()))
    logits = jax.jit(model.call)(images)
"""

import dataclasses
import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitcore import weight_about
from vitcore.command_line import Parser, attempt, end
from vitcore.config import ViTConfig
from vitcore.families import changed
from vitcore.model import apply
from vitcore.normalisation import HALF, Pixels, normalise, said
from vitcore.normalisation import pixels as read_pixels
from vitcore.ops import REFERENCE
from vitcore.runs import as_file
from vitcore.weight_files import appearing
from vitcore.weight_names import OPEN_POOLS, OPEN_POSITIONS
from vitcore.weight_tree import about, describe, read

PLATFORMS = ("cpu", "cuda", "tpu")
# Endings of other forms, which a name should not promise.
OTHERS = {
    ".onnx": "ONNX", ".tflite": "TFLite", ".pt": "PyTorch", ".pth": "PyTorch", ".pb": "TensorFlow", ".mlmodel": "Core ML",
    ".npz": "weights (python -m vitcore.weights convert does)", ".safetensors": "weights (python -m vitcore.weights convert does)",
}  # fmt: skip


def export(
    params, config: ViTConfig, *, batch: int | None = None, dtype=jnp.float32, platforms=PLATFORMS, pixels: Pixels = HALF
) -> bytearray:
    """The serialized function images [B, Y, X, C] float32 -> logits [B, V] float32, with these parameters inside.

    batch: B, or None for any. dtype: of activations and matmul operands. platforms: that it can be compiled for. pixels: what the
    model wants; the exported function takes [-1, 1] and makes that of it. Raises ValueError
    where flatbuffers is missing or a value is out of range.
    """
    from jax import export as jax_export

    _need_flatbuffers()
    if batch is not None and batch < 1:
        raise ValueError(f"batch={batch}: a positive number, or None for any, is required")
    size = jax_export.symbolic_shape("b")[0] if batch is None else batch
    images = jax.ShapeDtypeStruct((size, *config.image_shape, config.channels), jnp.float32)
    params = jax.tree.map(jnp.asarray, params)

    def model(images):
        return apply(params, normalise(images, pixels), config, ops=REFERENCE, dtype=dtype)

    return jax_export.export(jax.jit(model), platforms=platforms)(images).serialize()


def load(path):
    """The exported function of a file. ValueError, one line, where it is none."""
    from jax import export as jax_export

    _need_flatbuffers()
    with open(path, "rb") as file:
        data = file.read()
    try:
        return jax_export.deserialize(bytearray(data))
    except Exception as error:  # flatbuffers and the StableHLO reader raise many kinds
        said = " ".join(str(error).split())[:150] or type(error).__name__
        raise ValueError(f"{path} is no exported model ({said}): make it with python -m vitcore.export") from error


def _need_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError('jax.export needs flatbuffers: pip install "vitcore[export]"') from None


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 with one line on stderr."""
    parser = Parser(prog="python -m vitcore.export", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", nargs="?", help=".npz (release) or .safetensors; or a run's directory, or directory/STEP")
    parser.add_argument("target", nargs="?", help="the file to write")
    parser.add_argument(
        "--try", dest="attempt", metavar="FILE", help="load an exported file, run it on random images, say how fast"
    )
    parser.add_argument("--format", default="stablehlo", help="stablehlo, which is all that is written")
    parser.add_argument("--batch", type=int, help="the only batch size; default: any")
    parser.add_argument("--image-size", type=int, help="default: the model's; the position embedding is fitted to it")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--gelu", choices=["tanh", "erf", "quick", "silu"], help="default: by the file; else tanh for .npz, erf for others"
    )
    parser.add_argument("--heads", type=int, help="number of heads, where the file does not say and the model is unusual")
    parser.add_argument("--mean", type=float, nargs="+", help="of the pixels that the model wants, where the file does not say")
    parser.add_argument("--std", type=float, nargs="+", help="deviation of the pixels, likewise")
    parser.add_argument("--pool", choices=OPEN_POOLS, help="of a file without class token, which does not say it")
    parser.add_argument("--position", choices=OPEN_POSITIONS, help="of a file without position embedding, which does not say it")
    parser.add_argument("--allow-nonfinite", action="store_true", help="take weights that hold NaN or infinities")
    parser.add_argument("--platforms", nargs="+", choices=PLATFORMS, default=PLATFORMS)
    args = parser.parse_args(argv)

    def work():
        if args.attempt:
            print(_attempt(args.attempt, args.batch))
        elif args.source and args.target:
            print(_write(args))
        else:
            raise ValueError("SOURCE and TARGET are required, or --try FILE")

    return attempt("vitcore.export", work)


def _write(args) -> str:
    if (asked := args.format.lower()) != "stablehlo":
        cure = "jax2onnx makes ONNX of vitcore.apply" if asked == "onnx" else "give stablehlo, or leave it out"
        raise ValueError(f"--format {args.format}: StableHLO is what is written (any JAX runs it, and IREE, OpenXLA); {cure}")
    if (suffix := os.path.splitext(args.target)[1].lower()) in OTHERS:
        raise ValueError(f"{args.target}: StableHLO is what is written, not {OTHERS[suffix]}: give a name like vit.stablehlo")
    with as_file(args.source, allow_nonfinite=args.allow_nonfinite) as source:
        data, config, words = _exported(source, args)
    with appearing(args.target) as (file, _):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    shape = [args.batch or "B", *config.image_shape, config.channels]
    where = ", ".join(args.platforms)
    return f"{args.target}: {len(data):,} bytes; images {shape} -> logits [B, {config.num_classes}]; {where}; {words}"


def _exported(source: str, args) -> tuple[bytes | bytearray, Any, str]:
    """The program, its model and a word on its pixels."""
    style, config, _ = describe(source, heads=args.heads, pool=args.pool, position=args.position)
    wanted, words = weight_about.pixels_of(source, about(source), style.naming, config)
    if args.mean or args.std:
        wanted = read_pixels(args.mean or (), args.std or ())
        words = f"pixels {said(wanted)}"
    grid = config.grid
    config = dataclasses.replace(config, image_size=args.image_size or config.image_size)
    params = read(source, config, grid=grid, allow_nonfinite=args.allow_nonfinite)
    data = export(
        params, changed(config, gelu=args.gelu), batch=args.batch, dtype=jnp.dtype(args.dtype),
        platforms=tuple(args.platforms), pixels=wanted,
    )  # fmt: skip
    return data, config, words


def _attempt(path: str, batch: int | None) -> str:
    model = load(path)
    shape = model.in_avals[0].shape
    given = tuple(n if isinstance(n, int) else batch or 2 for n in shape)
    images = np.random.default_rng(0).uniform(-1, 1, given).astype(np.float32)
    run = jax.jit(model.call)
    logits = np.asarray(run(images))
    begun = time.perf_counter()
    jax.block_until_ready(run(images))
    took = time.perf_counter() - begun
    if not np.isfinite(logits).all():
        raise ValueError(f"{path} gives logits that are not finite on random images")
    return (
        f"images {list(given)} -> logits {list(logits.shape)}, the largest {np.abs(logits).max():.4g}; {math.ceil(1e3 * took)} ms"
    )


if __name__ == "__main__":
    end("vitcore.export", main)
