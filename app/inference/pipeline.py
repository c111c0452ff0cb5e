"""From picture files and boxes to people: the one module that knows the order of the stages.

decode and crop run on picture threads, the network and its keypoints on the scheduler's lanes, nothing on the event loop.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.inference.model_store import ModelError, stored_models
from app.inference.pose import Crops, PoseModel, person_scores
from app.inference.scheduler import Scheduler
from app.inference.session import take_one_thread_each, usable_cores
from app.settings import Settings
from app.telemetry.metrics import Metrics
from app.vision import box, image

log = logging.getLogger(__name__)

Float64 = npt.NDArray[np.float64]


class ModelNotFound(Exception):
    """A request names a model that the store does not hold."""


class NotReady(Exception):
    """The models are still being warmed up, or no lane is left."""


class PictureError(Exception):
    """A picture or its boxes are at fault; `__cause__` tells how, `picture` is its place in the request."""

    def __init__(self, picture: int) -> None:
        super().__init__(picture)
        self.picture = picture


@dataclass(frozen=True, slots=True)
class PoseTask:
    """What to do: picture files with the boxes [N, 4] of their people, and how."""

    pictures: Sequence[bytes]
    boxes: Sequence[Float64]
    model: str | None
    flip_test: bool
    deadline: float  # on the event loop's clock
    keep_pixels: bool = False  # of the decoded pictures, for drawing


@dataclass(frozen=True, slots=True)
class People:
    """The people of one picture. Places are in pixels of the upright picture, of `width` × `height`."""

    width: int
    height: int
    boxes: Float64  # [N, 4]
    box_scores: Float64  # [N]
    keypoints: Float64  # [N, K, 3]: x, y, score
    scores: Float64  # [N]
    pixels: npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The people of each picture, by which model, and the seconds that each stage took."""

    model: PoseModel
    people: list[People]
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A decoded picture's size, its people's crops, and the seconds that both took."""

    width: int
    height: int
    crops: Crops
    decode_seconds: float
    crop_seconds: float
    pixels: npt.NDArray[np.uint8] | None


class Pipeline:
    """The models of a store, the threads that run them, and the way of a request through them."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Load and verify every model of the store. Raises ModelError that names the file and the fault."""
        take_one_thread_each()
        self._settings = settings
        self._metrics = metrics
        self._models = {
            f"{name}/{version}": PoseModel.load(folder) for name, version, folder in stored_models(settings.model_store)
        }
        if not self._models:
            raise ModelError("the model store holds no model; POSE_MODEL_STORE names its folder")
        try:
            self.default = self.find(settings.default_model).description.id
        except ModelNotFound as error:
            raise ModelError(f"POSE_DEFAULT_MODEL: {error}") from error
        self._lanes = settings.lanes or usable_cores()
        self.scheduler = Scheduler(self._lanes, settings.queue_crops, settings.max_batch_crops, metrics)
        self._picture_threads = ThreadPoolExecutor(self._lanes, "pictures")
        self._warm = False

    @property
    def models(self) -> list[PoseModel]:
        """The loaded models, by name and version."""
        return list(self._models.values())

    @property
    def why_not_ready(self) -> str | None:
        """Why no work is taken at present; None where it is."""
        if not self._warm:
            return "The models are being warmed up."
        return None if self.scheduler.ready else "No lane is running."

    async def start(self) -> None:
        """Open the lanes and run every batch size of every model once, which also measures the capacity."""
        self.scheduler.start()
        loop = asyncio.get_running_loop()
        for model in self._models.values():
            seconds = await loop.run_in_executor(self._picture_threads, self._warm_up, model)
            description = model.description
            if description.id == self.default:
                self.scheduler.seconds_per_crop = seconds
            self._metrics.capacity.labels(description.id).set(self._lanes / seconds)
            self._metrics.model_info.labels(
                description.name, description.version, description.precision, description.sha256
            ).set(1)
            log.info("model %s is warm", description.id, extra={"ms_per_crop": round(seconds * 1000, 2)})
        self._warm = True

    async def stop(self) -> None:
        """Close the lanes and the picture threads."""
        self._warm = False
        await self.scheduler.stop()
        self._picture_threads.shutdown(wait=False, cancel_futures=True)

    def find(self, name: str | None) -> PoseModel:
        """The model of that name/version, or the latest of that name; the default for None. Raises ModelNotFound."""
        wanted = self.default if name is None else name
        if wanted in self._models:
            return self._models[wanted]
        versions = [model for model in self._models.values() if model.description.name == wanted]
        if not versions:
            raise ModelNotFound(f"There is no model {wanted!r}; there are {', '.join(self._models)}.")
        return versions[-1]

    async def estimate(self, task: PoseTask) -> Outcome:
        """Find the keypoints of everybody boxed.

        Raises ModelNotFound, NotReady, QueueFull, TooManyCrops, PictureError, TimeoutError, BatchFailed and LaneLost.
        """
        if self.why_not_ready:
            raise NotReady(self.why_not_ready)
        model = self.find(task.model)
        with self.scheduler.admit(max(1, sum(map(len, task.boxes)))):
            async with asyncio.timeout_at(task.deadline):
                prepared = await self._prepare_all(task, model)
            crops = np.concatenate([picture.crops.pixels for picture in prepared])
            network = model.with_flip_test if task.flip_test else model.plain
            ticket = await self.scheduler.run(network, crops, task.deadline)
        people = _people(model, task, prepared, [values for values in ticket.results if values is not None])
        self._metrics.images.inc(len(people))
        for picture in people:
            self._metrics.people_per_image.observe(len(picture.boxes))
        seconds = {
            "decode": sum(picture.decode_seconds for picture in prepared),
            "crop": sum(picture.crop_seconds for picture in prepared),
            "queue": ticket.queue_seconds,
            "infer": ticket.infer_seconds,
            "keypoints": ticket.keypoint_seconds,
        }
        return Outcome(model, people, seconds)

    async def _prepare_all(self, task: PoseTask, model: PoseModel) -> list[_Prepared]:
        loop = asyncio.get_running_loop()
        jobs = [
            loop.run_in_executor(self._picture_threads, self._prepare, task, number, model)
            for number in range(len(task.pictures))
        ]
        try:
            return await asyncio.gather(*jobs)
        except BaseException:
            for job in jobs:
                job.cancel()
            raise

    def _prepare(self, task: PoseTask, number: int, model: PoseModel) -> _Prepared:
        """Decode picture `number` and cut out its people; on a picture thread."""
        started = time.perf_counter()
        try:
            picture = image.decode(task.pictures[number], self._settings.max_image_pixels)
            height, width = picture.shape[:2]
            box.check_boxes(task.boxes[number], width, height)
        except (image.InvalidImage, image.ImageTooLarge, box.InvalidBox) as error:
            raise PictureError(number) from error
        decoded = time.perf_counter()
        crops = model.cut(picture, task.boxes[number])
        return _Prepared(
            width,
            height,
            crops,
            decoded - started,
            time.perf_counter() - decoded,
            picture if task.keep_pixels else None,
        )

    def _warm_up(self, model: PoseModel) -> float:
        """Run every batch size once; the seconds a crop of the quickest."""
        shape = model.description.input
        quickest = float("inf")
        for size in range(1, self._settings.max_batch_crops + 1):
            crops = np.zeros((size, shape.height, shape.width, 3), np.uint8)
            model.with_flip_test.run(crops)
            model.plain.run(crops)
            started = time.perf_counter()
            model.plain.run(crops)
            quickest = min(quickest, (time.perf_counter() - started) / size)
        return quickest


def _people(
    model: PoseModel, task: PoseTask, prepared: list[_Prepared], results: list[npt.NDArray[np.float32]]
) -> list[People]:
    """The results of all crops, dealt out to their pictures and mapped into their pixels."""
    joints = len(model.description.keypoints.names)
    cells = np.stack(results) if results else np.zeros((0, joints, 3), np.float32)
    people, start = [], 0
    for boxes, picture in zip(task.boxes, prepared, strict=True):
        keypoints = model.to_picture(cells[start : start + len(boxes)], picture.crops)
        start += len(boxes)
        box_scores = np.ones(len(boxes))
        people.append(
            People(
                picture.width,
                picture.height,
                boxes,
                box_scores,
                keypoints,
                person_scores(keypoints, box_scores),
                picture.pixels,
            )
        )
    return people
