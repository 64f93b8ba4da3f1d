"""What a model has learned, as numbers: the functions behind the figures of `python -m vitcore.inspect` (paper, section 4.5, D.7).

The arrays that go in may be numpy's or JAX's; what comes out is numpy's, float32. `vitcore.attention_statistics` has the attention.
"""

import numpy as np


def token_distances(config) -> np.ndarray:
    """Distances [T, T] float32 between the centres of patches, in pixels of the model's input; zero to and from a class token and
    registers."""
    sides = [side / n for side, n in zip(config.image_shape, config.grid, strict=True)]
    places = np.indices(config.grid).reshape(2, -1).T * np.array(sides)  # [patches, 2]
    found = np.linalg.norm(places[:, None] - places[None], axis=-1)
    return np.pad(found, ((config.class_tokens, config.registers),) * 2).astype(np.float32)


def projection_filters(kernel, components: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """(filters [K, P, P, C], shares [K]): the principal components of a patch projection [P, P, C, D] (Fig. 7, left), the strongest
    first, K the smaller of `components` and what there are.

    The D columns are D observations of P*P*C variables, centred. A filter has norm 1, and the sign with which its largest
    value is positive; its share is the part of the variance that it holds. ValueError for another shape.
    """
    kernel = np.asarray(kernel, np.float64)
    if kernel.ndim != 4 or components < 1:
        raise ValueError(f"kernel {list(kernel.shape)}, components={components}: [P, P, C, D] and a positive number are required")
    columns = kernel.reshape(-1, kernel.shape[-1])
    left, values, _ = np.linalg.svd(columns - columns.mean(1, keepdims=True), full_matrices=False)
    left, values = left[:, :components], values**2
    largest = np.abs(left).argmax(0)
    left = left * np.where(left[largest, np.arange(left.shape[1])] < 0, -1.0, 1.0)
    shares = values[: left.shape[1]] / (values.sum() or 1.0)
    return left.T.reshape(-1, *kernel.shape[:3]).astype(np.float32), shares.astype(np.float32)


def position_similarity(position, grid: tuple[int, int], class_tokens: int = 0) -> np.ndarray:
    """Cosine similarities [rows, columns, rows, columns] of the position embeddings of patches, of a table [T, D] (Fig. 7, centre,
    and Fig. 10); the class token's is left out. A zero embedding is similar to nothing. ValueError for another shape."""
    position = np.asarray(position, np.float64)
    rows, columns = grid
    if position.ndim != 2 or position.shape[0] != class_tokens + rows * columns:
        raise ValueError(f"position {list(position.shape)}: [{class_tokens} + {rows} x {columns}, D] is required")
    patches = position[class_tokens:]
    norms = np.linalg.norm(patches, axis=1, keepdims=True)
    patches = patches / np.where(norms > 0, norms, 1.0)
    return (patches @ patches.T).reshape(rows, columns, rows, columns).astype(np.float32)


def attention_rollout(maps, *, class_tokens: int = 1) -> np.ndarray:
    """How much of each patch is in what the head reads, [B, patches], by the blocks' mean maps over their heads [L, B, T, T]
    (Figs. 6 and 14; Abnar and Zuidema 2020).

    Each map plus the identity, its rows renormalised to sum 1, times those of the blocks before it. Of the product the class
    token's row, or without a class token the mean of all rows; of that the patches, as they are. ValueError for another shape.
    """
    maps = np.asarray(maps, np.float64)
    if maps.ndim != 4 or maps.shape[2] != maps.shape[3] or not maps.size or not 0 <= class_tokens < maps.shape[2]:
        raise ValueError(f"maps {list(maps.shape)}, class_tokens={class_tokens}: [L, B, T, T] and fewer than T are required")
    product = np.broadcast_to(np.eye(maps.shape[2]), maps.shape[1:])
    for one in maps:
        mixed = one + np.eye(maps.shape[2])
        product = mixed / mixed.sum(-1, keepdims=True) @ product
    row = product[:, 0] if class_tokens else product.mean(1)
    return row[:, class_tokens:].astype(np.float32)
