"""Crops made in PyTorch for a whole batch are those that OpenCV makes one by one."""

import cv2
import numpy as np
import pytest
import torch

from training import device
from training.augment import Augmentation, changed_crops, drawn_changes
from training.data import People

STILL = Augmentation.none()
GEOMETRY = {"rotation": 30.0, "rotated": 0.7, "turned": 0.2, "scale": 0.3, "shift": 0.1, "stretch": 0.2, "mirrored": 0.5,
            "half_body": 0.3}  # fmt: skip
MEMBERS = [(0, 1), (1, 0), (0, 0), (1, 2), (1, 1), (0, 2), (0, 1), (1, 2)]


def _people(seed, count=3):
    """Crops of different sizes, smooth enough that a hundredth of a pixel does not matter."""
    rng = np.random.default_rng(seed)
    shapes = rng.integers(100, 200, (count, 2))
    crops = [cv2.resize(rng.integers(0, 256, (h // 8, w // 8, 3), np.uint8), (w, h)) for h, w in shapes.tolist()]
    heights, widths = shapes.T
    return People(
        pixels=np.concatenate([crop.ravel() for crop in crops]),
        offsets=np.cumsum([0, *(crop.size for crop in crops)]),
        heights=heights,
        widths=widths,
        centres=(shapes[:, ::-1] / 2).astype(np.float32),
        sizes=np.stack([heights * 0.6, heights * 0.8], axis=1).astype(np.float32),
        keypoints=rng.uniform(10, 100, (count, 17, 2)).astype(np.float32),
        weights=(rng.random((count, 17)) < 0.8).astype(np.float32),
    )


SETS = [_people(0), _people(1)]


def _both(**changed):
    """The same drawn changes by OpenCV and in PyTorch, and the changes."""
    augmentation = STILL.model_copy(update=changed)
    changes = drawn_changes(SETS, MEMBERS, 128, augmentation, np.random.default_rng(4))
    people = device.resident(SETS, torch.device("cpu"))
    return (
        changed_crops(SETS, MEMBERS, changes).astype(float),
        device.changed_crops(people, MEMBERS, changes).numpy(),
        changes,
    )


@pytest.mark.parametrize("changed", [{}, GEOMETRY])
def test_the_same_affines_show_the_same(changed):
    by_opencv, in_torch, _ = _both(**changed)
    assert in_torch.shape == (8, 128, 96, 3)
    assert np.abs(by_opencv - in_torch).mean() < 0.6  # OpenCV places pixels to a 32nd, and rounds values
    assert np.percentile(np.abs(by_opencv - in_torch), 99.5) < 6


@pytest.mark.parametrize(
    ("changed", "tolerance"),
    [
        ({"brightness": 0.2, "contrast": 0.25, "colour": 0.1, "grey": 0.5}, 1.0),
        ({"occluded": 1.0}, 0.6),
        ({"pasted": 0.7}, 1.0),
        ({"cut": 0.8}, 0.6),
        ({"reduced": 0.8}, 1.5),
        ({"blurred": 0.8}, 1.0),
    ],
)
def test_each_change_is_the_same_by_both(changed, tolerance):
    by_opencv, in_torch, _ = _both(**changed)
    still, _, _ = _both()
    assert np.abs(by_opencv - in_torch).mean() < tolerance
    assert np.abs(by_opencv - still).mean() > np.abs(by_opencv - in_torch).mean()


def test_beyond_the_photo_it_stays_black_whatever_its_colours():
    _, plain, _ = _both(**GEOMETRY)
    by_opencv, in_torch, _ = _both(**GEOMETRY, brightness=0.3, contrast=0.3, grey=0.3)
    assert (plain == 0).mean() > 0.05
    assert in_torch[plain == 0].max() == 0
    assert np.abs(by_opencv - in_torch).mean() < 1.0


def test_jpeg_is_imitated_at_its_strength():
    by_opencv, in_torch, _ = _both(jpeg=1.0)
    still, _, _ = _both()
    real, imitated = (np.abs(each - still).mean() for each in (by_opencv, in_torch))
    assert 0.3 < imitated / real < 2


def test_keypoints_land_where_their_pixels_do():
    """A bright dot at each person's first joint is the brightest place near where the joint is said to be."""
    for people in SETS:
        people.pixels[:] //= 4
        for index in range(len(people)):
            x, y = np.rint(people.keypoints[index, 0]).astype(int)
            people.keypoints[index, 0] = x, y
            cv2.circle(people[index], (int(x), int(y)), 2, (255, 255, 255), cv2.FILLED)
    _, in_torch, changes = _both(**GEOMETRY | {"mirrored": 0.0})
    seen = 0
    for crop, (x, y), weight in zip(in_torch, changes.keypoints[:, 0], changes.weights[:, 0], strict=True):
        if weight and 6 < x < 89 and 6 < y < 121:
            column, row = int(np.rint(x)), int(np.rint(y))
            near = crop[row - 6 : row + 7, column - 6 : column + 7].sum(2)
            ys, xs = np.nonzero(near > 0.8 * near.max())
            np.testing.assert_allclose([xs.mean() + column - 6, ys.mean() + row - 6], [x, y], atol=1.2)
            seen += 1
    assert seen >= 3
