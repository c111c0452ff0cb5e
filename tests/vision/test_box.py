"""Boxes, affines and crops against what the reference's own code makes of eight boxes."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from app.vision import box, crop

REFERENCE = Path(__file__).parents[1] / "data/reference"
PHOTOS = ("astronaut_384.png", "camera_400.png", "drawing_560x360.png")


@pytest.fixture(scope="module")
def parity():
    with np.load(REFERENCE / "parity.npz") as content:
        return dict(content)


def test_centres_and_sizes_are_the_references(parity):
    centres, sizes = box.centres_and_sizes(parity["box_xywh"], 192 / 256)
    np.testing.assert_array_equal(centres, parity["center"])
    np.testing.assert_array_equal(sizes / np.float32(200), parity["scale"])


def test_affines_are_the_references(parity):
    centres, sizes = box.centres_and_sizes(parity["box_xywh"], 192 / 256)
    np.testing.assert_allclose(box.crop_affines(centres, sizes, 192, 256), parity["affine"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_a_picture_decoded_smaller_gives_the_same_crop(reduction):
    rng = np.random.default_rng(7)
    picture = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (1600, 1200), interpolation=cv2.INTER_CUBIC)
    affines = box.crop_affines(*box.centres_and_sizes(np.array([[400.0, 250, 500, 650]]), 192 / 256), 192, 256)
    whole, small = np.empty((2, 1, 256, 192, 3), np.uint8)
    crop.cut_crops(picture, affines, whole)
    reduced = cv2.resize(picture, None, fx=1 / reduction, fy=1 / reduction, interpolation=cv2.INTER_AREA)
    crop.cut_crops(reduced, box.from_reduced(affines, reduction), small)
    assert np.abs(whole.astype(int) - small).max() <= 4


def test_crops_are_the_references_within_one_grey_level(parity):
    for index, name in enumerate(PHOTOS):
        mine = parity["image_index"] == index
        crops = np.empty((mine.sum(), 256, 192, 3), np.uint8)
        crop.cut_crops(cv2.imread(str(REFERENCE / name)), parity["affine"][mine], crops)
        difference = np.abs(crops.astype(int) - parity["crop_bgr_u8"][mine])
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.001


def test_points_go_back_to_the_picture_through_the_inverse_affine(parity):
    centres, sizes = box.centres_and_sizes(parity["box_xywh"], 192 / 256)
    cells = np.random.default_rng(0).uniform(0, 48, (8, 17, 2))
    inverse = parity["affine_inv_heatmap"]
    expected = np.einsum("nij,nkj->nki", inverse[:, :, :2], cells) + inverse[:, None, :, 2]
    np.testing.assert_allclose(box.to_picture(cells, centres, sizes, 48, 64), expected, rtol=0, atol=1e-6)


def test_wide_and_high_boxes_get_the_aspect_around_their_centre():
    centres, sizes = box.centres_and_sizes(np.array([[0, 0, 300, 40], [10, 20, 30, 400]]), 0.75)
    np.testing.assert_allclose(centres, [[150, 20], [25, 220]])
    np.testing.assert_allclose(sizes, [[375, 500], [375, 500]], rtol=1e-6)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ([np.nan, 0, 10, 10], "finite"),
        ([0, 0, np.inf, 10], "finite"),
        ([0, 0, -5, 10], "above 0"),
        ([0, 0, 10, 0], "above 0"),
        ([5, 5, 0.5, 0.2], "at least 1 pixel"),
        ([0, 0, 1e12, 10], "reach beyond"),
        ([100, 0, 10, 10], "misses the picture"),
        ([-30, 0, 29, 10], "misses the picture"),
    ],
)
def test_a_box_that_shows_nobody_is_named_by_its_place(bad, why):
    boxes = np.array([[1, 1, 20, 20], bad], np.float64)
    with pytest.raises(box.InvalidBox, match=why) as caught:
        box.check_boxes(boxes, 100, 80)
    assert caught.value.index == 1


def test_boxes_that_reach_over_the_edge_are_taken():
    box.check_boxes(np.array([[-50, -50, 60, 60], [99, 79, 500, 500]], np.float64), 100, 80)
