"""Optimizers beside the paper's, from optax by name: `--optimizer lion`, `adafactor` or `muon`; and SAM around any, `--sam RHO`.

Two of them look at a matrix as a whole: Adafactor's second moment is the product of a row's and a column's, Muon makes each update
orthogonal. What is a matrix is said by the parameters' list (`vitcore.optax_labels`), not by `ndim`: layers are stacked, and so are
q, k and v, and each of the stacked matrices counts by itself. On a mesh such an optimizer works on whole arrays, which XLA brings
together and takes apart (`StepOptions.whole`); the others work on each device's shard. Their state lies where the parameters lie.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from train.optim import decay_kernels, kept_in, scale_layers
from vitcore import families, parameters
from vitcore.config import ViTConfig
from vitcore.optax_labels import stacked_axes

Name = Literal["lion", "adafactor", "muon"]
WHOLE = ("adafactor", "muon")  # that look at a matrix as a whole
FACTORED = 128  # side from which Adafactor factors a matrix: optax's, and T5's
RMS = 0.2  # of Muon's updates, that of Adam's: one learning rate suits both (arXiv:2502.16982)


@dataclass(frozen=True, kw_only=True)
class SamOptions:
    """Sharpness-aware minimisation, of any optimizer."""

    sam: float = 0.0
    """Sharpness-aware minimisation (arXiv:2010.01412): each gradient is taken this far uphill, 0.05 say, and so costs two. 0 for
    none."""

    def check_sam(self) -> None:
        """Raises ValueError for a radius that is none."""
        if not 0 <= self.sam < float("inf"):
            raise ValueError(f"--sam {self.sam}: a radius of 0 or more is required")


def named(
    name: str,
    learning_rate: optax.Schedule,
    config,
    *,
    weight_decay: float,
    layer_decay: float = 1.0,
    first_moment: Literal["float32", "bfloat16"] = "float32",
    factored: int = FACTORED,
) -> optax.GradientTransformation:
    """An optimizer by its name, a `Name`, for the parameters of `config`.

        w -= lr_t s (u + wd w)

    u: Lion's sign of its interpolated momentum (Chen et al. 2023), Adafactor's update with neither momentum nor the parameters'
    scale (Shazeer & Stern 2018), or Muon's for the matrices of the blocks, scaled to an RMS of 0.2, and Adam's with Nesterov's
    momentum for the rest. wd: of kernels only. s, layer_decay: as in `train.optim.adamw`. first_moment: what Lion's is kept in.
    factored: Adafactor's FACTORED. Raises ValueError for Muon without blocks, and for a bfloat16 moment of another than Lion.
    """
    if first_moment != "float32" and name != "lion":
        raise ValueError(f"--optimizer {name} keeps its moments in float32: leave {first_moment} out")
    if not 0 < layer_decay <= 1 or weight_decay < 0:
        raise ValueError(f"layer_decay={layer_decay}, weight_decay={weight_decay}: a share in (0, 1] and 0 or more are required")
    if name == "lion":
        scale = kept_in(optax.scale_by_lion(b1=0.9, b2=0.99), "mu", jnp.dtype(first_moment))
    elif name == "adafactor":
        scale = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=factored), _clip_each(1.0, stacked_axes(config)))
    elif name == "muon":
        scale = _muon(config)
    else:
        raise ValueError(f"--optimizer {name}: lion, adafactor or muon is required")
    return optax.chain(
        scale,
        decay_kernels(weight_decay),
        scale_layers(layer_decay, getattr(config, "depth", 0)),
        optax.scale_by_learning_rate(learning_rate),
    )


def _muon(config) -> optax.GradientTransformation:
    if not isinstance(config, ViTConfig):
        raise ValueError("--optimizer muon is for the matrices of a ViT's blocks, and this is a ResNet: take another")
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    which: dict[Any, Any] = {
        leaf.path: matrix if leaf.path[0] == "blocks" and leaf.path[-1] == "kernel" else None for leaf in families.leaves(config)
    }
    muon = optax.contrib.muon(
        1.0, consistent_rms=RMS, adam_learning_rate=1.0, muon_weight_dimension_numbers=parameters.nested(which)
    )
    return optax.chain(muon, optax.scale(-1.0))  # the update itself, which the rate then turns downhill


def _clip_each(most: float, stacked: dict) -> optax.GradientTransformation:
    """optax.clip_by_block_rms where a block is one matrix or vector. stacked: how many leading axes of a leaf hold such."""

    def clip(update, axes: int):
        rms = jnp.sqrt(jnp.square(update).mean(tuple(range(axes, update.ndim)), keepdims=True))
        return update / jnp.maximum(1.0, rms / most)

    return optax.stateless(lambda updates, params=None: jax.tree.map(clip, updates, stacked))
