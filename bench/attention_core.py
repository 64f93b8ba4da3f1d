"""The attention core alone on the Hopper GPU that is present: our kernels beside cuDNN's.

    python -m bench.attention_core                                          ViT-B/16 at 224 pixels, 128 images
    python -m bench.attention_core --tokens 257 --heads 16 --width 80       ViT-H/14

A line is a pass: microseconds of a call among many in a row, by the wall, which has what a launch costs, or of its kernels by the
card's own clock (CUPTI). Calls of both take turns, medians count. cuDNN's backward pass takes even numbers of tokens only: it is
given a row more where they are odd, masked, as `kernels/attention/gpu.py` does.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from kernels.attention.gpu import TOKENS
from kernels.attention.hopper.plan import HEADS, longest, not_hopper
from kernels.attention.library import attend

TURNS = 5
CALLS = 20  # of a turn


def passes(by: str, tokens: int) -> dict[str, Callable]:
    """Functions of (q, k, v, g): the result; the result and the three gradients for that of the result."""
    core: Callable = partial(attend, tokens=tokens, by="cudnn")
    if by == "ours":
        from kernels.attention.hopper.forward import attention  # Mosaic GPU takes a third of a second to import

        core = partial(attention, tokens=tokens)

    def both(q, k, v, g):
        o, pull = jax.vjp(core, q, k, v)
        return o, pull(g)

    return {"forward": lambda q, k, v, g: core(q, k, v), "forward + backward": both}


def arrays(by: str, batch: int, tokens: int, heads: int, width: int) -> list[jax.Array]:
    """q, k, v and the result's gradient, zero in the rows that cuDNN is given besides."""
    more = 0 if by == "ours" else -tokens % TOKENS
    keys = jax.random.split(jax.random.key(0), 4)
    some = [jax.random.normal(key, (batch, tokens, heads, width), jnp.bfloat16) for key in keys]
    return [jnp.pad(a, ((0, 0), (0, more), (0, 0), (0, 0))) for a in some]


def by_the_wall(run: Callable, given: list[jax.Array]) -> float:
    """Microseconds of a call among CALLS in a row."""
    jax.block_until_ready(run(*given))
    began = time.perf_counter()
    jax.block_until_ready([run(*given) for _ in range(CALLS)])
    return (time.perf_counter() - began) / CALLS * 1e6


def by_the_card(run: Callable, given: list[jax.Array]) -> float:
    """Microseconds of the kernels of a call."""
    from jax.experimental.mosaic.gpu import profiler

    _, milliseconds = profiler.measure(run)(*given)
    if milliseconds is None:
        raise RuntimeError("CUPTI saw no kernel: is another profiler attached to this process?")
    return float(milliseconds) * 1e3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.attention_core", description="Our attention core beside cuDNN's")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64, choices=HEADS, help="of a head")
    args = parser.parse_args(argv)
    if min(args.batch, args.tokens, args.heads) < 1 or args.tokens > longest(args.width):
        parser.error(f"--batch and --heads from 1, --tokens from 1 to {longest(args.width)}, which shared memory holds")
    if (why := not_hopper()) is not None:
        print(f"bench.attention_core: {why}: nothing of ours would run", file=sys.stderr)
        return 2
    print(f"{jax.devices()[0].device_kind}, {args.batch} x {args.tokens} x {args.heads} x {args.width}, bfloat16; microseconds")
    runs = {}
    for by in ("ours", "cuDNN"):
        given = arrays(by, args.batch, args.tokens, args.heads, args.width)
        for what, f in passes(by, args.tokens).items():
            runs[what, by] = jax.jit(f).lower(*given).compile(), given
    for title, clock in (("a call among many in a row", by_the_wall), ("its kernels", by_the_card)):
        turns = [{key: clock(*run) for key, run in runs.items()} for _ in range(TURNS)]
        for what, by in sorted(runs):
            print(f"{what:<20}{by:<7}{title:<28}{statistics.median(turn[what, by] for turn in turns):>8.1f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
