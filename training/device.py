"""Crops made on the device that trains: all pixels lie there, and drawn changes are done in PyTorch for a whole batch.

The same changes as training/augment.py does by OpenCV, one person at a time; JPEG is imitated by rounding the cosine
coefficients of blocks. Runs on any device; it pays on an accelerator.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from training.augment import Changes, Colours
from training.data import People
from training.schedule import Members

_CHUNK = 1 << 28  # bytes that are copied to the device at a time
# The luminance table of JPEG (ITU-T T.81, table K.1).
_QUANTISATION = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ResidentPeople:
    """All crops of several sets on one device: pixels [P, 3], and of each person the first, the crop's height and width."""

    pixels: Tensor
    firsts: Tensor
    heights: Tensor
    widths: Tensor
    starts: npt.NDArray[np.int64]  # number of the first person of each set

    def numbers(self, members: Members) -> Tensor:
        """The numbers [N] of people (set, index) among all."""
        numbers = [self.starts[which] + index for which, index in members]
        return torch.tensor(numbers, device=self.pixels.device)


def resident(sets: list[People], device: torch.device) -> ResidentPeople:
    """Bring all pixels of the sets to the device."""
    ends = np.cumsum([people.offsets[-1] for people in sets])
    flat = torch.empty(int(ends[-1]), dtype=torch.uint8, device=device)
    for people, end in zip(sets, ends, strict=True):
        begin = int(end - people.offsets[-1])
        for start in range(0, int(people.offsets[-1]), _CHUNK):
            piece = torch.from_numpy(np.array(people.pixels[start : min(start + _CHUNK, int(people.offsets[-1]))]))
            flat[begin + start : begin + start + len(piece)] = piece.to(device)
    firsts = [(people.offsets[:-1] + end - people.offsets[-1]) // 3 for people, end in zip(sets, ends, strict=True)]
    starts = np.cumsum([0, *(len(people) for people in sets)])[:-1]
    first_pixels, heights, widths = (
        torch.from_numpy(np.concatenate(each)).to(device)
        for each in (firsts, [people.heights for people in sets], [people.widths for people in sets])
    )
    return ResidentPeople(flat.view(-1, 3), first_pixels, heights, widths, starts)


def changed_crops(people: ResidentPeople, members: Members, changes: Changes) -> Tensor:
    """The crops [N, H, W, 3] of `members`, float32 0…255."""
    device = people.pixels.device
    numbers, size = people.numbers(members), (changes.height, changes.width)

    def there(values: npt.NDArray[np.floating] | npt.NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(values).to(device, torch.float32)[:, None, None]

    rows, columns = (torch.arange(length, device=device, dtype=torch.float32) for length in size)
    rows = rows[:, None]
    crops = recoloured(*warped(people, numbers, changes.affines, size), changes.colours, np.arange(len(numbers)))
    x1, y1, x2, y2 = there(np.rint(changes.frames)).unbind(3)
    crops *= ((columns >= x1) & (columns < x2) & (rows >= y1) & (rows < y2))[..., None]
    some = np.flatnonzero(changes.donors >= 0)
    if len(some):
        of_donors = numbers[torch.from_numpy(changes.donors[some]).to(device)]
        donors = recoloured(*warped(people, of_donors, changes.donor_affines[some], size), changes.colours, some)
        x, y, across, down = there(changes.ellipses[some]).unbind(3)
        inside = ((columns - x) / across) ** 2 + ((rows - y) / down) ** 2 <= 1
        chosen = torch.from_numpy(some).to(device)
        crops[chosen] = torch.where(inside[..., None], donors, crops[chosen])
    x1, y1, x2, y2 = there(np.rint(changes.rectangles)).unbind(3)
    covered = (columns >= x1) & (columns < x2) & (rows >= y1) & (rows < y2)
    crops = torch.where(covered[..., None], there(np.trunc(changes.rectangle_colours)), crops)
    maps = crops.permute(0, 3, 1, 2)
    for change, amounts in ((_reduced, changes.reductions), (_blurred, changes.blurs), (_as_jpeg, changes.jpeg_qualities)):
        some = np.flatnonzero(amounts)
        if len(some):
            chosen = torch.from_numpy(some).to(device)
            maps[chosen] = change(maps[chosen], amounts[some])
    return maps.permute(0, 2, 3, 1)


def recoloured(crops: Tensor, shown: Tensor, colours: Colours, rows: npt.NDArray[np.intp]) -> Tensor:
    """Crops [N, H, W, 3] in the colours of those rows; they stay black so far as nothing is `shown` [N, H, W]."""
    gains, offsets, grey = (
        torch.from_numpy(each[rows]).to(crops)[:, None, None] for each in (colours.gains, colours.offsets, colours.grey)
    )
    luminance = crops @ torch.tensor([0.114, 0.587, 0.299], device=crops.device)  # of BGR
    crops = torch.where(grey[..., None] > 0, luminance[..., None], crops)
    shown = shown[..., None]
    return (crops * gains + shown * (128 - 128 * gains + offsets[..., None])).clamp(0, 255)


def warped(
    people: ResidentPeople, numbers: Tensor, affines: npt.NDArray[np.float64], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """People [N] through affines [N, 2, 3] from their cached crops, bilinear, black outside: [N, H, W, 3] float32; and how
    much of each place they fill [N, H, W], 0…1."""
    device = numbers.device
    back = np.linalg.inv(affines[:, :, :2])
    origin = -(back @ affines[:, :, 2:])
    inverse = torch.from_numpy(np.concatenate([back, origin], axis=2)).to(device, torch.float32)
    rows, columns = (torch.arange(length, device=device, dtype=torch.float32) for length in size)
    x, y = (
        inverse[:, i, 0, None, None] * columns + inverse[:, i, 1, None, None] * rows[:, None] + inverse[:, i, 2, None, None]
        for i in (0, 1)
    )
    first, height, width = (each[numbers][:, None, None] for each in (people.firsts, people.heights, people.widths))
    left, top = x.floor(), y.floor()
    crops, shown = torch.zeros((*x.shape, 3), device=device), torch.zeros(x.shape, device=device)
    for down in (0, 1):
        for right in (0, 1):
            column, row = left.long() + right, top.long() + down
            seen = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            share = (1 - (x - left - right).abs()) * (1 - (y - top - down).abs()) * seen
            place = first + row.clamp_min(0).minimum(height - 1) * width + column.clamp_min(0).minimum(width - 1)
            crops += share[..., None] * people.pixels[place]
            shown += share
    return crops, shown


def _reduced(maps: Tensor, factors: npt.NDArray[Any]) -> Tensor:
    """Reduced by whole factors [N] and enlarged again."""
    height, width = maps.shape[2:]
    for factor in np.unique(factors).tolist():
        some = torch.from_numpy(np.flatnonzero(factors == factor)).to(maps.device)
        small = functional.interpolate(maps[some], (height // factor, width // factor), mode="area")
        maps[some] = functional.interpolate(small, (height, width), mode="bilinear", align_corners=False)
    return maps


def _blurred(maps: Tensor, deviations: npt.NDArray[Any]) -> Tensor:
    """By Gaussians of deviations [N] in windows of 7 × 7, mirrored at the edges."""
    steps = torch.arange(-3, 4, device=maps.device)
    kernels = torch.exp(-(steps**2) / (2 * torch.from_numpy(deviations).to(maps)[:, None] ** 2))
    kernels = (kernels / kernels.sum(1, keepdim=True))[:, :, None, None, None]
    for axis in (2, 3):
        padding = (3, 3, 0, 0) if axis == 3 else (0, 0, 3, 3)
        padded = functional.pad(maps, padding, mode="reflect")
        maps = sum((kernels[:, i] * padded.narrow(axis, i, maps.shape[axis]) for i in range(7)), torch.zeros_like(maps))
    return maps


def _as_jpeg(maps: Tensor, qualities: npt.NDArray[Any]) -> Tensor:
    """Each channel's blocks of 8 × 8 with their cosine coefficients rounded as JPEG of that quality does."""
    frequency, place = torch.arange(8.0)[:, None], torch.arange(8.0)[None]
    cosines = torch.cos((2 * place + 1) * frequency * torch.pi / 16) / 2
    cosines[0] /= 2**0.5
    cosines = cosines.to(maps.device)
    scales = np.where(qualities < 50, 50 / qualities, 2 - qualities / 50)
    steps = (torch.tensor(_QUANTISATION) * torch.from_numpy(scales)[:, None, None]).clamp_min(1).to(maps)
    n, channels, height, width = maps.shape
    blocks = maps.reshape(n, channels, height // 8, 8, width // 8, 8).transpose(3, 4) - 128
    coefficients = cosines @ blocks @ cosines.T
    steps = steps[:, None, None, None]
    blocks = cosines.T @ ((coefficients / steps).round() * steps) @ cosines
    return (blocks + 128).transpose(3, 4).reshape(maps.shape).clamp(0, 255)
