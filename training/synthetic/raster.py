"""A z-buffer for many small triangles: the same PyTorch code on a CPU and on an accelerator.

Each triangle tests the pixels of a square window around it; triangles are taken together by the size of their windows. The
nearest triangle of a pixel is found by one minimum over depth and number packed in 64 bits, so that the result does not
depend on any order.
"""

import torch
from torch import Tensor

NEAR = 0.1  # metres; triangles with a corner nearer than that are left out
_WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_TESTS_AT_ONCE = 4_000_000
_STEPS_PER_METRE = 20_000  # of depth
_NOTHING = torch.iinfo(torch.int64).max


def rasterise(points: Tensor, triangles: Tensor, image: Tensor, size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The nearest triangle and its depth at each pixel centre of N images of one size (N, height, width).

    points [P, 3] (x and y in pixels, 0 being the centre of the first; depth in metres), triangles [T, 3], image [T] → numbers
    of triangles [N, H, W], -1 where there is none, and depths [N, H, W] in metres, infinite there.
    """
    count, height, width = size
    nearest = torch.full((count * height * width,), _NOTHING, device=points.device)
    corners = points[triangles]  # [T, 3, 3]
    low = corners[..., :2].amin(1).ceil().clamp(min=0)
    high = corners[..., :2].amax(1).floor()
    high = torch.minimum(high, high.new_tensor([width - 1, height - 1]))
    spans = (high - low + 1).amax(1)
    area = _doubled_area(corners)
    drawn = (high >= low).all(1) & (corners[..., 2].amin(1) > NEAR) & (area.abs() > 1e-9)
    smaller = 0
    for window in _WINDOWS:
        chosen = torch.nonzero(drawn & (spans > smaller) & (spans <= window))[:, 0]
        smaller = window
        for part in torch.split(chosen, max(1, _TESTS_AT_ONCE // window**2)):
            _draw(corners[part], area[part], low[part], high[part], part, image[part], window, size, nearest)
    nothing = nearest == _NOTHING
    numbers = torch.where(nothing, -1, nearest & 0xFFFFFFFF)
    depths = torch.where(nothing, torch.inf, (nearest >> 32).float() / _STEPS_PER_METRE)
    return numbers.view(size), depths.view(size)


def barycentric(corners: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Weights [M, 3] of the corners [M, 3, 3] (pixels, depth) at the pixels x, y [M], right in perspective."""
    inverse = _weights(corners, _doubled_area(corners), x[:, None], y[:, None])[:, 0] / corners[..., 2]
    return inverse / inverse.sum(1, keepdim=True)


def _draw(
    corners: Tensor,
    area: Tensor,
    low: Tensor,
    high: Tensor,
    numbers: Tensor,
    image: Tensor,
    window: int,
    size: tuple[int, int, int],
    nearest: Tensor,
) -> None:
    steps = torch.arange(window, device=corners.device)
    x = (low[:, :1, None] + steps[None, None, :]).expand(-1, window, -1).flatten(1)
    y = (low[:, 1:, None] + steps[None, :, None]).expand(-1, -1, window).flatten(1)
    weights = _weights(corners, area, x, y)
    inside = (weights >= 0).all(2) & (x <= high[:, :1]) & (y <= high[:, 1:])
    depth = 1 / (weights / corners[:, None, :, 2]).sum(2)
    packed = ((depth * _STEPS_PER_METRE).long() << 32) | numbers[:, None]
    place = (image[:, None] * size[1] + y.long()) * size[2] + x.long()
    nearest.scatter_reduce_(0, place[inside], packed[inside], "amin")


def _doubled_area(corners: Tensor) -> Tensor:
    a, b, c = corners[..., :2].unbind(1)
    return (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])


def _weights(corners: Tensor, area: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Shares [M, S, 3] of the triangles' areas across each corner at the places x, y [M, S]; none negative inside."""
    found = []
    for first, second in ((1, 2), (2, 0)):
        a, b = corners[:, first, None, :2].unbind(2), corners[:, second, None, :2].unbind(2)
        found.append(((b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])) / area[:, None])
    return torch.stack([*found, 1 - found[0] - found[1]], 2)
