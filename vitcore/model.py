"""The Vision Transformer of the paper, section 3.1, as two pure functions: `init` and `apply`.

    z0 = dropout([x_class; x_p1 E; ...; x_pN E] + E_pos)                                   Eq. 1
    z'l = z(l-1) + dropout(MSA(LN(z(l-1))))                         l = 1 ... L            Eq. 2
    zl = z'l + dropout(MLP(LN(z'l)))                                                       Eq. 3
    y = LN(zL)[class token]                                                                Eq. 4
    logits = head(tanh(pre_logits(y)))      the tanh layer in pre-training only

Parameters are float32 in a nested dict; the blocks' are stacked on a leading L axis and run under `lax.scan`, so a model of
any depth compiles in the time of one block. The arithmetic of a half block lives in `ops`.

On a mesh the same code runs inside one `shard_map` with both axes manual (`sharding.py` says where each parameter lives).
Two kinds of collective stand here, and no others: `gather` brings a layer's matrices together over "data" just before they
are used (its transpose, a reduce-scatter, takes their gradients apart again), and a half block ends in one sum over "model".
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kernels.attention.reference import AttentionWeights
from kernels.dropout import Dropout
from kernels.mlp.reference import MLPWeights
from vitcore.config import ViTConfig
from vitcore.ops import Ops, resolve
from vitcore.sharding import MIDDLE, MeshShape, block_specs, gather, partition_specs, recompute_gathers, vary

PART = 24576  # tokens of a part of the batch, where several blocks are made again: few, and the kernels' grids still long


def init(key, config: ViTConfig):
    """Fresh parameters: a nested dict of float32 arrays. Values as in the authors' release.

    Attention and MLP kernels Xavier-uniform, q, k and v drawn apart; MLP biases N(0, 1e-6); patch projection and pre-logits
    LeCun-normal (truncated); position embedding N(0, 0.02); class token and head zero; norms one and zero.
    """
    c = config
    k = dict(
        zip(
            ("patch", "position", "qkv", "out", "in", "in_bias", "mlp_out", "mlp_out_bias", "pre"),
            jax.random.split(key, 9),
            strict=True,
        )
    )
    layers = c.depth

    def xavier(key, shape):
        limit = (6 / (shape[-2] + shape[-1])) ** 0.5
        return jax.random.uniform(key, shape, jnp.float32, -limit, limit)

    def lecun(key, shape):
        fan_in = 1
        for n in shape[:-1]:
            fan_in *= n
        # a normal cut at two deviations has a deviation of 0.8796: divided out, so that the variance is 1 / fan_in
        return jax.random.truncated_normal(key, -2, 2, shape, jnp.float32) * (fan_in**-0.5 / 0.87962566103423978)

    def norm(*shape):
        return {"scale": jnp.ones(shape, jnp.float32), "bias": jnp.zeros(shape, jnp.float32)}

    params = {
        "patch_embed": {
            "kernel": lecun(k["patch"], (c.patch_size, c.patch_size, c.channels, c.width)),
            "bias": jnp.zeros(c.width, jnp.float32),
            "position": 0.02 * jax.random.normal(k["position"], (c.tokens, c.width), jnp.float32),
        },
        "blocks": {
            "norm1": norm(layers, c.width),
            "qkv": {
                "kernel": xavier(k["qkv"], (layers, 3, c.width, c.width)),
                "bias": jnp.zeros((layers, 3, c.width), jnp.float32),
            },
            "out": {"kernel": xavier(k["out"], (layers, c.width, c.width)), "bias": jnp.zeros((layers, c.width), jnp.float32)},
            "norm2": norm(layers, c.width),
            "mlp_in": {
                "kernel": xavier(k["in"], (layers, c.width, c.mlp_dim)),
                "bias": 1e-6 * jax.random.normal(k["in_bias"], (layers, c.mlp_dim), jnp.float32),
            },
            "mlp_out": {
                "kernel": xavier(k["mlp_out"], (layers, c.mlp_dim, c.width)),
                "bias": 1e-6 * jax.random.normal(k["mlp_out_bias"], (layers, c.width), jnp.float32),
            },
        },
        "norm": norm(c.width),
        "head": {
            "kernel": jnp.zeros((c.feature_size, c.num_classes), jnp.float32),
            "bias": jnp.full(c.num_classes, c.head_bias, jnp.float32),
        },
    }
    if c.pool == "token":
        params["patch_embed"]["cls"] = jnp.zeros(c.width, jnp.float32)
    if c.representation_size is not None:
        params["pre_logits"] = {
            "kernel": lecun(k["pre"], (c.width, c.representation_size)),
            "bias": jnp.zeros(c.representation_size, jnp.float32),
        }
    return params


def apply(params, images, config: ViTConfig, *, ops: Ops | None = None, dtype=jnp.float32, dropout_key=None, remat=0):
    """Logits [B, V] float32 of images [B, Y, X, C], floats in [-1, 1].

    ops: REFERENCE, FUSED, or None for what suits the platform. dtype: float32 or bfloat16, of activations and matmul
    operands (accumulation is float32 either way). dropout_key: a JAX PRNG key; None switches dropout off. remat: for the
    backward pass keep only the input of every n-th block (True is 1, every block; 0 keeps what the ops keep). Differentiable;
    runs in a user's own jit on one device, and on a mesh through `apply_on`. Raises ValueError where images or parameters do not
    fit the configuration, or n does not divide the depth.
    """
    check(params, images, config)
    return forward(params, images, config, ops=ops, dtype=dtype, dropout_key=dropout_key, remat=remat)


def features(params, images, config: ViTConfig, *, ops: Ops | None = None, dtype=jnp.float32, remat=0):
    """The image representation y of Eq. 4, [B, D] float32: the class token after the last norm, or the mean of the patches."""
    check(params, images, config)
    x = encode(params, images, config, ops=resolve(ops), dtype=dtype, remat=remat)
    return represent(params, x, config, ops=resolve(ops)).astype(jnp.float32)


def forward(
    params,
    images,
    config,
    *,
    ops=None,
    dtype=jnp.float32,
    dropout_key=None,
    remat: int = 0,
    mesh: MeshShape | None = None,
    first_example=0,
):
    """`apply` without its checks, on one device (mesh None) or on this device's shards inside a `shard_map`.

    first_example: the global index of images[0], which keys the dropout masks.
    """
    ops = resolve(ops)
    x = encode(
        params, images, config, ops=ops, dtype=dtype, dropout_key=dropout_key, remat=remat, mesh=mesh, first_example=first_example
    )
    y = represent(params, x, config, ops=ops, mesh=mesh)
    specs = partition_specs(config, mesh)
    if "pre_logits" in params:
        y = jnp.tanh(_dense(gather(params["pre_logits"], specs["pre_logits"], mesh, y.dtype), y)).astype(y.dtype)
    return _dense(gather(params["head"], specs["head"], mesh, y.dtype), y)


def _pair(p):
    """Scale or kernel, and bias."""
    return p["scale" if "scale" in p else "kernel"], p["bias"]


def encode(params, images, config, *, ops, dtype, dropout_key=None, remat=0, mesh=None, first_example=0):
    """Images [B, Y, X, C] to the last block's tokens [B, T, D]: Eq. 1 to 3."""
    specs = partition_specs(config, mesh)
    residual_scale = 1.0 / mesh.model if mesh else 1.0
    row = first_example * config.tokens
    column = lax.axis_index("model") * (config.mlp_dim // mesh.model) if mesh else 0
    keys = None
    if dropout_key is not None and config.dropout > 0:
        bits = jax.random.bits(dropout_key, (config.depth + 1,), jnp.uint32)
        keys = lax.bitcast_convert_type(bits, jnp.int32)  # one for the embedding, one for each block

    def dropout(key, row=row):
        return None if key is None else Dropout(config.dropout, key, row, column)

    p = gather(params["patch_embed"], specs["patch_embed"], mesh, dtype)
    first = dropout(None if keys is None else keys[0])
    x = ops.patch_embed(images.astype(dtype), p["kernel"], p["bias"], p.get("cls"), p["position"], dropout=first)

    extra, tokens = -x.shape[1] % ops.multiple, {}
    if extra:  # rows that no token sees
        x, tokens = jnp.pad(x, ((0, 0), (0, extra), (0, 0))), {"tokens": config.tokens}

    def halves(x, row, w, key):
        x = sum_over_model(
            ops.attention_half(
                vary(x, mesh),
                AttentionWeights(*_pair(w["norm1"]), *_pair(w["qkv"]), *_pair(w["out"])),
                num_heads=config.num_heads // (mesh.model if mesh else 1),
                dropout=dropout(key, row),
                residual_scale=residual_scale,
                **tokens,
            )
        )
        x = checkpoint_name(x, MIDDLE)
        return sum_over_model(
            ops.mlp_half(
                vary(x, mesh),
                MLPWeights(*_pair(w["norm2"]), *_pair(w["mlp_in"]), *_pair(w["mlp_out"])),
                gelu=config.gelu,
                dropout=dropout(key, row),
                residual_scale=residual_scale,
                **tokens,
            )
        )

    sum_over_model = partial(lax.psum, axis_name="model") if mesh else lambda x: x
    # vectors are replicated over "data": made varying here, outside the scan, their gradients are summed once, not once a layer
    layers = vary(params["blocks"], mesh, specs["blocks"]), None if keys is None else keys[1:]
    scan = _unrolled if ("remat" if remat else "forward") in ops.unrolled else lax.scan
    checkpoint = partial(jax.checkpoint, prevent_cse=scan is _unrolled)

    def block(x, layer):
        w, key = layer
        return halves(x, row, gather(w, block_specs(specs), mesh, dtype), key), None

    if remat > 1:
        x = _rematerialised(halves, x, row, layers, remat, specs["blocks"], mesh, dtype, scan)
    else:
        if remat:
            block = checkpoint(block, policy=_nothing)
        elif mesh and mesh.data > 1:
            block = checkpoint(block, policy=recompute_gathers(ops.keeps))
        x = scan(block, x, layers)[0]
    return x[:, : config.tokens] if extra else x


def _unrolled(block, x, layers):
    """`lax.scan` of a block without results of its own, as one program without a loop.

    The stacks are split once: a gradient is then put together once, where layer by layer it would be a sum of padded arrays.
    """
    leaves, tree = jax.tree.flatten(layers)
    parts = [[part.reshape(part.shape[1:]) for part in lax.split(a, (1,) * a.shape[0])] for a in leaves]
    for layer in zip(*parts, strict=True):
        x, _ = block(x, jax.tree.unflatten(tree, layer))
    return x, None


_nothing = jax.checkpoint_policies.nothing_saveable
_again = partial(jax.checkpoint, policy=_nothing, prevent_cse=False)  # inside a loop


def _rematerialised(block, x, row, layers, every: int, specs, mesh, dtype, scan):
    """`scan` over the blocks, of which the backward pass keeps the input of every n-th and makes those in between again.

    It does so for a part of the batch at a time: the inputs in between are a part's, and little. A weight's gradients are summed
    over the parts in float32. block: (x, row, weights, key) -> x. Raises ValueError where n does not divide the depth.
    """
    depth, tokens = jax.tree.leaves(layers)[0].shape[0], x.shape[1]
    if depth % every:
        raise ValueError(f"remat is {every} and the blocks are {depth}: a divisor of {depth} is required, or 0 to keep everything")
    parts = _parts(x.shape[0], tokens)

    def group(x, layers):
        weights, keys = layers
        weights = gather(weights, specs, mesh, dtype)
        if parts > 1:
            weights = jax.tree.map(lambda w: w.astype(jnp.float32), weights)

        def run(part):
            x, row = part
            return lax.scan(_again(lambda x, layer: (block(x, row, *layer), None)), x, (weights, keys))[0]

        if parts == 1:
            return run((x, row)), None
        pieces = x.reshape(parts, -1, *x.shape[1:])
        pieces = lax.map(_again(run), (pieces, row + jnp.arange(parts) * (pieces.shape[1] * tokens)))
        return pieces.reshape(x.shape), None

    checkpoint = partial(jax.checkpoint, prevent_cse=scan is _unrolled)
    # Several parts are checkpointed each: around them a checkpoint is only there to drop the gathered weights.
    if parts == 1 or (mesh and mesh.data > 1):
        group = checkpoint(group, policy=_nothing)
    return scan(group, x, jax.tree.map(lambda a: a.reshape(-1, every, *a.shape[1:]), layers))[0]


def _parts(batch: int, tokens: int) -> int:
    """Into how many equal parts rematerialised blocks take the batch: the fewest of at most PART tokens; 1 where they would be
    less than an eighth of that, as of a prime number of images."""
    most = max(1, PART // tokens)
    images = next(n for n in range(min(batch, most), 0, -1) if batch % n == 0)
    return batch // images if 8 * images >= most else 1


def represent(params, x, config, *, ops, mesh=None):
    """Tokens [B, T, D] to the representation [B, D] in the same dtype: Eq. 4. The norm acts on each token alone."""
    norm = gather(params["norm"], partition_specs(config, mesh)["norm"], mesh, x.dtype)
    if config.pool == "token":
        # not x[:, 0], before which XLA copies all of x on a TPU to another layout, forward and backward
        first = lax.broadcasted_iota(jnp.int32, (1, x.shape[1], 1), 1) == 0
        return ops.layer_norm(jnp.where(first, x, jnp.zeros_like(x)).sum(1), norm["scale"], norm["bias"])
    return ops.layer_norm(x, norm["scale"], norm["bias"]).astype(jnp.float32).mean(1).astype(x.dtype)


def _dense(p, x):
    """x [B, D] @ kernel + bias, accumulated and returned in float32."""
    return jnp.einsum("bd,dv->bv", x, p["kernel"].astype(x.dtype), preferred_element_type=jnp.float32) + p["bias"]


def check(params, images, config: ViTConfig) -> None:
    """Raise ValueError where images or parameters do not fit the configuration."""
    want = (*config.image_shape, config.channels)
    if images.ndim != 4 or images.shape[1:] != want or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images are {images.dtype}{list(images.shape)}: "
            f"floats [B, {', '.join(map(str, want))}] in [-1, 1] are required by this config"
        )
    have = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
    need = _shapes(config)
    if have != need:
        name = min(name for name in have.keys() | need.keys() if have.get(name) != need.get(name))
        raise ValueError(
            f"params{name} is {have.get(name, 'missing')}, the config requires {need.get(name, 'no such entry')}: "
            "use the config the parameters were made with"
        )


@cache
def _shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    shapes = jax.eval_shape(partial(init, config=config), jax.random.key(0))
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(shapes)}
