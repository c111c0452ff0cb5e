"""Augmentation: labels follow the pixels, whatever is done to them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from training import loss
from training.augment import Augmentation, augmented_batch
from training.data import People

STILL = Augmentation.none()


def _person(keypoints):
    """A black picture of 300 × 400 with a white dot at each keypoint, boxed as a whole."""
    pixels = np.zeros((400, 300, 3), np.uint8)
    for x, y in keypoints:
        pixels[int(y) - 3 : int(y) + 4, int(x) - 3 : int(x) + 4] = 255
    return People(
        pixels=pixels.ravel(),
        offsets=np.array([0, pixels.size]),
        heights=np.array([400]),
        widths=np.array([300]),
        centres=np.array([[150, 200]], np.float32),
        sizes=np.array([[300, 400]], np.float32),
        keypoints=keypoints[None].astype(np.float32),
        weights=np.ones((1, 17), np.float32),
    )


def _brightest_near(crop, place):
    """The centre of mass of the brightness around a place."""
    x, y = np.rint(place).astype(int)
    ys, xs = np.mgrid[max(0, y - 5) : y + 6, max(0, x - 5) : x + 6]
    ys, xs = np.clip(ys, 0, crop.shape[0] - 1), np.clip(xs, 0, crop.shape[1] - 1)
    weight = crop[ys, xs, 1].astype(float)
    return np.array([(xs * weight).sum(), (ys * weight).sum()]) / weight.sum()


@pytest.mark.parametrize("seed", range(12))
def test_keypoints_stay_on_their_pixels(seed):
    rows, columns = np.divmod(np.arange(17), 4)
    keypoints = np.stack([60 + 55 * columns, 50 + 70 * rows], axis=1)  # far enough apart to be told from each other
    moved = STILL.model_copy(
        update={"rotation": 30.0, "rotated": 1.0, "scale": 0.2, "shift": 0.05, "stretch": 0.1, "mirrored": 0.5}
    )
    batch = augmented_batch([_person(keypoints)], [(0, 0)], 256, moved, np.random.default_rng(seed))
    inner = (batch.keypoints[0] > 8).all(1) & (batch.keypoints[0] < [183, 247]).all(1)
    assert inner.sum() > 5
    for joint in np.flatnonzero(inner):
        found = _brightest_near(batch.crops[0], batch.keypoints[0, joint])
        np.testing.assert_allclose(found, batch.keypoints[0, joint], atol=1.5)


def test_a_mirrored_crop_swaps_left_and_right():
    keypoints = np.full((17, 2), 150.0)
    keypoints[:, 1] = 20 * np.arange(17) + 20
    keypoints[9], keypoints[10] = [50, 100], [250, 300]
    mirrored = STILL.model_copy(update={"mirrored": 1.0})
    plain = augmented_batch([_person(keypoints)], [(0, 0)], 256, STILL, np.random.default_rng(0)).keypoints[0]
    turned = augmented_batch([_person(keypoints)], [(0, 0)], 256, mirrored, np.random.default_rng(0)).keypoints[0]
    np.testing.assert_allclose(turned[9], [192 - plain[10, 0], plain[10, 1]], atol=1e-3)
    np.testing.assert_allclose(turned[10], [192 - plain[9, 0], plain[9, 1]], atol=1e-3)


def test_a_mirrored_crop_swaps_the_weights_too():
    person = _person(np.full((17, 2), 150.0))
    person.weights[0, 9] = 0
    mirrored = STILL.model_copy(update={"mirrored": 1.0})
    weights = augmented_batch([person], [(0, 0)], 256, mirrored, np.random.default_rng(0)).weights[0]
    assert (weights[9], weights[10]) == (1, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"rotation": 30.0, "rotated": 1.0},
        {"turned": 1.0},
        {"scale": 0.3},
        {"shift": 0.1},
        {"stretch": 0.2},
        {"half_body": 1.0},
    ],
)
def test_each_change_of_place_moves_keypoints(change):
    person = _person(np.random.default_rng(0).uniform(100, 200, (17, 2)))
    still, moved = (
        augmented_batch([person], [(0, 0)], 256, each, np.random.default_rng(1)).keypoints
        for each in (STILL, STILL.model_copy(update=change))
    )
    assert np.abs(moved - still).max() > 2


def test_joints_outside_the_crop_weigh_nothing():
    keypoints = np.full((17, 2), 150.0)
    keypoints[0] = [-20, 100]
    person = _person(np.clip(keypoints, 4, 290))
    person.keypoints[0] = keypoints
    batch = augmented_batch([person], [(0, 0)], 128, STILL, np.random.default_rng(0))
    assert batch.weights[0, 0] == 0
    assert batch.weights[0, 1:].all()


@pytest.mark.parametrize("seed", range(8))
def test_what_a_cut_photo_no_longer_shows_is_taught_to_be_absent(seed):
    rows, columns = np.divmod(np.arange(17), 4)
    keypoints = np.stack([60 + 55 * columns, 50 + 70 * rows], axis=1)
    person, cut = _person(keypoints), STILL.model_copy(update={"cut": 1.0})
    person.weights[0, 5] = 0  # unlabelled: nothing is known of it
    batch = augmented_batch([person], [(0, 0)], 256, cut, np.random.default_rng(seed))
    absent = batch.keypoints[0, :, 0] < -500
    assert 0 < absent.sum() <= 13
    np.testing.assert_array_equal(batch.weights[0], np.arange(17) != 5)
    assert not loss.target_heatmaps(torch.from_numpy(batch.keypoints[:, absent] / 4), 64, 48, 2.0).any()
    for joint in np.flatnonzero(~absent):
        found = _brightest_near(batch.crops[0], batch.keypoints[0, joint])
        np.testing.assert_allclose(found, batch.keypoints[0, joint], atol=1.5)
    person.pixels[:] = 255
    white = augmented_batch([person], [(0, 0)], 256, cut, np.random.default_rng(seed)).crops[0, :, :, 0] > 0
    assert white[tuple(np.rint(batch.keypoints[0, ~absent]).astype(int).T[::-1])].all()
    assert white.mean() < 0.92  # beyond the photo's end, a tenth of the crop, it is black


@pytest.mark.parametrize(("mirrored", "ankle"), [(0.0, 15), (1.0, 16)])
def test_a_joint_that_is_labelled_beyond_the_photo_is_taught_to_be_absent(mirrored, ankle):
    keypoints = np.full((17, 2), 200.0)
    keypoints[15] = [100, 450]  # the photo ends at 400, the box at 500
    person = replace(_person(np.clip(keypoints, 0, 390)), keypoints=keypoints[None].astype(np.float32))
    person = replace(person, centres=np.array([[150, 300]], np.float32))
    changes = STILL.model_copy(update={"mirrored": mirrored})
    batch = augmented_batch([person], [(0, 0)], 256, changes, np.random.default_rng(0))
    assert (batch.keypoints[0, :, 1] < 0).nonzero()[0].tolist() == [ankle]
    assert batch.weights[0].tolist() == [1] * 17


def test_nobody_is_cut_who_would_keep_too_little():
    person = _person(np.stack([np.full(17, 150.0), np.linspace(60, 340, 17)], axis=1))
    person.weights[0, 4:] = 0
    cut = STILL.model_copy(update={"cut": 1.0})
    for seed in range(20):
        batch = augmented_batch([person], [(0, 0)], 256, cut, np.random.default_rng(seed))
        assert (batch.weights[0, :4] == 1).all()
        assert (batch.keypoints[0, :4] > -500).all()


def test_beyond_the_photo_crops_stay_black_whatever_their_colours():
    person = replace(_person(np.full((17, 2), 150.0)), pixels=np.full(400 * 300 * 3, 120, np.uint8))
    moved = STILL.model_copy(update={"shift": 0.3})
    bright = moved.model_copy(update={"brightness": 0.3, "contrast": 0.3})
    plain, coloured = (
        augmented_batch([person] * 8, [(n, 0) for n in range(8)], 256, changes, np.random.default_rng(1)).crops
        for changes in (moved, bright)
    )
    assert (plain == 0).mean() > 0.1
    assert coloured[plain == 0].max() == 0
    assert (coloured != plain).mean() > 0.5


def test_the_same_generator_gives_the_same_batch():
    person = _person(np.full((17, 2), 150.0))
    batches = [augmented_batch([person], [(0, 0)] * 3, 128, Augmentation(), np.random.default_rng(5)) for _ in range(2)]
    np.testing.assert_array_equal(batches[0].crops, batches[1].crops)
    np.testing.assert_array_equal(batches[0].keypoints, batches[1].keypoints)
