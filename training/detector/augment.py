"""Training pictures for the detector: photos scaled, turned, mirrored, cut, put together. Deterministic by its generator."""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from training.augment import Augmentation, recoloured
from training.detector.data import Photos

PAD = 114  # what surrounds a photo in its letterbox
_LEAST_SIDE = 8.0  # smaller people's longest side in pixels: they are ignored
_LEAST_SEEN = 0.25  # of a box's area; people cut to less are ignored
_COLOURS = Augmentation()

Float = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Variation:
    """How far photos are changed."""

    scale: tuple[float, float]  # of the photo, whose longest side is `side` at 1
    mosaic: float = 0.5  # share of pictures made of four photos
    mosaic_scale: float = 0.65  # of the photos in them, on top of `scale`
    rotated: float = 0.3  # share of photos that are turned
    rotation: float = 3.0  # standard deviation in degrees, cut at twice that
    stretch: float = 0.1  # of the width against the height
    colour: bool = True


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures [N, S, S, 3] (uint8 BGR), and each one's people [G, 4] and ignored areas [I, 4] (x1, y1, x2, y2)."""

    pictures: npt.NDArray[np.uint8]
    people: list[npt.NDArray[np.float32]]
    ignored: list[npt.NDArray[np.float32]]


def augmented_batch(
    sets: list[Photos],
    members: list[tuple[int, int]],
    size: int,
    side: int,
    variation: Variation,
    rng: np.random.Generator,
) -> Batch:
    """Pictures `size` wide and high, one for each of `members` (set, photo); mosaics show three more of the members."""
    pictures = np.full((len(members), size, size, 3), PAD, np.uint8)
    people, ignored = [], []
    for i, member in enumerate(members):
        mosaic = rng.random() < variation.mosaic
        regions = _quarters(size, rng) if mosaic else [(0, 0, size, size)]
        scaled_side = side * (variation.mosaic_scale if mosaic else 1.0)
        labels = []
        more = rng.integers(len(members), size=len(regions) - 1)
        for (which, index), (x1, y1, x2, y2) in zip([member, *(members[each] for each in more)], regions, strict=True):
            shown, places, ignore = _placed(sets[which], index, (x2 - x1, y2 - y1), scaled_side, variation, rng)
            pictures[i, y1:y2, x1:x2] = shown
            labels.append((places + np.array([x1, y1, x1, y1]), ignore))
        places = np.concatenate([place for place, _ in labels])
        ignore = np.concatenate([spared for _, spared in labels])
        people.append(places[~ignore].astype(np.float32))
        ignored.append(places[ignore].astype(np.float32))
    return Batch(pictures, people, ignored)


def _quarters(size: int, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Four rectangles (x1, y1, x2, y2) around a random place near the centre."""
    x, y = (int(value) for value in rng.uniform(0.3, 0.7, 2) * size)
    return [(0, 0, x, y), (x, 0, size, y), (0, y, x, size), (x, y, size, size)]


def _placed(
    photos: Photos, index: int, shape: tuple[int, int], side: float, variation: Variation, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], Float, npt.NDArray[np.bool_]]:
    """A photo changed at random and cut to `shape` (width, height): pixels, boxes [M, 4] in them, which are ignored [M]."""
    photo = photos[index]
    if variation.colour:
        photo = recoloured(photo, _COLOURS, rng)
    boxes, ignored = photos.labels(index)
    height, width = photo.shape[:2]
    affine = _random_affine(width, height, shape, side, variation, rng)
    pixel_affine = affine.copy()  # OpenCV's places are pixel centres, boxes count from the outer edge
    pixel_affine[:, 2] += affine[:, :2].sum(1) * 0.5 - 0.5
    shown = np.asarray(
        cv2.warpAffine(
            photo, pixel_affine, shape, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=(PAD,) * 3
        ),
        np.uint8,
    )
    places, seen = _moved(boxes.astype(np.float64), affine, shape)
    small = (places[:, 2:] - places[:, :2]).max(1, initial=0) < _LEAST_SIDE
    return shown, places[seen > 0], (ignored | small | (seen < _LEAST_SEEN))[seen > 0]


def _random_affine(
    width: int, height: int, shape: tuple[int, int], side: float, variation: Variation, rng: np.random.Generator
) -> Float:
    """A random affine [2, 3] of a photo into a rectangle of `shape`, from edge coordinates to edge coordinates."""
    zoom = side / max(width, height) * np.exp(rng.uniform(*np.log(variation.scale)))
    stretch = np.exp(rng.uniform(-variation.stretch, variation.stretch) / 2)
    angle = 0.0
    if rng.random() < variation.rotated:
        angle = np.deg2rad(np.clip(rng.normal(0, variation.rotation), *np.array([-2, 2]) * variation.rotation))
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    cos, sin = np.cos(angle), np.sin(angle)
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.diag([zoom * stretch * mirror, zoom / stretch])
    room = np.array(shape) - np.abs(np.diag(linear)) * [width, height]  # negative: the photo is larger, and is cut
    low = rng.uniform(np.minimum(room, 0), np.maximum(room, 0))
    centre = low + np.abs(np.diag(linear)) * [width / 2, height / 2]
    offset = centre - linear @ np.array([width / 2, height / 2])
    return np.hstack([linear, offset[:, None]])


def _moved(boxes: Float, affine: Float, shape: tuple[int, int]) -> tuple[Float, Float]:
    """Boxes [M, 4] through `affine` and cut to `shape`, and the share [M] of each that is still seen.

    A turned box is taken as the hull of the ellipse in it: a person's corners are mostly empty.
    """
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 @ affine[:, :2].T + affine[:, 2]
    halves = np.sqrt(((boxes[:, 2:] - boxes[:, :2]) / 2) ** 2 @ (affine[:, :2] ** 2).T)
    whole = np.hstack([centres - halves, centres + halves])
    cut = np.clip(whole, 0, np.tile(shape, 2))
    areas = [(b[:, 2:] - b[:, :2]).prod(1) for b in (cut, whole)]
    return cut, areas[0] / np.maximum(areas[1], 1e-6)
