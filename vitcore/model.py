"""A model as pure functions: `init`, `apply`, `features` and `attention_maps`, for every family of `vitcore/families.py`.

    logits = head(tanh(pre_logits(y)))      y: the representation of an image; the tanh layer in pre-training only

Parameters are float32 in a nested dict. On a mesh the same code runs inside one `shard_map` with both axes manual:
`vitcore/sharding.py` says where each parameter lives, `vitcore/collectives.py` has the collectives, and `vitcore/on_mesh.py` the
wrapper for a user's own mesh.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention.statistics.reference import Statistics
from kernels.settings import own
from vitcore import families, parameters, vit
from vitcore.config import ViTConfig
from vitcore.context import Capture, Context
from vitcore.heads import hidden, logits
from vitcore.look import token_distances
from vitcore.ops import Ops, resolve
from vitcore.sharding import partition_specs

PLAIN = Context()


@own
def init(key, config):
    """Fresh parameters: a nested dict of float32 arrays. Values as in the authors' release.

    Attention and MLP kernels Xavier-uniform, q, k and v drawn apart; MLP biases N(0, 1e-6); patch projection and pre-logits
    LeCun-normal (truncated); position embedding N(0, 0.02); class token and head zero; norms one and zero.
    """
    return parameters.init(key, families.leaves(config))


@own
def apply(
    params, images, config, *, ops: Ops | None = None, dtype=jnp.float32, dropout_key=None, remat=0, edit=None
):  # fmt: skip
    """Logits [B, V] float32 of images [B, Y, X, C], floats in [-1, 1]; with num_classes=0 what a head would read, [B, D] float32.

    ops: REFERENCE, FUSED, or None for what suits the platform. dtype: float32 or bfloat16, of activations and matmul
    operands (accumulation is float32 either way). dropout_key: a JAX PRNG key; None switches dropout off. remat: for the
    backward pass keep only the input of every n-th block (True is 1, every block; 0 keeps what the ops keep). edit: a function
    (patch embeddings [B, N, D] in dtype, 0) -> the same shape, between the projection and the position embedding. Differentiable;
    runs in a user's own jit on one device, and on a mesh through `apply_on`. Raises ValueError where images or parameters do not
    fit the configuration, or n does not divide the depth.
    """
    check(params, images, config)
    if images.shape[0] == 0:  # as the last batch of a filtered stream; no op is made for it
        return jnp.zeros((0, config.num_classes or config.feature_size), jnp.float32)
    return forward(params, images, config, Context(ops=ops, dtype=dtype, dropout_key=dropout_key, remat=remat, edit=edit))


@own
def features(params, images, config, *, ops: Ops | None = None, dtype=jnp.float32, remat=0, blocks: tuple[int, ...] | None = None):
    """The image representation y of Eq. 4, [B, D] float32: the class token after the last norm, or the mean of the patches.

    blocks: the blocks, counted from 1, whose outputs are wanted instead: a tuple of [B, T, D] float32 in the order asked for. They
    are the tokens as the next block reads them, the class token first where there is one, without registers; the last norm is
    applied to none. Raises
    ValueError as `apply`, for a block that the model does not have, and where both blocks and remat are given.
    """
    check(params, images, config)
    if images.shape[0] == 0:
        one = jax.eval_shape(lambda x: features(params, x, config, dtype=dtype, blocks=blocks), some(images))
        return jax.tree.map(lambda a: jnp.zeros((0, *a.shape[1:]), a.dtype), one)
    if blocks is None:
        return representation(params, images, config, Context(ops=ops, dtype=dtype, remat=remat))[0].astype(jnp.float32)
    capture = Capture(features=tuple(blocks))
    found = representation(params, images, config, Context(ops=ops, dtype=dtype, remat=remat, capture=capture))[1]
    return tuple(found["features"].astype(jnp.float32))


@own
def attention_maps(
    params, images, config, *, blocks: tuple[int, ...] | None = None, mean: bool = False, ops: Ops | None = None, dtype=jnp.float32
):
    """Attention probabilities of blocks, counted from 1 (default: all): float32 [K, B, N, T, T], of which the last axis sums to 1.

    Registers are left out, rows and columns, so that of a model with them the last axis sums to what the others get.

    mean: their mean over the heads, [K, B, T, T]. The maps of all blocks are large: K B N T^2 floats. Raises ValueError as `apply`,
    and for a block that there is not or that has no attention maps.
    """
    check(params, images, config)
    _not_empty(images)
    if mean:
        return attention_statistics(params, images, config, blocks=blocks, mean=True, ops=ops, dtype=dtype).mean
    capture = Capture(maps=blocks_of(config, blocks))
    return representation(params, images, config, Context(ops=ops, dtype=dtype, capture=capture))[1]["maps"]


@own
def attention_statistics(
    params,
    images,
    config,
    *,
    blocks: tuple[int, ...] | None = None,
    mean: bool = False,
    row: bool = False,
    distance: bool = False,
    ops: Ops | None = None,
    dtype=jnp.float32,
) -> Statistics:
    """What the attention of blocks, counted from 1 (default: all), says, without their maps, at nearly the speed of `apply`.

    Returns a record of float32 arrays, None where not asked for. mean: the maps' mean over the heads, [K, B, T, T]. row: of each
    head's map the first token's row, [K, B, N, T]: what the class token looks at. distance: how far each head looks, [K, B, N], in
    pixels of the model's input (`look.token_distances`): the mean over the patches of sum_s p[t, s] |place_t - place_s|, the class
    token being no query and at no distance (Fig. 7, right, and Fig. 11). Raises ValueError as `apply`, for a block that there is
    not or that has no attention maps, and where nothing is asked for.
    """
    check(params, images, config)
    _not_empty(images)
    capture = asked_for(config, blocks, mean=mean, row=row, distance=distance)
    return representation(params, images, config, Context(ops=ops, dtype=dtype, capture=capture))[1]["statistics"]


def _not_empty(images) -> None:
    if images.shape[0] == 0:
        raise ValueError("images are none: of an empty batch there are no attention maps, give at least one image")


def some(images):
    """The shape of one image in place of none."""
    return jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)


def blocks_of(config, blocks: tuple[int, ...] | None) -> tuple[int, ...]:
    """The blocks that are asked for: with None all."""
    return tuple(range(1, config.depth + 1)) if blocks is None else tuple(blocks)


def asked_for(config, blocks: tuple[int, ...] | None, *, mean: bool, row: bool, distance: bool) -> Capture:
    """The Capture of `attention_statistics`. ValueError where it holds nothing."""
    if not (mean or row or distance):
        raise ValueError("no statistic is asked for: mean=True, row=True or distance=True is required")
    distances = token_distances(config) if distance else None
    if distances is not None and config.tokens > (patches := config.grid[0] * config.grid[1]):
        distances = distances * np.float32(config.tokens / patches)  # of a mean over T queries, some of which are no patches
    return Capture(statistics=blocks_of(config, blocks), mean=mean, row=row, distances=distances)


# --- without checks, on one device or on this device's shards inside a `shard_map` ---------------------------------------------


def prepared(config, context: Context) -> Context:
    """The context with its ops chosen and the parameters' specs filled in."""
    return context._replace(ops=resolve(context.ops), specs=partition_specs(config, context.mesh, shard=context.shard))


def forward(params, images, config, context: Context = PLAIN):
    """`apply` without its checks; `context.capture` must be None."""
    context = prepared(config, context)
    y, _ = families.family_of(config).represent(params, images, config, context)
    return logits(params, hidden(params, y, config, context), config, context)


def representation(params, images, config, context: Context = PLAIN, *, behind_hidden: bool = False):
    """(what the pool makes of an image, [B, D] in context.dtype, and what `context.capture` asks for by its fields' names).

    behind_hidden: what the head reads instead, behind the tanh layer where the model has one.
    """
    context = prepared(config, context)
    y, found = families.family_of(config).represent(params, images, config, context)
    return (hidden(params, y, config, context) if behind_hidden else y), found


def encode(params, images, config: ViTConfig, context: Context = PLAIN):
    """The tokens [B, T, D] of a Vision Transformer behind its last block, in context.dtype."""
    return vit.encode(params, images, config, prepared(config, context))[0]


def masked_predictions(params, images, config: ViTConfig, context: Context, key):
    """What a model with `config.masked` predicts of the corrupted patches of images: (predictions [B, K, outputs] float32, the
    `vitcore.masked.Corruption` that says which they are). key: a JAX PRNG key, which with context.first_example decides them."""
    return vit.predict_masked(params, images, config, prepared(config, context), key)


def check(params, images, config) -> None:
    """Raise ValueError where images or parameters do not fit the configuration."""
    want = (*config.image_shape, config.channels)
    if images.ndim != 4 or images.shape[1:] != want or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images are {images.dtype}{list(images.shape)}: "
            f"floats [B, {', '.join(map(str, want))}] in [-1, 1] are required by this config"
        )
    parameters.check(params, families.leaves(config))
