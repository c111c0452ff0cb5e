"""Augmented training crops: what changes is drawn for a whole batch at once, then done by OpenCV or by training/device.py.

Deterministic by the generator. Both ways of doing it take the same drawn changes, so that they show the same crops.
"""

from dataclasses import dataclass
from typing import Annotated

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from training.data import People
from training.keypoints import MIRROR
from training.schedule import Members

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_ABSENT = -1000.0  # pixels: so far away that a target heatmap is 0 everywhere
_CUT_SIDES = (0.15, 0.1, 0.15, 0.6)  # how often photos are cut at the left, above, at the right and below
_CLOSEST = 1.8  # how far what is left of a cut person is enlarged; cached crops have no more pixels
_HALF_BODIES = (np.arange(17) < 11, np.arange(17) >= 11)


Share = Annotated[float, Field(ge=0, le=1)]
Extent = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Augmentation(BaseModel):
    """How far crops are changed: [augmentation] of a config. Zeros mean: not at all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rotation: Extent = 30.0  # standard deviation in degrees, cut at twice that
    rotated: Share = 0.6  # share of crops that are rotated
    turned: Share = 0.0  # share of crops that are turned to any angle
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.25  # crops show between 1 - scale and 1 + scale of the padded box
    shift: Extent = 0.06  # standard deviation, as a share of the padded box
    stretch: Extent = 0.08  # of the width against the height
    mirrored: Share = 0.5
    half_body: Share = 0.1  # share of crops around the upper or the lower half alone
    cut: Share = 0.0  # share of crops in which the photo ends within the person
    brightness: Extent = 0.2
    contrast: Extent = 0.25
    colour: Extent = 0.1  # gain of each channel
    grey: Share = 0.05
    occluded: Share = 0.0  # share of crops with a rectangle of one colour over them
    pasted: Share = 0.0  # share of crops with a part of somebody else of the batch over them
    reduced: Share = 0.0  # share of crops that are reduced 2 to 4 times and enlarged again
    blurred: Share = 0.0
    jpeg: Share = 0.0  # share of crops with JPEG's artefacts

    @classmethod
    def none(cls) -> "Augmentation":
        """Crops as the service cuts them."""
        return cls(**dict.fromkeys(cls.model_fields, 0.0))


@dataclass(frozen=True, slots=True)
class Colours:
    """Changes of colour: (value - 128) · gain [N, 3] + 128 + offset [N]; before it, some crops [N] become grey."""

    gains: Float64
    offsets: Float64
    grey: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Changes:
    """What becomes of a batch of N people, in pixels of the crops. Rectangles, reductions, blurs and qualities are zero where
    that change is not made."""

    height: int
    width: int
    affines: Float64  # [N, 2, 3] from the cached crop
    frames: Float64  # [N, 4]: x1, y1, x2, y2 of the photo, which is black beyond
    donors: npt.NDArray[np.int64]  # [N] who in the batch is pasted over, -1: nobody
    donor_affines: Float64  # [N, 2, 3] from the donor's cached crop
    ellipses: Float64  # [N, 4]: what is seen of the donor: centre x, y and half axes
    rectangles: Float64  # [N, 4]: x1, y1, x2, y2
    rectangle_colours: Float64  # [N, 3]
    colours: Colours
    reductions: npt.NDArray[np.int64]  # [N] 2, 3 or 4
    blurs: Float64  # [N] standard deviations
    jpeg_qualities: npt.NDArray[np.int64]  # [N]
    keypoints: Float32  # [N, 17, 2], far outside where the photo ends, or was made to end, before them
    weights: Float32  # [N, 17], 0 where unlabelled or outside by chance


@dataclass(frozen=True, slots=True)
class Batch:
    """Crops [N, H, W, 3] (uint8 BGR), keypoints and weights as in `Changes`."""

    crops: UInt8
    keypoints: Float32
    weights: Float32


def augmented_batch(
    sets: list[People], members: Members, height: int, augmentation: Augmentation, rng: np.random.Generator
) -> Batch:
    """One batch of crops, `height` high and ¾ as wide, of `members` (set, index)."""
    changes = drawn_changes(sets, members, height, augmentation, rng)
    return Batch(changed_crops(sets, members, changes), changes.keypoints, changes.weights)


def drawn_changes(
    sets: list[People], members: Members, height: int, augmentation: Augmentation, rng: np.random.Generator
) -> Changes:
    """What is to become of `members` in crops `height` high and ¾ as wide, and where their joints come to lie."""
    n, width = len(members), height * 3 // 4
    joints = np.stack([sets[which].keypoints[index] for which, index in members]).astype(np.float64)
    weights = np.stack([sets[which].weights[index] for which, index in members])
    centres = np.stack([sets[which].centres[index] for which, index in members]).astype(np.float64)
    sizes = np.stack([sets[which].sizes[index] for which, index in members]).astype(np.float64)
    ends = np.array([[sets[which].widths[index], sets[which].heights[index]] for which, index in members]) - 0.5
    on_photo = ((joints > -0.5) & (joints < ends[:, None])).all(axis=2)
    elsewhere = np.logical_not(on_photo)  # a teacher places joints beyond the photo too
    for person in np.flatnonzero(_some(n, augmentation.half_body, rng)):
        centres[person], sizes[person] = _half_body(joints[person], weights[person], centres[person], sizes[person], rng)
    affines, mirrored = _random_affines(centres, sizes, width, height, augmentation, rng)
    donors, donor_affines, ellipses = _random_pastes(joints, weights, sizes, width, height, augmentation, rng)
    joints = joints @ affines[:, :, :2].transpose(0, 2, 1) + affines[:, None, :, 2]
    joints[mirrored], weights[mirrored] = joints[mirrored][:, MIRROR], weights[mirrored][:, MIRROR]
    elsewhere[mirrored] = elsewhere[mirrored][:, MIRROR]
    corners = rng.uniform([0, 0], [width, height], (n, 2))
    sides = rng.uniform(0.1, 0.4, (n, 2)) * [width, height]
    rectangles = np.hstack([corners - sides / 2, corners + sides / 2]) * _some(n, augmentation.occluded, rng)[:, None]
    rectangle_colours = rng.uniform(0, 255, (n, 3))
    colours = _random_colours(n, augmentation, rng)
    reductions = rng.integers(2, 5, n) * _some(n, augmentation.reduced, rng)
    blurs = rng.uniform(0.4, 1.6, n) * height / 256 * _some(n, augmentation.blurred, rng)
    jpeg_qualities = rng.integers(25, 76, n) * _some(n, augmentation.jpeg, rng)
    frames, beyond = _random_cuts(joints, weights, affines, width, height, augmentation, rng)
    inside = ((joints > -0.5) & (joints < [width - 0.5, height - 0.5])).all(axis=2)
    beyond |= elsewhere & inside
    return Changes(
        height=height,
        width=width,
        affines=affines,
        frames=frames,
        donors=donors,
        donor_affines=donor_affines,
        ellipses=ellipses,
        rectangles=rectangles,
        rectangle_colours=rectangle_colours,
        colours=colours,
        reductions=reductions,
        blurs=blurs,
        jpeg_qualities=jpeg_qualities,
        keypoints=np.where(beyond[..., None], _ABSENT, joints).astype(np.float32),
        weights=weights * (inside | beyond),
    )


def _some(count: int, share: float, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    return rng.random(count) < share


def _half_body(
    joints: Float64, weights: Float32, centre: Float64, size: Float64, rng: np.random.Generator
) -> tuple[Float64, Float64]:
    """The area around the labelled joints of the upper or the lower body, or the whole where fewer than 4 are labelled."""
    seen = joints[(weights > 0) & _HALF_BODIES[rng.integers(2)]]
    if len(seen) < 4:
        return centre, size
    low, high = seen.min(0), seen.max(0)
    spread = np.maximum(high - low, 1) * (1.5 * 1.25)
    height = max(spread[1], spread[0] / 0.75)
    if height >= size[1]:
        return centre, size
    return (low + high) / 2, np.array([height * 0.75, height])


def _random_affines(
    centres: Float64, sizes: Float64, width: int, height: int, augmentation: Augmentation, rng: np.random.Generator
) -> tuple[Float64, npt.NDArray[np.bool_]]:
    """Random affines [N, 2, 3] from the cached crops to the new ones, and which of them mirror."""
    n = len(centres)
    zoom = width / sizes[:, 0] / rng.uniform(1 - augmentation.scale, 1 + augmentation.scale, n)
    stretch = np.exp(rng.uniform(-augmentation.stretch, augmentation.stretch, n) / 2)
    degrees = np.clip(rng.normal(0, 1, n), -2, 2) * augmentation.rotation * _some(n, augmentation.rotated, rng)
    degrees = np.where(_some(n, augmentation.turned, rng), rng.uniform(-180, 180, n), degrees)
    mirrored = _some(n, augmentation.mirrored, rng)
    shifts = rng.normal(0, 1, (n, 2)) * augmentation.shift * sizes
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    linear = (
        np.array([[cos, -sin], [sin, cos]]).transpose(2, 0, 1) * np.stack([zoom * stretch, zoom / stretch], 1)[:, :, None]
    )
    linear[mirrored, 0] *= -1
    offsets = np.array([width, height]) / 2 - (linear @ (centres + shifts)[:, :, None])[:, :, 0]
    return np.concatenate([linear, offsets[:, :, None]], axis=2), mirrored


def _random_cuts(
    joints: Float64,
    weights: Float32,
    affines: Float64,
    width: int,
    height: int,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> tuple[Float64, npt.NDArray[np.bool_]]:
    """Let some photos end within the person: where they end [N, 4], and which joints [N, 17] lie beyond.

    Crops are then of the box that is left: `joints` and `affines` are changed in place. Most end below, as portraits do.
    Nobody is cut who would keep fewer than 4 labelled joints.
    """
    n, size, margin = len(joints), np.array([width, height], np.float64), 0.06 * height
    frames, beyond = np.tile([0.0, 0.0, width, height], (n, 1)), np.zeros((n, 17), bool)
    sides, shares = rng.choice(4, n, p=_CUT_SIDES), rng.uniform(0.15, 0.6, n)
    for person in np.flatnonzero(_some(n, augmentation.cut, rng) & ((weights > 0).sum(axis=1) >= 4)):
        axis, far = sides[person] % 2, sides[person] >= 2
        low, high = _around(joints[person][weights[person] > 0], margin, size)
        line = high[axis] - shares[person] * (high - low)[axis] if far else low[axis] + shares[person] * (high - low)[axis]
        lost = joints[person, :, axis] > line if far else joints[person, :, axis] < line
        kept = joints[person][~lost & (weights[person] > 0)]
        if len(kept) < 4:
            continue
        low, high = _around(kept, margin, size)
        (high if far else low)[axis] = line
        zoom = min(0.8 / ((high - low) / size).max(), _CLOSEST)
        offset = size / 2 - zoom * (low + high) / 2
        joints[person] = joints[person] * zoom + offset
        affines[person] *= zoom
        affines[person, :, 2] += offset
        frames[person, sides[person]] = line * zoom + offset[axis]
        beyond[person] = lost
    return frames, beyond


def _around(joints: Float64, margin: float, size: Float64) -> tuple[Float64, Float64]:
    """The corners of a box around joints [M, 2] in a crop of this size, not larger than the person's own box in it."""
    return np.maximum(0.1 * size, joints.min(0) - margin), np.minimum(0.9 * size, joints.max(0) + margin)


def _random_pastes(
    joints: Float64,
    weights: Float32,
    sizes: Float64,
    width: int,
    height: int,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.int64], Float64, Float64]:
    """Who of the batch is pasted over whom [N], by which affines [N, 2, 3], and the ellipses [N, 4] that are seen.

    A labelled joint of the donor comes to lie in the middle of an ellipse, which is anywhere in the crop.
    """
    n = len(joints)
    pasted = _some(n, augmentation.pasted, rng) & (n > 1)
    others = (np.arange(n) + rng.integers(1, max(2, n), n)) % n
    shown = np.argmax((weights[others] > 0) * rng.random(weights.shape), axis=1)
    zoom = width / sizes[others, 0] * rng.uniform(0.6, 1.4, n)
    middles = rng.uniform([0, 0], [width, height], (n, 2))
    axes = rng.uniform(0.08, 0.25, (n, 2)) * height
    affines = np.zeros((n, 2, 3))
    affines[:, 0, 0] = affines[:, 1, 1] = zoom
    affines[:, :, 2] = middles - zoom[:, None] * joints[others, shown]
    return np.where(pasted, others, -1), affines, np.hstack([middles, axes])


def _random_colours(n: int, augmentation: Augmentation, rng: np.random.Generator) -> Colours:
    contrasts = rng.uniform(1 - augmentation.contrast, 1 + augmentation.contrast, (n, 1))
    gains = contrasts * rng.uniform(1 - augmentation.colour, 1 + augmentation.colour, (n, 3))
    offsets = 255 * rng.uniform(-augmentation.brightness, augmentation.brightness, n)
    return Colours(gains, offsets, _some(n, augmentation.grey, rng))


def changed_crops(sets: list[People], members: Members, changes: Changes) -> UInt8:
    """The crops [N, H, W, 3] of `members`, by OpenCV."""
    width, height = size = (changes.width, changes.height)
    crops = np.empty((len(members), height, width, 3), np.uint8)
    for i, (which, index) in enumerate(members):
        # Before they are cut out: what lies beyond the photo is black, whatever its colours.
        seen = _recoloured(sets[which][index], changes.colours, i)
        crop = cv2.warpAffine(seen, changes.affines[i], size, flags=cv2.INTER_LINEAR)
        x1, y1, x2, y2 = np.clip(np.rint(changes.frames[i]), 0, None).astype(int)
        crop[:y1] = crop[y2:] = crop[:, :x1] = crop[:, x2:] = 0
        if changes.donors[i] >= 0:
            donor_set, donor_index = members[changes.donors[i]]
            other = _recoloured(sets[donor_set][donor_index], changes.colours, i)
            donor = cv2.warpAffine(other, changes.donor_affines[i], size, flags=cv2.INTER_LINEAR)
            mask = np.zeros((height, width), np.uint8)
            x, y, across, down = np.rint(changes.ellipses[i]).astype(int).tolist()
            cv2.ellipse(mask, (x, y), (across, down), 0, 0, 360, 1, cv2.FILLED)
            cv2.copyTo(donor, mask, crop)
        x1, y1, x2, y2 = np.clip(np.rint(changes.rectangles[i]), 0, None).astype(int)
        crop[y1:y2, x1:x2] = changes.rectangle_colours[i]
        if changes.reductions[i]:
            small = (width // changes.reductions[i], height // changes.reductions[i])
            crop = np.asarray(cv2.resize(cv2.resize(crop, small, interpolation=cv2.INTER_AREA), size), np.uint8)
        if changes.blurs[i]:
            crop = np.asarray(cv2.GaussianBlur(crop, (7, 7), changes.blurs[i]), np.uint8)
        if changes.jpeg_qualities[i]:
            quality = [cv2.IMWRITE_JPEG_QUALITY, int(changes.jpeg_qualities[i])]
            crop = np.asarray(cv2.imdecode(cv2.imencode(".jpg", crop, quality)[1], cv2.IMREAD_COLOR), np.uint8)
        crops[i] = crop
    return crops


def recoloured(crop: UInt8, augmentation: Augmentation, rng: np.random.Generator) -> UInt8:
    """A picture [H, W, 3] with random gain, offset and channel gains; now and then grey."""
    return _recoloured(crop, _random_colours(1, augmentation, rng), 0)


def _recoloured(crop: UInt8, colours: Colours, index: int) -> UInt8:
    """Through one table a channel."""
    levels = np.arange(256)[:, None]
    table = np.clip((levels - 128) * colours.gains[index] + 128 + colours.offsets[index], 0, 255).astype(np.uint8)
    if colours.grey[index]:
        crop = np.asarray(cv2.cvtColor(cv2.cvtColor(crop, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR), np.uint8)
    return np.asarray(cv2.LUT(crop, table[None]), np.uint8)
