"""What stands behind rendered people: photos with nobody in them, or plain gradients where there are none."""

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from training.data import Picture, read_pictures

Float32 = npt.NDArray[np.float32]


def read_backgrounds(file: Path | None) -> list[Picture]:
    """The pictures of a COCO file, still encoded; none for None. Raises DataError."""
    return [] if file is None else list(read_pictures(file))


def background(photos: list[Picture], height: int, width: int, rng: np.random.Generator) -> Float32:
    """A random part of a random photo [height, width, 3] (BGR, 0…1), mirrored or not. Raises DataError."""
    if not photos:
        ends = rng.uniform(0, 1, (2, 1, 3))
        ramp = np.linspace(0, 1, height)[:, None, None]
        return np.array(np.broadcast_to(ends[0] + ramp * (ends[1] - ends[0]), (height, width, 3)), np.float32)
    pixels = photos[rng.integers(len(photos))].pixels()
    share = rng.uniform(0.5, 1.0)
    scale = min(pixels.shape[0] / height, pixels.shape[1] / width) * share
    h, w = max(1, int(height * scale)), max(1, int(width * scale))
    top, left = rng.integers(pixels.shape[0] - h + 1), rng.integers(pixels.shape[1] - w + 1)
    part = cv2.resize(pixels[top : top + h, left : left + w], (width, height), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.5:
        part = part[:, ::-1]
    return np.ascontiguousarray(part, np.float32) / np.float32(255)
