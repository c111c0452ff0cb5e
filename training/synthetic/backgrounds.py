"""What stands behind rendered people: photos with nobody in them, what others show beside their people, or gradients."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from training.data import Picture, read_pictures
from training.files import DataError

UInt8 = npt.NDArray[np.uint8]

_TRIES = 25  # to find a part of a photo that shows nobody
_LONGEST = 480  # pixels of a photo's longer side that are kept


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo [H, W, 3] (BGR) and the boxes [N, 4] (left, top, right, bottom) of people in it."""

    pixels: UInt8
    people: npt.NDArray[np.float64]


def read_photos(files: list[Path]) -> list[Photo]:
    """The photos of COCO files, without those whose people are not surely all boxed. Raises DataError."""
    photos = [
        _photo(picture)
        for file in files
        for picture in read_pictures(file)
        if picture.image.get("persons_complete", not picture.annotations)
        and not any(each.get("iscrowd", 0) for each in picture.annotations)
    ]
    if files and not photos:
        raise DataError(f"{files[0]} holds no photo of nobody, and none whose people are all boxed (persons_complete)")
    return photos


def _photo(picture: Picture) -> Photo:
    pixels = picture.pixels()
    boxes = np.array([each["bbox"] for each in picture.annotations], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    factor = min(1.0, _LONGEST / max(pixels.shape[:2]))
    if factor < 1:
        pixels = np.asarray(cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA), np.uint8)
    return Photo(pixels, boxes * factor)


def background(photos: list[Photo], height: int, width: int, rng: np.random.Generator) -> UInt8:
    """A random part of a random photo [height, width, 3] (BGR), mirrored or not, or a gradient where none shows nobody."""
    for _ in range(_TRIES if photos else 0):
        photo = photos[rng.integers(len(photos))]
        # Nearly as much of the photo as fits: a smaller part, enlarged, would be less sharp than the people before it.
        scale = min(photo.pixels.shape[0] / height, photo.pixels.shape[1] / width) * rng.uniform(0.8, 1.0)
        h, w = max(1, int(height * scale)), max(1, int(width * scale))
        top, left = rng.integers(photo.pixels.shape[0] - h + 1), rng.integers(photo.pixels.shape[1] - w + 1)
        if ((photo.people[:, :2] < [left + w, top + h]) & (photo.people[:, 2:] > [left, top])).all(1).any():
            continue
        part = cv2.resize(photo.pixels[top : top + h, left : left + w], (width, height), interpolation=cv2.INTER_LINEAR)
        return np.ascontiguousarray(part[:, ::-1] if rng.random() < 0.5 else part, np.uint8)
    ends = rng.uniform(0, 255, (2, 1, 3))
    ramp = np.linspace(0, 1, height)[:, None, None]
    return np.array(np.broadcast_to(ends[0] + ramp * (ends[1] - ends[0]), (height, width, 3)), np.uint8)
