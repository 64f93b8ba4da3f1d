"""Programs for the compiler: the builders that `bench.tpu_compiler` calls in its subprocess, for single ops and for whole models.

Each is called as builder(devices, **arguments) with the devices of the topology, and returns (function, shapes of its arguments).
`kernels` says whose code it is: True ours, False the references as XLA compiles them; of attention alone also a name of
`bench.peers.attention`, of whole models on one core `bench.peers.FLAX`.
"""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Format, Layout

from bench import plans, shapes
from bench.peers import FLAX, vit
from bench.peers import attention as peers
from kernels.attention.reference import AttentionWeights
from kernels.attention.relative import reference as relative
from kernels.attention.relative.reference import RelativeWeights
from kernels.attention.statistics import tpu as statistics_tpu
from kernels.device import SUBLANES, from_kind
from kernels.dropout import Dropout
from kernels.launch import Launch
from kernels.mlp.reference import MLPWeights
from kernels.vmem import round_up
from train.mesh import laid, rows, shape_of
from train.shards import choose, laid_for
from train.step import StepOptions, make_eval_step, make_train_step, state_specs
from train.step import shardings as shardings_of
from vitcore import ViTConfig, apply_on, axial, partition_specs, resnet, variant
from vitcore.context import Context
from vitcore.heads import logits
from vitcore.keep import choose as choose_kept
from vitcore.model import asked_for, forward, init, prepared, representation
from vitcore.ops import BY_NAME, FUNCTIONS, FUSED, KEPT, OTHERS, REFERENCE, Ops, for_training, fused
from vitcore.pixels import to_unit
from vitcore.sharding import MeshShape

S = jax.ShapeDtypeStruct


def _kernel(op: str):
    return getattr(importlib.import_module(f"kernels.{op.removesuffix('_half')}.tpu"), op)


def ops_for(device, *, kernels: bool) -> Ops:
    """The ops of a program compiled for `device`."""
    if not kernels:
        return REFERENCE
    launch = launch_for(device)
    ours = fused(launch)
    return FUSED._replace(**{name: getattr(ours, name) for name in (*FUNCTIONS, *OTHERS, *KEPT)})


def launch_for(device) -> Launch:
    """Our kernels compiled for `device`, which need not be a device of this process. ValueError for one without kernels."""
    return Launch(device=from_kind(device.device_kind))


def op_of(
    op: str,
    config: ViTConfig,
    batch: int,
    dtype,
    *,
    launch: Launch | None,
    rate: float = 0.0,
    ops: Ops = REFERENCE,
    keep: bool = False,
    padded: bool = False,
    changes: dict | None = None,
):
    """(function, shapes of its float arguments) of an op at a model's shapes, parameters float32. launch None: that of `ops`.

    keep: of a kernel of a half block that has the option. padded: of a half block, images of whole register tiles of rows, of which
    the tokens count, as a model lays them. changes: of the plan of a half block by kernels, as `plans.changed` takes them.
    """
    c, d, f = config, config.width, config.mlp_dim

    def p(*shape):
        return S(shape, jnp.float32)

    rows = round_up(c.tokens, SUBLANES) if padded else c.tokens
    x = S((batch, rows, d), dtype)
    dropout = Dropout(rate, jnp.int32(7)) if rate else None
    fn = getattr(ops, op) if launch is None else partial(_kernel(op), launch=launch, **({"keep": True} if keep else {}))
    if padded:
        fn = partial(fn, tokens=c.tokens)
    if changes and launch is not None:
        fn = partial(fn, plan=plans.changed(plans.of(op, c, batch, rows, dtype, launch.device, keep=keep), changes))
    if op == "patch_embed":
        y, w = c.image_shape
        images = S((batch, y, w, c.channels), dtype)
        kernel = p(c.patch_size, c.patch_size, c.channels, d)
        return partial(fn, dropout=dropout), (images, kernel, p(d), p(d), p(c.tokens, d))
    if op == "attention_half":
        half = partial(fn, num_heads=c.num_heads, dropout=dropout)
        return (lambda x, *w: half(x, AttentionWeights(*w))), (x, p(d), p(d), p(3, d, d), p(3, d), p(d, d), p(d))
    if op == "mlp_half":
        half = partial(fn, dropout=dropout)
        return (lambda x, *w: half(x, MLPWeights(*w))), (x, p(d), p(d), p(d, f), p(f), p(f, d), p(d))
    return fn, (x, p(d), p(d))


def _op(device, op: str, config: ViTConfig, batch: int, dtype, *, kernels: bool | str, **more):
    """An op for `device`: ours, the reference, or (attention between the projections alone) a peer by its name."""
    name = kernels if isinstance(kernels, str) else "ours" if kernels else "reference"
    launch = launch_for(device) if name == "ours" else None
    if op != "attention":
        return op_of(op, config, batch, dtype, launch=launch, ops=REFERENCE if launch else BY_NAME[name], **more)
    t, n = config.tokens, config.num_heads
    one = peers.peer(name, tokens=t, heads=n, launch=launch)
    if launch and more.get("changes"):
        chosen = plans.changed(plans.of(op, config, batch, t, dtype, launch.device), more["changes"])
        one = one._replace(fn=partial(one.fn, plan=chosen))
    return one.fn, peers.shapes(one, batch, t, n, config.width // n, dtype)


def one_op(
    devices, *, op, shape, batch, dtype="bfloat16", backward=False, kernels=True, image=False, **more
):  # fmt: skip
    """An op at a named shape: its forward pass, or forward and all gradients (a patch embedding's image only with image=True).

    more: rate, keep, padded and changes of `op_of`.
    """
    config = shapes.shape(shape).config
    fn, arguments = _op(devices[0], op, config, batch, jnp.dtype(dtype), kernels=kernels, **more)
    if not backward:
        return fn, arguments
    constants = 1 if op == "patch_embed" and not image else 0

    def both(cotangent, *arrays):
        value, pullback = jax.vjp(partial(fn, *arrays[:constants]), *arrays[constants:])
        return value, pullback(cotangent)

    return both, (jax.eval_shape(fn, *arguments), *arguments)


def op_alone(devices, **asked):
    """`one_op` with arguments and results in the layouts its code likes best, as its neighbours in a model would leave them.

    A program's own arguments otherwise lie with whatever axis makes them smallest, and copies to another layout would be counted.
    """
    fn, arguments = one_op(devices, **asked)
    best = Format(Layout.AUTO)
    return jax.jit(fn, in_shardings=best, out_shardings=best), arguments


def _config(
    model: str, image_size: int | None, depth: int | None = None, units: Sequence[int] = (), position: str | None = None
) -> Any:
    """units: of the stages of a ResNet or of a hybrid's stem, for fewer than the name has."""
    changes = {"image_size": image_size, "depth": depth, "position": position}
    config = variant(model, num_classes=1000, **{name: value for name, value in changes.items() if value is not None})
    return replace(config, stem=replace(config.stem, depths=tuple(units))) if units else config


def _bytes(config: ViTConfig, batch: int, sharding=None):
    """Images as jobs have them."""
    return S((batch, *config.image_shape, config.channels), jnp.uint8, sharding=sharding)


def _floats(config: ViTConfig, batch: int, dtype):
    """Images as the peer has them: normalised by its host."""
    return S((batch, *config.image_shape, config.channels), jnp.dtype(dtype))


def whole_forward(
    devices, *, model, batch, dtype="bfloat16", kernels=True, image_size=None, depth=None, units=(), position=None
):  # fmt: skip
    """The logits of a whole model for bytes, as jobs have their images; parameters float32, on one core."""
    config = _config(model, image_size, depth, units, position)
    if kernels == FLAX:
        return partial(vit.forward, dtype=jnp.dtype(dtype)), (vit.shapes(config), _floats(config, batch, dtype))
    context = Context(ops=ops_for(devices[0], kernels=kernels), dtype=jnp.dtype(dtype))
    params = jax.eval_shape(partial(init, config=config), jax.random.key(0))
    return (lambda p, x: forward(p, to_unit(x), config, context)), (params, _bytes(config, batch))


def forward_with_statistics(devices, *, model, batch, dtype="bfloat16", kernels=True, image_size=None, depth=None):
    """`whole_forward`, and of every block the distance of each head and the class token's row."""
    config = _config(model, image_size, depth)
    capture = asked_for(config, None, mean=False, row=True, distance=True)
    context = Context(ops=ops_for(devices[0], kernels=kernels), dtype=jnp.dtype(dtype), capture=capture)
    params = jax.eval_shape(partial(init, config=config), jax.random.key(0))

    def run(p, x):
        y, found = representation(p, to_unit(x), config, context, behind_hidden=True)
        return logits(p, y, config, prepared(config, context)), found

    return run, (params, _bytes(config, batch))


def statistics_alone(devices, *, shape, batch, dtype="bfloat16", mean=True, row=True, distance=True):
    """The kernel of attention statistics at a named shape."""
    c = shapes.shape(shape).config
    d, f32 = c.width, jnp.float32
    arrays: Any = [S(s, f32) for s in ((d,), (d,), (3, d, d), (3, d), (d, d), (d,))]
    weights = AttentionWeights(*arrays)
    launch = launch_for(devices[0])

    def run(x, distances, weights):
        asked = {"mean": mean, "row": row, "distances": distances if distance else None}
        return statistics_tpu.attention_statistics(x, weights, num_heads=c.num_heads, eps=c.eps, launch=launch, **asked)

    return run, (S((batch, c.tokens, d), jnp.dtype(dtype)), S((c.tokens, c.tokens), f32), weights)


def mesh_forward(devices, *, model, batch, data=1, axis=1, dtype="bfloat16", kernels=True, image_size=None, depth=None):
    """The logits of a whole model for bytes on a mesh of data x axis cores; `batch` is the global batch."""
    config = _config(model, image_size, depth)
    mesh = laid(MeshShape(data, axis), devices[: data * axis])
    params = jax.eval_shape(partial(init, config=config), jax.random.key(0))
    params = jax.tree.map(lambda a, s: S(a.shape, a.dtype, sharding=s), params, shardings_of(mesh, partition_specs(config, mesh)))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    images = _bytes(config, batch, split)
    run = apply_on(mesh, config, ops=ops_for(devices[0], kernels=kernels), dtype=jnp.dtype(dtype))
    return (lambda p, x: run(p, to_unit(x))), (params, images)


def train_step(
    devices,
    *,
    model,
    batch,
    data=1,
    axis=1,
    dtype="bfloat16",
    kernels=True,
    remat=False,
    accumulate=1,
    image_size=None,
    depth=None,
    units=(),
    dropout=0.0,
    drop_path=0.0,
    position=None,
    shard="parameters",
    whole_plan=False,
):
    """The training step of `train.step`, fed bytes as the loop feeds it, with Adam on a mesh of data x axis cores; `batch` is the
    global batch. shard: "parameters", "optimizer", "none", or "auto" for what a job takes. whole_plan: at a smaller depth, shard
    and what is kept for the backward pass are those of the whole model."""
    config = _config(model, image_size, depth, units, position)
    whole = _config(model, image_size, None, units, position) if whole_plan else config
    rates = {name: rate for name, rate in (("dropout", dropout), ("drop_path", drop_path)) if rate}
    config = replace(config, **rates)  # of which a ResNet has none
    if kernels == FLAX:
        if (data, axis, remat, accumulate, rates) != (1, 1, 0, 1, {}):
            raise ValueError("the peer's step runs on one core, without rematerialisation, accumulation and dropout")
        tx, params = vit.optimizer(), vit.shapes(config)
        step = jax.jit(partial(vit.step, tx=tx, dtype=jnp.dtype(dtype)), donate_argnums=(0, 1))
        return step, (params, jax.eval_shape(tx.init, params), _floats(config, batch, dtype), S((batch,), jnp.int32))
    mesh = laid(MeshShape(data, axis), devices[: data * axis])
    tx = optax.adam(1e-3)
    how, ops = choose(shard, whole, mesh, jnp.dtype(dtype)), ops_for(devices[0], kernels=kernels)
    mesh = laid_for(how, mesh, whole)
    if whole_plan:
        images = batch // data // accumulate
        ops = choose_kept(for_training(ops), whole, images, dtype, shape_of(mesh), remat=remat)[0]._replace(keeping=())
    options = StepOptions(ops=ops, dtype=jnp.dtype(dtype), remat=remat, accumulate=accumulate, shard=how)
    specs = state_specs(config, mesh, tx, polyak=False, shard=how)
    params = jax.eval_shape(partial(init, config=config), jax.random.key(0))
    state: Any = specs._replace(step=S((), jnp.int32), params=params, opt_state=jax.eval_shape(tx.init, params), average=None)
    state = jax.tree.map(lambda a, s: S(a.shape, a.dtype, sharding=s), state, shardings_of(mesh, specs))
    split = jax.sharding.NamedSharding(mesh, rows(mesh))
    images = _bytes(config, batch, split)
    labels = S((batch,), jnp.int32, sharding=split)
    return make_train_step(config, mesh, tx, options), (state, images, labels)


def eval_step(
    devices, *, model, batch, data=1, axis=1, dtype="bfloat16", kernels=True, image_size=None, depth=None, shard="auto"
):  # fmt: skip
    """The evaluation step of `train.step`, fed bytes as the loop feeds it, on a mesh of data x axis cores; `batch` is the global
    batch. shard: as of `train_step`, of the whole model."""
    config, mesh = _config(model, image_size, depth), laid(MeshShape(data, axis), devices[: data * axis])
    how = choose(shard, _config(model, image_size), mesh, jnp.dtype(dtype))
    mesh = laid_for(how, mesh, _config(model, image_size))
    options = StepOptions(ops=ops_for(devices[0], kernels=kernels), dtype=jnp.dtype(dtype), shard=how)
    params = jax.eval_shape(partial(init, config=config), jax.random.key(0))
    specs = shardings_of(mesh, partition_specs(config, shape_of(mesh), shard=how))
    params = jax.tree.map(lambda a, s: S(a.shape, a.dtype, sharding=s), params, specs)
    split = jax.sharding.NamedSharding(mesh, rows(mesh))
    labels, weights = S((batch,), jnp.int32, sharding=split), S((batch,), jnp.float32, sharding=split)
    return make_eval_step(config, mesh, options), (params, _bytes(config, batch, split), labels, weights)


def relative_half(devices, *, shape, batch, dtype="bfloat16", backward=False, kernels=True, class_token=True):
    """The attention half with relative positions at a named shape: its forward pass, or forward and all gradients."""
    c, f32 = shapes.shape(shape).config, jnp.float32
    d, tokens = c.width, c.tokens - (not class_token)
    x = S((batch, tokens, d), jnp.dtype(dtype))
    entries = relative.entries(tokens - class_token, class_token)
    weights: Any = [S(s, f32) for s in ((d,), (d,), (3, d, d), (3, d), (d, d), (d,), (entries, d))]
    ops = fused(launch_for(devices[0])) if kernels else REFERENCE
    fn = partial(ops.relative_half, num_heads=c.num_heads, class_token=class_token)
    arguments = x, RelativeWeights(AttentionWeights(*weights[:-1]), weights[-1])
    if not backward:
        return fn, arguments

    def both(cotangent, *arrays):
        value, pullback = jax.vjp(fn, *arrays)
        return value, pullback(cotangent)

    return both, (x, *arguments)


def axial_lines(devices, *, length, channels, images, dtype="bfloat16", kernels=False, backward=False, whole=False):
    """Attention over the columns of maps [images, length, length, channels] of an AxialResNet, its 8 heads: what lies between
    projections and norms or, whole, a layer with them."""
    heads = resnet.AXIAL_HEADS
    if channels % (2 * heads):
        raise ValueError(
            f"channels={channels}: a multiple of {2 * heads} is required, for {heads} heads whose q and k are half as wide as v"
        )
    lines = ops_for(devices[0], kernels=kernels).lines
    tables = S((2 * channels // heads, 2 * length - 1), jnp.float32)
    if whole:
        norm = partial(resnet._norm, form=resnet.FORMS["axial"])
        fn: Any = partial(axial.along, axis=1, heads=heads, norm=norm, lines=lines)
        vectors = {
            name: {part: S((n,), jnp.float32) for part in ("scale", "bias")}
            for name, n in (("gn_qkv", 2 * channels), ("gn_out", channels))
        }
        weights = {"qkv": S((channels, 2 * channels), jnp.float32), "relative": tables, **vectors}
        arguments: Any = (S((images, length, length, channels), jnp.dtype(dtype)), weights)
    else:
        fn = partial(lines, heads=heads)
        arguments = (S((images * length, length, 2 * channels), jnp.dtype(dtype)), tables)
    if not backward:
        return fn, arguments
    return (lambda dy, *arrays: jax.vjp(fn, *arrays)[1](dy)), (jax.eval_shape(fn, *arguments), *arguments)
