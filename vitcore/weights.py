"""Published weights on the command line; `vitcore.load` and `vitcore.save` are the same in a program.

    python -m vitcore.weights show FILE
    python -m vitcore.weights convert FROM TO [--naming transformers] [--dtype bfloat16]

FROM and TO are .npz (the release's layouts) or .safetensors (timm's or transformers' naming): `vitcore/weight_tree.py`.
"""

import dataclasses
import re
from collections.abc import Mapping

import jax

from vitcore import families, parameters
from vitcore.command_line import Parser, attempt, end
from vitcore.config import ViTConfig
from vitcore.runs import as_file
from vitcore.weight_about import pixels_of
from vitcore.weight_checks import left_out
from vitcore.weight_files import Stored
from vitcore.weight_names import OPEN_POOLS, OPEN_POSITIONS, Style
from vitcore.weight_tree import about as about
from vitcore.weight_tree import convert as convert
from vitcore.weight_tree import describe as describe
from vitcore.weight_tree import load as load
from vitcore.weight_tree import read as read
from vitcore.weight_tree import save as save


def main(argv: list[str] | None = None) -> int:
    """`python -m vitcore.weights`. Returns the exit code: 0, or 2 with one line on stderr."""
    parser = Parser(prog="python -m vitcore.weights", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("show", help="what a file holds: its naming, its model, every array")
    shown.add_argument("file", help=".npz or .safetensors; or a run's directory, or directory/STEP")
    converted = commands.add_parser("convert", help="write a file's weights in another layout")
    converted.add_argument("source", help="likewise")
    converted.add_argument("target", help=".npz (release) or .safetensors")
    converted.add_argument("--naming", choices=["timm", "transformers"], help="of a .safetensors; default timm")
    converted.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    converted.add_argument("--allow-nonfinite", action="store_true", help="take weights that hold NaN or infinities")
    for command in (shown, converted):
        command.add_argument("--heads", type=int, help="number of heads, where the file does not say and the width is unusual")
        command.add_argument("--grid", help="ROWSxCOLUMNS of a position embedding that is not square")
        command.add_argument("--pool", choices=OPEN_POOLS, help="of a file without class token, which does not say it")
        command.add_argument("--position", choices=OPEN_POSITIONS, help="of a file without position embedding, likewise")
    args = parser.parse_args(argv)

    def work():
        if args.grid and not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", args.grid):
            raise ValueError(f"--grid {args.grid}: ROWSxCOLUMNS is required, e.g. --grid 14x28")
        rows, _, columns = (args.grid or "").partition("x")
        if args.heads is not None and args.heads < 1:
            raise ValueError(f"--heads {args.heads}: a positive number is required")
        grid = (int(rows), int(columns)) if args.grid else None
        if args.command == "show":
            with as_file(args.file, allow_nonfinite=True) as file:
                _show(file, *describe(file, heads=args.heads, grid=grid, pool=args.pool, position=args.position))
        else:
            with as_file(args.source, allow_nonfinite=args.allow_nonfinite) as source:
                config = convert(
                    source, args.target, naming=args.naming, dtype=args.dtype, heads=args.heads, grid=grid, pool=args.pool,
                    position=args.position, allow_nonfinite=args.allow_nonfinite,
                )  # fmt: skip
                print(f"{args.target}: {_model_line(config)}")
                silent = isinstance(config, ViTConfig) and about(source).config is None
                if silent and (".npz" in args.target) != (".npz" in source):
                    print("note: the release computes GELU by tanh, timm and transformers exactly; the weights say nothing of it")

    return attempt("vitcore.weights", work)


def _show(path: str, style: Style, config, arrays: Mapping[str, Stored]) -> None:
    kind = ", ".join(f"{k} {v!r}" for k, v in dataclasses.asdict(style).items() if v not in (False, "", style.naming))
    print(f"naming {style.naming}{'; ' + kind if kind else ''}")
    print(_model_line(config))
    told = about(path)
    named = "" if told.classes is None else f"; classes {', '.join(told.classes[:8])}{', ...' if len(told.classes) > 8 else ''}"
    print(pixels_of(path, told, style.naming, config)[1] + named)
    if beside := left_out(arrays, style):
        print(beside)
    for name, array in arrays.items():
        print(f"  {name:70s} {array.dtype!s:9s} {list(array.shape)}")


def _model_line(config) -> str:
    count = parameters.count(families.leaves(config))
    fields = [f.name for f in dataclasses.fields(config) if f.name not in ("dropout", "head_bias")]
    said = ", ".join(f"{name}={getattr(config, name)}" for name in fields)
    return f"{count:,} parameters; {type(config).__name__}({said})"


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing here wants a device, and looking for a TPU takes long and prints much
    end("vitcore.weights", main)
