"""The whole models of the compile tests: programs that together hold every kind of part that a model of the paper is made of.

What decides whether a model compiles is the kinds of its parts, and not how many there are of each: a unit of a ResNet with and
without stride, projection and others before it; a block, of few tokens or many; a position embedding; a pool. `kinds` reads them
off a configuration, and of each model here the depth is the smallest that has all of them.
"""

from typing import Any, NamedTuple

import pytest

from bench.flops import TABLE_6
from bench.programs import _config as named
from bench.reports import Program
from bench.tpu_compiler import TOPOLOGIES
from kernels.by_xla import few_tokens
from train.recipes import TABLE_3
from train.studies.paper import TABLE_8
from vitcore import ViTConfig, variant
from vitcore.resnet import units

# Tables 3 and 6 and Figure 13, by name, and Table 8's position embeddings, at 224 pixels.
PAPER = sorted(
    {
        *(row[0] for row in TABLE_6),
        *(name for row in TABLE_3 for name in row.models if "*" not in name),
        *("Axial-ViT-B/32", "Axial-ViT-B/16", "AxialResNet-50"),
    }
)
CONFIGS = {
    **{name: variant(name) for name in PAPER},
    **{f"ViT-B/16, {row['position']}": variant("ViT-B/16", position=row["position"]) for row in TABLE_8},
}


def length(config: ViTConfig) -> int:
    """Tokens of what attends: of an image, or of one of its rows or columns."""
    return config.grid[1] if config.block == "axial" else config.tokens


def kinds(config) -> frozenset[tuple]:
    """What kinds of parts a configuration has."""
    found: set[tuple] = set()
    if config.stem is not None:
        found |= {(config.stem.form, u.stride, u.project, u.number > 1) for u in units(config.stem)}
    if isinstance(config, ViTConfig):
        few = tuple(found is not None for found in few_tokens(length(config)))
        found |= {(config.block, few), ("position", config.position), ("pool", config.pool)}
    return frozenset(found)


class Model(NamedTuple):
    """Two images of image_size pixels a side; the named model with so many blocks, such units and another position embedding."""

    name: str
    image_size: int
    depth: int | None = None
    units: tuple[int, ...] = ()
    position: str | None = None

    def __str__(self) -> str:
        return self.name + (f", {self.position}" if self.position else "")

    @property
    def arguments(self) -> dict[str, Any]:
        given = {"depth": self.depth, "units": self.units, "position": self.position}
        return {"model": self.name, "image_size": self.image_size, **{name: value for name, value in given.items() if value}}

    @property
    def config(self):
        return named(**self.arguments)

    def programs(self) -> list[Program]:
        """The whole forward pass, and a training step with Adam."""
        builds = {"whole_forward": "forward", "train_step": "training step"}
        arguments = {**self.arguments, "batch": 2}
        return [
            Program(build=f"bench.programs:{build}", arguments=arguments, name=f"{self} {name}") for build, name in builds.items()
        ]

    def kernels(self, target: str) -> tuple[set[str], set[str]]:
        """Parts of the names of kernels that the forward pass and the training step hold: none of a ResNet but an axial one,
        and none of passes of a half block that few tokens leave to XLA."""
        if not isinstance(self.config, ViTConfig):
            if self.config.stem.form != "axial":
                return set(), set()
            return {"attention_lines_forward"}, {f"attention_lines_{kernel}" for kernel in ("forward", "queries", "keys")}
        forward, backward = few_tokens(length(self.config))
        attention = "attention_relative_core" if self.position == "relative" else "attention_"
        ours = {attention, "mlp_half"}
        once = {"layer_norm", *({"patch_embed"} if self.config.stem is None else ())}
        return once | (set() if forward else ours), once | (set() if backward else ours)


# On every generation.
MODELS = (
    Model("R50x1", 64, units=(1, 2)),
    Model("R50x1-post", 64, units=(1, 2)),
    Model("AxialResNet-50", 64, units=(1, 2)),
    Model("R50+ViT-B/16", 96, depth=2, units=(1, 2)),
    Model("Axial-ViT-B/32", 224, depth=2),
    Model("Axial-ViT-B/16", 224, depth=2),
    Model("ViT-B/16", 224, depth=2, position="relative"),
)
# On v3, whose compiler takes least: what a position embedding adds to x is XLA's.
POSITIONS = tuple(
    Model("ViT-B/16", 96, depth=2, position=position)
    for position in ("none", "1d-layers", "1d-shared", "2d", "2d-layers", "2d-shared")
)
IN_CI = (("v3", "R50x1"),)  # of convolutions; kernels in a whole model are in the training step on 32 cores


def cases() -> list[Any]:
    """(target, model) as parameters of a test."""
    pairs = [*((target, model) for model in MODELS for target in TOPOLOGIES), *(("v3", model) for model in POSITIONS)]
    return [
        pytest.param(target, model, marks=[pytest.mark.ci] * ((target, str(model)) in IN_CI), id=f"{target}-{model}")
        for target, model in pairs
    ]
