"""The detector's figures on boxes that are known."""

import pytest

from training.detector.evaluate import compared, figures, threshold_for
from training.plots import precision_recall_plot

TRUTH = {
    "images": [{"id": 1, "width": 640, "height": 480}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 99, 200], "area": 12_000, "iscrowd": 0, "num_keypoints": 9},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [200, 0, 50, 60], "area": 2_000, "iscrowd": 0, "num_keypoints": 0},
        {"id": 3, "image_id": 1, "category_id": 1, "bbox": [300, 0, 20, 30], "area": 300, "iscrowd": 0, "num_keypoints": 4},
        {"id": 4, "image_id": 1, "category_id": 1, "bbox": [400, 0, 200, 200], "area": 9_000, "iscrowd": 1},
        {"id": 5, "image_id": 1, "category_id": 1, "bbox": [0, 300, 90, 90], "area": 4_000, "iscrowd": 0,
         "iscrowd_unknown": True, "num_keypoints": 0},
    ],
}  # fmt: skip


def _found(box, score):
    return {"image_id": 1, "category_id": 1, "bbox": box, "score": score}


EXACT = [_found([0, 0, 99, 200], 0.9), _found([200, 0, 50, 60], 0.6), _found([300, 0, 20, 30], 0.4)]


def test_exact_boxes_are_perfect_and_crowds_do_not_count():
    more = [*EXACT, _found([420, 20, 40, 90], 0.95), _found([0, 300, 90, 90], 0.99)]
    measures, truth, precision = compared(TRUTH, more)
    assert measures["ap"] == pytest.approx(1)
    assert (precision > 0.999).all()
    assert sorted(truth.scores.tolist()) == [0.4, 0.6, 0.9]


def test_recall_goes_by_threshold_size_and_keypoints():
    _, truth, _ = compared(TRUTH, EXACT)
    assert truth.recall(0.5) == pytest.approx(2 / 3)
    assert truth.recall(0.5, keypoints_only=True) == 0.5
    assert truth.recall(0.5, 32**2, keypoints_only=True) == 1
    assert truth.recall(0.7, 32**2, 96**2) == 0
    assert truth.recall(0.7, 1e6) == -1  # there is nobody of that size


def test_a_misplaced_box_finds_nobody():
    measures, truth, _ = compared(TRUTH, [_found([60, 0, 100, 200], 0.9)])
    assert measures["ap50"] == 0
    assert truth.recall(0.01) == 0


def test_nothing_found_is_zero():
    measures, truth, _ = compared(TRUTH, [])
    assert measures["ap"] == 0
    assert truth.recall(0.01) == 0


def test_the_threshold_lets_through_as_many_boxes_as_allowed():
    scores = [0.9, 0.553, 0.55, 0.3]
    for photos, passing in ((10, 1), (20, 2), (5, 0), (100, 4)):
        threshold = threshold_for(scores, photos, 0.1)
        assert sum(score >= threshold for score in scores) <= photos * 0.1
        assert sum(score >= threshold - 0.01 for score in scores) >= passing
    assert threshold_for([], 10, 0.1) == 0.01


def test_the_card_has_all_figures():
    measures, truth, precision = compared(TRUTH, EXACT)
    rows = figures(measures, truth, [0.9, 0.2], 10, 0.5)
    assert rows["recall_keypoints_over_32"] == 1
    assert rows["nobody_boxes"] == 0.1
    assert precision_recall_plot({"drawn": precision}).startswith(b"\x89PNG")
