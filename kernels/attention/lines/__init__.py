"""Attention along short lines with relative positions on queries, keys and values, what an AxialResNet is made of."""
