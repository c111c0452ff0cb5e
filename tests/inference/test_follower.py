"""Who is told over the frames of a video, with the stored models; the frames' times are made up, 20 a second."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from app.inference.admission import TooManyCrops
from app.inference.follower import Followed, Follower
from app.inference.pipeline import Outcome, People, Pipeline, PoseTask
from app.settings import Settings
from app.telemetry.metrics import Metrics
from app.vision.people import person_scores

SECOND = 20  # frames

Frames = Iterable[np.ndarray]


def task_of(frame: bytes, max_people: int = 50) -> PoseTask:
    """To find the people of a frame within a minute."""
    deadline = asyncio.get_running_loop().time() + 60
    return PoseTask(pictures=[frame], boxes=[None], max_people=max_people, deadline=deadline)


@pytest.fixture(scope="module")
def woman(two_women) -> np.ndarray:
    """The part of a photo with one woman, 640 × 845."""
    return cv2.imdecode(np.frombuffer(two_women, np.uint8), cv2.IMREAD_COLOR)[:, :640]


@pytest.fixture(scope="module")
def nobody(two_women) -> np.ndarray:
    """The same with grass where she stood."""
    photo = cv2.imdecode(np.frombuffer(two_women, np.uint8), cv2.IMREAD_COLOR)
    grass = photo[:, :640].copy()
    grass[:, 100:370] = photo[:, 370:640]
    return grass


@pytest.fixture(scope="module")
def follow() -> Iterable[Callable[..., list[Followed]]]:
    """What a follower tells of frames."""
    with asyncio.Runner() as runner:
        pipeline = Pipeline(Settings(), Metrics())
        runner.run(pipeline.start())

        async def told(frames: Frames, rate: float, max_people: int) -> list[Followed]:
            follower = Follower(pipeline)
            found = []
            for number, frame in enumerate(frames):
                task = task_of(cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes(), max_people)
                found.append(await follower.follow(task, number / rate))
            return found

        def follow_all(frames: Frames, rate: float = SECOND, max_people: int = 50) -> list[Followed]:
            return runner.run(told(frames, rate, max_people))

        yield follow_all
        runner.run(pipeline.stop())


def ids(followed: list[Followed]) -> list[list[int]]:
    return [each.ids for each in followed]


def searched(followed: list[Followed]) -> list[bool]:
    return ["detect" in each.seconds for each in followed]


def test_the_detector_searches_once_a_second(follow, woman):
    seen = follow([woman] * (SECOND + 2))
    assert ids(seen) == [[1]] * len(seen)
    assert [number for number, search in enumerate(searched(seen)) if search] == [0, SECOND]


def test_frames_that_come_seldom_are_all_searched(follow, woman):
    assert all(searched(follow([woman] * 4, rate=3)))


def test_who_leaves_is_told_for_a_frame_or_two_at_most(follow, woman, nobody):
    seen = follow([woman] * 8 + [nobody] * 6)
    assert ids(seen)[:8] == [[1]] * 8
    assert ids(seen)[10:] == [[]] * 4


@pytest.mark.parametrize("at", [5, SECOND])  # between two searches, and at one
@pytest.mark.parametrize("spoilt", ["dark", "covered"])
def test_who_is_not_seen_for_a_moment_keeps_their_number(follow, woman, at, spoilt):
    bad = woman * 0 if spoilt == "dark" else woman.copy()
    bad[200:, 100:370] = 90
    seen = follow([woman] * at + [bad] + [woman] * 6)
    assert ids(seen)[:at] + ids(seen)[at + 5 :] == [[1]] * (at + 2)
    assert set(map(tuple, ids(seen))) <= {(1,), ()}


@pytest.mark.parametrize(("rate", "stops"), [(20, False), (60, False), (30, True)])
def test_who_walks_behind_something_keeps_their_number(follow, woman, nobody, rate, stops):
    """One size a second; the first frames without her show joints on the grass."""
    stage, walker = cv2.resize(nobody[:, 100:370], (1600, 845)), woman[:, 100:370]
    frames = []
    for number in range(int(1.6 * rate)):
        time = number / rate
        frame, left = stage.copy(), int(200 + 380 * (min(time, 0.8) if stops else time))
        if not 0.8 <= time < (1.4 if stops else 1.2):
            frame[:, left : left + 270] = walker
        frames.append(frame)
    seen = ids(follow(frames, rate=rate))
    assert seen[0] == seen[-1] == [1]
    assert [] in seen


def test_who_comes_back_late_has_another_number(follow, woman, nobody):
    seen = follow([woman] * 2 + [nobody] * (2 * SECOND) + [woman] * 2)
    assert ids(seen)[-1] == [2]


def test_the_box_that_is_told_lies_around_the_joints_of_its_own_frame(follow, woman):
    """Not where they were looked for, which is behind somebody who moves."""
    wide = np.concatenate([woman[:, ::-1][:, :300], woman], axis=1)
    seen = follow([wide[:, left : left + 640] for left in range(0, 280, 20)])
    for followed in seen[1:]:
        ((x, _, width, _),) = followed.people.boxes
        joints = followed.people.keypoints[0, :, 0]
        assert abs(x + width / 2 - (joints.min() + joints.max()) / 2) < 0.15 * width


@pytest.mark.parametrize("scale", [1.07, 0.5])
def test_frames_of_another_size_are_another_video(follow, woman, scale):
    other = cv2.resize(woman, None, fx=scale, fy=scale)
    (first,), seen = follow([other]), follow([woman] * 3 + [other] * 2)
    assert seen[3].people.keypoints == pytest.approx(first.people.keypoints)
    assert len(seen[4].ids) == 1


def test_there_are_so_many_people_and_no_more(follow, two_women):
    both = cv2.imdecode(np.frombuffer(two_women, np.uint8), cv2.IMREAD_COLOR)
    assert ids(follow([both] * (SECOND + 5), max_people=1)) == [[1]] * (SECOND + 5)


def test_joints_that_are_smoothed_keep_their_scores_and_errors(follow, woman):
    first, second = follow([woman, np.roll(woman, 6, axis=1)])
    raw = follow([np.roll(woman, 6, axis=1)])[0]
    assert second.people.keypoints.shape == raw.people.keypoints.shape
    moved = second.people.keypoints[0, :, 0] - first.people.keypoints[0, :, 0]
    assert 0 < np.median(moved) <= 6


def test_a_frame_that_fails_is_not_seen(follow, woman):
    with pytest.raises(TimeoutError):
        asyncio.run(_late(woman))


async def _late(frame: np.ndarray) -> None:
    pipeline = Pipeline(Settings(lanes=1), Metrics())
    await pipeline.start()
    try:
        data = cv2.imencode(".jpg", frame)[1].tobytes()
        task = task_of(data)
        follower = Follower(pipeline)
        assert (await follower.follow(task, 0.0)).ids == [1]
        late = replace(task, deadline=asyncio.get_running_loop().time())
        try:
            await follower.follow(late, 0.05)
        finally:
            assert (await follower.follow(task, 0.1)).ids == [1]
    finally:
        await pipeline.stop()


class StandIn:
    """A pipeline whose people stand still, all equally well seen; the detector finds those whose turn it is best."""

    def __init__(self, people: int, score: float = 0.7, queue_crops: int = 400) -> None:
        self.scheduler = SimpleNamespace(admission=SimpleNamespace(limit=queue_crops))
        self.boxes = np.array([[150.0 * number + 10, 100, 100, 250] for number in range(people)])
        self.shape = np.random.default_rng(3).uniform(0.05, 0.95, (17, 2))
        self.score = score
        self.searches = 0
        self.finds = True

    async def estimate(self, task: PoseTask) -> Outcome:
        boxes = task.boxes[0]
        scores = np.ones(0 if boxes is None else len(boxes))
        if boxes is None:
            self.searches += 1
            order = np.roll(np.arange(len(self.boxes)), self.searches)[: task.max_people if self.finds else 0]
            boxes, scores = self.boxes[order], np.linspace(0.9, 0.7, len(order))
            if len(boxes) > self.scheduler.admission.limit:
                raise TooManyCrops("too many")
        at = np.abs(self.boxes[:, 0] - boxes[:, :1]).argmin(axis=1)
        places = self.boxes[at][:, None, :2] + self.shape * self.boxes[at][:, None, 2:]
        keypoints = np.concatenate([places, np.full((len(at), 17, 1), self.score)], axis=2)
        people = People(150 * len(self.boxes) + 100, 500, boxes, scores, keypoints, person_scores(keypoints, scores))
        return Outcome([people], None, {})


def told_by(
    pipeline: StandIn, times: Iterable[float], max_people: int = 50, before: Callable[[float], None] = lambda _: None
) -> list[Followed]:
    """What is told of frames at those times; `before` is called with each before it is looked at."""

    async def follow_all() -> list[Followed]:
        follower, task, told = Follower(pipeline), task_of(b"", max_people), []
        for time in times:
            before(time)
            told.append(await follower.follow(task, time))
        return told

    return asyncio.run(follow_all())


def frames_of(seconds: int) -> list[float]:
    """Their times."""
    return [number / SECOND for number in range(seconds * SECOND)]


def told_of_a_ghost(score: float, seconds: int) -> list[list[int]]:
    """The numbers told of somebody of that score whom the detector finds in the first frame alone."""
    pipeline = StandIn(1, score=score)
    return ids(told_by(pipeline, frames_of(seconds), before=lambda time: setattr(pipeline, "finds", time == 0)))


@pytest.mark.parametrize(("score", "last"), [(0.4, 4), (0.7, 11)])  # seconds: the less sure, the sooner
def test_whoever_the_detector_does_not_find_again_is_told_for_some_searches_and_no_longer(score, last):
    told = told_of_a_ghost(score, 14)
    assert [number for number, numbers in enumerate(told) if numbers] == list(range(last * SECOND))


class Walker(StandIn):
    """One person who walks so many sizes a second, and whose joints are found in boxes that lie around them."""

    def __init__(self, speed: float) -> None:
        super().__init__(1)
        self.speed, self.now = speed * np.sqrt(100 * 250), 0.0

    async def estimate(self, task: PoseTask) -> Outcome:
        self.boxes[0, 0] = 10 + self.speed * self.now
        outcome = await super().estimate(task)
        (people,) = outcome.people
        missed = np.abs(people.boxes[:, 0] - self.boxes[0, 0]) > 60
        people.keypoints[missed, :, 2] = 0.05
        scores = person_scores(people.keypoints, people.box_scores)
        return replace(outcome, people=[replace(people, width=3000, scores=scores)])


@pytest.mark.parametrize("speed", [1.0, 1.5])
@pytest.mark.parametrize("phase", [0.0, 0.3, 0.6])
def test_whoever_walks_keeps_their_number_where_frames_become_seldom(speed, phase):
    pipeline = Walker(speed)
    often = np.arange(0, 1.2 + phase, 1 / 30)
    times = np.concatenate([often, often[-1] + np.arange(1, 12) / 6])
    told = told_by(pipeline, times.tolist(), before=lambda time: setattr(pipeline, "now", time))
    assert told[-1].ids == [1]


@pytest.mark.parametrize(("speed", "gap"), [(0.7, 0.8), (1.0, 0.5), (1.5, 0.3), (1.5, 1.2)])
def test_whoever_stops_while_no_frame_comes_keeps_their_number(speed, gap):
    pipeline = Walker(speed)
    times = [*np.arange(0, 1, 1 / 30), 1 + gap, 1.1 + gap]
    told = told_by(pipeline, times, before=lambda time: setattr(pipeline, "now", min(time, 29 / 30)))
    assert ids(told)[-2:] == [[1], [1]]


@pytest.mark.parametrize(("people", "max_people"), [(5, 1), (8, 2)])
def test_whoever_is_followed_is_not_given_up_for_others(people, max_people):
    pipeline = StandIn(people)
    told = told_by(pipeline, frames_of(10), max_people)
    assert ids(told) == [list(range(1, max_people + 1))] * len(told)
    places = np.array([each.people.keypoints[:, 0, 0] for each in told])
    assert np.ptp(places, axis=0).max() < 1
    assert pipeline.searches == 10


def test_a_search_asks_for_no_more_people_than_a_request_may():
    told = told_by(StandIn(80, queue_crops=60), frames_of(3))
    assert {len(each.ids) for each in told} == {50}


def test_whoever_has_no_sure_joint_is_gone_with_the_next_search():
    assert told_of_a_ghost(0.1, 2)[-1] == []
