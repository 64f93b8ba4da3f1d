"""BiT ResNets (Kolesnikov et al. 2020) and the root of a hybrid: GroupNorm and weight-standardised convolutions, NHWC.

    root                  7x7/2 convolution, 3x3/2 max pool
    a unit of a stage     1x1 to C channels, 3x3 (with the stride), 1x1 to 4C; around it a residual, projected where shapes differ
    stage s = 1, 2, ...   C = 64 w 2^(s-1), the first unit of every stage but the first has stride 2

Three forms, each with the numbers its authors published it with (`FORMS`):

    post   the hybrids' root: normalise and ReLU after each convolution, SAME padding       relu(x + GN(conv(...)))
    pre    BiT's own, the paper's ResNet baseline: both before each convolution, symmetric padding   x + conv(relu(GN(...)))
    axial  AxialResNet: post, but in place of the 3x3 convolution attention over columns and rows, and a 2x2 mean at a stride

The convolutions are XLA's on every platform; statistics are float32, activations and products in the dtype asked for. A stage's
first unit is apart; the units after it are stacked on a leading axis, like the blocks of a transformer, and run as one loop.

On a mesh the C channels inside a unit are split over "model": conv1 by its outputs, conv2 and conv3 by their inputs, so that a unit
needs two sums: one scattered over the channels after conv2, and one at its end. Groups stay whole: the axis divides 32. An axial
unit splits its heads, gathers channels between columns and rows, and sums at its end: the axis divides the 8 heads.
Kernels are split over "data" along their output channels, for which standardisation is local, and gathered in the compute dtype.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from kernels.attention.lines.reference import attention
from vitcore import axial
from vitcore.collectives import MeshShape, gather, lies_on, recompute_gathers, sum_over_model

GROUPS = 32
# Bottleneck units of the stages (He et al. 2016; 200: paper appendix; 26: the later hybrids R26+S/32).
DEPTHS = {14: (1, 1, 1, 1), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}


class Form(NamedTuple):
    """The numbers of a published form. eps: GroupNorm's. std_eps, var_eps: weights are divided by sqrt(var + var_eps) + std_eps.
    same: SAME padding, else symmetric. pool: what the max pool's border holds. zero_last: the last scale of a unit starts at 0."""

    eps: float
    std_eps: float
    var_eps: float
    same: bool
    pool: float
    zero_last: bool


FORMS = {
    "post": Form(1e-6, 1e-5, 0.0, True, -math.inf, True),
    "pre": Form(1e-5, 0.0, 1e-10, False, 0.0, False),
    "axial": Form(1e-4, 0.0, 1e-10, True, -math.inf, True),
}
AXIAL_HEADS = 8


@dataclass(frozen=True, kw_only=True)
class ResNetStem:
    """A ResNet without its head. depths: units of each stage; () is the root alone. width_factor: w, the root has 64 w channels.
    form: "post", as in the hybrids, "pre", as BiT has it, or "axial". Raises ValueError where 64 w is no multiple of the 32
    groups."""

    depths: tuple[int, ...] = (3, 4, 9)
    width_factor: float = 1.0
    form: Literal["post", "pre", "axial"] = "post"
    kind: Literal["resnet"] = "resnet"  # its name in the table of stems

    def __post_init__(self):
        object.__setattr__(self, "depths", tuple(self.depths))  # a list, as it comes out of config.json
        if len(self.depths) > 8 or not all(isinstance(n, int) and n >= 1 for n in self.depths):
            raise ValueError(f"depths={self.depths}: the number of units of each stage is required, e.g. (3, 4, 6, 3)")
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r}: {' or '.join(map(repr, FORMS))} is required")
        channels = 64 * self.width_factor
        if not (channels >= GROUPS and channels % GROUPS == 0):
            raise ValueError(
                f"width_factor={self.width_factor} gives the root {channels:g} channels: a multiple of the {GROUPS} groups of "
                "GroupNorm is required, e.g. 0.5, 1, 2 or 3"
            )

    @property
    def root_channels(self) -> int:
        return int(64 * self.width_factor)

    @property
    def channels(self) -> int:
        """Of the feature map."""
        return self.root_channels * 2 ** (len(self.depths) + 1) if self.depths else self.root_channels

    @property
    def stride(self) -> int:
        """Pixels of the image along one side of a cell of the feature map."""
        return 4 * 2 ** max(0, len(self.depths) - 1)

    def grid(self, image_shape: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the feature map of an image of (Y, X) pixels: every stride rounds up."""
        halvings = self.stride.bit_length() - 1
        rows, columns = image_shape
        for _ in range(halvings):
            rows, columns = -(-rows // 2), -(-columns // 2)
        return rows, columns


class Unit(NamedTuple):
    """The shape of one unit. into, middle, out: channels. project: whether the residual is projected. stage: 1, 2, ... number: 1,
    2, ... in its stage."""

    stage: int
    number: int
    into: int
    middle: int
    out: int
    stride: int

    @property
    def project(self) -> bool:
        return self.into != self.out or self.stride > 1


def units(c: ResNetStem) -> Iterator[Unit]:
    """Every unit, in order."""
    into = c.root_channels
    for s, count in enumerate(c.depths):
        middle = c.root_channels * 2**s
        for number in range(1, count + 1):
            yield Unit(s + 1, number, into, middle, 4 * middle, 2 if s and number == 1 else 1)
            into = 4 * middle


# --- arithmetic -------------------------------------------------------------------------------------------------------------


def group_norm(x, scale, bias, *, groups: int = GROUPS, eps: float):
    """(x - mean) / sqrt(var + eps) * scale + bias, statistics over the positions and the C / groups channels of a group; float32.

    x [..., C] with the batch first; scale, bias [C]. Returns x's shape and dtype.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    where = tuple(range(1, x.ndim - 1))

    def of_groups(channels):  # [B, 1..., C] means of channels to those of their groups; only this little array is taken apart
        grouped = channels.reshape(channels.shape[0], groups, -1)
        mean = jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape)
        return mean.reshape(channels.shape)

    z = x.astype(wide)
    z = z - of_groups(z.mean(where, keepdims=True))
    z = z * lax.rsqrt(of_groups(jnp.square(z).mean(where, keepdims=True)) + eps)
    return (z * scale + bias).astype(x.dtype)


def standardised(kernel, form: Form, *, split: tuple[str, ...] | None = None):
    """A kernel [y, x, in, out] with mean 0 and deviation 1 over (y, x, in), for each output channel; in the kernel's dtype.

    split: the mesh axes its input channels are split over, None for whole kernels.
    """
    mean = partial(jnp.mean, axis=(0, 1, 2), keepdims=True)
    total = (lambda a: lax.pmean(a, split)) if split else lambda a: a
    kernel = kernel - total(mean(kernel))
    var = total(mean(jnp.square(kernel))) + form.var_eps
    # a kernel of equal weights has no deviation, and the root there no derivative: 1e-30 changes no other
    return kernel / (jnp.sqrt(jnp.maximum(var, 1e-30)) + form.std_eps)


def convolve(x, kernel, stride: int, form: Form):
    """x [B, Y, X, C] and a kernel [k, k, C, C'] to [B, ceil(Y / stride), ceil(X / stride), C']."""
    side = kernel.shape[0] // 2
    padding = "SAME" if form.same else ((side, side), (side, side))
    return lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def max_pool(x, form: Form):
    """The largest of 3x3 every two positions: [B, Y, X, C] to [B, ceil(Y / 2), ceil(X / 2), C]."""
    padding = "SAME"
    if not form.same:
        x, padding = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=form.pool), "VALID"
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


# --- the network ------------------------------------------------------------------------------------------------------------


def feature_map(
    params,
    images,
    c: ResNetStem,
    *,
    specs=None,
    mesh: MeshShape | None = None,
    remat: bool = False,
    unrolled=False,
    lines=attention,
):
    """Images [B, Y, X, C] to the last stage's output [B, *c.grid((Y, X)), c.channels], in the images' dtype.

    params: as `leaves` lists them; on a mesh this device's shards, with their specs, inside a `shard_map` whose axes are manual.
    remat: keep the input of every unit alone for the backward pass. unrolled: no loop over the units of a stage. lines: attention
    along lines, of `vitcore.ops`.
    """
    form = FORMS[c.form]
    ready = partial(_ready, form=form, mesh=mesh, dtype=images.dtype)
    root = ready(params["root"], specs and specs["root"])
    x = convolve(images, root["conv"]["kernel"], 2, form)
    if c.form != "pre":
        x = _relu(_norm(x, root["norm"], form))
    x = max_pool(x, form)
    scan = _unrolled if unrolled else lax.scan
    for s in range(len(c.depths)):
        stage = params[f"stage{s + 1}"]
        for part in stage:  # "first", then "rest"
            spec = specs and specs[f"stage{s + 1}"][part]
            if part == "first":
                x = _unit(ready, spec, c.form, 2 if s else 1, mesh, remat, lines)(x, stage[part])
                continue
            layer = spec and jax.tree.map(lambda p: P(*p[1:]), spec)
            run = _unit(ready, layer, c.form, 1, mesh, remat, lines)
            x, _ = scan(lambda x, w, run=run: (run(x, w), None), x, _vary(stage[part], spec, mesh))
    if c.form == "pre":
        x = _relu(_norm(x, ready(params["norm"], specs and specs["norm"]), form))
    return x


def _unit(ready, specs, name: str, stride: int, mesh, remat: bool, lines):
    """(x, its weights) -> x."""
    run = {"post": _post, "pre": _pre, "axial": partial(_axial, lines=lines)}[name]

    def unit(x, w):
        return run(x, ready(w, specs), stride, FORMS[name], mesh)

    if remat:
        return jax.checkpoint(unit, policy=jax.checkpoint_policies.nothing_saveable)
    if mesh and mesh.data > 1:
        return jax.checkpoint(unit, policy=recompute_gathers(None))
    return unit


def _post(x, w, stride, form, mesh):
    residual = x
    if "conv_proj" in w:
        residual = _norm(convolve(x, w["conv_proj"]["kernel"], stride, form), w["gn_proj"], form)
    y = _relu(_norm(convolve(x, w["conv1"]["kernel"], 1, form), w["gn1"], form, mesh))
    y = _scatter(convolve(y if stride == 1 else _apart(y), w["conv2"]["kernel"], stride, form), mesh)
    y = _relu(_norm(y, w["gn2"], form, mesh))
    y = _norm(_sum(convolve(y, w["conv3"]["kernel"], 1, form), mesh), w["gn3"], form)
    return _relu(residual + y)


def _pre(x, w, stride, form, mesh):
    z = _relu(_norm(x, w["gn1"], form))
    residual = convolve(z, w["conv_proj"]["kernel"], stride, form) if "conv_proj" in w else x
    y = _relu(_norm(convolve(z, w["conv1"]["kernel"], 1, form), w["gn2"], form, mesh))
    y = _scatter(convolve(y, w["conv2"]["kernel"], stride, form), mesh)
    y = _relu(_norm(y, w["gn3"], form, mesh))
    return residual + _sum(convolve(y, w["conv3"]["kernel"], 1, form), mesh)


def _axial(x, w, stride, form, mesh, *, lines):
    residual = x
    if "conv_proj" in w:
        residual = _norm(convolve(x, w["conv_proj"]["kernel"], stride, form), w["gn_proj"], form)
    y = _relu(_norm(convolve(x, w["conv1"]["kernel"], 1, form), w["gn1"], form))
    heads = AXIAL_HEADS // (mesh.model if mesh else 1)
    y = axial.along(y, w["height"], 1, heads, lambda z, n: _norm(z, n, form, mesh), lines)
    if mesh and mesh.over_model:  # the other heads' channels, of which each head reads all
        y = lax.all_gather(y, mesh.over_model, axis=y.ndim - 1, tiled=True)
    y = axial.along(y, w["width"], 2, heads, lambda z, n: _norm(z, n, form, mesh), lines)
    if stride > 1:
        y = _halved(y)
    y = _norm(_sum(convolve(_relu(y), w["conv3"]["kernel"], 1, form), mesh), w["gn3"], form)
    return _relu(residual + y)


def _halved(x):
    """The mean of every 2x2 positions; beyond the border stand zeros."""
    b, rows, columns, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, rows % 2), (0, columns % 2), (0, 0)))
    x = x.reshape(b, (rows + 1) // 2, 2, (columns + 1) // 2, 2, c)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((2, 4)).astype(x.dtype)


def _relu(x):
    return jnp.maximum(x, 0)


@jax.custom_vjp
def _apart(x):
    """x; backward, a program of its own up to here. v6e's compiler (libtpu of jax 0.10.2) dies of the gradient of a SAME
    convolution with a stride fused with the sums over it that a GroupNorm's scale takes, on bfloat16 maps of 16x16 and less."""
    return x


_apart.defvjp(lambda x: (x, None), lambda _, dx: (lax.optimization_barrier(dx),))


def _norm(x, w, form: Form, mesh: MeshShape | None = None):
    """GroupNorm; with a mesh, of this device's channels, which are whole groups."""
    return group_norm(x, w["scale"], w["bias"], groups=GROUPS // (mesh.model if mesh else 1), eps=form.eps)


def _sum(x, mesh):
    return sum_over_model(x, mesh)


def _scatter(x, mesh):
    """The sum over the model axis, of which each device keeps its part of the channels."""
    over = mesh.over_model if mesh else ()
    return lax.psum_scatter(x, over, scatter_dimension=x.ndim - 1, tiled=True) if over else x


def _ready(params, specs, *, form: Form, mesh, dtype):
    """Kernels standardised in float32 and then whole over "data" in `dtype`; vectors float32."""

    def one(path, w, spec=None):
        if path[-1].key == "kernel":
            w = standardised(w, form, split=mesh.over_model if spec and lies_on(spec[2], mesh.over_model) else None)
        return gather(w, spec, mesh, dtype) if mesh else w

    return jax.tree_util.tree_map_with_path(one, params, *((specs,) if mesh else ()))


def _vary(params, specs, mesh):
    """What is whole on every device of "data", made varying before a loop: its gradient is summed once, not once a unit."""
    if not mesh:
        return params

    def one(w, spec):
        split = any(lies_on(entry, mesh.over_data) for entry in spec)
        new = tuple(axis for axis in mesh.over_data if axis not in jax.typeof(w).manual_axis_type.varying)
        return w if split or not new else lax.pcast(w, new, to="varying")

    return jax.tree.map(one, params, specs)


def _unrolled(unit, x, stack):
    """`lax.scan` as one program without a loop. The stacks are split once: a gradient is then put together once."""
    leaves, tree = jax.tree.flatten(stack)
    parts = [[part.reshape(part.shape[1:]) for part in lax.split(a, (1,) * a.shape[0])] for a in leaves]
    for w in zip(*parts, strict=True):
        x, _ = unit(x, jax.tree.unflatten(tree, w))
    return x, None
