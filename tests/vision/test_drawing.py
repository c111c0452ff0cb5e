"""Skeletons on a picture: only what is seen is drawn, left and right are told apart, and no place is too far."""

import cv2
import numpy as np
import pytest

from app.vision.drawing import draw_people, encode

NAMES = ("nose", "left_shoulder", "left_elbow", "right_shoulder", "right_elbow")
SKELETON = ((2, 3), (4, 5), (1, 2))
PICTURE = np.full((120, 160, 3), 30, np.uint8)


def person(*places: tuple[float, float, float]) -> np.ndarray:
    return np.array([places], np.float64)


ARMS = person((80, 10, 0.9), (100, 40, 0.9), (140, 80, 0.9), (60, 40, 0.9), (20, 80, 0.9))


def draw(people: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    picture = PICTURE.copy()
    draw_people(picture, people, SKELETON, NAMES, threshold)
    return picture


def test_lines_are_drawn_between_joints():
    drawn = draw(ARMS)
    assert drawn.shape == PICTURE.shape
    assert (drawn[60, 120] != 30).any()
    assert (drawn[60, 40] != 30).any()
    assert (drawn[110] == 30).all()


def test_left_and_right_have_colours_of_their_own():
    drawn = draw(ARMS).astype(int)
    left, right = drawn[60, 120], drawn[60, 40]
    assert left[0] > 2 * left[2]  # blue
    assert right[2] > 2 * right[0]  # orange: red-blind and green-blind people see blue and yellow


def test_the_joints_of_large_people_have_a_rim_that_is_seen():
    large = np.full((3000, 2000, 3), 30, np.uint8)
    draw_people(large, person((1000, 300, 0.9), (1000, 1500, 0.9), (1000, 2700, 0.9), (0, 0, 0), (0, 0, 0)), (), NAMES, 0.5)
    across = large[1500, 1000:1030].astype(int)  # of a dot of the left, from its middle on
    assert (across[0] == 255).all()
    assert (across[:, 0] > 2 * across[:, 2]).sum() >= 3


def test_joints_below_the_threshold_and_their_lines_are_not_drawn():
    unsure = ARMS.copy()
    unsure[0, 2, 2] = 0.4
    drawn = draw(unsure)
    assert (drawn[60, 120] == 30).all()
    assert (drawn[80, 140] == 30).all()
    assert (drawn[60, 40] != 30).any()
    assert (draw(unsure, 0.4)[80, 140] != 30).any()


def test_scores_are_compared_as_answers_tell_them():
    assert (draw(person(*[(x, y, 0.49996) for x, y, _ in ARMS[0]])) != 30).any()
    assert (draw(person(*[(x, y, 0.49994) for x, y, _ in ARMS[0]])) == 30).all()


def test_nobody_and_unseen_people_leave_the_picture_as_it_is():
    assert (draw(np.zeros((0, 5, 3))) == PICTURE).all()
    assert (draw(ARMS, 0.95) == PICTURE).all()


@pytest.mark.parametrize("far", [1e4, 1e6, 1e12, 1e300])
def test_joints_far_outside_are_drawn_without_harm(far):
    for x, y in ((far, far), (-far, 50), (50, -far)):
        people = person((80, 10, 1), (100, 40, 1), (x, y, 1), (60, 40, 1), (20, 80, 1))
        assert (draw(people)[60, 40] != 30).any()


def test_one_pixel_can_be_drawn_on():
    picture = PICTURE[:1, :1].copy()
    draw_people(picture, person((0, 0, 1), (0, 0, 1), (0, 0, 1), (0, 0, 1), (0, 0, 1)), SKELETON, NAMES, 0)
    assert (picture != 30).any()


def test_a_png_keeps_every_pixel_and_a_jpeg_nearly():
    drawn = draw(ARMS)
    for extension, worst in ((".png", 0), (".jpg", 12)):
        back = cv2.imdecode(np.frombuffer(encode(drawn, extension), np.uint8), cv2.IMREAD_COLOR)
        assert np.abs(back.astype(int) - drawn).mean() <= worst
