"""Whole photos with people's boxes, reduced and decoded once into a cache on disk that training draws from.

Boxes of crowds, and boxes that may be crowds (`iscrowd`; `iscrowd_unknown` without keypoints), are areas to be ignored:
neither people nor background. Photos in which not everyone is boxed (`persons_complete` false) are left out.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import numpy.typing as npt

from training.cache import Pictures, cached
from training.data import Picture, read_pictures
from training.files import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Photos(Pictures):
    """Whole photos. The boxes of photo i are rows first[i] to first[i + 1] of `boxes` [M, 4] and of `ignored` [M].

    A box is (x1, y1, x2, y2) in the reduced photo's pixels, 0 being the outer edge of the first.
    """

    first: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float32]
    ignored: npt.NDArray[np.bool_]

    def labels(self, index: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """The boxes [M, 4] of photo `index`, and which of them [M] are to be ignored."""
        rows = slice(self.first[index], self.first[index + 1])
        return self.boxes[rows], self.ignored[rows]


def cached_photos(annotation_file: Path, cache: Path, side: int) -> Photos:
    """The photos of a set with their longest side at most `side`; made on the first call, then mapped from disk.

    Raises DataError that names what cannot be read.
    """
    name = f"photos-{annotation_file.parent.name}-{annotation_file.stem}-{side}"
    return Photos(**cached(cache, name, annotation_file, lambda out: _write_photos(annotation_file, side, out)))


def is_ignored(annotation: dict[str, Any]) -> bool:
    """Whether a box is a crowd or may be one."""
    unknown = annotation.get("iscrowd_unknown", False) and annotation.get("num_keypoints", 0) == 0
    return bool(annotation.get("iscrowd", 0) or unknown)


def _write_photos(annotation_file: Path, side: int, out: BinaryIO) -> dict[str, Any]:
    heights, widths, offsets, first = [], [], [0], [0]
    boxes: list[npt.NDArray[np.float64]] = []
    ignored: list[bool] = []
    for number, picture in enumerate(read_pictures(annotation_file)):
        if not picture.image.get("persons_complete", True):
            continue
        pixels, places = _reduced(picture, side, smooth=number % 2 == 0)
        out.write(pixels.tobytes())
        heights.append(pixels.shape[0])
        widths.append(pixels.shape[1])
        offsets.append(offsets[-1] + pixels.size)
        boxes.append(places)
        ignored += [is_ignored(annotation) for annotation in picture.annotations]
        first.append(len(ignored))
    if not heights:
        raise DataError(f"{annotation_file} has no photo in which everyone is boxed")
    log.info("%s at %d: %d photos, %.1f GB", annotation_file.stem, side, len(heights), offsets[-1] / 1e9)
    return {
        "heights": np.array(heights, np.int64),
        "widths": np.array(widths, np.int64),
        "offsets": np.array(offsets, np.int64),
        "first": np.array(first, np.int64),
        "boxes": np.concatenate(boxes).astype(np.float32),
        "ignored": np.array(ignored, np.bool_),
    }


def _reduced(picture: Picture, side: int, smooth: bool) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """The photo with its longest side at most `side`, and its boxes [M, 4] in the new pixels.

    `smooth` averages pixels, as the service does below half of the size; otherwise they are sampled bilinearly. Training sees
    half of each.
    """
    pixels = picture.pixels()
    shape = np.array(pixels.shape[1::-1])
    new = np.maximum(1, np.rint(shape * min(1.0, side / shape.max()))).astype(int)
    if (new != shape).any():
        way = cv2.INTER_AREA if smooth else cv2.INTER_LINEAR
        pixels = np.asarray(cv2.resize(pixels, (int(new[0]), int(new[1])), interpolation=way), np.uint8)
    places = np.array([annotation["bbox"] for annotation in picture.annotations], np.float64).reshape(-1, 4)
    places[:, 2:] += places[:, :2]
    return pixels, places * np.tile(new / shape, 2)
