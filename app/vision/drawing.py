"""Skeletons drawn on a picture, and the picture as a file."""

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from app.vision.people import visible

UInt8 = npt.NDArray[np.uint8]

_LEFT, _RIGHT, _MIDDLE = (255, 140, 50), (30, 130, 255), (80, 200, 80)  # BGR; the colour-blind, too, tell left from right


def draw_people(
    picture: UInt8,
    keypoints: npt.NDArray[np.float64],
    skeleton: Sequence[tuple[int, int]],
    names: Sequence[str],
    threshold: float,
) -> None:
    """Draw on picture [H, W, 3] (BGR) the joints of keypoints [N, K, 3] (x, y, score) at or over the threshold.

    `skeleton` pairs joints, counted from 1. The person's left is blue, the right orange, what joins them green.
    """
    limit = 8 * max(picture.shape)  # OpenCV takes 32-bit coordinates
    for person in keypoints:
        places = [(int(x), int(y)) for x, y in np.rint(np.clip(person[:, :2], -limit, limit))]
        seen = visible(person, threshold)
        if not seen.any():
            continue
        extent = np.ptp(person[seen, :2], axis=0).max()
        thickness = int(np.clip(extent / 100, 1, 12))
        for first, second in skeleton:
            if seen[first - 1] and seen[second - 1]:
                colour = _colour(names[first - 1], names[second - 1])
                cv2.line(picture, places[first - 1], places[second - 1], colour, thickness, cv2.LINE_AA)
        for joint in np.flatnonzero(seen).tolist():
            cv2.circle(picture, places[joint], thickness + 1, (255, 255, 255), cv2.FILLED, cv2.LINE_AA)
            rim = max(1, thickness // 3)  # a pixel is not seen on large photos
            cv2.circle(picture, places[joint], thickness + 1, _colour(names[joint], names[joint]), rim, cv2.LINE_AA)


def draw_numbers(picture: UInt8, boxes: npt.NDArray[np.float64], numbers: Sequence[int]) -> None:
    """Write on picture [H, W, 3] (BGR) the number of each of the boxes [N, 4] (x, y, width, height) over its top."""
    size = max(picture.shape) / 1200
    thick = max(1, round(2 * size))
    height, width = picture.shape[:2]
    for (x, y, box_width, _), number in zip(boxes.tolist(), numbers, strict=True):
        (wide, high), _ = cv2.getTextSize(str(number), cv2.FONT_HERSHEY_SIMPLEX, size, thick)
        left = x + (box_width - wide) / 2
        place = int(np.clip(left, 0, max(0, width - wide))), int(np.clip(y, high, height))
        for colour, rim in (((0, 0, 0), 2 * thick), ((255, 255, 255), 0)):
            cv2.putText(picture, str(number), place, cv2.FONT_HERSHEY_SIMPLEX, size, colour, thick + rim, cv2.LINE_AA)


def encode(picture: UInt8, extension: str) -> bytes:
    """A picture as a file of the kind that `extension` names: .jpg, .png or .bmp."""
    written, data = cv2.imencode(extension, picture)
    if not written:
        raise ValueError(f"OpenCV did not write a {extension} file of {picture.shape}")
    return data.tobytes()


def _colour(first: str, second: str) -> tuple[int, int, int]:
    if first.startswith("left") and second.startswith("left"):
        return _LEFT
    if first.startswith("right") and second.startswith("right"):
        return _RIGHT
    return _MIDDLE
