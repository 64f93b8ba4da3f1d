"""Resident weights of the MLP's kernels that come to VMEM a hidden tile at a time, while the first row tile is worked on.

As blocks of the grid both matrices would be waited for as a whole before the first step: 9.4 MB of ViT-B/16, 10 thousand cycles of
v6e in either kernel. Where the products take another dtype than the weights have, a tile is rounded as it arrives, and the next one
is fetched meanwhile: XLA's pass that rounds the weights of all layers, 28 MB a layer at the memory's rate, is then not needed.

For one core a device: of two that share a grid, the second would begin behind the first row tile.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.mlp.plan import Tiling


def scratch(t: Tiling, d: int, f: int, given: jnp.dtype, operand: jnp.dtype) -> list:
    """VMEM of both matrices, the semaphores of their copies and, if they are rounded, of a hidden tile of both; nothing where they
    are blocks of the grid. given: the weights' dtype."""
    if not t.roomy:
        return []
    tile = [pltpu.VMEM((d, t.hidden), given), pltpu.VMEM((t.hidden, d), given)] if given != operand else []
    return [pltpu.VMEM((d, f), operand), pltpu.VMEM((f, d), operand), pltpu.SemaphoreType.DMA((f // t.hidden, 2)), *tile]


class Arriving:
    """W1 [D, F] and W2 [F, D]. `begin` once a step, before all else; `ready` before the step's products. hbm: both; memory: what
    `scratch` asked for; i, j: the row tile and the hidden tile."""

    def __init__(self, hbm, memory, t: Tiling, i, j):
        self.hbm, self.near, self.semaphores, self.tile = hbm, memory[:2], memory[2], memory[3:]
        self.t, self.i, self.j, self.tiles = t, i, j, memory[2].shape[0]

    def _places(self, j):
        """Where the hidden tile j lies in both."""
        if self.tiles == 1:
            return ..., ...
        part = pl.ds(pl.multiple_of(j * self.t.hidden, self.t.hidden), self.t.hidden)
        return (slice(None), part), part

    def _copies(self, j):
        for k, place in enumerate(self._places(j)):
            into = self.tile[k] if self.tile else self.near[k].at[place]
            yield pltpu.make_async_copy(self.hbm[k].at[place], into, self.semaphores.at[j, k])

    def _start(self, j):
        for copy in self._copies(j):
            copy.start()

    def begin(self):
        @pl.when((self.i == 0) & (self.j == 0))
        def _():
            for j in range(1 if self.tile else self.tiles):
                self._start(j)

    def ready(self):
        @pl.when(self.i == 0)
        def _():
            for copy in self._copies(self.j):
                copy.wait()
            for near, tile, place in zip(self.near, self.tile, self._places(self.j), strict=False):
                near[place] = tile[...].astype(near.dtype)

        if self.tile and self.tiles > 1:
            pl.when((self.i == 0) & (self.j + 1 < self.tiles))(lambda: self._start(self.j + 1))
