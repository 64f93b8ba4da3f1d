"""Attention on float32 rows in VMEM, for TPU v2 and v3."""
