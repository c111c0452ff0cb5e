"""A z-buffer for many small triangles: the same PyTorch code on a CPU and on an accelerator.

Each triangle tests the pixels of a square window around it, taken together by the sizes of their windows; large triangles are
cut into tiles first, and tiles beside them dropped. The nearest triangle of a pixel is found by one minimum over depth and
number packed in 64 bits, so that the result does not depend on any order.
"""

import torch
from torch import Tensor

NEAR = 0.1  # metres; triangles with a corner nearer than that are left out
_WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16)
_TILE = 16
_TESTS_AT_ONCE = {"cpu": 250_000}  # more do not fit into a core's cache; elsewhere 16 million
_EDGE = 1e-5  # of a weight: rounding opens no gaps between neighbours
_STEPS_PER_METRE = 20_000  # of depth
_NOTHING = torch.iinfo(torch.int64).max


def rasterise(
    points: Tensor, triangles: Tensor, image: Tensor, size: tuple[int, int, int], closed: Tensor
) -> tuple[Tensor, Tensor]:
    """The nearest triangle and its depth at each pixel centre of N images of one size (N, height, width).

    points [P, 3] (x and y in pixels, 0 being the centre of the first; depth in metres), triangles [T, 3] of images [T] →
    numbers of triangles [N, H, W], -1 where there is none, and depths [N, H, W] in metres, infinite there. Of triangles that
    are closed [T] only the front is drawn, where the corners go counter-clockwise.
    """
    count, height, width = size
    nearest = torch.full((count * height * width,), _NOTHING, device=points.device)
    at_once = _TESTS_AT_ONCE.get(points.device.type, 16_000_000)
    corners = points[triangles]  # [T, 3, 3]
    low, high = corners[..., :2].amin(1).ceil().clamp(min=0), corners[..., :2].amax(1).floor()
    high = torch.minimum(high, high.new_tensor([width - 1, height - 1]))
    area = _doubled_area(corners)
    front = (area < 0) | ~closed  # y points down
    drawn = (high >= low).all(1) & (corners[..., 2].amin(1) > NEAR) & (area.abs() > 1e-9) & front
    numbers = torch.nonzero(drawn)[:, 0]
    planes, low = _planes(corners[numbers], area[numbers]), low[numbers]
    spans = (high[numbers] - low + 1).amax(1)
    smaller = 0
    for window in _WINDOWS:
        chosen = torch.nonzero((spans > smaller) & (spans <= window))[:, 0]
        smaller = window
        for part in torch.split(chosen, max(1, at_once // window**2)):
            _draw(planes[part], low[part], numbers[part], image[numbers[part]], window, size, nearest)
    large = torch.nonzero(spans > smaller)[:, 0]
    which, corner = _tiles(planes[large], low[large], high[numbers[large]])
    chosen = large[which]
    for part in torch.split(torch.arange(len(chosen), device=points.device), at_once // _TILE**2):
        triangle = numbers[chosen[part]]
        _draw(planes[chosen[part]], corner[part], triangle, image[triangle], _TILE, size, nearest)
    nothing = nearest == _NOTHING
    depths = torch.where(nothing, torch.inf, (nearest >> 32).float() / _STEPS_PER_METRE)
    return torch.where(nothing, -1, nearest & 0xFFFFFFFF).view(size), depths.view(size)


def barycentric(corners: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Weights [M, 3] of the corners [M, 3, 3] (pixels, depth) at the pixels x, y [M], right in perspective."""
    dx, dy, at_corner = _planes(corners, _doubled_area(corners))[:, :2].unbind(2)
    x0, y0 = corners[:, 0, 0], corners[:, 0, 1]
    second, third = (dx * (x - x0)[:, None] + dy * (y - y0)[:, None] + at_corner).unbind(1)
    inverse = torch.stack([1 - second - third, second, third], 1) / corners[..., 2]
    return inverse / inverse.sum(1, keepdim=True)


def _doubled_area(corners: Tensor) -> Tensor:
    a, b, c = corners[..., :2].unbind(1)
    return (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])


def _planes(corners: Tensor, area: Tensor) -> Tensor:
    """What is linear in a picture, as its slopes along x and y and its value at the first corner.

    [T, 5, 3]: the weights of the second and third corners, one over the depth, and the first corner's own x and y.
    """
    a, b, c = corners.unbind(1)
    second = torch.stack([c[:, 1] - a[:, 1], a[:, 0] - c[:, 0], 0 * area], 1) / area[:, None]
    third = torch.stack([a[:, 1] - b[:, 1], b[:, 0] - a[:, 0], 0 * area], 1) / area[:, None]
    near, over_b, over_c = 1 / a[:, 2], 1 / b[:, 2], 1 / c[:, 2]
    inverse = second * (over_b - near)[:, None] + third * (over_c - near)[:, None]
    inverse[:, 2] = near
    zero = torch.zeros_like(second)
    x, y = zero.clone(), zero.clone()
    x[:, 2], y[:, 2] = a[:, 0], a[:, 1]
    return torch.stack([second, third, inverse, x, y], 1)


def _tiles(planes: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The tiles of _TILE² pixels that large triangles [L] touch: which triangle [K], and the tile's first pixel [K, 2]."""
    across = ((high - low) / _TILE).floor().long() + 1
    counts = across.prod(1)
    which = torch.repeat_interleave(torch.arange(len(planes), device=low.device), counts)
    place = torch.arange(len(which), device=low.device) - (counts.cumsum(0) - counts)[which]
    columns = across[which, 0]
    first = low[which] + _TILE * torch.stack([place % columns, place // columns], 1)
    # A weight is largest in one of the tile's corners; the tile is beside the triangle if one is negative there.
    centre = first + (_TILE - 1) / 2
    values = _at(planes[which], centre[:, 0], centre[:, 1])[:, :2]
    slopes = planes[which, :2, :2]
    reach = (_TILE - 1) / 2
    values = torch.cat([values, 1 - values.sum(1, keepdim=True)], 1)
    slopes = torch.cat([slopes, -slopes.sum(1, keepdim=True)], 1)
    touched = (values + reach * slopes.abs().sum(2) >= -1e-4).all(1)
    return which[touched], first[touched]


def _at(planes: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The first three of planes [M, 5, 3] at the places x, y [M]: [M, 3]."""
    dx, dy = x - planes[:, 3, 2], y - planes[:, 4, 2]
    return planes[:, :3, 0] * dx[:, None] + planes[:, :3, 1] * dy[:, None] + planes[:, :3, 2]


def _draw(
    planes: Tensor, low: Tensor, numbers: Tensor, image: Tensor, window: int, size: tuple[int, int, int], nearest: Tensor
) -> None:
    """Bring the pixels of windows from `low` [M, 2] on into the buffer, where they are nearer than what is there."""
    steps = torch.arange(window, device=planes.device, dtype=planes.dtype)
    start = _at(planes, low[:, 0], low[:, 1])
    columns = planes[:, :2, 0, None] * steps
    rows = planes[:, :2, 1, None] * steps + start[:, :2, None]
    second = rows[:, 0, :, None] + columns[:, 0, None, :]
    third = rows[:, 1, :, None] + columns[:, 1, None, :]
    triangle, row, column = torch.nonzero(
        (second >= -_EDGE) & (third >= -_EDGE) & (second + third <= 1 + _EDGE), as_tuple=True
    )
    inverse = start[triangle, 2] + planes[triangle, 2, 0] * column + planes[triangle, 2, 1] * row
    x, y = low[triangle, 0].long() + column, low[triangle, 1].long() + row
    inside = (x < size[2]) & (y < size[1])  # windows may reach beyond the picture
    packed = ((_STEPS_PER_METRE / inverse).long() << 32) | numbers[triangle]
    place = (image[triangle] * size[1] + y) * size[2] + x
    nearest.scatter_reduce_(0, place[inside], packed[inside], "amin")
