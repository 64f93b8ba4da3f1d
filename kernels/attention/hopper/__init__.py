"""Attention on Hopper GPUs, by Mosaic GPU."""
