"""Geometry of person boxes: from COCO's [x, y, width, height] to the crop a network sees, and back.

Numerically the reference's (zhang943/lpn-pytorch, lib/dataset/coco.py and lib/utils/transforms.py), vectorised. Pixels of
the upright picture; (0, 0) is the centre of the top left pixel.
"""

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

PADDING = 1.25
_FARTHEST = 1_000_000
_PIXEL_STD = np.float32(200.0)  # the reference stores sizes in units of 200 pixels, as float32


class InvalidBox(Exception):
    """A box that shows nobody; `index` is its place among the boxes, the message says what is wrong with it."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


def check_boxes(boxes: Float64, width: int, height: int) -> None:
    """Raise InvalidBox for one of boxes [N, 4] that is not finite, has no area, is less than a pixel both ways, reaches
    beyond 1,000,000 pixels or misses the picture entirely."""
    x, y, w, h = boxes.T
    with np.errstate(invalid="ignore", over="ignore"):
        faults = (
            (~np.isfinite(boxes).all(axis=1), "must hold four finite numbers"),
            ((w <= 0) | (h <= 0), "must have a width and a height above 0"),
            ((w < 1) & (h < 1), "must be at least 1 pixel wide or high"),
            ((np.abs(boxes) > _FARTHEST).any(axis=1), f"must not reach beyond {_FARTHEST:,} pixels"),
            (
                (x + w <= -0.5) | (y + h <= -0.5) | (x >= width - 0.5) | (y >= height - 0.5),
                f"misses the picture of {width} × {height} pixels",
            ),
        )
    for faulty, message in faults:
        if faulty.any():
            index = int(faulty.argmax())
            raise InvalidBox(index, f"[{', '.join(f'{value:g}' for value in boxes[index])}] {message}")


def centres_and_sizes(boxes: npt.NDArray[np.floating], aspect: float) -> tuple[Float32, Float32]:
    """Boxes [N, 4] (x, y, width, height) → centres [N, 2], sizes [N, 2] (width, height) of the crops' areas, in pixels.

    Each box is widened or heightened to `aspect` (width / height) and padded by 1.25.
    """
    x, y, width, height = np.asarray(boxes, np.float64).reshape(-1, 4).T
    centres = np.stack([x + width * 0.5, y + height * 0.5], axis=1).astype(np.float32)
    widened = np.maximum(width, height * aspect)
    heightened = np.maximum(height, width / aspect)
    scale = np.stack([widened, heightened], axis=1) / float(_PIXEL_STD)
    return centres, scale.astype(np.float32) * np.float32(PADDING) * _PIXEL_STD


def crop_affines(centres: Float32, sizes: Float32, width: int, height: int) -> Float64:
    """Affines [N, 2, 3] from picture pixels to pixels of crops of `width` × `height`."""
    gain, offset = _gain_and_offset(centres, sizes, width, height)
    affines = np.zeros((len(centres), 2, 3))
    affines[:, 0, 0], affines[:, 1, 1] = gain.T
    affines[:, :, 2] = offset
    return affines


def from_reduced(affines: Float64, reduction: int) -> Float64:
    """Affines [N, 2, 3] from picture pixels → the same from those of the picture decoded `reduction` times smaller."""
    offset = affines[:, :, :2].sum(axis=2) * ((reduction - 1) / 2) + affines[:, :, 2]
    return np.concatenate([affines[:, :, :2] * reduction, offset[..., None]], axis=2)


def to_picture(points: npt.NDArray[np.floating], centres: Float32, sizes: Float32, width: int, height: int) -> Float64:
    """Points [N, K, 2] in cells of maps of `width` × `height` over the crops' areas → the same points in picture pixels."""
    gain, offset = _gain_and_offset(centres, sizes, width, height)
    return (points - offset[:, None]) / gain[:, None]


def _gain_and_offset(centres: Float32, sizes: Float32, width: int, height: int) -> tuple[Float64, Float64]:
    """The axis-aligned affine through the reference's three float32 points, solved in float64: gain [N, 2], offset [N, 2].

    The reference hands cv2.getAffineTransform the centre, the point half a width above it, and that point turned by a right
    angle; only the width of the area counts. The rounding of those points to float32 is kept: it moves tiny boxes.
    """
    half = sizes[:, :1] * np.float32(0.5)
    above = (centres[:, 1:] - half).astype(np.float32)
    drop = (centres[:, 1:] - above).astype(np.float32)
    left = (centres[:, :1] - drop).astype(np.float32)
    corner = np.concatenate([left, above], axis=1).astype(np.float64)
    middle = centres.astype(np.float64)
    gain = (width * 0.5) / (middle - corner)
    offset = np.array([width * 0.5, height * 0.5]) - gain * middle
    return gain, offset
