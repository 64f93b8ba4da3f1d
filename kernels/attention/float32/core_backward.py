"""The gradient of softmax attention on float32 rows, for v2 and v3: dq, dk, dv and o of q, k, v and do; `backward.py` has the rest.

It works on transposed logits, as `general/core_backward.py`. The heads of a grid step are unrolled. Where VMEM has no room for
their arrays twice, once for inputs and once for results, the results are written over what they are made of (`_Slots`).
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.float32.forward import ByColumns, gather, pack_into, pad_rows, unpack_into
from kernels.attention.general.core import core_cost
from kernels.attention.general.forward import Static
from kernels.attention.tiling import Float32Core, heads_of
from kernels.body import F32, PACKED_ROWS, dot, staggered
from kernels.device import LANES, SUBLANES
from kernels.float32_rows import token_at
from kernels.launch import Launch, call
from kernels.vmem import round_up


def _differentiate(lanes: int, width: int, lags, arrays, out, *, t: int, tokens: int, scale: float, dtype) -> None:
    """From q, k, v, do to dq, dk, dv (and o, with a fourth ref in `out`) of all heads; refs [R, lanes], do zero behind T.
    width: of a head. tokens: of the t rows, the first ones. lags: of `Float32Core`."""
    q, k, v, do = arrays
    rows = q.shape[0]
    # rows of keys that are all tokens, in whatever order the rows of their tile are
    keys, whole = round_up(rows, LANES), min(tokens // PACKED_ROWS * PACKED_ROWS if t > tokens else t // SUBLANES * SUBLANES, rows)
    queries, outputs = (ByColumns(lambda c, ref=ref: pad_rows(ref[:, c], keys)) for ref in (q, do))
    transposed_q, transposed_do = (ByColumns(lambda c, ref=ref: pad_rows(ref[:, c], keys).T) for ref in (q, do))
    sums: list[dict] = [{} for _ in out]
    heads, made = [head for run in heads_of(lanes, width) for head in run], {}

    def logits(n):
        head = heads[n]
        columns = slice(head.lo, head.hi)
        key, value = k[:, columns], v[:, columns]
        s, dp = dot(head.mask(key), transposed_q[head], dtype), dot(head.mask(value), transposed_do[head], dtype)
        made[n] = key, value, s, dp

    def softmax(n):
        key, value, s, dp = made[n]
        if whole < rows:
            row = whole + lax.broadcasted_iota(jnp.int32, (rows - whole, 1), 0)
            last = jnp.where(token_at(row, t, dtype) < tokens, s[whole:], -jnp.inf)
            s = jnp.concatenate([s[:whole], last]) if whole else last
        p = jnp.exp2((s - s.max(0, keepdims=True)) * (scale * math.log2(math.e)))
        p = p * (1.0 / p.sum(0, keepdims=True))
        made[n] = key, value, p, p * (dp - (p * dp).sum(0, keepdims=True))

    def gradients(n):
        head, (key, value, p, ds) = heads[n], made.pop(n)
        dk, dv = dot(ds, queries[head], dtype) * scale, dot(p, outputs[head], dtype)
        dq = dot(pad_rows(ds, keys).T[:rows], pad_rows(key, keys), dtype) * scale
        found = [dq, dk, dv]
        if len(out) == 4:
            found.append(dot(pad_rows(p, keys).T[:rows], pad_rows(value, keys), dtype))
        following = heads[n + 1].lo if n + 1 < len(heads) else lanes
        for ref, total, part in zip(out, sums, found, strict=True):
            gather(total, head, part)
            for lo, hi in [column for column in total if column[1] <= following]:
                ref[:, lo:hi] = total.pop((lo, hi))

    staggered(len(heads), (logits, softmax, gradients), lags)


def half_core(tiles: Float32Core, qkv, do, t: int, dtype, static: Static, *, with_o: bool):
    """dq, dk, dv (and o) of do and q, k, v, all [B, R, K] float32; the first t rows are tokens, and do is zero behind them. qkv may
    be one array [3, B, R, K], or [3, B, T, K] of any float dtype, whose rows become float32 in VMEM."""
    if tiles.shared:
        return _shared_core(tiles, qkv, do, t, dtype, static, with_o=with_o)
    b, padded, k = do.shape
    lanes, n, one = tiles.lanes, static.num_heads, not isinstance(qkv, (list, tuple))
    packed_rows = one and (qkv.dtype, qkv.shape[2]) != (F32, padded)

    def kernel(*refs):
        given = [ref.at[0, 0] if len(ref.shape) == 4 and not packed_rows else ref.at[0] for ref in refs[:4]]
        out = [ref.at[0] for ref in refs[4 : 4 + results]]
        if packed_rows:
            for ref, target in zip(given[:3], refs[4 + results :], strict=True):
                unpack_into(target, ref.at[0], t)
            given[:3] = refs[4 + results :]
        _differentiate(lanes, k // n, tiles.lags, given, out, t=t, tokens=static.tokens or t, scale=static.width**-0.5, dtype=dtype)

    rows = pl.BlockSpec((1, padded, lanes), lambda i, g: (i, 0, g))
    sections = [pl.BlockSpec((1, 1, t if packed_rows else padded, lanes), lambda i, g, c=c: (c, i, 0, g)) for c in range(3)]
    results = 3 + with_o
    flops, exponentials = 2 * (5 + with_o) * b * t * t * k, b * n * t * t
    return call(
        kernel,
        launch=static.launch,
        name="attention_core_backward",
        grid=(b, k // lanes),
        in_specs=[*(sections if one else [rows] * 3), rows],
        out_specs=[rows] * results,
        out_shapes=[((b, padded, k), F32)] * results,
        semantics=("parallel", "parallel"),
        cost=pl.CostEstimate(flops=flops, transcendentals=exponentials, bytes_accessed=4 * (4 + results) * b * padded * k),
        scratch=[pltpu.VMEM((padded, lanes), F32)] * (3 * packed_rows),
    )(*((qkv,) * 3 if one else qkv), do)


class _Slots:
    """q, k, v and do of three steps, [3, 4, R, lanes]: one is fetched, one worked on, and one, whose results lie over what they are
    made of, written back."""

    def __init__(self, given, out, slots, semaphores, lanes: int):
        self.given, self.out, self.slots, self.semaphores, self.lanes = given, out, slots, semaphores, lanes
        self.groups = pl.num_programs(1)
        self.step, self.steps = pl.program_id(0) * self.groups + pl.program_id(1), pl.num_programs(0) * self.groups

    def _copies(self, step, *, load: bool):
        slot, i = lax.rem(step, 3), lax.div(step, self.groups)
        columns = pl.ds(pl.multiple_of(lax.rem(step, self.groups) * self.lanes, LANES), self.lanes)
        for c, array in enumerate(self.given if load else self.out):
            hbm, vmem = array.at[i, :, columns], self.slots.at[slot, c]
            source, target = (hbm, vmem) if load else (vmem, hbm)
            yield pltpu.make_async_copy(source, target, self.semaphores.at[int(load), slot, c])

    def _start(self, step, *, load: bool):
        for copy in self._copies(step, load=load):
            copy.start()

    def _wait(self, step, *, load: bool):
        for copy in self._copies(step, load=load):
            copy.wait()

    def fetch(self):
        """This step's refs, full; the next step's are on their way."""
        pl.when(self.step == 0)(lambda: self._start(self.step, load=True))
        pl.when(self.step >= 2)(lambda: self._wait(self.step - 2, load=False))
        pl.when(self.step + 1 < self.steps)(lambda: self._start(self.step + 1, load=True))
        self._wait(self.step, load=True)
        return [self.slots.at[lax.rem(self.step, 3), c] for c in range(4)]

    def send(self):
        self._start(self.step, load=False)
        last = self.step + 1 == self.steps
        pl.when(last & (self.step >= 1))(lambda: self._wait(self.step - 1, load=False))
        pl.when(last)(lambda: self._wait(self.step, load=False))


def _shared_core(tiles: Float32Core, qkv, do, t: int, dtype, static: Static, *, with_o: bool):
    """`half_core` of float32 rows with `Float32Core.shared`."""
    b, padded, k = do.shape
    lanes, results, one = tiles.lanes, 3 + with_o, not isinstance(qkv, (list, tuple))
    inputs = [qkv, do] if one else [*qkv, do]

    def kernel(*refs):
        given = [*(refs[0].at[c] for c in range(3)), refs[1]] if one else refs[:4]
        *outputs, slots, semaphores = refs[len(inputs) :]
        slots = _Slots(given, outputs[:results], slots, semaphores, lanes)
        arrays = slots.fetch()
        _differentiate(
            lanes, k // static.num_heads, tiles.lags, arrays, arrays[:results], t=t, tokens=static.tokens or t,
            scale=static.width**-0.5, dtype=dtype,
        )  # fmt: skip
        slots.send()

    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    flops, exponentials = 2 * (5 + with_o) * b * t * t * k, b * static.num_heads * t * t
    return call(
        kernel,
        launch=static.launch,
        name="attention_core_backward",
        grid=(b, k // lanes),
        in_specs=[in_hbm] * len(inputs),
        out_specs=[in_hbm] * results,
        out_shapes=[((b, padded, k), F32)] * results,
        semantics=("arbitrary", "arbitrary"),
        cost=pl.CostEstimate(flops=flops, transcendentals=exponentials, bytes_accessed=4 * (4 + results) * b * padded * k),
        scratch=[pltpu.VMEM((3, 4, padded, lanes), F32), pltpu.SemaphoreType.DMA((2, 3, 4))],
    )(*inputs)


def core(tiles: Float32Core, qkv, do, *, num_heads: int, width: int, launch: Launch):
    """dqkv of qkv [3, B, T, K] and do [B, T, K]: attention by itself, arrays of any float dtype, float32 in VMEM."""
    _, b, t, k = qkv.shape
    lanes, padded = tiles.lanes, round_up(t, SUBLANES)

    def kernel(q_ref, k_ref, v_ref, do_ref, out, *scratch):
        arrays, found = scratch[:4], scratch[4:]
        for ref, target in zip((q_ref.at[0, 0], k_ref.at[0, 0], v_ref.at[0, 0], do_ref.at[0]), arrays, strict=True):
            unpack_into(target, ref, t)
        _differentiate(lanes, k // num_heads, tiles.lags, arrays, found, t=t, tokens=t, scale=width**-0.5, dtype=qkv.dtype)
        for c, source in enumerate(found):
            pack_into(out.at[c, 0], source, t)

    section = [pl.BlockSpec((1, 1, t, lanes), lambda i, g, c=c: (c, i, 0, g)) for c in range(3)]
    return call(
        kernel,
        launch=launch,
        name="attention_core_backward",
        grid=(b, k // lanes),
        in_specs=[*section, pl.BlockSpec((1, t, lanes), lambda i, g: (i, 0, g))],
        out_specs=[pl.BlockSpec((3, 1, t, lanes), lambda i, g: (0, i, 0, g))],
        out_shapes=[(qkv.shape, qkv.dtype)],
        semantics=("parallel", "parallel"),
        cost=core_cost(b, t, k, num_heads, qkv.dtype.itemsize, backward=True),
        scratch=[pltpu.VMEM((padded, lanes), F32)] * 7,
    )(qkv, qkv, qkv, do)[0]
