"""What picture threads make of one picture: an overview for the detector, then crops of its people.

It is decoded as small as a stage can do with, and no longer after the request's deadline.
"""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.inference.detector import Detector
from app.inference.pose import Crops, PoseModel
from app.vision import box, detection, image

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
UInt8 = npt.NDArray[np.uint8]

_KEPT_PIXELS = 1_000_000  # of a picture that is kept while the detector works; 3 MB


@dataclass(frozen=True, slots=True)
class Overview:
    """What is known of a picture that was decoded `reduction` times smaller for the detector; `gain` is letterbox pixels per
    pixel of the whole, and `picture` its pixels where they are kept."""

    header: image.Header
    gain: float
    picture: UInt8 | None
    reduction: int
    decode_seconds: float
    letterbox_seconds: float


@dataclass(frozen=True, slots=True)
class Found:
    """The people [N, 5] (x1, y1, x2, y2, score) that the detector found in the letterbox of an overview."""

    people: Float32
    overview: Overview


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


def is_heavy(data: bytes) -> bool:
    """Whether a file may be a WebP whose pixels or alpha are lossless. libwebp may need 1.7 GB for one, whatever its pixels,
    which is not known before it is decoded."""
    kind = data[12:16] if data.startswith(b"RIFF") else b""
    return kind == b"VP8L" or (kind == b"VP8X" and (b"VP8L" in data or b"ALPH" in data))


def overview(data: bytes, detector: Detector, most_pixels: int, keep: bool) -> tuple[Overview, UInt8]:
    """Decode a picture of so many pixels at most, as small as the detector can do with, and letterbox it, [h, w, 3]. `keep`
    its pixels if they are few. Raises InvalidImage, ImageTooLarge and MemoryError."""
    started = time.perf_counter()
    header = image.read_header(data)
    reduction = image.reduction(header, max(header.width, header.height) / detector.side)
    picture = image.decode(data, most_pixels, reduction, header)
    decoded = time.perf_counter()
    letterbox, gain = detector.letterbox(picture, reduction)
    kept = picture if keep and picture.shape[0] * picture.shape[1] <= _KEPT_PIXELS else None
    return Overview(header, gain, kept, reduction, decoded - started, time.perf_counter() - decoded), letterbox


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
    most, seen = model.most_reductions(boxes), found.overview if found else None
    pictures, reductions, (width, height) = _for_crops(data, most, seen, most_pixels, deadline)
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
    data: bytes, most: list[float], seen: Overview | None, most_pixels: int, deadline: float
) -> tuple[dict[int, UInt8], list[int], tuple[int, int]]:
    """A picture's decodings by their reduction, the reduction that each person is cut from, which is its own of `most` at
    most, and the whole picture's width and height.

    Each one's own size decides, so that nobody's joints depend on who else is asked for. Found people are cut from what
    the detector saw, where it suffices. Raises InvalidImage, ImageTooLarge, and TimeoutError before a decoding after the
    deadline: event loops go by time.monotonic().
    """
    header = seen.header if seen else image.read_header(data)
    searched = seen.reduction if seen else np.inf
    reductions = [image.crop_reduction(header, min(each, searched)) for each in most]
    pictures = {}
    for times in sorted(set(reductions)) or [image.crop_reduction(header, searched)]:
        if seen is not None and seen.picture is not None and seen.reduction == times:
            pictures[times] = seen.picture
        elif time.monotonic() > deadline:
            raise TimeoutError
        else:
            pictures[times] = image.decode(data, most_pixels, times, header)
    return pictures, reductions, image.upright_size(pictures[times], header, times)


def _found_boxes(found: Found, width: float, height: float) -> tuple[Float64, npt.NDArray[np.bool_]]:
    """Boxes [N, 4] of found people in a picture of that size, and which of them lie on it, not in the letterbox's rim."""
    boxes = detection.to_picture(found.people[:, :4], found.overview.gain, width, height)
    return boxes, detection.on_picture(boxes)
