"""How a call is timed: warm-up, synchronised samples, median and spread; the rise of throughput over batch sizes."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_SAMPLE = 0.02  # seconds: shorter calls are timed several at once
_MOST = 200  # samples
SLOW = 3  # samples of a call longer than the time for all
RISE = 1.02  # a batch size counts as faster from here on
PATIENCE = 2  # batch sizes in a row that are not, and the sweep is over


class Stepper:
    """A step at one batch size. `run` does one and waits for it; `used`: its bytes where the library knows them beforehand."""

    def __init__(self, run: Callable[[], None], used: int = 0):
        self.run, self.used = run, used


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call: median over the samples; spread: (90th - 10th percentile) / median; samples of `calls` each."""

    median: float
    spread: float
    samples: int
    calls: int


def measure(call: Callable[[], None], *, seconds: float, least: int = 5, warmup: int = 2) -> Timing:
    """Times `call`, which returns when its work is done, for `seconds` and at least `least` samples after `warmup` calls.

    Calls longer than `seconds` are warmed up once and sampled SLOW times: what noise adds to them is short beside them.
    """
    for _ in range(warmup):
        started = time.perf_counter()
        call()
        if time.perf_counter() - started > seconds:
            break
    started = time.perf_counter()
    call()
    once = time.perf_counter() - started
    if once > seconds:
        samples, calls, least = [once], 1, min(least, SLOW)
    else:
        samples, calls = [], max(1, round(_SAMPLE / max(once, 1e-9)))
    until = time.perf_counter() + seconds
    while len(samples) < least or (once <= seconds and time.perf_counter() < until and len(samples) < _MOST):
        started = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - started) / calls)
    return summary(samples, calls)


def predicted(call: float, *, seconds: float) -> float:
    """Seconds that `measure` will take, its warm-up with it, of a call of `call` seconds."""
    return (1 + SLOW) * call if call > seconds else seconds + 5 * call


def summary(samples: list[float], calls: int = 1) -> Timing:
    """Median and spread of seconds."""
    ordered = sorted(samples)
    median = statistics.median(ordered)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return Timing(median=median, spread=(high - low) / median, samples=len(ordered), calls=calls)


def still_rising(rates: Iterable[float]) -> bool:
    """Whether a sweep that has seen these images/s should go on: not once PATIENCE batch sizes in a row brought no RISE."""
    best, idle = 0.0, 0
    for rate in rates:
        idle = 0 if rate > RISE * best else idle + 1
        best = max(best, rate)
    return idle < PATIENCE
