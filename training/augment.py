"""Augmented training crops: random geometry and colour, one affine warp a person. Deterministic by its generator."""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from training.data import People
from training.keypoints import MIRROR

_HALF_BODIES = (np.arange(17) < 11, np.arange(17) >= 11)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How far crops are changed. Zeros mean: not at all."""

    rotation: float = 30.0  # standard deviation in degrees, cut at twice that
    rotated: float = 0.6  # share of crops that are rotated
    scale: float = 0.25  # crops show between 1 - scale and 1 + scale of the padded box
    shift: float = 0.06  # standard deviation, as a share of the padded box
    stretch: float = 0.08  # of the width against the height
    mirrored: float = 0.5
    half_body: float = 0.1  # share of crops around the upper or the lower half alone
    brightness: float = 0.2
    contrast: float = 0.25
    colour: float = 0.1  # gain of each channel
    grey: float = 0.05


@dataclass(frozen=True, slots=True)
class Batch:
    """Crops [N, H, W, 3] (uint8 BGR), keypoints [N, 17, 2] in crop pixels, weights [N, 17] (0 outside or unlabelled)."""

    crops: npt.NDArray[np.uint8]
    keypoints: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]


def augmented_batch(
    sets: list[People],
    members: list[tuple[int, int]],
    height: int,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> Batch:
    """One batch of crops, `height` high and ¾ as wide, of `members` (set, index)."""
    width = height * 3 // 4
    crops = np.empty((len(members), height, width, 3), np.uint8)
    keypoints = np.empty((len(members), 17, 2), np.float32)
    weights = np.empty((len(members), 17), np.float32)
    for i, (which, index) in enumerate(members):
        people = sets[which]
        joints, trust = people.keypoints[index], people.weights[index]
        centre, size = people.centres[index], people.sizes[index]
        if rng.random() < augmentation.half_body:
            centre, size = _half_body(joints, trust, centre, size, rng)
        affine, mirrored = _random_affine(centre, size, width, height, augmentation, rng)
        crop = cv2.warpAffine(people.crop(index), affine, (width, height), flags=cv2.INTER_LINEAR)
        crops[i] = recoloured(np.asarray(crop, np.uint8), augmentation, rng)
        joints = joints @ affine[:, :2].T.astype(np.float32) + affine[:, 2].astype(np.float32)
        if mirrored:
            joints, trust = joints[MIRROR], trust[MIRROR]
        inside = (joints > -0.5).all(1) & (joints < [width - 0.5, height - 0.5]).all(1)
        keypoints[i], weights[i] = joints, trust * inside
    return Batch(crops, keypoints, weights)


def _half_body(
    joints: npt.NDArray[np.float32],
    trust: npt.NDArray[np.float32],
    centre: npt.NDArray[np.float32],
    size: npt.NDArray[np.float32],
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The area around the labelled joints of the upper or the lower body, or the whole where fewer than 4 are labelled."""
    seen = joints[(trust > 0) & _HALF_BODIES[rng.integers(2)]]
    if len(seen) < 4:
        return centre, size
    low, high = seen.min(0), seen.max(0)
    spread = np.maximum(high - low, 1) * np.float32(1.5 * 1.25)
    height = max(spread[1], spread[0] / 0.75)
    if height >= size[1]:
        return centre, size
    return (low + high) / 2, np.array([height * 0.75, height], np.float32)


def _random_affine(
    centre: npt.NDArray[np.float32],
    size: npt.NDArray[np.float32],
    width: int,
    height: int,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.float64], bool]:
    """A random affine [2, 3] from the picture to the crop, and whether it mirrors."""
    zoom = width / size[0] / rng.uniform(1 - augmentation.scale, 1 + augmentation.scale)
    stretch = np.exp(rng.uniform(-augmentation.stretch, augmentation.stretch) / 2)
    angle = 0.0
    if rng.random() < augmentation.rotated:
        angle = np.deg2rad(np.clip(rng.normal(0, augmentation.rotation), *np.array([-2, 2]) * augmentation.rotation))
    mirrored = bool(rng.random() < augmentation.mirrored)
    shift = rng.normal(0, augmentation.shift, 2) * size
    cos, sin = np.cos(angle), np.sin(angle)
    linear = np.diag([zoom * stretch, zoom / stretch]) @ np.array([[cos, -sin], [sin, cos]])
    if mirrored:
        linear = np.diag([-1.0, 1.0]) @ linear
    offset = np.array([width, height]) / 2 - linear @ (centre + shift)
    return np.hstack([linear, offset[:, None]]), mirrored


def recoloured(crop: npt.NDArray[np.uint8], augmentation: Augmentation, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Random gain, offset and channel gains through one table a channel; now and then grey."""
    contrast = rng.uniform(1 - augmentation.contrast, 1 + augmentation.contrast)
    gains = contrast * rng.uniform(1 - augmentation.colour, 1 + augmentation.colour, 3)
    offset = 255 * rng.uniform(-augmentation.brightness, augmentation.brightness)
    levels = np.arange(256)[:, None]
    table = np.clip((levels - 128) * gains + 128 + offset, 0, 255).astype(np.uint8)
    if rng.random() < augmentation.grey:
        crop = np.asarray(cv2.cvtColor(cv2.cvtColor(crop, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR), np.uint8)
    return np.asarray(cv2.LUT(crop, table[None]), np.uint8)
