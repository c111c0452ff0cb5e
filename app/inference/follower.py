"""The people of a video, frame by frame: the detector searches once a second, and soon after somebody fades or is lost.

Between, the joints of a frame tell where to look in the next.
"""

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from app.inference.pipeline import Outcome, People, PictureError, Pipeline, PoseTask
from app.vision import box, detection, tracking
from app.vision.people import SURE, distinct_people, person_scores, same_people

Bool = npt.NDArray[np.bool_]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

_SEARCH_SECONDS = 1.0
_SOON_SECONDS = 0.2  # from one search to the next where somebody has faded or is lost
_STALE_SECONDS = 0.25  # after which people are hardly where their joints were
_REMEMBERED_SECONDS = 1.5  # for which somebody who is lost keeps their number
_SAME_BOX = 0.3  # intersection over union of where somebody was looked for and where the detector finds somebody
# Mean scores of sure joints. Of boxes around dev people 99 % have the least and 76 % the sure one, of boxes around nobody
# 67 % and 1 %. Background has some 0.4 to 0.55 of the score of who stood before it.
_LEAST_SCORE, _SURE_SCORE = 0.25, 0.5
_FADED = 0.6  # of the score at the last search that found somebody
_AS_BEFORE = 0.8  # of the same: enough for somebody whom a search does not find …
_MISSES, _MOST_MISSES = 3, 10  # … so many times in a row; then a sure score is, and then nothing
_GAPS = 4  # between frames, whose mean is taken: as many as come at once where a network holds them up
_AHEAD_SECONDS = 1.0  # for which people are taken to move on as they did


@dataclass(frozen=True, slots=True)
class Followed:
    """The people of a frame with the numbers that they keep while they are followed, oldest first; joints are smoothed."""

    ids: list[int]
    people: People
    seconds: dict[str, float]  # of each stage


@dataclass(frozen=True, slots=True)
class _Track:
    """Somebody as they were seen last, and where to look for them in the next frame."""

    id: int
    box: Float64  # [4], of the next frame
    margins: Float64  # [4], of the box in which they were found last
    box_score: float
    sure: Bool  # [K], which joints were
    motion: tracking.Motion  # of their joints, [K, 2]
    seen: float  # when
    found_score: float  # of their joints, at the last search that found them
    misses: int  # searches since then


@dataclass(frozen=True, slots=True)
class _Seen:
    """The people of a frame: their ids, 0 for newcomers, and whether the detector found them in it."""

    people: People
    ids: Int64
    found: Bool


class Follower:
    """Follows the people of one video with the pipeline that all requests share."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._tracks: dict[int, _Track] = {}  # by id: who was in the last frame, and who was lost a moment ago
        self._size = (0, 0)  # of the last frame
        self._time = -np.inf  # of the last frame
        self._gaps = deque[float](maxlen=_GAPS)
        self._interval = 0.0  # from frame to frame, their mean: arrivals are uneven where the video is not
        self._searched = -np.inf
        self._next_search = -np.inf
        self._next_id = 1

    async def follow(self, task: PoseTask, time: float) -> Followed:
        """The people of the next frame, which is the task's one picture, taken at `time` (seconds).

        Raises what Pipeline.estimate raises; the frame counts as not seen then.
        """
        seconds: dict[str, float] = {}
        here = [track for track in self._tracks.values() if track.seen == self._time]
        lost = [track for track in self._tracks.values() if self._time > track.seen > time - _REMEMBERED_SECONDS]
        seen = None
        if here and time < self._next_search and time - self._time <= _STALE_SECONDS:
            least = [min(_LEAST_SCORE, _FADED * track.found_score) for track in here]
            seen = await self._look_at(task, here, least, time, seconds)
        if seen is None:
            seen = await self._search(task, here, lost, time, seconds)
            self._searched, self._next_search = time, time + _SEARCH_SECONDS
        return self._kept(seen, task.max_people, time, seconds)

    async def _search(
        self, task: PoseTask, here: list[_Track], lost: list[_Track], time: float, seconds: dict[str, float]
    ) -> _Seen:
        """Find everybody, and look for those who were here and are not found. Who is found where somebody was is the same."""
        # Who is cut to how many may be told is not one who is not found. But no more than one request may ask for.
        most = max(task.max_people, min(task.max_people + len(here), self._pipeline.scheduler.admission.limit))
        people = _people(await self._pipeline.estimate(replace(task, max_people=most)), seconds)
        seen = _Seen(people, np.zeros(len(people.scores), np.int64), np.ones(len(people.scores), np.bool_))
        if (people.width, people.height) != self._size:
            self._tracks = {}
            return seen
        # Whoever was here has walked on, or stopped. Who was lost may besides be hidden by who stands there now.
        for known, ahead in ((here, True), (here, False), (lost, True), (lost, False)):
            free = np.flatnonzero(seen.ids == 0)
            tracks = [track for track in known if track.id not in seen.ids]
            if tracks and len(free):
                boxes = self._ahead(tracks, time) if ahead else np.array([track.box for track in tracks])
                for track, person in tracking.same_boxes(boxes, people.boxes[free], _SAME_BOX):
                    seen.ids[free[person]] = tracks[track].id
        missed = [track for track in here if track.id not in seen.ids and track.misses < _MOST_MISSES]
        if not missed:
            return seen
        least = [
            max(_LEAST_SCORE, min(_AS_BEFORE * track.found_score, _SURE_SCORE)) if track.misses < _MISSES else _SURE_SCORE
            for track in missed
        ]
        also = await self._look_at(task, missed, least, time, seconds)
        return seen if also is None else _joined(seen, also)

    def _ahead(self, tracks: list[_Track], time: float) -> Float64:
        """Where people are looked for at `time`: boxes [N, 4], which move on as their joints did, within the frame."""
        boxes = np.array([track.box for track in tracks])
        moved = boxes.copy()
        for row, track in enumerate(tracks):
            if track.sure.any():
                moved[row, :2] += np.median(track.motion.speeds[track.sure], axis=0) * min(time - track.seen, _AHEAD_SECONDS)
        low = np.clip(moved[:, :2], 0, self._size)
        high = np.clip(moved[:, :2] + moved[:, 2:], 0, self._size)
        moved = np.hstack([low, high - low])
        return np.where(detection.on_picture(moved)[:, None], moved, boxes)

    async def _look_at(
        self, task: PoseTask, tracks: list[_Track], least: list[float], time: float, seconds: dict[str, float]
    ) -> _Seen | None:
        """Those of the tracks who score `least` or more where they are looked for; None where frames have changed size."""
        try:
            outcome = await self._pipeline.estimate(replace(task, boxes=[self._ahead(tracks, time)]))
        except PictureError as error:
            if isinstance(error.__cause__, box.InvalidBox):
                return None
            raise
        people = _people(outcome, seconds)
        if (people.width, people.height) != self._size:
            return None
        kept = people.scores >= np.array(least)
        box_scores = np.array([track.box_score for track in tracks])
        people = replace(people, box_scores=box_scores, scores=person_scores(people.keypoints, box_scores))
        ids = np.array([track.id for track in tracks], np.int64)
        return _Seen(people.of(kept), ids[kept], np.zeros(int(kept.sum()), np.bool_))

    def _kept(self, seen: _Seen, most: int, time: float, seconds: dict[str, float]) -> Followed:
        """Who is told: nobody twice, and at most so many, first those who are followed and found, or surely there: the
        search ends before them where more people than may be told are before them."""
        seen = _told_once(seen)
        sure = person_scores(seen.people.keypoints, np.ones(len(seen.ids))) >= _SURE_SCORE
        best = np.argsort(-(seen.people.scores + ((seen.found | sure) & (seen.ids > 0))), kind="stable")[:most]
        ids = seen.ids[best]
        new = np.flatnonzero(ids == 0)
        ids[new] = np.arange(self._next_id, self._next_id + len(new))
        self._next_id += len(new)
        oldest = np.argsort(ids)
        ids, people, found = ids[oldest], seen.people.of(best[oldest]), seen.found[best[oldest]]
        motion = self._motion(people, ids, time)
        margins = tracking.margins(people.boxes, people.keypoints)
        for row in np.flatnonzero(~found).tolist():
            margins[row] = self._tracks[int(ids[row])].margins
        around = tracking.next_boxes(people.boxes, people.keypoints, margins, people.width, people.height)
        self._remember(_Seen(people, ids, found), motion, around, margins, time)
        looked_at = ~found & detection.on_picture(around)
        boxes = np.where(looked_at[:, None], around, people.boxes)  # where they are, not where they were looked for
        keypoints = np.concatenate([motion.places, people.keypoints[..., 2:]], axis=2)
        return Followed(ids.tolist(), replace(people, boxes=boxes, keypoints=keypoints), seconds)

    def _motion(self, people: People, ids: Int64, time: float) -> tracking.Motion:
        """The smoothed joints of the people; as they are of those who were not in the last frame, and of joints that were
        unsure there."""
        motion = tracking.at_rest(people.keypoints[..., :2])
        passed = time - self._time
        if not 0 < passed <= _SEARCH_SECONDS:
            self._gaps.clear()
            return motion
        # The first two may come as a pair, and one that is late tells little.
        self._gaps.append(min(passed, 4 * self._interval) if self._gaps else max(passed, 1 / 30))
        self._interval = sum(self._gaps) / len(self._gaps)
        for row, id_ in enumerate(ids.tolist()):
            if (track := self._tracks.get(id_)) is None or track.seen != self._time:
                continue
            sure = track.sure[:, None]
            places = motion.places[row]
            known = track.motion
            then = replace(
                known, places=np.where(sure, known.places, places), innovations=np.where(sure, known.innovations, 0.0)
            )
            size = float(np.sqrt(people.boxes[row, 2:].prod()))
            smoothed = tracking.smooth(then, places, size, self._interval)
            motion.places[row], motion.innovations[row] = smoothed.places, smoothed.innovations
            motion.speeds[row] = smoothed.speeds
        return motion

    def _remember(self, seen: _Seen, motion: tracking.Motion, around: Float64, margins: Float64, time: float) -> None:
        """Make tracks of the people that are seen, with those of before who are lost, and search soon where it is needed."""
        people = seen.people
        scores = person_scores(people.keypoints, np.ones(len(seen.ids))).tolist()
        searched = self._searched == time
        tracks = {}
        soon = False
        for row in np.flatnonzero(detection.on_picture(around)).tolist():
            track = self._tracks.get(int(seen.ids[row]))
            known = track is not None and not seen.found[row]
            found_score, misses = (track.found_score, track.misses + searched) if track and known else (scores[row], 0)
            faded = scores[row] < _FADED * found_score
            soon |= not searched and not misses and faded
            now = _Track(
                int(seen.ids[row]),
                around[row],
                margins[row],
                float(people.box_scores[row]),
                people.keypoints[row, :, 2] > SURE,
                tracking.Motion(motion.places[row], motion.innovations[row], motion.speeds[row]),
                time,
                found_score,
                misses,
            )
            if track and known and faded and not misses:  # joints on what hides them, or where they stood, lead nowhere
                now = _gone_on(now, track, self._ahead([track], time)[0])
            tracks[now.id] = now
        absent = {id_: track for id_, track in self._tracks.items() if id_ not in seen.ids}
        lost = {id_: track for id_, track in absent.items() if time - track.seen < _REMEMBERED_SECONDS}
        # Soon, and where the lost are not found then, after twice as long each time.
        waits = [max(_SOON_SECONDS, self._searched - track.seen) for track in lost.values()] + [_SOON_SECONDS] * soon
        self._next_search = min([self._next_search, *(self._searched + wait for wait in waits)])
        self._tracks, self._size, self._time = tracks | lost, (people.width, people.height), time


def _gone_on(now: _Track, before: _Track, box: Float64) -> _Track:
    """Somebody at `box`, who moves as before; joints that are unsure now are where they were."""
    sure = now.sure[:, None]
    motion = tracking.Motion(
        np.where(sure, now.motion.places, before.motion.places),
        np.where(sure, now.motion.innovations, before.motion.innovations),
        before.motion.speeds,
    )
    return replace(now, box=box, sure=before.sure, motion=motion)


def _told_once(seen: _Seen) -> _Seen:
    """Without those who are somebody else twice: the detector's box is the better one, and the number is who was followed."""
    people = seen.people
    ranks = people.scores + seen.found
    kept = distinct_people(people.keypoints, ranks, people.boxes)
    ids = seen.ids.copy()
    dropped = ~kept & (ids > 0)
    if dropped.any():
        same = same_people(people.keypoints, people.boxes)
        for newcomer in np.flatnonzero(kept & (ids == 0)):
            tracks = np.flatnonzero(dropped & same[:, newcomer])
            if len(tracks):
                ids[newcomer], dropped[tracks[0]] = ids[tracks[0]], False
    return _Seen(people.of(kept), ids[kept], seen.found[kept])


def _people(outcome: Outcome, seconds: dict[str, float]) -> People:
    """The people of an outcome of one picture, whose seconds are added to the given ones."""
    for stage, value in outcome.seconds.items():
        seconds[stage] = seconds.get(stage, 0.0) + value
    return outcome.people[0]


def _joined(some: _Seen, others: _Seen) -> _Seen:
    columns = map(np.concatenate, zip(some.people.columns, others.people.columns, strict=True))
    people = People(some.people.width, some.people.height, *columns)
    return _Seen(people, np.concatenate([some.ids, others.ids]), np.concatenate([some.found, others.found]))
