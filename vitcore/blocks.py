"""Blocks of the encoder, a table of entries that `ViTConfig.block` chooses from."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels import dropout as drop
from kernels.attention.reference import AttentionWeights
from kernels.attention.statistics import reference as statistics
from kernels.mlp.reference import GatedWeights, MLPWeights
from vitcore import drop_path
from vitcore.block_leaves import attention_leaves, gated_leaves, mlp_leaves
from vitcore.collectives import MIDDLE, vary
from vitcore.context import Layer
from vitcore.halves import summed
from vitcore.parameters import Leaf, Name, constant

# Where the two halves stand: `Layer.residual`'s places.
IN_ATTENTION, IN_MLP = (drop.ATTENTION_OUT, drop_path.ATTENTION), (drop.MLP_OUT, drop_path.MLP)


class Block(NamedTuple):
    """One kind of block; `config` is a ViTConfig.

    leaves: (config) -> the leaves of one layer, with neither the layer axis nor "blocks" in front. apply: (x [B, T, D], w, config,
    layer) -> [B, T, D]; w are the layer's weights ready for use, `layer` a `context.Layer`. maps: (x, w, config, layer) -> the
    attention probabilities [B, N, T, T] float32 of the block for its input x, N the heads of this device; None for a block that has
    none. statistics: (x, w, config, layer, mean=, row=, distances=) -> `kernels.attention.statistics.reference.Statistics`; None
    likewise. calls: (config) -> how its half blocks are called, one after the other: (sequences that an image becomes, tokens of
    each). check: (config) raises ValueError for a configuration that it cannot take. outside: the paths of those of its leaves
    that it uses outside its sums over the model axis, such as a scale of what a half block adds; none is split over "model".
    mlp: which op of `Ops` its MLP halves are.
    """

    leaves: Callable
    apply: Callable
    maps: Callable | None = None
    statistics: Callable | None = None
    calls: Callable = lambda config: ((1, config.tokens),)
    check: Callable = lambda config: None
    outside: tuple[tuple[str, ...], ...] = ()
    mlp: str = "mlp_half"


# --- the paper's block: attention half and MLP half, pre-norm ----------------------------------------------------------------


def _pair(p):
    """The scale or kernel of a norm or dense layer, and its bias."""
    return p["scale" if "scale" in p else "kernel"], p["bias"]


def attention_weights(w) -> AttentionWeights:
    """Of the attention half, in a layer's weights; those of q, k and v that have no bias have one of zeros."""
    kernel, bias = w["qkv"]["kernel"], w["qkv"].get("bias")
    if bias is None:
        bias = jnp.zeros((3, kernel.shape[-1]), jnp.float32)
    elif len(bias) == 2:
        bias = jnp.stack([bias[0], jnp.zeros_like(bias[0]), bias[1]])
    return AttentionWeights(*_pair(w["norm1"]), kernel, bias, *_pair(w["out"]))


def heads_here(config, layer: Layer) -> int:
    """N, the heads of this device."""
    mesh = layer.context.mesh
    return config.num_heads // (mesh.model if mesh else 1)


def attend(x, w, config, layer: Layer):
    """x + dropout(MSA(LN(x))), paper Eq. 2, summed over the model axis."""

    def half(x, layer):
        options = {"num_heads": heads_here(config, layer), "eps": config.eps}
        return layer.half(layer.context.ops.attention_half, x, attention_weights(w), IN_ATTENTION, **options)

    return summed(half, x, config, layer)


def transform(x, w, config, layer: Layer):
    """x + dropout(MLP(LN(x))), paper Eq. 3, summed over the model axis."""

    def half(x, layer):
        weights = MLPWeights(*_pair(w["norm2"]), *_pair(w["mlp_in"]), *_pair(w["mlp_out"]))
        return layer.half(layer.context.ops.mlp_half, x, weights, IN_MLP, gelu=config.gelu, eps=config.eps)

    return summed(half, x, config, layer)


def transform_gated(x, w, config, layer: Layer):
    """x + dropout(MLP(LN(x))) with a gated MLP (arXiv:2002.05202), summed over the model axis."""

    def half(x, layer):
        weights = GatedWeights(*_pair(w["norm2"]), *_pair(w["mlp_gated"]), *_pair(w["mlp_out"]))
        layer = layer._replace(stacks=None)  # the op takes no weights where they lie
        return layer.half(layer.context.ops.gated_half, x, weights, IN_MLP, gelu=config.gelu, eps=config.eps)

    return summed(half, x, config, layer)


def attention_maps(x, w, config, layer: Layer):
    """The probabilities of the attention half, [B, N, T, T] float32, by the formula of `kernels/attention/reference.py`."""
    return statistics.probabilities(
        *_looked_at(x, w, layer), num_heads=heads_here(config, layer), eps=config.eps, **_of_position(w, config, layer)
    )


def attention_statistics(x, w, config, layer: Layer, **asked):
    """`Statistics` of the attention half, over the heads of this device. asked: mean, row, distances."""
    x, weights = _looked_at(x, w, layer)
    if own := _of_position(w, config, layer):  # relative and rotary positions: the statistics have no kernel for them
        return statistics.attention_statistics(x, weights, num_heads=heads_here(config, layer), eps=config.eps, **own, **asked)
    return layer.context.ops.attention_statistics(x, weights, num_heads=heads_here(config, layer), eps=config.eps, **asked)


def _looked_at(x, w, layer: Layer):
    """A block's input without padding, and the weights of its attention half."""
    x = vary(x if layer.tokens is None else x[:, : layer.tokens], layer.context.mesh)
    return x, attention_weights(w)


def _of_position(w, config, layer: Layer) -> dict[str, Callable]:
    """What the position embedding does to the logits, as options of `statistics.probabilities`; {} for nothing."""
    position = config.entries.position
    own: dict[str, Callable] = {}
    if position.logits is not None:
        own["extra"] = lambda q: position.logits(q, w, config)
    if position.turn is not None:
        own["turn"] = lambda qk: position.turn(qk, config, heads_here(config, layer))
    return own


def _encoder(x, w, config, layer: Layer, mlp: Callable = transform) -> Any:
    x = (config.entries.position.attend or attend)(x, w, config, layer)
    return mlp(jax.tree.map(lambda part: checkpoint_name(part, MIDDLE), x), w, config, layer)


def _gated(x, w, config, layer: Layer) -> Any:
    return _encoder(x, w, config, layer, transform_gated)


# --- LayerScale (CaiT, arXiv:2103.17239, Eq. 5 to 8): what each half adds is multiplied channel by channel ---------------------

LAYER_SCALE = 1e-5  # initial value: DINOv2's, and that of CaiT's deepest models


def _scaled_leaves(config, of_mlp: Callable = mlp_leaves) -> tuple[Leaf, ...]:
    def scale(name: str, number: int) -> Leaf:
        text = f"{{block}}.layer_scale{number}.lambda1"
        names = {
            "timm": (Name(f"{{block}}.{{scale{number}}}"),),
            "transformers": tuple(Name(text, when={"form": form}) for form in ("dinov2", "dinov3")),
        }
        return Leaf(path=(name,), shape=(config.width,), initial=constant(LAYER_SCALE), names=names)

    return (*attention_leaves(config), scale("scale1", 1), *of_mlp(config), scale("scale2", 2))


def _folded(w) -> dict:
    """The weights of a block without LayerScale that computes the same: s (o W + b) = o (W s) + b s.

    Dropout multiplies each element alone and so commutes. The product is part of the traced program: gradients reach scale and
    kernel through it, and every implementation of the halves carries it as it is. It costs D^2 + D F multiplications a layer.
    """

    def fold(dense, scale):
        return {"kernel": dense["kernel"] * scale.astype(dense["kernel"].dtype), "bias": dense["bias"] * scale}

    return {**w, "out": fold(w["out"], w["scale1"]), "mlp_out": fold(w["mlp_out"], w["scale2"])}


def _scaled(x, w, config, layer: Layer, mlp: Callable = transform):
    return _encoder(x, _folded(w), config, layer, mlp)


# --- the axial block (paper, appendix D.6): attention along rows and an MLP, then along columns and an MLP --------------------


def _axial_leaves(config) -> tuple[Leaf, ...]:
    rows, columns = config.grid
    return tuple(
        dataclasses.replace(leaf, path=(axis, *leaf.path), names={}, key=None)
        for axis, seen in (("row", columns), ("column", rows))
        for leaf in (*attention_leaves(config, seen), *mlp_leaves(config))
    )


def _axial(x, w, config, layer: Layer):
    """x [B, T, D], T the grid in row-major order and perhaps padding. To the ops a row, then a column, is a sequence of its own."""
    rows, columns = config.grid
    b, t, d = x.shape
    x = x[:, : rows * columns].reshape(b, rows, columns, d)
    x = _along_rows(x, w["row"], config, layer)
    if layer.dropout is not None:  # other masks than the rows'
        layer = layer._replace(dropout=layer.dropout._replace(key=layer.dropout.key ^ jnp.int32(0x5BD1E995)))
    if layer.path is not None:
        layer = layer._replace(path=layer.path._replace(key=layer.path.key ^ jnp.int32(0x5BD1E995)))
    x = _along_rows(x.swapaxes(1, 2), w["column"], config, layer).swapaxes(1, 2).reshape(b, rows * columns, d)
    return jnp.pad(x, ((0, 0), (0, t - rows * columns), (0, 0)))


def _along_rows(x, w, config, layer: Layer):
    """The encoder's block on each row of x [B, R, C, D] for itself."""
    b, rows, length, d = x.shape
    x = x.reshape(b * rows, length, d)
    ops = layer.context.ops
    assert ops is not None
    extra = ops.padding(length)
    if extra:
        x = jnp.pad(x, ((0, 0), (0, extra), (0, 0)))
    path = layer.path and layer.path._replace(sequences=rows)
    x = _encoder(x, w, config, layer._replace(tokens=length if extra else None, path=path))
    return x[:, :length].reshape(b, rows, length, d)


def _check_axial(config) -> None:
    if config.registers:
        raise ValueError(f"block='axial' with registers={config.registers}: a register stands in no row: use registers=0")
    if config.class_tokens:
        raise ValueError(f"block='axial' with pool={config.pool!r}: a class token stands in no row: use pool='gap' or pool='map'")
    if config.entries.position.attend is not None:
        raise ValueError(
            f"block='axial' with position={config.position!r}: its offsets are those of a whole image; use '1d' or '2d'"
        )


BLOCKS: dict[str, Block] = {
    "encoder": Block(
        leaves=lambda config: (*attention_leaves(config), *mlp_leaves(config)),
        apply=_encoder,
        maps=attention_maps,
        statistics=attention_statistics,
    ),
    "layerscale": Block(
        leaves=_scaled_leaves,
        apply=_scaled,
        maps=attention_maps,
        statistics=attention_statistics,
    ),
    # a gated MLP, which with gelu="silu" is SwiGLU: without and with LayerScale (DINOv2-giant; DINOv3's S+, H+ and 7B)
    "gated": Block(
        leaves=lambda config: (*attention_leaves(config), *gated_leaves(config)),
        apply=_gated,
        maps=attention_maps,
        statistics=attention_statistics,
        mlp="gated_half",
    ),
    "layerscale-gated": Block(
        leaves=partial(_scaled_leaves, of_mlp=gated_leaves),
        apply=partial(_scaled, mlp=transform_gated),
        maps=attention_maps,
        statistics=attention_statistics,
        mlp="gated_half",
    ),
    "axial": Block(leaves=_axial_leaves, apply=_axial, calls=lambda config: (config.grid, config.grid[::-1]), check=_check_axial),
}
