"""Every random choice of the pipeline, as pure functions of what it is keyed by: seed, epoch, example.

The order of an epoch is one permutation per (seed, epoch), from numpy's Philox. The draws of an augmentation come from
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) written over arrays: one call gives the
draws of a whole batch, each row what its example would get alone, at 0.5 us an example; an object of numpy's own generators
for each would take 9 us, more than all the rest of a digit. Both are fixed by published algorithms, so a run resumes under
another numpy.
"""

from functools import lru_cache
from threading import Lock

import numpy as np

AUGMENT, SUBSET, RANGE, REPLACE, MIXUP, MIXUP_BATCH, SHOTS = range(7)  # streams: what the draws are for

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: tuple, key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Ten rounds of Philox4x32. counter: four uint64 arrays that hold 32-bit values and broadcast. Returns four such arrays."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> _SHIFT) ^ c1 ^ np.uint64(k0), b & _LOW, (a >> _SHIFT) ^ c3 ^ np.uint64(k1), a & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniforms(seed: int, epoch: np.ndarray, index: np.ndarray, count: int, stream: int = AUGMENT) -> np.ndarray:
    """float64 [K, count] in [0, 1): row i holds the draws of (seed, epoch[i], index[i]) and of nothing else.

    epoch, index: int [K], each below 2**32. count: columns wanted; more columns never change the first ones.
    """
    index, epoch = np.asarray(index, np.uint64)[:, None], np.asarray(epoch, np.uint64)[:, None]
    block = np.arange(-(-count // 4), dtype=np.uint64)[None, :]
    words = philox4x32((block, index, epoch, np.uint64(stream)), (seed & 0xFFFFFFFF, seed >> 32))
    return np.stack(words, axis=-1).reshape(len(index), -1)[:, :count] * 2.0**-32


def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """int32 [length]: the permutation in which `epoch` visits the examples. Kept, not recomputed: 0.2 s for a million.

    grain's index_shuffle is the same thing without the memory, but takes 17 us per index on a set of 1437 (102 us by way of
    MapDataset.shuffle) where a digit's whole batch has to be ready in a few ms.
    """
    with _ORDERS:
        return _order(length, seed, epoch)


_ORDERS = Lock()  # the readers come to a new epoch together; one of them makes its order, the others wait for it


@lru_cache(maxsize=4)  # a batch may straddle epochs, and readers run ahead
def _order(length: int, seed: int, epoch: int) -> np.ndarray:
    keys = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(length)
    order = np.argsort(keys, kind="stable").astype(np.int32)
    order.flags.writeable = False
    return order


def random_subset(length: int, count: int, seed: int) -> np.ndarray:
    """int [count], ascending: a random subset of range(length). With one seed, a smaller subset lies inside every larger one."""
    rank = uniforms(seed, np.zeros(length), np.arange(length), 1, SUBSET)[:, 0]
    return np.sort(np.argsort(rank, kind="stable")[:count])


def replacements(length: int, seed: int, index: int) -> np.ndarray:
    """int [16]: the places, in the order in which to try them, of what may stand in for the example at place `index`."""
    row = uniforms(seed, np.array([0]), np.array([index]), 16, REPLACE)[0]
    return (row * length).astype(np.int64)
