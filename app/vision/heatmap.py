"""From heatmaps to keypoints: Beta-Soft-Argmax, its score, the quarter shift, the flip test, and what tells the error.

Numerically the reference's (zhang943/lpn-pytorch, lib/core/inference.py and function.py), vectorised over crops and joints;
Beta-Soft-Argmax in a window and what tells the error are ours.
"""

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


def soft_argmax(heatmaps: Float32, beta: float) -> Float32:
    """Heatmaps [N, K, H, W] → places [N, K, 2] (x, y) in cells: the mean place under softmax(beta · heatmap) over the map."""
    n, k, height, width = heatmaps.shape
    weights = heatmaps.reshape(n, k, height * width) * np.float32(beta)
    weights -= weights.max(axis=2, keepdims=True)
    np.exp(weights, out=weights)
    weights = weights.reshape(n, k, height, width)
    columns, rows = weights.sum(axis=2), weights.sum(axis=3)
    total = rows.sum(axis=2)
    x = columns @ np.arange(width, dtype=np.float32) / total
    y = rows @ np.arange(height, dtype=np.float32) / total
    return np.stack([x, y], axis=2)


def soft_argmax_in_window(heatmaps: Float32, beta: float, window: int) -> Float32:
    """As `soft_argmax`, over the square of `window` (odd) cells about the highest cell, as far as it lies on the map.

    Far cells do not count, so that a lower beta can weigh the near ones: places between cells, where the whole map needs
    a beta that makes nearly an argmax of it.
    """
    n, k, height, width = heatmaps.shape
    cells = argmax(heatmaps).astype(np.intp)[..., None] + np.arange(-(window // 2), window // 2 + 1)
    x, y = cells[:, :, 0], cells[:, :, 1]
    crop, joint = (index[..., None, None] for index in np.ogrid[:n, :k])
    near = heatmaps[crop, joint, np.clip(y, 0, height - 1)[..., None], np.clip(x, 0, width - 1)[:, :, None]]
    weights = np.exp(np.float32(beta) * (near - near.max(axis=(2, 3), keepdims=True)))
    weights *= ((y >= 0) & (y < height))[..., None] & ((x >= 0) & (x < width))[:, :, None]
    columns, rows = weights.sum(axis=2), weights.sum(axis=3)
    places = np.stack([(columns * x).sum(axis=2), (rows * y).sum(axis=2)], axis=2) / rows.sum(axis=2)[..., None]
    return np.asarray(places, np.float32)


def argmax(heatmaps: Float32) -> Float32:
    """Heatmaps [N, K, H, W] → places [N, K, 2] (x, y) of the highest cells."""
    n, k, height, width = heatmaps.shape
    index = heatmaps.reshape(n, k, height * width).argmax(axis=2)
    return np.stack([index % width, index // width], axis=2).astype(np.float32)


def scores_at(heatmaps: Float32, places: Float32) -> Float32:
    """Heatmap values [N, K] at the cells nearest to places [N, K, 2] (half to even, as the reference rounds)."""
    x, y = np.moveaxis(np.rint(places).astype(np.intp), 2, 0)
    n, k = np.ogrid[: x.shape[0], : x.shape[1]]
    return np.asarray(heatmaps[n, k, y, x])


def quarter_shift(heatmaps: Float32, places: Float32) -> Float32:
    """Places [N, K, 2] moved a quarter cell towards the higher neighbour on each axis, except those in the first two rows or
    columns or the last, as in the reference."""
    height, width = heatmaps.shape[2:]
    x, y = np.moveaxis(np.floor(places + np.float32(0.5)).astype(np.intp), 2, 0)
    inside = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)
    x, y = np.where(inside, x, 1), np.where(inside, y, 1)
    n, k = np.ogrid[: x.shape[0], : x.shape[1]]
    slope = np.stack(
        [
            heatmaps[n, k, y, x + 1] - heatmaps[n, k, y, x - 1],
            heatmaps[n, k, y + 1, x] - heatmaps[n, k, y - 1, x],
        ],
        axis=2,
    )
    return np.asarray(places + np.float32(0.25) * np.sign(slope) * inside[..., None])


def decode(heatmaps: Float32, beta: float, shift: bool, window: int | None = None) -> Float32:
    """Heatmaps [N, K, H, W] → keypoints [N, K, 3]: x, y in cells, score. The score is read before the shift.

    Beta-Soft-Argmax over the whole map, or over `window` cells about the highest.
    """
    places = soft_argmax(heatmaps, beta) if window is None else soft_argmax_in_window(heatmaps, beta, window)
    scores = scores_at(heatmaps, places)
    if shift:
        places = quarter_shift(heatmaps, places)
    return np.concatenate([places, scores[..., None]], axis=2)


def spreads(heatmaps: Float32) -> Float32:
    """Heatmaps [N, K, H, W] → how far they spread [N, K], in cells: the deviation of places weighted by the squared map.

    Values below 0.0001 count as that: a map without any above it spreads evenly, and a very faint one widely. Every second
    cell is enough, at a quarter of the cost: what is sought is several peaks or a broad one.
    """
    weights = np.maximum(heatmaps[:, :, ::2, ::2], np.float32(1e-4))
    np.multiply(weights, weights, out=weights)
    columns, rows = weights.sum(axis=2), weights.sum(axis=3)
    total = rows.sum(axis=2)
    variance = np.zeros_like(total)
    for sums in (columns, rows):
        places = np.arange(0, 2 * sums.shape[2], 2, dtype=np.float32)
        variance += sums @ (places * places) / total - (sums @ places / total) ** 2
    return np.asarray(np.sqrt(np.maximum(variance, 0)))


def error_signs(heatmaps: Float32, scores: Float32) -> Float32:
    """What tells how far off joints may be, [N, K, 2]: the logarithms of their score [N, K] and of their map's spread."""
    low, near = np.float32(0.01), np.float32(0.5)
    return np.asarray(np.log(np.stack([np.maximum(scores, low), np.maximum(spreads(heatmaps), near)], axis=2)))


def expected_errors(signs: Float32, intercepts: Float32, weights: Float32) -> Float32:
    """Signs [N, K, 2] → expected distances [N, K] from the true places in cells, by intercepts [K] and weights [2]."""
    return np.asarray(np.exp(intercepts + signs @ weights))


def average_with_mirrored(heatmaps: Float32, mirrored: Float32, pairs: npt.NDArray[np.intp], shift: float) -> Float32:
    """Flip test: heatmaps [N, K, H, W] of the crops and of the mirrored crops → their mean.

    `pairs` [K] holds for each joint the joint that it becomes in a mirror. The maps, mirrored back, are moved `shift` cells
    to the right to lie on the others; column 0 stays where it was. The reference moves them by 1. Where cells are places of
    every fourth pixel it is 3/4: pixel x of 4W becomes 4W - 1 - x, whose cell is mirrored back to x / 4 - 3 / 4.
    """
    back = mirrored[:, pairs, :, ::-1]
    moved = back.copy()
    moved[..., 1:] = np.float32(shift) * back[..., :-1] + np.float32(1 - shift) * back[..., 1:]
    return (heatmaps + moved) * np.float32(0.5)
