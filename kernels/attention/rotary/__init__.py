"""Rotary positions: q and k turned by where their patch stands; `reference.py` is the specification."""

from kernels.attention.rotary.reference import Turn as Turn
