"""From picture files and boxes to people: the one module that knows the order of the stages.

decode, letterbox, crop and draw run on picture threads, where requests take turns, the networks and what is made of their
output on the scheduler's lanes; the event loop only puts together what they give. Large pictures are decoded as small as a
stage can do with; while networks work they are not kept but decoded again: the memory of many requests stays that of a few.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from app.inference.admission import Room
from app.inference.detector import Detector
from app.inference.model_store import ModelError
from app.inference.models import open_models, warm_up
from app.inference.picture_threads import PictureThreads
from app.inference.pictures import Found, Overview, Prepared, is_heavy, overview, prepare
from app.inference.pose import PoseModel
from app.inference.scheduler import Network, Scheduler
from app.inference.session import take_one_thread_each, throttled_seconds, usable_cores
from app.settings import Settings
from app.telemetry.metrics import Metrics
from app.vision import box, drawing, image
from app.vision.people import distinct_people, person_scores

log = logging.getLogger(__name__)

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
UInt8 = npt.NDArray[np.uint8]

_MOST_THREADS = 4  # of a crop that is alone: the networks are small
_KEPT_PICTURES = 100  # with no more crops and pictures than that in the queue, small ones are kept while the detector works


class NoDetector(Exception):
    """A picture comes without boxes, and there is no detector."""


class NotReady(Exception):
    """No work is taken: models are not warm, lanes or picture threads stand still, or the service has stopped."""


class Unread(Exception):
    """Too much of what was drawn for others lies unread."""


class PictureError(Exception):
    """A picture or its boxes are at fault; `__cause__` tells how, `picture` is its place in the request."""

    def __init__(self, picture: int) -> None:
        super().__init__(picture)
        self.picture = picture


@dataclass(frozen=True, slots=True)
class Drawing:
    """A drawn picture: the kind of file, .jpg or .png, and the score from which joints are drawn."""

    extension: str
    threshold: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PoseTask:
    """What to do: picture files with the boxes [N, 4] of their people, None where the detector is to find them, and how."""

    pictures: Sequence[bytes]
    boxes: Sequence[Float64 | None]
    max_people: int  # that are found in a picture
    deadline: float  # on the event loop's clock
    model: str | None = None
    flip_test: bool = False
    detection_threshold: float | None = None  # None: the detector's
    drawing: Drawing | None = None  # of the first picture

    def is_heavy(self, number: int) -> bool:
        """Whether no other such picture is to be decoded beside this one."""
        return is_heavy(self.pictures[number])


@dataclass(frozen=True, slots=True)
class People:
    """The people of one picture. Places are in pixels of the upright picture, of `width` × `height`."""

    width: int
    height: int
    boxes: Float64  # [N, 4]
    box_scores: Float64  # [N]
    keypoints: Float64  # [N, K, 3 or 4]: x, y, score and, of a calibrated model, the expected error
    scores: Float64  # [N]

    @property
    def columns(self) -> tuple[Float64, Float64, Float64, Float64]:
        """What has a row for each of them."""
        return self.boxes, self.box_scores, self.keypoints, self.scores

    def of(self, rows: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> "People":
        """Those in the rows, in their order."""
        return People(self.width, self.height, *(column[rows] for column in self.columns))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The people of each picture; the drawn picture where one was asked for; the seconds of each stage."""

    people: list[People]
    drawn: bytes | None
    seconds: dict[str, float]


class Pipeline:
    """The models of a store, the threads that run them, and the way of a request through them."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Load and verify every model of the store. Raises ModelError that names the file and the fault."""
        take_one_thread_each()
        self._settings = settings
        self._metrics = metrics
        self._lanes = settings.lanes or usable_cores()
        threads = min(self._lanes, usable_cores(), _MOST_THREADS)
        self.models = open_models(settings, threads)
        self.scheduler = Scheduler(self._lanes, settings.queue_crops, settings.max_batch_crops, metrics)
        metrics.lanes.set(self._lanes)
        metrics.queue_limit.set(settings.queue_crops)
        self._picture_threads = PictureThreads(self._lanes)
        self._throttled = throttled_seconds()
        self._not_warm: str | None = "The models are being warmed up."
        self.draining = False  # the service is about to stop; what still comes is answered
        self._usual_people = 1.0  # that a search finds: a moving average
        self._unread = 0  # bytes of drawn pictures that clients have not read yet

    @property
    def why_not_ready(self) -> str | None:
        """Why no work is taken at present; None where it is."""
        if self._not_warm:
            return self._not_warm
        if not self.scheduler.ready:
            return "No lane runs, as many as there are lanes stand still, or a network fails on every crop."
        return self._picture_threads.why_stalled

    async def start(self) -> None:
        """Open the lanes and warm up every model, which also measures a first capacity."""
        self.scheduler.start()
        try:
            for model in self.models.pose.values():
                seconds = await self._warm_up(model)
                self.scheduler.quickest |= {model.plain: seconds, model.with_flip_test: 2 * seconds}
                if model.description.id == self.models.default:
                    self.scheduler.admission.seconds_per_crop = seconds
                capacity = partial(self._capacity, model.plain)
                self._metrics.capacity.labels(model.description.id).set_function(capacity)
            if detector := self.models.detector:
                self.scheduler.quickest[detector.network] = await self._warm_up(detector)
        except Exception:
            self._not_warm = "The warm-up failed; the log tells why."
            raise
        self._not_warm = None

    def _capacity(self, network: Network) -> float:
        return self._lanes / self.scheduler.quickest[network]

    async def stop(self) -> None:
        """Close the lanes and the picture threads."""
        self._not_warm = "The service has stopped."
        await self.scheduler.stop()
        self._picture_threads.close()

    def tell_throttling(self) -> None:
        """Bring the metric of throttled seconds up to date."""
        seconds = throttled_seconds()
        self._metrics.cpu_throttled.inc(max(0.0, seconds - self._throttled))
        self._throttled = seconds

    async def estimate(self, task: PoseTask) -> Outcome:
        """Find the keypoints of everybody, boxed or found.

        Raises ModelNotFound, NoDetector, NotReady, QueueFull, TooManyCrops, Unread, PictureError, TimeoutError, BatchFailed,
        LaneLost, ShuttingDown, and MemoryError where OpenCV has none left.
        """
        if why := self.why_not_ready:  # which picture threads change meanwhile
            raise NotReady(why)
        model = self.models.find(task.model)
        if task.drawing:
            self._check_unread()
        seconds: dict[str, float] = defaultdict(float)
        with self.scheduler.admission.admit(*self._expected_room(task), task.deadline) as room:
            async with asyncio.timeout_at(task.deadline):
                prepared = await self._prepared(task, model, room, seconds)
            crops = [crop for picture in prepared for crop in picture.crops.pixels]
            network = model.with_flip_test if task.flip_test else model.plain
            ticket = await self.scheduler.run(network, crops, task.deadline, room)
            people = _people(model, prepared, ticket.results)
            drawn = await self._drawn(task, task.drawing, model, people[0], seconds) if task.drawing else None
        seconds["queue"] += ticket.queue_seconds
        seconds["infer"], seconds["keypoints"] = ticket.infer_seconds, ticket.keypoint_seconds
        return Outcome(people, drawn, dict(seconds))

    def _expected_room(self, task: PoseTask) -> tuple[int, int]:
        """The room that a task takes before its pictures are searched, and the room that it leaves to others.

        It takes room for as many people in each picture as there usually are, and leaves a quarter of the queue, or what the
        lanes do not run in half of its time if that is more, to those that turn out to have more. Else nearly all that a full
        queue searches is searched in vain: there is no room for the people found, or no time.
        """
        limit, least = self.scheduler.admission.limit, _room_for(task, {})
        searched = sum(boxes is None for boxes in task.boxes)
        if not searched:
            return least, 0
        in_time = int(self.scheduler.admission.crops_until(task.deadline) / 2)
        leave = max(0, limit - max(least, min(limit - limit // 4, in_time)))
        usual = least + round(searched * (min(self._usual_people, task.max_people) - 1))
        return max(least, min(usual, limit - leave)), leave

    @contextmanager
    def unread(self, size: int) -> Iterator[None]:
        """Count a drawn picture of so many bytes as unread. A small file may be drawn as a large one, and be left unread."""
        self._unread += size
        try:
            yield
        finally:
            self._unread -= size

    def _check_unread(self) -> None:
        most = self._settings.queue_bytes
        if self._unread > most:
            raise Unread(f"More than {most:,} bytes of drawn pictures wait for their clients to read them.")

    async def _prepared(self, task: PoseTask, model: PoseModel, room: Room, seconds: dict[str, float]) -> list[Prepared]:
        """All pictures, searched where they are to be, and cut. The seconds of each stage are added, as below."""
        found = await self._search(task, seconds)
        for each in found.values():
            self._usual_people += 0.1 * (max(1, len(each.people)) - self._usual_people)
        room.resize(_room_for(task, found))
        prepared, wait = await self._picture_threads.run(
            lambda number: self._prepare(task, number, model, found.get(number)), range(len(task.pictures)), task.is_heavy
        )
        seconds["decode"] += sum(picture.decode_seconds for picture in prepared)
        seconds["crop"] += sum(picture.crop_seconds for picture in prepared)
        seconds["queue"] += wait
        return prepared

    async def _drawn(
        self, task: PoseTask, asked: Drawing, model: PoseModel, people: People, seconds: dict[str, float]
    ) -> bytes:
        """The first picture with its people as a file. It is decoded again: kept from the first time, those of all waiting
        requests would be."""
        started = time.perf_counter()
        async with asyncio.timeout_at(task.deadline):
            (drawn,), wait = await self._picture_threads.run(
                lambda n: self._draw(task.pictures[n], asked, model, people), [0], task.is_heavy
            )
        seconds["encode"] += time.perf_counter() - started - wait
        seconds["queue"] += wait
        return drawn

    def _draw(self, data: bytes, asked: Drawing, model: PoseModel, people: People) -> bytes:
        self._check_unread()
        joints = model.description.keypoints
        picture = image.decode(data, self._settings.max_image_pixels)
        drawing.draw_people(picture, people.keypoints, joints.skeleton, joints.names, asked.threshold)
        return drawing.encode(picture, asked.extension)

    async def _search(self, task: PoseTask, seconds: dict[str, float]) -> dict[int, Found]:
        """Who is found in the pictures without boxes, by the picture's number."""
        numbers = [number for number, boxes in enumerate(task.boxes) if boxes is None]
        if not numbers:
            return {}
        detector = self.models.detector
        if detector is None:
            raise NoDetector
        overviews, wait = await self._picture_threads.run(lambda n: self._overview(task, n, detector), numbers, task.is_heavy)
        ticket = await self.scheduler.run(detector.network, [letterbox for _, letterbox in overviews], task.deadline)
        people = [detector.found(each, task.detection_threshold, task.max_people) for each in ticket.results]
        seconds["decode"] += sum(o.decode_seconds for o, _ in overviews)
        seconds["detect"] += sum(o.letterbox_seconds for o, _ in overviews) + ticket.infer_seconds + ticket.keypoint_seconds
        seconds["queue"] += wait + ticket.queue_seconds
        return {n: Found(rows, seen) for n, rows, (seen, _) in zip(numbers, people, overviews, strict=True)}

    def _overview(self, task: PoseTask, number: int, detector: Detector) -> tuple[Overview, UInt8]:
        with _at_fault(number):
            keep = self.scheduler.admission.admitted <= _KEPT_PICTURES
            return overview(task.pictures[number], detector, self._settings.max_image_pixels, keep)

    def _prepare(self, task: PoseTask, number: int, model: PoseModel, found: Found | None) -> Prepared:
        with _at_fault(number):
            data, boxes = task.pictures[number], task.boxes[number]
            return prepare(data, boxes, found, model, self._settings.max_image_pixels, task.deadline)

    async def _warm_up(self, model: PoseModel | Detector) -> float:
        """Run all that a lane may run of a model once; the seconds a crop at the quickest."""
        most, told = self._settings.max_batch_crops, model.description
        try:
            (seconds,), _ = await self._picture_threads.run(lambda _: warm_up(model, most), [0])
        except Exception as error:
            raise ModelError(f"model {told.id} fails in its warm-up") from error
        self._metrics.model_info.labels(told.name, told.version, told.precision, told.sha256).set(1)
        log.info("model %s is warm", told.id, extra={"ms_per_crop": round(seconds * 1000, 2)})
        return seconds


@contextmanager
def _at_fault(number: int) -> Iterator[None]:
    """What is wrong with a picture or its boxes is told with its place."""
    try:
        yield
    except (image.InvalidImage, image.ImageTooLarge, box.InvalidBox) as error:
        raise PictureError(number) from error


def _room_for(task: PoseTask, found: Mapping[int, Found]) -> int:
    """Crops that a task holds room for: its people, one for a picture of nobody and until they are found, and one to draw."""
    people = sum(1 if boxes is None else max(1, len(boxes)) for n, boxes in enumerate(task.boxes) if n not in found)
    return people + sum(max(1, len(each.people)) for each in found.values()) + (task.drawing is not None)


def _people(model: PoseModel, prepared: list[Prepared], results: list[Float32]) -> list[People]:
    """The results of all crops, dealt out to their pictures and mapped into their pixels; who was found: once, best first."""
    joints, columns = len(model.description.keypoints.names), 3 if model.description.calibration is None else 4
    cells = np.stack(results) if results else np.zeros((0, joints, columns), np.float32)
    people, start = [], 0
    for picture in prepared:
        keypoints = model.to_picture(cells[start : start + len(picture.boxes)], picture.crops)
        start += len(picture.boxes)
        scores = person_scores(keypoints, picture.box_scores)
        told = People(picture.width, picture.height, picture.boxes, picture.box_scores, keypoints, scores)
        if picture.found:
            best = np.argsort(-scores, kind="stable")
            told = told.of(best[distinct_people(keypoints, scores, picture.boxes)[best]])
        people.append(told)
    return people
