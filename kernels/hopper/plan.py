"""Which products the Hopper kernel (`product.py`) takes, and with which tiles: plain numbers."""

from dataclasses import dataclass

DEEP = 64  # of K at a time: 128 bytes of bfloat16, the widest swizzle of shared memory


@dataclass(frozen=True)
class Tiles:
    """rows, columns: of a tile of the result. stages: slices in shared memory at a time. cluster: blocks that share slices of w.
    alternate: the two warpgroups take whole tiles in turn, else the halves of one."""

    rows: int = 128
    columns: int = 128
    stages: int = 4
    cluster: int = 2
    alternate: bool = True
    slots: int = 2
