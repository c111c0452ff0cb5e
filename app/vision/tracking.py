"""People from frame to frame of a video: where to look for them next, and joints that do not tremble.

Pixels of the upright frame; times in seconds.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.vision.people import SURE

Float64 = npt.NDArray[np.float64]

_LEAST_JOINTS = 4
_MARGINS = (-0.25, 0.75)  # the least and the most that is taken for one
# How far COCO's boxes reach beyond the outermost joints: medians over the joints that lpn50 finds of 1,316 labelled people of
# train2017.
_USUAL_MARGINS = np.array([0.06, 0.13, 0.06, 0.07])

# The One Euro filter (Casiez, Roussel and Vogel, CHI 2012): a low-pass whose cutoff rises with speed. Speeds are in sizes of
# the person a second, so that the near and the far are treated alike.
_CUTOFF_HZ = 1.0
_CUTOFF_PER_SPEED = 5.0
_SPEED_CUTOFF_HZ = 1.0


@dataclass(frozen=True, slots=True)
class Motion:
    """Smoothed joints [N, K, 2] of people, or [K, 2] of one, and how they move, in pixels a second.

    `innovations` are what the filter goes by: how far joints are from their smoothed places, which lag behind, over the time
    of a frame. `speeds` are the smoothed places' own, which are the joints' where these move steadily.
    """

    places: Float64
    innovations: Float64
    speeds: Float64


def margins(boxes: Float64, keypoints: Float64) -> Float64:
    """How far boxes [N, 4] (x, y, width, height) reach beyond the outermost sure joints of keypoints [N, K, 3] (x, y, score):
    [N, 4], left, above, right and below, as shares of the joints' longer extent. COCO's where there are few sure joints."""
    low, high, longer = _extents(boxes, keypoints)
    reach = np.hstack([low - boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - high])
    known = (longer > 0)[:, None]
    return np.where(known, np.clip(reach / np.where(known, longer[:, None], 1), *_MARGINS), _USUAL_MARGINS)


def next_boxes(boxes: Float64, keypoints: Float64, beyond: Float64, width: int, height: int) -> Float64:
    """Boxes [N, 4] to look for people in the next frame of that size, from those of this one and keypoints [N, K, 3]
    found there, with the margins `beyond` [N, 4] around.

    Half way to the box around the joints: one frame's error is not taken for the person's size. Whoever shows too few joints
    stays where they are.
    """
    low, high, longer = _extents(boxes, keypoints)
    limit = np.array([width, height])
    around_low = np.clip(low - longer[:, None] * beyond[:, :2], 0, limit)
    around_high = np.maximum(np.clip(high + longer[:, None] * beyond[:, 2:], 0, limit), around_low)
    return np.asarray((boxes + np.hstack([around_low, around_high - around_low])) / 2)


def _extents(boxes: Float64, keypoints: Float64) -> tuple[Float64, Float64, Float64]:
    """The corners [N, 2] of the sure joints and their longer extent [N]; the boxes' corners and 0 where there are too few."""
    sure = (keypoints[..., 2] > SURE)[..., None]
    enough = (sure.sum(axis=(1, 2)) >= _LEAST_JOINTS)[:, None]
    low = np.where(enough, np.where(sure, keypoints[..., :2], np.inf).min(axis=1), boxes[:, :2])
    high = np.where(enough, np.where(sure, keypoints[..., :2], -np.inf).max(axis=1), boxes[:, :2] + boxes[:, 2:])
    return low, high, np.where(enough[:, 0], (high - low).max(axis=1), 0.0)


def same_boxes(some: Float64, others: Float64, least: float) -> list[tuple[int, int]]:
    """Pairs of places in boxes [N, 4] and [M, 4] that overlap by `least` (intersection over union), the nearest first; each
    box is of one pair at most."""
    low = np.maximum(some[:, None, :2], others[:, :2])
    high = np.minimum((some[:, :2] + some[:, 2:])[:, None], others[:, :2] + others[:, 2:])
    shared = np.maximum(high - low, 0).prod(axis=2)
    overlaps = shared / (some[:, 2:].prod(axis=1)[:, None] + others[:, 2:].prod(axis=1) - shared)
    pairs: list[tuple[int, int]] = []
    for place in np.argsort(-overlaps, axis=None, kind="stable"):
        one, other = divmod(int(place), len(others))
        if overlaps[one, other] < least:
            break
        if all(one != first and other != second for first, second in pairs):
            pairs.append((one, other))
    return pairs


def smooth(before: Motion, places: Float64, size: float, seconds: float) -> Motion:
    """The motion after joints at `places` [K, 2] of somebody of that size (pixels) were seen, `seconds` after `before`."""
    taken = _share(_SPEED_CUTOFF_HZ, seconds)
    innovations = before.innovations + taken * ((places - before.places) / seconds - before.innovations)
    speed = np.hypot(innovations[..., 0], innovations[..., 1]) / size
    share = _share(_CUTOFF_HZ + _CUTOFF_PER_SPEED * speed, seconds)[..., None]
    return Motion(before.places + share * (places - before.places), innovations, share * innovations)


def at_rest(places: Float64) -> Motion:
    """The motion of people who are seen for the first time, at `places` [N, K, 2]."""
    return Motion(places.copy(), np.zeros_like(places), np.zeros_like(places))


def _share(cutoff: Float64 | float, seconds: float) -> Float64:
    """How much of a new value a low-pass of that cutoff (Hz) takes after so many seconds."""
    return np.asarray(1 / (1 + 1 / (2 * np.pi * np.asarray(cutoff) * seconds)))
