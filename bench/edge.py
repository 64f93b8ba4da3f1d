"""The largest batch that fits, in few attempts: bytes are nearly affine in the batch, so two attempts predict the edge and two more
prove it. Where the prediction fails, bisection.

An attempt is anybody's: a compilation for a TPU nobody has, or a process on a device that runs one step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_PREDICTED = 8  # attempts by prediction; bisection after these


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One batch tried. used, limit: bytes it takes and may take, 0 where that is not known. why: what failed, empty if it fits.

    used counts the same things in all attempts of a search: one whose bytes were counted otherwise leaves it 0.
    """

    batch: int
    fits: bool
    used: int = 0
    limit: int = 0
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Edge:
    """The outcome. batch: the largest that fits (0: none), beyond: the smallest tried that does not (0: none was found).

    beyond - batch is the step asked for, unless a limit on attempts or time came first; then `complete` is False.
    """

    batch: int
    beyond: int
    complete: bool
    attempts: tuple[Attempt, ...]

    @property
    def why(self) -> str:
        """What the smallest batch that does not fit failed on."""
        return next((a.why for a in self.attempts if a.batch == self.beyond), "")


def _predict(attempts: Sequence[Attempt]) -> int | None:
    """The batch whose bytes are the limit: on the line through the attempts on both sides of it, or through the two largest."""
    known = sorted({a.batch: a for a in attempts if a.used}.values(), key=lambda a: a.batch)
    limits = {not a.fits: a.limit for a in attempts if a.limit}  # one that did not fit was told the limit exactly
    limit = limits.get(True) or limits.get(False) or 0
    if len(known) < 2 or not limit:
        return None
    beyond = next((i for i, a in enumerate(known) if not a.fits), len(known) - 1)
    known = known[max(0, beyond - 1) :][:2] if beyond else known[:2]
    slope = (known[1].used - known[0].used) / (known[1].batch - known[0].batch)
    return int(known[1].batch + (limit - known[1].used) / slope) if slope > 0 else None


def default_step(batch: int) -> int:
    """The largest power of two that is at most a 64th of `batch`: the edge to within 1.6 %."""
    return 1 << max(0, (batch // 64).bit_length() - 1)


def search(
    attempt: Callable[[int], Attempt],
    *,
    start: int,
    known: Sequence[Attempt] = (),
    step: int | None = None,
    unit: int = 1,
    tries: int = 24,
    most: int = 2**31 - 1,
    in_time: Callable[[], bool] = lambda: True,
) -> Edge:
    """The largest multiple of `step` that fits, and the next one that does not.

    attempt: tries one batch. start: the first to try. known: attempts made already. step: how sharp; by default `default_step` of
    the batch first predicted, times `unit` (every batch is a multiple of it). tries, most, in_time: where to stop without a proof.
    """
    attempts = list(known)
    sharp = step * unit if step else 0
    width = 0  # of what lay between low and high when a prediction was last followed; one that did not halve it gives way once

    def align(batch: int) -> int:
        grain = sharp or unit
        return max(grain, batch // grain * grain)

    for count in range(tries):
        low = max((a.batch for a in attempts if a.fits), default=0)
        high = min((a.batch for a in attempts if not a.fits and a.batch > low), default=0)
        predicted = _predict(attempts) if count < _PREDICTED else None
        if not sharp and (predicted or high):
            sharp = default_step(min(predicted or high, most) // unit) * unit
        if high and (high - low <= (sharp or unit)):
            return Edge(batch=low, beyond=high, complete=True, attempts=tuple(attempts))
        if not in_time() or low >= most:
            break
        if predicted is not None and high:
            width, slow = high - low, 0 < width < 2 * (high - low)
            if slow or not low <= predicted < high:
                predicted, width = None, 0
        attempts.append(attempt(min(_next(low, high, predicted, start, sharp or unit, align), align(most))))
    low = max((a.batch for a in attempts if a.fits), default=0)
    high = min((a.batch for a in attempts if not a.fits and a.batch > low), default=0)
    return Edge(batch=low, beyond=high, complete=bool(high) and high - low <= (sharp or unit), attempts=tuple(attempts))


def _next(low: int, high: int, predicted: int | None, start: int, grain: int, align: Callable[[int], int]) -> int:
    """The batch to try next, a multiple of the grain strictly between low and high."""
    if not low and not high:
        return align(start)
    if predicted is not None:
        wanted = align(predicted)
    else:
        wanted = align((low + high) // 2) if high else 2 * low
    wanted = max(wanted, align(low) + grain if low else grain)
    return min(wanted, align(high - 1)) if high else wanted
