"""The detector's geometry: letterbox, non-maximum suppression, and back into the picture."""

import numpy as np
import pytest

from app.vision import detection

RANDOM = np.random.default_rng(7)


@pytest.mark.parametrize(
    ("height", "width", "content"),
    [(100, 200, (104, 208)), (400, 100, (208, 52)), (208, 208, (208, 208)), (1, 900, (1, 208))],
)
def test_a_picture_lies_at_the_top_left_as_large_as_fits(height, width, content):
    picture = np.full((height, width, 3), 200, np.uint8)
    out = np.zeros((208, 208, 3), np.uint8)
    gain = detection.letterbox(picture, out, 114)
    assert gain == pytest.approx(208 / max(height, width))
    assert (out[: content[0], : content[1]] == 200).all()
    assert (out[content[0] :] == 114).all()
    assert (out[:, content[1] :] == 114).all()


@pytest.mark.parametrize(
    ("height", "width", "shape"),
    [
        (480, 640, (320, 416)),  # 312
        (640, 427, (416, 288)),  # 277.6
        (600, 600, (416, 416)),
        (1, 900, (32, 416)),
        (320, 416, (320, 416)),
        (321, 416, (352, 416)),
        (2003, 2600, (320, 416)),  # 320.48, which is no row more
        (3, 4, (320, 416)),  # small pictures are enlarged
    ],
)
def test_a_letterbox_is_no_larger_than_it_needs_to_be(height, width, shape):
    assert detection.letterbox_shape((height, width), (416, 416), 32) == shape


def test_what_is_made_smaller_is_averaged():
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::4] = 255
    out = np.empty((100, 100, 3), np.uint8)
    detection.letterbox(stripes, out, 0)
    assert np.abs(out.astype(int) - 255 / 4).max() < 1


def test_a_picture_of_the_letterbox_size_is_copied():
    picture = RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    out = np.empty_like(picture)
    assert detection.letterbox(picture, out, 0) == 1
    assert (out == picture).all()


def candidates(*rows: tuple[float, float, float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(rows, np.float32)
    return table[:, :4], table[:, 4]


def test_of_boxes_that_overlap_the_best_remains_and_the_best_comes_first():
    boxes, scores = candidates((0, 0, 10, 20, 0.5), (1, 0, 11, 20, 0.7), (50, 0, 60, 20, 0.9), (5, 0, 15, 20, 0.6))
    found = detection.people(boxes, scores, 0.5, 5)
    assert found[:, 4].tolist() == pytest.approx([0.9, 0.7, 0.6, 0, 0])  # the last overlaps 0.7 by 6 / 14
    assert found[1, :4].tolist() == [1, 0, 11, 20]
    assert (found[3:] == 0).all()


def test_a_box_that_was_suppressed_suppresses_none():
    boxes, scores = candidates((0, 0, 10, 10, 0.9), (4, 0, 14, 10, 0.8), (8, 0, 18, 10, 0.7))
    assert detection.people(boxes, scores, 0.4, 3)[:, 4].tolist() == pytest.approx([0.9, 0.7, 0])


def test_no_more_people_than_asked_for():
    boxes, scores = candidates(*((30 * i, 0, 30 * i + 10, 10, 0.1 + 0.01 * i) for i in range(50)))
    assert detection.people(boxes, scores, 0.5, 3)[:, 4].tolist() == pytest.approx([0.59, 0.58, 0.57])


def test_the_best_of_many_candidates_are_found():
    corners = RANDOM.uniform(0, 300, (3000, 2)).astype(np.float32)
    boxes, scores = np.concatenate([corners, corners + 8], axis=1), RANDOM.random(3000).astype(np.float32)
    found = detection.people(boxes, scores, 0.6, 100)
    assert found[0, 4] == scores.max()
    assert (np.diff(found[:, 4]) <= 0).all()
    assert (found[:, 4] > 0).all()


def test_found_corners_come_back_as_boxes_within_the_picture():
    corners = np.array([[104, 52, 156, 104], [-10, -10, 500, 500], [150, 300, 160, 310]], np.float32)
    boxes = detection.to_picture(corners, 0.52, 400, 200)
    assert boxes[0] == pytest.approx([200, 100, 100, 100])
    assert boxes[1] == pytest.approx([0, 0, 400, 200])
    assert boxes[2, 3] == 0  # it lies in the rim below the picture


def test_letterbox_and_back_is_where_it_was():
    picture = np.zeros((300, 500, 3), np.uint8)
    picture[90:210, 200:260] = 255
    out = np.empty((416, 416, 3), np.uint8)
    gain = detection.letterbox(picture, out, 0)
    rows, columns = np.nonzero(out[..., 0] > 127)
    corners = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], np.float32)
    assert detection.to_picture(corners, gain, 500, 300)[0] == pytest.approx([200, 90, 60, 120], abs=1)
