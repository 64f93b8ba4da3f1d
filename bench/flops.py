"""Compute of the paper's models: Table 6 by its own convention beside the paper's figures, or any model at any size.

    python -m bench.flops                                        Table 6: exaFLOPs of pre-training
    python -m bench.flops --model R50x1 ViT-B/16 --size 224 384  multiply-adds of a forward pass, by part of the model
    python -m bench.flops --json FILE                            the same rows as JSON

Two FLOPs a multiply-add; matrix products and convolutions alone, of these only the taps that fall on the image; a training step
is three forward passes (`vitcore/flops.py`). Table 6 is pre-training on JFT: 303 million images an epoch, 224 pixels, 18,291
classes, and the hidden layer for what has a transformer in it."""

import json
import sys
from pathlib import Path
from typing import Any

from vitcore import ResNetConfig, variant
from vitcore.command_line import Parser, attempt
from vitcore.families import leaves
from vitcore.flops import JFT_CLASSES, multiply_adds, pretraining_exaflops
from vitcore.parameters import count

# Table 6 of the paper: model, epochs, exaFLOPs.
TABLE_6 = (
    ("ViT-B/32", 7, 55),
    ("ViT-B/16", 7, 224),
    ("ViT-L/32", 7, 196),
    ("ViT-L/16", 7, 783),
    ("ViT-L/16", 14, 1567),
    ("ViT-H/14", 14, 4262),
    ("R50x1", 7, 50),
    ("R50x2", 7, 199),
    ("R101x1", 7, 96),
    ("R152x1", 7, 141),
    ("R152x2", 7, 563),
    ("R152x2", 14, 1126),
    ("R200x3", 14, 3306),
    ("R50+ViT-B/32", 7, 106),
    ("R50+ViT-B/16", 7, 274),
    ("R50+ViT-L/32", 7, 246),
    ("R50+ViT-L/16", 7, 859),
    ("R50+ViT-L/16", 14, 1668),
)
NOTES = {("R50+ViT-L/16", 7): "the paper's 859 contradicts its own 1668 for 14 epochs, of which half is 834"}


def jft_config(model: str):
    """The configuration that Table 6 counts: 224 pixels, the classes of JFT, a hidden layer where there is a transformer."""
    config = variant(model, image_size=224, num_classes=JFT_CLASSES)
    hidden = {} if isinstance(config, ResNetConfig) else {"representation_size": config.width}
    return variant(model, image_size=224, num_classes=JFT_CLASSES, **hidden)


def table_6() -> list[dict[str, Any]]:
    """Every row of Table 6: what the convention gives beside the paper's figure."""
    rows = []
    for model, epochs, paper in TABLE_6:
        config = jft_config(model)
        ours = pretraining_exaflops(config, epochs)
        rows.append(
            {
                "model": model,
                "epochs": epochs,
                "gmacs": sum(multiply_adds(config).values()) / 1e9,
                "exaflops": ours,
                "paper": paper,
                "deviation": ours / paper - 1,
                "note": NOTES.get((model, epochs), ""),
            }
        )
    return rows


def one(model: str, size: int | None, classes: int) -> dict[str, Any]:
    """Parameters and multiply-adds of a model at a size; its own size by default."""
    config = variant(model, num_classes=classes, **({} if size is None else {"image_size": size}))
    parts = multiply_adds(config)
    return {
        "model": model,
        "size": config.image_size,
        "parameters": count(leaves(config)),
        "gmacs": sum(parts.values()) / 1e9,
        "gflops": 2 * sum(parts.values()) / 1e9,
        "parts": {part: n / 1e9 for part, n in parts.items()},
    }


def printed(rows: list[dict[str, Any]]) -> str:
    """Rows as a table for people."""
    if "paper" in rows[0]:
        head = f"{'model':14s} {'epochs':>6s} {'GMACs':>9s} {'exaFLOPs':>9s} {'paper':>6s} {'deviation':>9s}"
        lines = [
            f"{r['model']:14s} {r['epochs']:6d} {r['gmacs']:9.2f} {r['exaflops']:9.1f} {r['paper']:6d} {r['deviation']:+9.1%}  "
            + r["note"]
            for r in rows
        ]
    else:
        head = f"{'model':18s} {'size':>5s} {'parameters':>13s} {'GMACs':>9s} {'GFLOPs':>9s}  GMACs by part"
        lines = [
            f"{r['model']:18s} {r['size']!s:>5s} {r['parameters']:13,d} {r['gmacs']:9.2f} {r['gflops']:9.2f}  "
            + ", ".join(f"{part} {n:.2f}" for part, n in r["parts"].items())
            for r in rows
        ]
    return "\n".join(line.rstrip() for line in (head, *lines))


def main(argv: list[str] | None = None) -> int:
    """`python -m bench.flops`. Returns the exit code: 0, or 2 with one line on stderr."""
    parser = Parser(prog="python -m bench.flops", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", nargs="+", help="any names that vitcore.variant knows; default: Table 6")
    parser.add_argument("--size", nargs="+", type=int, help="sides of the image in pixels; default: the model's own")
    parser.add_argument("--classes", type=int, default=1000, help="of the head, 0 for none; not for Table 6")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)

    def work():
        if args.size and not args.model:
            raise ValueError("--size without --model: Table 6 is at 224 pixels; say which models")
        rows = [one(m, s, args.classes) for m in args.model for s in args.size or (None,)] if args.model else table_6()
        print(printed(rows))
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")

    return attempt("bench.flops", work)


if __name__ == "__main__":
    sys.exit(main())
