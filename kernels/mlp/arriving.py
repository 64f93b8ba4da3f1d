"""Resident weights of the MLP's kernels that come to VMEM a hidden tile at a time, while the first row tile is worked on.

As blocks of the grid both matrices would be waited for as a whole before the first step: 9.4 MB of ViT-B/16, 10 thousand cycles of
v6e in either kernel. For one core a device: of two that share a grid, the second would begin behind the first row tile.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.mlp.plan import Tiling


def scratch(t: Tiling, d: int, f: int, operand: jnp.dtype) -> list:
    """VMEM of both matrices and the semaphores of their copies; nothing where they are blocks of the grid."""
    if not t.roomy:
        return []
    return [pltpu.VMEM((d, f), operand), pltpu.VMEM((f, d), operand), pltpu.SemaphoreType.DMA((f // t.hidden, 2))]


class Arriving:
    """W1 [D, F] and W2 [F, D]. `begin` once a step, before all else; `ready` before the step's products. hbm, vmem: of both; i, j:
    the row tile and the hidden tile."""

    def __init__(self, hbm, vmem, semaphores, t: Tiling, i, j):
        self.hbm, self.vmem, self.semaphores, self.t, self.i, self.j = hbm, vmem, semaphores, t, i, j

    def _copies(self, j):
        part = pl.ds(pl.multiple_of(j * self.t.hidden, self.t.hidden), self.t.hidden)
        if self.t.hidden == self.vmem[1].shape[0]:
            places: list = [...] * 2
        else:
            places = [(slice(None), part), part]
        for k, (place, hbm, vmem) in enumerate(zip(places, self.hbm, self.vmem, strict=True)):
            yield pltpu.make_async_copy(hbm.at[place], vmem.at[place], self.semaphores.at[j, k])

    def begin(self):
        @pl.when((self.i == 0) & (self.j == 0))
        def _():
            for j in range(self.semaphores.shape[0]):
                for copy in self._copies(j):
                    copy.start()

    def ready(self):
        @pl.when(self.i == 0)
        def _():
            for copy in self._copies(self.j):
                copy.wait()
