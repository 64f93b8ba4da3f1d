"""A model of another shape, or of other entries, than its name says, and SGD in place of Adam: the paper's ablations of
pre-training (D.1, D.2), and the families that followed (docs/families.md)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitcore import families
from vitcore.blocks import BLOCKS
from vitcore.heads import POOLS
from vitcore.positions import POSITIONS
from vitcore.stems import STEMS

TABLES: dict[str, Mapping[str, Any]] = {"stem": STEMS, "position": POSITIONS, "block": BLOCKS, "pool": POOLS}
# Entries that are no choice: patches are what a model has without --stem, and without a pool there is no one vector for a head.
UNASKED = {("stem", "patches"), ("pool", "none")}
SHAPE = ("width", "depth", "mlp_dim", "num_heads", "block", "stem", "registers")


@dataclass(frozen=True, kw_only=True)
class AblationOptions:
    """What only pre-training has besides. None: as the model's name and the recipe have it."""

    width: int | None = None
    """Of the model, where it is not its name's (paper Fig. 8)."""
    depth: int | None = None
    mlp_dim: int | None = None
    """Hidden width of each block's MLP."""
    num_heads: int | None = None
    """A divisor of the width."""
    block: str | None = None
    """Of the encoder: encoder, or layerscale, whose halves are multiplied by learned scales (DeiT-III, DINOv2)."""
    stem: str | None = None
    """clip: patches without bias and a layer norm before the blocks, as CLIP has it."""
    registers: int | None = None
    """Learned tokens that the blocks see besides and nobody reads: 4 in DINOv2 with registers."""
    sgd: float | None = None
    """Train by SGD with this momentum, not by Adam (paper Table 7): 0.9. Wants --learning-rate and --weight-decay, for the recipe's
    are Adam's; the decay is of kernels, and part of the gradient."""

    def check_ablation(self, model: str) -> None:
        """Raises ValueError for what does not fit the model, and for SGD with open values."""
        args: Any = self
        for table in TABLES:
            _check_entry(table, getattr(args, table))
        for name, value in shape_of(vars(self)).items():
            option = f"--{name.replace('_', '-')} {value}"
            if name not in families.fields_of(model):
                raise ValueError(f"{option}: {model} is a ResNet, whose shape its name says: leave it out")
            if isinstance(value, int) and value < (name != "registers"):
                raise ValueError(f"{option}: a positive number is required{', or 0 for none' * (name == 'registers')}")
        if args.optimizer is not None:
            self._check_optimizer(args)
        if self.sgd is None:
            return
        if not 0 <= self.sgd < 1:
            raise ValueError(f"--sgd {self.sgd}: a momentum in [0, 1) is required")
        if args.learning_rate is None or args.weight_decay is None or args.weight_decay_form is not None:
            raise ValueError(
                f"--sgd {self.sgd}: --learning-rate and --weight-decay are required, and no --weight-decay-form: those of the "
                "recipe are Adam's; BiT has 0.03 for every 256 images of the batch, and 0.0001"
            )

    def _check_optimizer(self, args: Any) -> None:
        if self.sgd is not None:
            raise ValueError(f"--optimizer {args.optimizer} and --sgd {self.sgd}: give one of them")
        if args.weight_decay_form == "independent":
            raise ValueError(
                f"--optimizer {args.optimizer} decays by the rate: --weight-decay-form independent is Adam's, leave it out"
            )
        if args.optimizer == "lion" and (args.learning_rate is None or args.weight_decay is None):
            raise ValueError("--optimizer lion: --learning-rate and --weight-decay are required, for the recipe's are Adam's")


def _check_entry(table: str, name: str | None) -> None:
    """Raises ValueError for what is no entry of a table, or one whose fields no option can say."""
    choices = [
        one for one, entry in TABLES[table].items() if (table, one) not in UNASKED and getattr(entry, "options", None) is None
    ]
    if name is not None and name not in choices:
        raise ValueError(f"--{table} {name}: one of {', '.join(choices)} is required")


def shape_of(held: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model's configuration that options, or a run's config.json, set apart from its name."""
    return {name: held[name] for name in SHAPE if held.get(name) is not None}
