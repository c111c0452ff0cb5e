"""Boxes for the next frame, who is who, and the One Euro filter."""

import numpy as np
import pytest

from app.vision.tracking import Motion, at_rest, margins, next_boxes, same_boxes, smooth


def person(low, high, score=0.9, joints=17):
    """Joints [1, 17, 3] over the rectangle from `low` to `high`, the first `joints` of that score and the others of none."""
    keypoints = np.zeros((1, 17, 3))
    keypoints[0, :, :2] = np.linspace(low, high, 17)
    keypoints[0, :joints, 2] = score
    return keypoints


def test_the_next_box_lies_half_way_to_the_joints_and_their_margins():
    beyond = np.array([[0.1, 0.2, 0.3, 0.4]])
    box = next_boxes(np.array([[100.0, 100, 100, 200]]), person((120, 140), (220, 340)), beyond, 1000, 1000)
    around = np.array([120 - 20, 140 - 40, 100 + 20 + 60, 200 + 40 + 80])
    assert box[0] == pytest.approx((np.array([100, 100, 100, 200]) + around) / 2)


def test_somebody_still_is_looked_for_in_the_box_in_which_they_were_found():
    box, joints = np.array([[100.0, 100, 100, 200]]), person((110, 140), (180, 310))
    assert next_boxes(box, joints, margins(box, joints), 1000, 1000) == pytest.approx(box)


def test_margins_of_few_joints_are_the_usual_ones_and_none_is_beyond_reason():
    box = np.array([[100.0, 100, 800, 800]])
    assert margins(box, person((110, 140), (180, 310), joints=3)) == pytest.approx(np.array([[0.06, 0.13, 0.06, 0.07]]))
    assert margins(box, person((110, 140), (120, 150))).max() == 0.75
    assert margins(box, person((0, 0), (130, 150))).min() == -0.25
    assert margins(box, person((110, 140), (110, 140))) == pytest.approx(np.array([[0.06, 0.13, 0.06, 0.07]]))


def test_the_next_box_stays_in_the_picture():
    for low, high in (((-5, -5), (140, 140)), ((-300, 0), (-200, 90))):
        beyond = np.array([[-0.25, -0.25, -0.25, -0.25]])
        x, y, width, height = next_boxes(np.array([[0.0, 0, 100, 100]]), person(low, high), beyond, 100, 100)[0]
        assert x >= 0
        assert y >= 0
        assert 0 <= width <= 100 - x
        assert 0 <= height <= 100 - y


@pytest.mark.parametrize("unclear", [person((0, 0), (900, 900), score=0.2), person((0, 0), (900, 900), joints=3)])
def test_somebody_of_few_joints_is_looked_for_where_they_were(unclear):
    before = np.array([[100.0, 100, 100, 200]])
    assert next_boxes(before, unclear, np.zeros((1, 4)), 1000, 1000) == pytest.approx(before)


def test_each_box_is_of_one_pair_and_the_nearest_come_first():
    some = np.array([[0.0, 0, 10, 10], [2, 0, 10, 10], [500, 0, 10, 10]])
    others = np.array([[2.0, 0, 10, 10], [100, 100, 10, 10]])
    assert same_boxes(some, others, 0.3) == [(1, 0)]
    assert same_boxes(some[:1], others, 0.3) == [(0, 0)]
    assert same_boxes(some, np.zeros((0, 4)), 0.3) == []


def test_trembling_joints_become_calmer():
    random = np.random.default_rng(1)
    places = 100 + random.normal(0, 1, (100, 1, 17, 2))
    motion, seen = at_rest(places[0]), []
    for each in places[1:]:
        motion = smooth(motion, each, 200.0, 0.05)
        seen.append(motion.places)
    steps = [np.diff(np.array(way)[20:], axis=0).std() for way in (places, seen)]
    assert steps[1] < steps[0] / 2
    assert np.mean(seen) == pytest.approx(100, abs=0.2)


@pytest.mark.parametrize("speed", [0.25, 1, 3])  # sizes of the person a second
def test_joints_that_move_lag_little(speed):
    size, seconds = 200.0, 0.05
    motion = at_rest(np.zeros((1, 17, 2)))
    for frame in range(1, 60):
        place = frame * seconds * speed * size
        motion = smooth(motion, np.full((1, 17, 2), place / np.sqrt(2)), size, seconds)
    lag = np.hypot(*(place / np.sqrt(2) - motion.places[0, 0]))
    assert 0 < lag < 0.03 * size


@pytest.mark.parametrize("rate", [15, 60])  # frames a second
@pytest.mark.parametrize("speed", [0.25, 1, 3])  # sizes of the person a second
def test_the_speed_of_joints_that_move_steadily_is_theirs(speed, rate):
    size = 200.0
    motion = at_rest(np.zeros((1, 17, 2)))
    for frame in range(1, 4 * rate):
        motion = smooth(motion, np.full((1, 17, 2), frame / rate * speed * size), size, 1 / rate)
    assert motion.speeds == pytest.approx(np.full((1, 17, 2), speed * size), rel=0.01)


def test_the_near_and_the_far_are_smoothed_alike():
    before = Motion(np.zeros((1, 1, 2)), np.ones((1, 1, 2)), np.ones((1, 1, 2)))
    tenfold = Motion(before.places * 10, before.innovations * 10, before.speeds * 10)
    near = smooth(tenfold, np.full((1, 1, 2), 50.0), 1000.0, 0.04)
    far = smooth(before, np.full((1, 1, 2), 5.0), 100.0, 0.04)
    assert near.places == pytest.approx(far.places * 10)
