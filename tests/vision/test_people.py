"""Who of the found people is nobody else's second skeleton."""

import numpy as np
import pytest

from app.vision.people import distinct_people

BOX = np.array([100.0, 100, 80, 200])  # size 126: the same place is within 9.5 pixels


def person(rng, score=0.9):
    """A person in BOX: 17 joints with that score."""
    places = BOX[:2] + rng.random((17, 2)) * BOX[2:]
    return np.hstack([places, np.full((17, 1), score)])


def moved(joints, by):
    """The same joints so many pixels further right and down."""
    return np.add(joints, (by, by, 0))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def distinct(people, scores, boxes=None):
    boxes = [BOX] * len(people) if boxes is None else boxes
    return distinct_people(np.array(people), np.array(scores), np.array(boxes)).tolist()


def test_of_a_person_found_twice_the_better_stays(rng):
    whole = person(rng)
    again = moved(whole, 5)
    assert distinct([again, whole], [0.5, 0.6]) == [False, True]
    assert distinct([moved(whole, 9), whole], [0.5, 0.6]) == [True, True]


def test_a_part_is_the_same_person_though_it_guesses_the_rest(rng):
    whole, part = person(rng), person(rng)
    part[:9] = moved(whole[:9], 2)
    assert distinct([whole, part], [0.6, 0.5]) == [True, False]
    part[:9, :2] += 20
    assert distinct([whole, part], [0.6, 0.5]) == [True, True]


def test_joints_without_a_score_tell_nothing(rng):
    whole, part = person(rng), person(rng, score=0.1)
    assert distinct([whole, whole * [1, 1, 0.1]], [0.6, 0.0]) == [True, True]
    part[:3] = whole[:3]
    assert distinct([whole, part], [0.6, 0.5]) == [True, False]


def test_near_is_relative_to_the_smaller_person(rng):
    small = BOX * [1, 1, 0.5, 0.5]
    whole = person(rng)
    again = moved(whole, 5)
    assert distinct([whole, again], [0.6, 0.5], [BOX, small]) == [True, True]


def test_the_twin_of_a_twin_stays_if_it_is_far_from_the_best(rng):
    best = person(rng)
    assert distinct([best, moved(best, 6), moved(best, 12)], [0.9, 0.8, 0.7]) == [True, False, True]


def test_nobody_is_nobody():
    assert distinct_people(np.zeros((0, 17, 3)), np.zeros(0), np.zeros((0, 4))).tolist() == []
