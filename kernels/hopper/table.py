"""The fastest tiles of each product that was tried, written by `python -m bench.tune --save` or found in whole models (LOG.md).

(kind of epilogue, K, N of one matrix of w) -> the fields of `plan.Tiles`: rows, columns, stages, cluster, alternate, given, made.
"""

CARD = "NVIDIA H100 80GB HBM3"
TABLE = {
    ("gelu", 768, 3072): (128, 192, 4, 2, True, 1, 4),
    ("kept", 768, 3072): (128, 192, 4, 2, True, 2, 4),
    ("residual", 768, 768): (128, 192, 4, 2, True, 2, 2),
    ("residual", 3072, 768): (128, 192, 4, 1, True, 2, 2),
    ("slope", 768, 3072): (128, 192, 4, 2, True, 2, 2),
    ("plain", 768, 768): (128, 192, 4, 1, True, 2, 4),
    ("plain", 2304, 768): (128, 192, 4, 1, True, 2, 4),
    ("gelu", 1024, 4096): (128, 128, 5, 2, True, 2, 4),
    ("kept", 1024, 4096): (128, 128, 5, 2, True, 2, 4),
    ("residual", 1024, 1024): (128, 128, 5, 1, True, 2, 2),
    ("residual", 4096, 1024): (128, 256, 4, 2, False, 0, 2),
    ("slope", 1024, 4096): (128, 128, 5, 2, True, 2, 2),
    ("plain", 1024, 1024): (128, 128, 5, 2, True, 2, 4),
    ("plain", 3072, 1024): (128, 256, 4, 2, False, 1, 2),
}
