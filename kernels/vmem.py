"""VMEM: how many bytes arrays take there, and the limit that a kernel gets. Plain arithmetic, for the plans of all ops.

A plan counts for each kernel what it needs: its blocks (two of each that is streamed, so that one is transferred while the other
is worked on), its scratch, and the temporaries that the compiler keeps beside them. The counts are estimates, checked by compiling:
how much of the VMEM a kernel may fill by its own count, so that what the compiler spills still fits, is a constant of its plan.
"""

from kernels.device import LANES, SUBLANES, Device, MiB


def round_up(n: int, to: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // to) * to


def padded_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes of an array in VMEM, whose last two axes are padded to whole tiles."""
    return round_up(rows, SUBLANES * (4 // itemsize)) * round_up(columns, LANES) * itemsize


def limit(device: Device, needs: int) -> int:
    """The limit of a kernel that needs about `needs` bytes by its plan.

    All of a small VMEM. Of a large one half as much again as the plan counts, 32 MiB at least: XLA keeps arrays in the rest, which
    is worth 3 to 6 % of a forward pass of ViT-B/16.
    """
    return min(device.vmem_bytes, max(32 * MiB, needs * 3 // 2))
