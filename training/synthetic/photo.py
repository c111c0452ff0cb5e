"""Drawn scenes → photographs: backgrounds, then what a camera does (few pixels, defocus, exposure, noise, JPEG)."""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from training.synthetic.render import HELD, NOBODY, Drawn

UInt8 = npt.NDArray[np.uint8]

OVERSAMPLED = 2  # pixels drawn for one of the picture, in both directions


@dataclass(frozen=True, slots=True)
class Shot:
    """What is done to one picture."""

    reduction: float  # of its sides, before it is enlarged again; 1: none
    blur: float  # standard deviation in pixels; 0: none
    gamma: float
    gain: float
    noise: float  # standard deviation, of 1
    noise_seed: int
    jpeg: int  # quality; 0: none


def random_shot(rng: np.random.Generator) -> Shot:
    """A shot; most change little."""
    return Shot(
        reduction=float(rng.uniform(0.35, 0.8)) if rng.random() < 0.2 else 1.0,
        blur=float(rng.uniform(0.4, 1.4)) if rng.random() < 0.3 else 0.0,
        gamma=float(rng.uniform(0.65, 1.3)),
        gain=float(rng.uniform(0.75, 1.2)),
        noise=float(rng.uniform(0, 0.03)),
        noise_seed=int(rng.integers(1 << 31)),
        jpeg=int(rng.integers(30, 95)) if rng.random() < 0.5 else 0,
    )


def photographs(drawn: Drawn, behind: list[UInt8], before: list[UInt8], shots: list[Shot]) -> list[UInt8]:
    """Pictures [H, W, 3] (BGR) of scenes that were drawn OVERSAMPLED times as large.

    `behind` and `before` [H, W, 3] are the photos that backgrounds and held things are parts of.
    """
    device = drawn.colours.device
    colours = _reduced(drawn.colours.permute(0, 3, 1, 2))
    open_view = _reduced(((drawn.owner == NOBODY) * drawn.shadow)[:, None])
    held = _reduced((drawn.owner == HELD).float()[:, None])
    pictures = colours + open_view * _planes(behind, device) + held * _planes(before, device)
    made = torch.cat([_shot(picture[None], shot) for picture, shot in zip(pictures, shots, strict=True)])
    pixels = (made * 255).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [_compressed(each, shot.jpeg) for each, shot in zip(pixels, shots, strict=True)]


def _reduced(planes: Tensor) -> Tensor:
    return functional.avg_pool2d(planes, OVERSAMPLED)


def _planes(pictures: list[UInt8], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2) / 255


def _shot(picture: Tensor, shot: Shot) -> Tensor:
    """One picture [1, 3, H, W]."""
    if shot.reduction < 1:
        size = picture.shape[2:]
        small = [max(8, round(side * shot.reduction)) for side in size]
        picture = functional.interpolate(picture, small, mode="bilinear", antialias=True)
        picture = functional.interpolate(picture, size, mode="bilinear", align_corners=False)
    if shot.blur:
        picture = _blurred(picture, shot.blur)
    generator = torch.Generator(picture.device).manual_seed(shot.noise_seed)
    noise = torch.randn(picture.shape, generator=generator, device=picture.device)
    return picture.clamp(0, 1) ** shot.gamma * shot.gain + shot.noise * noise


def _blurred(picture: Tensor, sigma: float) -> Tensor:
    reach = int(np.ceil(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=picture.device) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1, 1)  # [3, 1, 1, K]
    padded = functional.pad(picture, (reach, reach, reach, reach), mode="replicate")
    across = functional.conv2d(padded, kernel, groups=3)
    return functional.conv2d(across, kernel.transpose(2, 3), groups=3)


def _compressed(pixels: UInt8, quality: int) -> UInt8:
    if not quality:
        return pixels
    data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)
