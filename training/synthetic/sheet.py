"""A contact sheet of a labelled set, to see by eye that its labels are right.

`python -m training.synthetic.sheet rendered.json --out sheet.jpg`: the person's left is orange and the right blue; joints are
green where they are seen and red where they are hidden; boxes are yellow.
"""

import argparse
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from training.command import one_line_faults
from training.data import Picture, read_pictures
from training.files import DataError, write_whole
from training.keypoints import SKELETON

_COLUMNS, _ROWS, _SIDE = 6, 4, 240
_LEFT, _RIGHT, _SEEN, _HIDDEN, _BOX = (0, 140, 255), (255, 180, 0), (0, 200, 0), (0, 0, 255), (0, 255, 255)  # BGR


def tile(picture: Picture) -> npt.NDArray[np.uint8]:
    """A picture with its labels, reduced or enlarged to fit a white square [_SIDE, _SIDE, 3] (BGR)."""
    pixels = picture.pixels()
    scale = _SIDE / max(pixels.shape[:2])
    drawn = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    for person in picture.annotations:
        x, y, w, h = (np.array(person["bbox"]) * scale).astype(int).tolist()
        cv2.rectangle(drawn, (x, y), (x + w, y + h), _BOX, 1)
        joints = np.array(person.get("keypoints") or [0] * 51, np.float64).reshape(-1, 3)
        places = ((joints[:, :2] + 0.5) * scale - 0.5).round().astype(int).tolist()
        for a, b in SKELETON:
            if joints[a - 1, 2] and joints[b - 1, 2]:
                colour = _LEFT if a % 2 == 0 else _RIGHT  # counted from 1, joints of the left have even numbers
                cv2.line(drawn, places[a - 1], places[b - 1], colour, 1, cv2.LINE_AA)
        for place, seen in zip(places, joints[:, 2].tolist(), strict=True):
            if seen:
                cv2.circle(drawn, place, 2, _SEEN if seen == 2 else _HIDDEN, -1, cv2.LINE_AA)
    square = np.full((_SIDE, _SIDE, 3), 255, np.uint8)
    square[: drawn.shape[0], : drawn.shape[1]] = drawn[:_SIDE, :_SIDE]
    return square


def sheet(annotation_file: Path) -> bytes:
    """The first 24 pictures of a set in rows of six, as a JPEG file. Raises DataError."""
    tiles = [tile(picture) for picture in islice(read_pictures(annotation_file), _COLUMNS * _ROWS)]
    if not tiles:
        raise DataError(f"{annotation_file} holds no pictures")
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % _COLUMNS)
    rows = [np.hstack(tiles[start : start + _COLUMNS]) for start in range(0, len(tiles), _COLUMNS)]
    return cv2.imencode(".jpg", np.vstack(rows), [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.synthetic.sheet", description="Draw a set with its labels.")
    parser.add_argument("annotations", type=Path, help="a COCO keypoint file")
    parser.add_argument("--out", type=Path, required=True, help="the sheet, a .jpg")
    arguments = parser.parse_args()
    with one_line_faults():
        write_whole(arguments.out, sheet(arguments.annotations))


if __name__ == "__main__":
    main()
