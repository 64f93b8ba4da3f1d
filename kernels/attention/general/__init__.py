"""Attention on the other TPUs, and where rows do not fit."""
