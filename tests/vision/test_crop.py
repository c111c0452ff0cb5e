"""Affine crops: the right pixels, black outside the picture, into the batch that is given."""

import numpy as np

from app.vision import box
from app.vision.crop import cut_crops

RANDOM = np.random.default_rng(7)
PICTURE = RANDOM.integers(1, 256, (120, 160, 3), dtype=np.uint8)


def affine(scale: float, x: float, y: float) -> np.ndarray:
    """Crops' pixel (u, v) = scale · (picture's pixel − (x, y))."""
    return np.array([[scale, 0, -scale * x], [0, scale, -scale * y]], np.float64)


def cut(*affines: np.ndarray) -> np.ndarray:
    out = np.full((len(affines), 64, 48, 3), 99, np.uint8)
    cut_crops(PICTURE, np.array(affines), out)
    return out


def test_a_shift_by_whole_pixels_copies_them():
    (crop,) = cut(affine(1, 20, 30))
    assert (crop == PICTURE[30:94, 20:68]).all()


def test_every_crop_of_a_batch_is_cut_by_its_own_affine():
    first, second = cut(affine(1, 0, 0), affine(1, 100, 50))
    assert (first == PICTURE[:64, :48]).all()
    assert (second == PICTURE[50:114, 100:148]).all()


def test_outside_the_picture_a_crop_is_black():
    (crop,) = cut(affine(1, -10, -20))
    assert (crop[:20] == 0).all()
    assert (crop[:, :10] == 0).all()
    assert (crop[20:, 10:] == PICTURE[:44, :38]).all()


def test_a_crop_beside_the_picture_is_black():
    assert (cut(affine(1, 5000, 5000)) == 0).all()


def test_between_pixels_a_crop_is_bilinear():
    (crop,) = cut(affine(2, 40, 40))
    expected = (PICTURE[40:72, 40:64].astype(int) + PICTURE[40:72, 41:65]) / 2
    assert np.abs(crop[::2, 1::2] - expected).max() <= 1


def test_no_box_makes_no_crop():
    out = np.empty((0, 64, 48, 3), np.uint8)
    cut_crops(PICTURE, np.empty((0, 2, 3)), out)


def test_a_boxs_centre_comes_to_the_crops_centre():
    centres, sizes = box.centres_and_sizes(np.array([[50.0, 40.0, 31.0, 41.0]]), 48 / 64)
    out = np.empty((1, 64, 48, 3), np.uint8)
    picture = np.zeros_like(PICTURE)
    picture[60, 65] = picture[61, 65] = picture[60, 66] = picture[61, 66] = 255
    cut_crops(picture, box.crop_affines(centres, sizes, 48, 64), out)
    weights = out[0, ..., 0].astype(float)
    y, x = (np.indices(weights.shape) * weights).sum(axis=(1, 2)) / weights.sum()
    assert abs(x - 24) < 0.5
    assert abs(y - 32) < 0.5
