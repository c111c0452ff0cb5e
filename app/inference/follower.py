"""The people of a video, frame by frame. The detector searches once a second; between, their joints tell where to look."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from app.inference.pipeline import Outcome, People, PictureError, Pipeline, PoseTask
from app.inference.pose import distinct_people, person_scores
from app.vision import box, detection, tracking

Float64 = npt.NDArray[np.float64]

_SEARCH_SECONDS = 1.0
_SAME_BOX = 0.3  # intersection over union of where somebody was looked for and where the detector finds somebody
# Scores from which somebody who is followed is taken to be in the frame, between two searches, and where a search does not
# find them: a search lets those go who are no longer here. Of boxes around dev people 99 % and 76 % have them, of boxes around
# nobody 67 % and 1 %.
_LEAST_SCORE = 0.25
_LEAST_SCORE_UNFOUND = 0.5


@dataclass(frozen=True, slots=True)
class Followed:
    """The people of a frame with the numbers that they keep while they are followed, oldest first; joints are smoothed."""

    ids: list[int]
    people: People
    seconds: dict[str, float]  # of each stage


@dataclass(frozen=True, slots=True)
class _Tracks:
    """The people of the last frame, and where to look for them in the next."""

    ids: npt.NDArray[np.int64]
    people: People
    motion: tracking.Motion
    boxes: Float64  # of the next frame
    time: float


class Follower:
    """Follows the people of one video with the pipeline that all requests share."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._tracks: _Tracks | None = None
        self._next_id = 1
        self._next_search = -np.inf

    async def follow(self, task: PoseTask, time: float) -> Followed:
        """The people of the next frame, which is the task's one picture, taken at `time` (seconds).

        Raises what Pipeline.estimate raises; the frame counts as not seen then.
        """
        seconds: dict[str, float] = {}
        tracks = self._tracks
        if tracks is not None and len(tracks.ids) and time < self._next_search:
            still = await self._look_at(task, tracks, slice(None), _LEAST_SCORE, seconds)
            if still is not None:
                return self._kept(*still, task.max_people, time, seconds)
        return await self._search(task, time, seconds)

    async def _search(self, task: PoseTask, time: float, seconds: dict[str, float]) -> Followed:
        """Find everybody, and look for those who were here and are not found. Who is found where somebody was is the same."""
        people = _people(await self._pipeline.estimate(task), seconds)
        self._next_search = time + _SEARCH_SECONDS
        ids = np.zeros(len(people.scores), np.int64)
        tracks = self._tracks
        if tracks is not None and len(tracks.ids):
            pairs = tracking.same_boxes(tracks.boxes, people.boxes, _SAME_BOX)
            for track, person in pairs:
                ids[person] = tracks.ids[track]
            missed = np.setdiff1d(np.arange(len(tracks.ids)), [track for track, _ in pairs])
            also = await self._look_at(task, tracks, missed, _LEAST_SCORE_UNFOUND, seconds) if len(missed) else None
            if also is not None:
                people, ids = _joined(people, also[0]), np.concatenate([ids, also[1]])
        return self._kept(people, ids, task.max_people, time, seconds)

    async def _look_at(
        self, task: PoseTask, tracks: _Tracks, which: slice | npt.NDArray[np.int64], least: float, seconds: dict[str, float]
    ) -> tuple[People, npt.NDArray[np.int64]] | None:
        """Those of the tracks who score `least` or more where they are looked for, and their ids; None where the frames have
        changed their size."""
        before = _rows(tracks.people, which)
        try:
            people = _people(await self._pipeline.estimate(replace(task, boxes=[tracks.boxes[which]])), seconds)
        except PictureError as error:
            if isinstance(error.__cause__, box.InvalidBox):
                return None
            raise
        if (people.width, people.height) != (before.width, before.height):
            return None
        seen = people.scores >= least
        scores = person_scores(people.keypoints, before.box_scores)
        return _rows(replace(people, box_scores=before.box_scores, scores=scores), seen), tracks.ids[which][seen]

    def _kept(
        self, people: People, ids: npt.NDArray[np.int64], most: int, time: float, seconds: dict[str, float]
    ) -> Followed:
        """The people with their ids, 0 for newcomers, at most so many, and nobody twice."""
        followed = ids > 0
        ranks = people.scores + followed  # who is followed goes before a newcomer
        kept = np.flatnonzero(distinct_people(people.keypoints, ranks, people.boxes))
        kept = kept[np.argsort(-ranks[kept], kind="stable")[:most]]
        newcomers = kept[~followed[kept]]
        ids = ids.copy()
        ids[newcomers] = np.arange(self._next_id, self._next_id + len(newcomers))
        self._next_id += len(newcomers)
        kept = kept[np.argsort(ids[kept])]
        people, ids = _rows(people, kept), ids[kept]
        motion = self._motion(people, ids, time)
        boxes = tracking.next_boxes(people.boxes, people.keypoints, people.width, people.height)
        shown = detection.on_picture(boxes)
        self._tracks = _Tracks(
            ids[shown],
            _rows(people, shown),
            tracking.Motion(motion.places[shown], motion.speeds[shown]),
            boxes[shown],
            time,
        )
        keypoints = np.concatenate([motion.places, people.keypoints[..., 2:]], axis=2)
        return Followed(ids.tolist(), replace(people, keypoints=keypoints), seconds)

    def _motion(self, people: People, ids: npt.NDArray[np.int64], time: float) -> tracking.Motion:
        """The smoothed joints of the people, of newcomers as they are seen."""
        places = people.keypoints[..., :2]
        motion = tracking.at_rest(places)
        tracks = self._tracks
        if tracks is None or time <= tracks.time:
            return motion
        _, now, then = np.intersect1d(ids, tracks.ids, return_indices=True)
        before = tracking.Motion(tracks.motion.places[then], tracks.motion.speeds[then])
        sizes = np.sqrt(people.boxes[now, 2:].prod(axis=1))
        smoothed = tracking.smooth(before, places[now], sizes, time - tracks.time)
        motion.places[now], motion.speeds[now] = smoothed.places, smoothed.speeds
        return motion


def _people(outcome: Outcome, seconds: dict[str, float]) -> People:
    """The people of an outcome of one picture, whose seconds are added to the given ones."""
    for stage, value in outcome.seconds.items():
        seconds[stage] = seconds.get(stage, 0.0) + value
    return outcome.people[0]


def _rows(people: People, rows: slice | npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> People:
    columns = (people.boxes, people.box_scores, people.keypoints, people.scores)
    return People(people.width, people.height, *(column[rows] for column in columns))


def _joined(some: People, others: People) -> People:
    if not len(some.scores):  # and joints without expected errors
        return others
    pairs = (
        (some.boxes, others.boxes),
        (some.box_scores, others.box_scores),
        (some.keypoints, others.keypoints),
        (some.scores, others.scores),
    )
    return People(some.width, some.height, *(np.concatenate(pair) for pair in pairs))
