"""What picture threads make of one picture: an overview for the detector, then crops of its people.

It is decoded as small as a stage can do with, and no longer after the request's deadline.
"""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.inference.detector import Detector, Letterbox
from app.inference.pose import Crops, PoseModel
from app.vision import box, detection, image

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
UInt8 = npt.NDArray[np.uint8]

_KEPT_PIXELS = 1_000_000  # of a picture that is kept while the detector works; 3 MB


@dataclass(frozen=True, slots=True)
class Overview:
    """A picture for the detector, decoded `reduction` times smaller; `picture` is its pixels where they are kept."""

    header: image.Header
    letterbox: Letterbox
    picture: UInt8 | None
    reduction: int
    decode_seconds: float
    letterbox_seconds: float


@dataclass(frozen=True, slots=True)
class Found:
    """The people [N, 5] (x1, y1, x2, y2, score) that the detector found in a letterbox of that gain, and the overview's
    header, kept picture and its reduction."""

    people: Float32
    gain: float
    header: image.Header
    picture: UInt8 | None
    reduction: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """A decoded picture's size, its people's boxes and crops, and the seconds that decoding and cutting took."""

    width: int
    height: int
    boxes: Float64
    box_scores: Float64
    found: bool  # by the detector
    crops: Crops
    decode_seconds: float
    crop_seconds: float


def overview(data: bytes, detector: Detector, most_pixels: int, keep: bool) -> Overview:
    """Decode a picture of so many pixels at most, as small as the detector can do with, and letterbox it. `keep` its pixels
    if they are few. Raises InvalidImage, ImageTooLarge and MemoryError."""
    started = time.perf_counter()
    header = image.read_header(data)
    reduction = image.reduction(header, max(header.width, header.height) / detector.side)
    picture = image.decode(data, most_pixels, reduction, header)
    decoded = time.perf_counter()
    letterbox = detector.letterbox(picture, reduction)
    kept = picture if keep and picture.shape[0] * picture.shape[1] <= _KEPT_PIXELS else None
    return Overview(header, letterbox, kept, reduction, decoded - started, time.perf_counter() - decoded)


def prepare(
    data: bytes, boxes: Float64 | None, found: Found | None, model: PoseModel, most_pixels: int, deadline: float
) -> Prepared:
    """Decode a picture and cut out its people, boxed or found. Raises InvalidImage, ImageTooLarge, InvalidBox, MemoryError,
    and TimeoutError before a decoding after the deadline."""
    started = time.perf_counter()
    if found is not None:
        boxes = _found_boxes(found, np.inf, np.inf)[0]
    if boxes is None:
        raise AssertionError("a picture without boxes was not searched")
    pictures, reductions, (width, height) = _for_crops(data, model.most_reductions(boxes), found, most_pixels, deadline)
    if found is None:
        box.check_boxes(boxes, width, height)
    decoded = time.perf_counter()
    scores = np.ones(len(boxes))
    if found is not None:
        boxes, inside = _found_boxes(found, width, height)
        boxes, scores = boxes[inside], found.people[inside, 4].astype(np.float64)
        reductions = [times for times, kept in zip(reductions, inside, strict=True) if kept]
    crops = model.cut_each(pictures.__getitem__, boxes, reductions)
    cut = time.perf_counter()
    return Prepared(width, height, boxes, scores, found is not None, crops, decoded - started, cut - decoded)


def _for_crops(
    data: bytes, most: list[float], found: Found | None, most_pixels: int, deadline: float
) -> tuple[dict[int, UInt8], list[int], tuple[int, int]]:
    """A picture's decodings by their reduction, the reduction that each person is cut from, which is its own of `most` at
    most, and the whole picture's width and height.

    Each one's own size decides, so that nobody's joints depend on who else is asked for. Found people are cut from what
    the detector saw, where it suffices. Raises InvalidImage, ImageTooLarge, and TimeoutError before a decoding after the
    deadline: event loops go by time.monotonic().
    """
    header = found.header if found else image.read_header(data)
    searched = found.reduction if found else np.inf
    reductions = [image.crop_reduction(header, min(each, searched)) for each in most]
    pictures = {}
    for times in sorted(set(reductions)) or [image.crop_reduction(header, searched)]:
        if found is not None and found.picture is not None and found.reduction == times:
            pictures[times] = found.picture
        elif time.monotonic() > deadline:
            raise TimeoutError
        else:
            pictures[times] = image.decode(data, most_pixels, times, header)
    return pictures, reductions, image.upright_size(pictures[times], header, times)


def _found_boxes(found: Found, width: float, height: float) -> tuple[Float64, npt.NDArray[np.bool_]]:
    """Boxes [N, 4] of found people in a picture of that size, and which of them lie on it, not in the letterbox's rim."""
    boxes = detection.to_picture(found.people[:, :4], found.gain, width, height)
    return boxes, detection.on_picture(boxes)
