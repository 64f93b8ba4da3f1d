"""Statistics of attention as a Pallas TPU kernel; `reference.py` is the specification.

    S'[s, t] = k_s . q_t;  e = 2^(S' - max_s S');  p' = e / sum_s e        the transpose of a head's map, never in HBM
    mean[t, s] = sum_n p'_n[s, t] / N,   row[n, s] = p'_n[s, 0],   distance[n, t] = sum_s p'_n[s, t] d[t, s]

q and k are made of the block's input in VMEM, so that a step reads x and weights and writes what is asked for: of ViT-B/16 9 kB an
image for the distances and as much for the class rows, where maps are 1.9 MB. Keys lie along sublanes: the softmax and the sum of
a distance are additions of whole registers, and only their last step goes across one. The logits' factor is in q. The first
tokens' rows of all heads are one more product: a matrix that has a head's q_0 in the head's own lanes of a row, times k'.

The grid is groups of heads, images, tiles of queries; the first tile of an image makes its q and k. On v2 and v3 rows come in the
order of `float32_rows.unpacked`, and are put in that of the tokens when LN's result is stored: undone by XLA, behind the kernel,
it takes ten times the cycles. Statistics have no gradient here.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cache

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.float32.forward import ByColumns
from kernels.attention.reference import AttentionWeights
from kernels.attention.statistics.reference import Statistics, check
from kernels.attention.tiling import Shape, heads_of
from kernels.body import F32, PACKED_ROWS, dot, iota, operand, operand_dtype
from kernels.device import LANES, SUBLANES, Device
from kernels.float32_rows import PIECE, column_slices, pieces, unpacked
from kernels.launch import Launch, call, vary_alike
from kernels.layer_norm.reference import EPS
from kernels.layer_norm.tpu import normalise
from kernels.vmem import padded_bytes, round_up

TEMPORARIES = 6  # float32 [S, queries] that the compiler keeps beside the blocks
SHARE = 0.85  # of VMEM, by the count below; the rest is for spilled registers
QUERIES = (512, 256, 128)  # of a tile, whole columns of lanes


@dataclass(frozen=True, kw_only=True)
class StatisticsTiles:
    """heads: of a group. head_lanes: of a head, H or more. queries: of a tile. rows: of the keys. copies: of
    an image in VMEM, 2 where the next one comes while one is worked on. needs: bytes of VMEM."""

    heads: int
    head_lanes: int
    queries: int
    rows: int
    copies: int
    needs: int


@cache
def tiles(shape: Shape, device: Device, *, mean: bool, distance: bool) -> StatisticsTiles:
    """As many heads, then as many queries, a step as fit VMEM; where they do, with room for the next image.

    NotImplementedError where nothing fits.
    """
    s, weight = shape, jnp.dtype(operand_dtype(shape.dtype, device)).itemsize
    rows = round_up(s.t, PACKED_ROWS if weight == 2 else SUBLANES)
    for h, copies in itertools.product(sorted({round_up(s.h, SUBLANES), round_up(s.h, LANES)}), (2, 1)):
        once = copies * padded_bytes(s.t, s.d, s.itemsize) + padded_bytes(rows, s.d, 4)
        for heads in (n for n in range(s.n, 0, -1) if s.n % n == 0 and (n == s.n or n * h % LANES == 0)):
            for queries in (min(n, round_up(s.t, LANES)) for n in QUERIES):
                weights = 2 * padded_bytes(s.d, heads * h, weight)
                qk = padded_bytes(round_up(s.t, queries) + rows, heads * h, 4)
                of_maps = (TEMPORARIES + 2 * distance + 2 * mean) * padded_bytes(rows, queries, 4)
                needs = once + weights + qk + of_maps
                if needs <= SHARE * device.vmem_bytes:
                    return StatisticsTiles(heads=heads, head_lanes=h, queries=queries, rows=rows, copies=copies, needs=needs)
    raise NotImplementedError(
        f"attention statistics of {s.t} tokens of width {s.d} with {s.n} heads do not fit the {device.vmem_bytes // 2**20} MiB of "
        f"VMEM of a {device.name}: use the reference ops"
    )


# ---- the kernel


@dataclass(frozen=True, kw_only=True)
class Static:
    """What a kernel is made with."""

    tiles: StatisticsTiles
    tokens: int
    num_heads: int  # all of the device's
    width: int  # H, without padding
    dtype: jnp.dtype
    mean: bool
    row: bool
    distance: bool
    eps: float
    launch: Launch

    @property
    def unpacks(self) -> bool:
        """Whether rows come in the order of `unpacked`."""
        return self.dtype == jnp.bfloat16 and not self.launch.device.bf16_matmul


def _write_rows(z, first: int, rows, unpacked: bool) -> None:
    """rows [n, D], float32, into z's rows from `first` on, in the order of the tokens. unpacked: they come in that of `unpacked`.

    A store with a stride puts the even and the odd rows in their places. It wants arrays a register wide: z is [D/128, S, 128].
    """
    n, d = rows.shape
    for c, at in enumerate(column_slices(d, LANES)):
        if not unpacked:
            z[c, first : first + n, : at.stop - at.start] = rows[:, at]
            continue
        for r in range(0, n, SUBLANES):
            start = first + r // PACKED_ROWS * PACKED_ROWS + r // SUBLANES % 2
            z[c, pl.ds(start, SUBLANES, stride=2), : at.stop - at.start] = rows[r : r + SUBLANES, at]


def _make_qk(x, scale, bias, w, b, z, q, k, static: Static) -> None:
    """q, with the factor of the logits in it, and k of one image into scratch; zeros behind the rows of q."""
    t, d, rows, device = static.tokens, x.shape[2], z.shape[1], static.launch.device
    for a, n in pieces(t, PIECE):
        values = x[0, a : a + n]
        normal, _ = normalise(unpacked(values) if static.unpacks else values.astype(F32), static.eps)
        _write_rows(z, a, normal * scale[...] + bias[...], static.unpacks and n % PACKED_ROWS == 0)
    if rows > t:
        z[:, t:] = jnp.zeros((z.shape[0], rows - t, LANES), F32)
    if q.shape[0] > rows:
        q[rows:] = jnp.zeros((q.shape[0] - rows, q.shape[1]), F32)
    factor = static.width**-0.5 * math.log2(math.e)
    keep = min(rows, q.shape[0])
    for at in column_slices(w.shape[2]):
        whole = jnp.concatenate([z[c, :, : a.stop - a.start] for c, a in enumerate(column_slices(d, LANES))], axis=1)
        one, two = (dot(operand(whole, static.dtype, device), w[c, :, at], static.dtype) + b[c, :, at] for c in range(2))
        q[:keep, at] = one[:keep] * factor
        k[:, at] = two


def _masked(s, t: int):
    """Logits [S, n] with -inf for keys that do not exist."""
    whole = t // SUBLANES * SUBLANES
    if s.shape[0] == t:
        return s
    last = jnp.where(whole + iota(s.shape[0] - whole, 0) < t, s[whole:], -jnp.inf)
    return jnp.concatenate([s[:whole], last]) if whole else last


def _exponentials(s):
    """(e, sum_s e) of logits [S, n] to the base 2."""
    e = jnp.exp2(s - s.max(0, keepdims=True))
    return e, e.sum(0, keepdims=True)


def _first_rows(out, q, k, static: Static) -> None:
    """The first token's probabilities of all heads, [N, S]."""
    h, n, device = static.tiles.head_lanes, out.shape[2], static.launch.device
    count, lanes = round_up(n, PACKED_ROWS), q.shape[1]
    first = lax.broadcasted_iota(jnp.int32, (count, lanes), 0) * h
    lane = lax.broadcasted_iota(jnp.int32, (count, lanes), 1)
    own = jnp.where((lane >= first) & (lane < first + h), q[0:1], 0.0)
    s = dot(operand(own, static.dtype, device), operand(k[...], static.dtype, device), static.dtype, (1, 1))
    s = jnp.where(iota(k.shape[0], 1) < static.tokens, s, -jnp.inf)
    e = jnp.exp2(s - s.max(1, keepdims=True))
    out[0, 0] = (e * (1.0 / e.sum(1, keepdims=True)))[:n]


def _own_rows(value, head):
    """value [columns of the head, n] with zeros in the rows that are not the head's own."""
    if (head.first, head.last) == (head.lo, head.hi):
        return value
    row = head.lo + iota(value.shape[0], 0)
    return jnp.where((row >= head.first) & (row < head.last), value, 0.0)


def _of_heads(found: dict, q, k, distances, start, static: Static) -> None:
    """Means and distances of a tile of queries from q's row `start` on."""
    device, h = static.launch.device, static.tiles.head_lanes
    queries = static.tiles.queries
    if static.mean:
        found["mean"][0, 0] = jnp.zeros(found["mean"].shape[2:], F32)
    transposed = ByColumns(lambda columns: q[pl.ds(start, queries), columns].T)
    keys = ByColumns(lambda columns: operand(k[:, columns], static.dtype, device))
    for n, head in enumerate(head for run in heads_of(k.shape[1], h) for head in run):
        own = operand(_own_rows(transposed[head], head), static.dtype, device)
        e, norm = _exponentials(_masked(dot(keys[head], own, static.dtype), static.tokens))
        if static.distance:
            found["distance"][0, 0, n : n + 1, :] = (e * distances[...]).sum(0, keepdims=True) * (1.0 / norm)
        if static.mean:
            found["mean"][0, 0] += e * (1.0 / (norm * static.num_heads))


def _kernel(*refs, static: Static):
    """refs: x, norm scale and bias, weights and biases of q and k, distances where they are wanted; the results; z, q, k."""
    x, scale, bias, w, b, *rest = refs
    *results, z, q, k = rest[static.distance :]
    found = dict(zip([name for name in Statistics._fields if getattr(static, name)], results, strict=True))
    queries = static.tiles.queries

    def first():
        _make_qk(x, scale, bias, w, b, z, q, k, static)
        if static.row:
            _first_rows(found["row"], q, k, static)

    j = pl.program_id(2)
    single = q.shape[0] == queries
    first() if single else pl.when(j == 0)(first)
    if static.mean or static.distance:
        start = 0 if single else pl.multiple_of(j * queries, queries)
        _of_heads(found, q, k, rest[0] if static.distance else None, start, static)


# ---- the launch


def _padded_heads(w, static: Static):
    """[..., N*H] as [..., N*head_lanes], zeros behind each head."""
    h, lanes = static.width, static.tiles.head_lanes
    if h == lanes:
        return w
    heads = w.reshape(*w.shape[:-1], static.num_heads, h)
    return jnp.pad(heads, [*((0, 0) for _ in w.shape), (0, lanes - h)]).reshape(*w.shape[:-1], -1)


def _launch(x, norm, w, b, distances, static: Static):
    """What the kernel writes, as a dict: mean [G, B, S, Q], row [G, B, N/G, S], distance [G, B, N/G, Q]."""
    tiles, (images, t, d) = static.tiles, x.shape
    groups, lanes = static.num_heads // tiles.heads, tiles.heads * tiles.head_lanes
    padded, rows = round_up(t, tiles.queries), tiles.rows
    steps = padded // tiles.queries if static.mean or static.distance else 1
    once = {"pipeline_mode": pl.Buffered(1)}  # weights change with the group of heads: the room is worth more than the wait
    image = {} if tiles.copies > 1 else once
    vector = pl.BlockSpec((1, d), lambda g, i, j: (0, 0))
    in_specs = [
        pl.BlockSpec((1, t, d), lambda g, i, j: (i, 0, 0), **image),
        *(vector, vector),
        pl.BlockSpec((2, d, lanes), lambda g, i, j: (0, 0, g), **once),
        pl.BlockSpec((2, 1, lanes), lambda g, i, j: (0, 0, g)),
        *([pl.BlockSpec((rows, tiles.queries), lambda g, i, j: (0, j))] if static.distance else []),
    ]
    of = {
        "mean": ((rows, padded), (rows, tiles.queries), lambda g, i, j: (g, i, 0, j)),
        "row": ((tiles.heads, rows), (tiles.heads, rows), lambda g, i, j: (g, i, 0, 0)),
        "distance": ((tiles.heads, padded), (tiles.heads, tiles.queries), lambda g, i, j: (g, i, 0, j)),
    }
    asked = {name: of[name] for name in Statistics._fields if getattr(static, name)}
    maps = static.num_heads * t * (t if static.mean or static.distance else 1)
    found = call(
        lambda *refs: _kernel(*refs, static=static),
        launch=static.launch.within(tiles.needs),
        name="attention_statistics",
        grid=(groups, images, steps),
        in_specs=in_specs,
        out_specs=[pl.BlockSpec((1, 1, *block), index) for _, block, index in asked.values()],
        out_shapes=[((groups, images, *shape), F32) for shape, _, _ in asked.values()],
        semantics=("parallel", "parallel", "arbitrary"),
        cost=pl.CostEstimate(
            flops=2 * images * (2 * t * d * static.num_heads * static.width + maps * static.width),
            transcendentals=images * maps,
            bytes_accessed=images * groups * t * d * x.dtype.itemsize + 2 * d * w.shape[2] * w.dtype.itemsize,
        ),
        scratch=[pltpu.VMEM(shape, F32) for shape in ((pl.cdiv(d, LANES), rows, LANES), (max(padded, rows), lanes), (rows, lanes))],
    )(x, *norm, w, b, *([distances] if static.distance else []))
    return dict(zip(asked, found, strict=True))


def attention_statistics(
    x, weights: AttentionWeights, *, num_heads, mean=False, row=False, distances=None, eps=EPS, launch: Launch
) -> Statistics:
    """Statistics of a block's attention by one kernel, as `statistics.attention_statistics` (arguments and meaning there).

    launch: from `kernels.launch`. ValueError for shapes or dtypes that do not fit together; NotImplementedError for a shape that no
    tiles fit.
    """
    check(x, weights, num_heads=num_heads, mean=mean, row=row, distances=distances)
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"attention_statistics: x is {x.dtype}; the kernel takes float32 or bfloat16")
    b, t, d = x.shape
    width = weights.qkv_kernel.shape[2] // num_heads
    chosen = tiles(Shape(b, t, d, num_heads, width, jnp.dtype(x.dtype)), launch.device, mean=mean, distance=distances is not None)
    static = Static(
        tiles=chosen, tokens=t, num_heads=num_heads, width=width, dtype=jnp.dtype(x.dtype), mean=mean, row=row,
        distance=distances is not None, eps=float(eps), launch=launch,
    )  # fmt: skip
    w = _padded_heads(weights.qkv_kernel, static).astype(operand_dtype(x.dtype, launch.device))
    bias = _padded_heads(weights.qkv_bias, static)[:, None].astype(F32)
    norm = weights.norm_scale[None].astype(F32), weights.norm_bias[None].astype(F32)
    if distances is not None:
        distances = jnp.asarray(distances, F32).T
        distances = jnp.pad(distances, ((0, chosen.rows - t), (0, round_up(t, chosen.queries) - t)))
    arrays = vary_alike(x, *norm, w, bias, *([] if distances is None else [distances]))
    x, *rest = map(lax.stop_gradient, arrays)
    found = _launch(x, rest[:2], rest[2], rest[3], rest[4] if distances is not None else None, static)
    return _results(found, static)


def _results(found: dict, static: Static) -> Statistics:
    """The kernel's arrays in the order of the tokens, groups of heads together."""
    t, out = static.tokens, {}
    if static.mean:
        means = found["mean"].sum(0) if found["mean"].shape[0] > 1 else found["mean"][0]
        out["mean"] = means[:, :t, :t].swapaxes(1, 2)
    if static.row:
        rows = found["row"].swapaxes(0, 1)
        out["row"] = rows.reshape(rows.shape[0], static.num_heads, -1)[..., :t]
    if static.distance:
        sums = found["distance"][..., :t].sum(-1) / t
        out["distance"] = sums.swapaxes(0, 1).reshape(-1, static.num_heads)
    return Statistics(**out)
