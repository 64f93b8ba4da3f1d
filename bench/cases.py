"""What a throughput study is made of: its cases, the rows they become, and the file that keeps them while the study runs.

A row is a plain dict (it goes into JSON as it is): the case's own fields, "images_per_second", "largest_batch" and how both came
about. Rows of a target carry "compiler_estimate": true; no others do.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vitcore import ResNetConfig, ViTConfig, variant

FIGURE_12 = (
    *("ViT-B/32", "ViT-B/16", "ViT-L/32", "ViT-L/16", "ViT-H/14"),
    *("R50x1", "R50x2", "R152x2", "R50+ViT-B/32", "R50+ViT-B/16"),
)
FIGURE_12_SIZES = (64, 128, 224, 384, 512)
XLA = "xla"  # the code of a model that no op of ours is in


@dataclass(frozen=True, kw_only=True)
class Case:
    """One point of the study. where: a TPU generation, or "device". library: "vitcore" or a peer. ops: whose, of ours.

    size: of the model's input in pixels; asked: the size the user named, another where --nearest moved it. mesh: "DxM" or None.
    shard: as --shard of `train.pretrain`.
    """

    where: str
    model: str
    size: int
    asked: int
    mode: str
    dtype: str
    library: str = "vitcore"
    ops: str = "auto"
    mesh: str | None = None
    slice: str | None = None
    remat: int = 0
    shard: str = "auto"
    dropout: float = 0.0

    @property
    def config(self) -> ViTConfig | ResNetConfig:
        return variant(self.model, image_size=self.size, num_classes=1000)

    @property
    def tokens(self) -> int:
        """Of an image; of a ResNet the places of its map at a sixteenth of the image, the tokens that patches of 16 pixels make."""
        config = self.config
        if isinstance(config, ViTConfig):
            return config.tokens
        rows, columns = config.image_shape
        return -(-rows // 16) * -(-columns // 16)

    @property
    def label(self) -> str:
        """A line's name in a picture or table, without the model and the size."""
        return self.ops if self.library == "vitcore" else self.library

    def __str__(self) -> str:
        return f"{self.where} {self.model}@{self.size} {self.mode} {self.label}"


def nearest(size: int, patch: int) -> int:
    """The multiple of `patch` nearest to `size`, at least one patch."""
    return max(1, round(size / patch)) * patch


def cases(
    *,
    where: str,
    models: Sequence[str],
    sizes: Sequence[int],
    modes: Sequence[str],
    ops: Sequence[str],
    peers: Sequence[str],
    move: bool,
    **same: Any,
) -> list[Case]:
    """Every combination, models outermost. ValueError for an unknown model, a size that its patch does not divide, or a peer that
    has no such model. A ResNet compiled for a TPU is XLA's whatever the ops are, and one case, but for an axial one."""
    found: list[Case] = []
    for model in models:
        patch, plain, resnet = _about(model)
        if peers and not plain:
            raise ValueError(f"--peer {peers[0]} has plain Vision Transformers alone: leave {model} out, or --peer")
        codes = (XLA,) if resnet and where != "device" else ops
        for asked in sizes:
            size = nearest(asked, patch) if move else asked
            if size % patch or size < 1:
                raise ValueError(
                    f"--sizes {asked} is not divisible by the patch of {model}: use a multiple of {patch}, e.g. "
                    f"{nearest(asked, patch)}, or --nearest to take the nearest one"
                )
            for mode in modes:
                for library, whose in [*(("vitcore", o) for o in codes), *((p, "") for p in peers)]:
                    fields = dict(model=model, size=size, asked=asked, mode=mode, library=library, ops=whose)
                    found.append(Case(where=where, **fields, **same))
    return found


def _about(model: str) -> tuple[int, bool, bool]:
    """(what a size must be a multiple of, whether it is a plain ViT, whether a ResNet without an op of ours) of a named model.

    ValueError for an unknown one. A ResNet, also as the stem under patches of one place of its map, rounds up and takes any size
    that it does not shrink to nothing.
    """
    total = model.rpartition("/")[2]
    side = int(total) if total.isdecimal() and int(total) else 224
    config = variant(model, image_size=math.lcm(side, 32) if "+" in model else side)
    if isinstance(config, ResNetConfig):
        return 1, False, config.stem.form != "axial"
    if config.stem is not None:
        return (config.patch_size * config.stem.stride if config.patch_size > 1 else 1), False, False
    return config.patch_size, config.block == "encoder", False


@cache
def sources() -> str:
    """A digest of the code that decides what is measured: kernels, model, training step, the builders and the counting."""
    root = Path(__file__).resolve().parent.parent
    files = [*root.glob("kernels/**/*.py"), *root.glob("vitcore/*.py"), *root.glob("train/*.py")]
    names = ("programs", "shapes", "hlo", "llo", "bundles", "yardstick", "trial", "timing", "edge", "links", "slices")
    files += [*root.glob("bench/peers/*.py"), *(root / "bench" / f"{n}.py" for n in names)]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Atomic: another reader, or the next run, sees the old file or the new one."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".part", delete=False) as file:
        json.dump(value, file, indent=1)
        file.write("\n")
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(file.name, 0o666 & ~mask)  # a temporary file is its owner's alone
    os.replace(file.name, path)


class Notebook:
    """The rows of a study, on disk after each; a study with the same options over the same code finds its rows here again."""

    def __init__(
        self, folder: Path, *, about: dict[str, Any], settings: dict[str, Any], fresh: bool = False, file: str = "throughput.json"
    ):
        self.path = folder / file
        self.about = about
        self.settings = json.loads(json.dumps(settings))
        self.rows: list[dict[str, Any]] = []
        self._kept: dict[str, dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"--out {folder} cannot be written ({error.strerror}): name a directory of your own") from None
        if self.path.exists() and not fresh:
            try:
                old = json.loads(self.path.read_text())
                self._kept = {row["key"]: row for row in old["rows"]}
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path} is not a study of this program: remove it, or name another --out") from None

    def key(self, case: Case, **more: Any) -> str:
        """What must be equal for a row to be taken over: the case, how it is measured, the code. more: besides."""
        text = json.dumps([asdict(case), {**self.settings, **more}, sources()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def kept(self, case: Case, **more: Any) -> dict[str, Any] | None:
        """The row of an earlier run, put among the rows of this one. more: as of `key`."""
        row = self._kept.get(self.key(case, **more))
        if row is None or not row.get("complete"):
            return None
        self.rows.append(row)
        return row

    def swept(self, case: Case) -> dict[str, Any] | None:
        """The images/s of an earlier run that ended before it had the largest batch."""
        row = self._kept.get(self.key(case))
        return row if row is not None and row.get("swept") else None

    def add(self, case: Case, row: dict[str, Any], **more: Any) -> dict[str, Any]:
        """The row of a finished case, kept; `row["complete"]` says whether a later run may take it over. more: as of `key`."""
        self.rows.append({"key": self.key(case, **more), **asdict(case), "tokens": case.tokens, **row})
        self.save()
        return self.rows[-1]

    def save(self) -> None:
        write_json(self.path, {"about": self.about, "rows": self.rows})
