"""The way of a request: requests take turns on the picture threads, and hold their room until all is done."""

import asyncio
import contextlib
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest

from app.inference.admission import QueueFull
from app.inference.pipeline import Drawing, PictureError, Pipeline, PoseTask
from app.settings import Settings
from app.telemetry.metrics import Metrics
from app.vision import drawing, image

BOX = np.array([[295.0, 15, 545, 595]])


def drive(work: Callable[[Pipeline], Coroutine[Any, Any, None]], lanes: int = 1) -> None:
    """Run `work` with a pipeline that is started and stopped."""

    async def main() -> None:
        pipeline = Pipeline(Settings(lanes=lanes), Metrics())
        await pipeline.start()
        try:
            await asyncio.wait_for(work(pipeline), 60)
        finally:
            await pipeline.stop()

    asyncio.run(main())


def task(pictures: list[bytes], seconds: float = 30, drawn: Drawing | None = None) -> PoseTask:
    deadline = asyncio.get_running_loop().time() + seconds
    return PoseTask(pictures=pictures, boxes=[BOX] * len(pictures), max_people=50, deadline=deadline, drawing=drawn)


def note_room(monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline, admitted: list[int]) -> None:
    """Add to the list, with each decoding from now on, how much room is held."""
    decode = image.decode

    def noted(*arguments: Any) -> Any:
        admitted.append(pipeline.scheduler.admission.admitted)
        return decode(*arguments)

    monkeypatch.setattr(image, "decode", noted)


def test_pictures_of_nobody_hold_room_each(monkeypatch, t_pose):
    admitted: list[int] = []

    async def work(pipeline: Pipeline) -> None:
        note_room(monkeypatch, pipeline, admitted)
        await pipeline.estimate(replace(task([t_pose] * 3), boxes=[np.zeros((0, 4))] * 3))
        assert pipeline.scheduler.admission.admitted == 0

    drive(work)
    assert admitted == [3, 3, 3]


def test_a_picture_to_be_searched_holds_the_room_of_as_many_people_as_there_usually_are(monkeypatch, two_women):
    """Else a full queue finds no room for nearly all whom it has searched."""
    admitted: list[int] = []

    async def work(pipeline: Pipeline) -> None:
        note_room(monkeypatch, pipeline, admitted)
        for held in (1, 1, 1, 1, 1, 1, 1, 2):
            admitted.clear()
            (people,) = (await pipeline.estimate(replace(task([two_women]), boxes=[None]))).people
            assert (len(people.boxes), admitted[0]) == (2, held)
        assert pipeline.scheduler.admission.admitted == 0

    drive(work)


def test_a_picture_is_not_searched_that_would_leave_no_time_for_the_people_found(monkeypatch, t_pose):
    """Else under overload nearly all are searched in vain. In half of the deadline the lane runs 40 crops, and 45 wait."""
    admitted: list[int] = []

    async def work(pipeline: Pipeline) -> None:
        note_room(monkeypatch, pipeline, admitted)
        pipeline.scheduler.admission.seconds_per_crop = 0.25
        with pipeline.scheduler.admission.admit(45):
            with pytest.raises(QueueFull):
                await pipeline.estimate(replace(task([t_pose], 20), boxes=[None]))
            assert admitted == []
            await pipeline.estimate(task([t_pose], 20))  # of a given box it is known what it takes
        await pipeline.estimate(replace(task([t_pose], 20), boxes=[None]))
        assert admitted[:2] == [46, 1]

    drive(work)


def test_nothing_more_is_decoded_after_the_deadline(monkeypatch):
    """Boxes of other sizes are cut from other decodings."""
    large, decoded = cv2.imencode(".jpg", np.zeros((4096, 4096, 3), np.uint8))[1].tobytes(), []
    boxes = np.array([[0.0, 0, 3000, 4000], [0, 0, 150, 200]])

    async def work(pipeline: Pipeline) -> None:
        decode = image.decode

        def slow(data: bytes, most: int, times: int, header: Any) -> Any:
            decoded.append(times)
            time.sleep(0.5)
            return decode(data, most, times, header)

        monkeypatch.setattr(image, "decode", slow)
        with pytest.raises(TimeoutError):
            await pipeline.estimate(replace(task([large], seconds=0.3), boxes=[boxes]))
        await asyncio.sleep(0.5)

    drive(work)
    assert len(decoded) == 1


def test_lossless_webps_are_decoded_one_at_a_time_and_keep_no_thread_waiting(monkeypatch):
    """One may need 1.7 GB, whatever its size. Nor is the next begun while a thread is at one whose client has left."""
    grey, params = np.full((64, 64, 3), 90, np.uint8), [cv2.IMWRITE_WEBP_QUALITY]
    lossless, lossy = (cv2.imencode(".webp", grey, [*params, quality])[1].tobytes() for quality in (101, 90))
    events: list[str] = []
    decode = image.decode

    def slow(data: bytes, *arguments: Any) -> Any:
        name = "lossless" if data is lossless else "lossy"
        events.append(name)
        time.sleep(0.3)
        events.append(f"{name} over")
        return decode(data, *arguments)

    async def work(pipeline: Pipeline) -> None:
        monkeypatch.setattr(image, "decode", slow)
        box = [np.array([[0.0, 0, 60, 60]])]
        with pytest.raises(TimeoutError):
            await pipeline.estimate(replace(task([lossless], 0.1), boxes=box))
        await asyncio.gather(*(pipeline.estimate(replace(task([data]), boxes=box)) for data in (lossless, lossless, lossy)))
        assert [event for event in events if "lossless" in event] == ["lossless", "lossless over"] * 3
        assert events.index("lossy") < events.index("lossless over")  # beside the first, past the second
        assert events.count("lossy over") == 1

    drive(work, lanes=2)


def test_a_request_whose_picture_is_decoded_slowly_is_answered_at_its_deadline(monkeypatch, t_pose):
    gate = threading.Event()

    async def work(pipeline: Pipeline) -> None:
        monkeypatch.setattr(image, "decode", lambda *_: gate.wait(30))
        try:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pipeline.estimate(task([t_pose], seconds=0.2)), 20)
            assert not gate.is_set()
            assert pipeline.scheduler.admission.admitted == 0
        finally:
            gate.set()

    drive(work)


def test_no_work_is_taken_while_all_picture_threads_stand_still(monkeypatch):
    stalled = "app.inference.picture_threads._STALLED_SECONDS"

    async def work(pipeline: Pipeline) -> None:
        gates = [threading.Event(), threading.Event()]
        jobs = []
        for gate in gates:
            monkeypatch.setattr(stalled, 0.0)
            assert pipeline.why_not_ready is None  # one of two at the most stands still
            jobs.append(asyncio.create_task(pipeline._picture_threads.run(lambda _, gate=gate: gate.wait(30), [0])))
            await asyncio.sleep(0.3)
        monkeypatch.setattr(stalled, 100.0)
        assert pipeline.why_not_ready is None
        monkeypatch.setattr(stalled, 0.1)
        assert pipeline.why_not_ready.startswith("All threads that decode pictures have been at one for over")
        gates[0].set()
        await jobs[0]
        assert pipeline.why_not_ready is None
        gates[1].set()
        await jobs[1]

    drive(work, lanes=2)


def test_the_picture_threads_queue_keeps_nothing_of_a_request_that_has_ended():
    """Else its body would stay in memory that nobody counts, until a thread is free."""

    class Body:
        pass

    async def work(pipeline: Pipeline) -> None:
        gate, body = threading.Event(), Body()
        kept = weakref.ref(body)
        first = asyncio.create_task(pipeline._picture_threads.run(lambda _: gate.wait(20), [0]))
        await asyncio.sleep(0.05)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await pipeline._picture_threads.run(lambda _, held=body: held, [0, 1])
        del body
        await asyncio.sleep(0.05)
        assert kept() is None
        gate.set()
        await first

    drive(work)


def test_a_request_of_one_picture_does_not_wait_for_all_of_another(t_pose, monkeypatch):
    decode, decoded, both_came = image.decode, [], threading.Event()

    def held(data: bytes, *how: Any) -> np.ndarray:
        decoded.append(data)
        assert both_came.wait(20)
        return decode(data, *how)

    alone = t_pose + b"another file of the same picture"

    async def work(pipeline: Pipeline) -> None:
        monkeypatch.setattr(image, "decode", held)
        many = asyncio.create_task(pipeline.estimate(task([t_pose] * 12)))
        one = asyncio.create_task(pipeline.estimate(task([alone])))
        await asyncio.sleep(0.2)
        both_came.set()
        assert (await one).seconds["queue"] > 0.1  # until the thread was free
        assert len((await many).people) == 12
        assert decoded.index(alone) == 1

    drive(work)


def test_once_a_picture_is_at_fault_the_others_of_its_request_are_dropped(t_pose, monkeypatch):
    decode, decoded = image.decode, []

    def counted(data: bytes, *how: Any) -> np.ndarray:
        decoded.append(data)
        return decode(data, *how)

    async def work(pipeline: Pipeline) -> None:
        monkeypatch.setattr(image, "decode", counted)
        with pytest.raises(PictureError):
            await pipeline.estimate(task([t_pose[:3000], *[t_pose] * 12]))
        await asyncio.sleep(0.3)
        assert len(decoded) <= 1  # the one that was begun already

    drive(work)


def test_the_capacity_is_that_of_all_lanes():
    async def work(pipeline: Pipeline, metrics: Metrics) -> None:
        await pipeline.start()
        capacity = metrics.registry.get_sample_value("pose_crops_per_second_capacity", {"model": pipeline.models.default})
        assert capacity == pytest.approx(2 / pipeline.scheduler.admission.seconds_per_crop)
        pipeline.scheduler.quickest[pipeline.models.find(None).plain] = 1e-4  # it was started on cores that others used
        capacity = metrics.registry.get_sample_value("pose_crops_per_second_capacity", {"model": pipeline.models.default})
        assert capacity == pytest.approx(20_000)
        await pipeline.stop()

    metrics = Metrics()
    asyncio.run(work(Pipeline(Settings(lanes=2), metrics), metrics))


@pytest.mark.parametrize(("asked", "chosen"), [("person-det", "2"), ("person-det/1", "1"), ("person-det/2", "2")])
def test_a_detector_is_chosen_by_name_or_by_version(tmp_path, asked, chosen):
    store = Settings().model_store
    shutil.copytree(store / "lpn50/1", tmp_path / "lpn50/1")
    for version in "12":
        folder = shutil.copytree(store / "person-det/1", tmp_path / "person-det" / version)
        description = folder / "model.toml"
        description.write_text(description.read_text().replace('version = "1"', f'version = "{version}"'))
    pipeline = Pipeline(Settings(model_store=tmp_path, detector=asked, lanes=1), Metrics())
    assert pipeline.models.detector.description.id == f"person-det/{chosen}"


@pytest.fixture
def reductions_asked(monkeypatch) -> list[int]:
    """How many times smaller pictures were decoded, one by one."""
    decode, asked = image.decode, []

    def seen(data: bytes, most: int, reduction: int = 1, *header: image.Header) -> np.ndarray:
        asked.append(reduction)
        return decode(data, most, reduction, *header)

    monkeypatch.setattr(image, "decode", seen)
    return asked


@pytest.mark.parametrize(
    ("enlarged", "boxes", "reductions"),
    [
        (0.5, BOX * 0.5, [1]),  # not large
        (1, BOX, [2]),
        (1, None, [2]),  # cut out of what the detector sees
        (4, BOX * 4, [8]),
        (4, BOX * 2, [4]),
        (4, BOX * [1, 1, 0.5, 0.5], [1]),
        (4, np.concatenate([BOX * 4, BOX * 2]), [4, 8]),  # each as it needs
        (4, np.zeros((0, 4)), [8]),  # nobody
        (4, None, [8]),
    ],
)
def test_a_large_photo_is_decoded_as_small_as_its_people_allow(t_pose, reductions_asked, enlarged, boxes, reductions):
    pixels = cv2.imdecode(np.frombuffer(t_pose, np.uint8), cv2.IMREAD_COLOR)
    photo = cv2.imencode(".jpg", cv2.resize(pixels, None, fx=enlarged, fy=enlarged))[1].tobytes()

    async def work(pipeline: Pipeline) -> None:
        reductions_asked.clear()  # of the models' own test pictures
        (people,) = (await pipeline.estimate(replace(task([photo]), boxes=[boxes], max_people=1))).people
        assert reductions_asked == reductions
        assert (people.height, people.width) == (pixels.shape[0] * enlarged, pixels.shape[1] * enlarged)
        assert len(people.boxes) == (1 if boxes is None else len(boxes))

    drive(work)


@pytest.mark.parametrize("boxes", [BOX, None])
def test_a_large_photo_of_any_sides_has_the_joints_of_the_whole(t_pose, reductions_asked, boxes):
    """The smaller picture's last column and row stand for less than two of the whole's."""
    pixels = cv2.imdecode(np.frombuffer(t_pose, np.uint8), cv2.IMREAD_COLOR)[:-1, :-1]

    async def work(pipeline: Pipeline) -> None:
        people = []
        for kind, reduction in ((".jpg", 2), (".png", 1)):
            reductions_asked.clear()
            photo = cv2.imencode(kind, pixels)[1].tobytes()
            people += (await pipeline.estimate(replace(task([photo]), boxes=[boxes], max_people=1))).people
            assert reductions_asked == [reduction]
        smaller, whole = people
        assert (smaller.width, smaller.height) == (whole.width, whole.height) == (1079, 719)
        distances = np.hypot(*(smaller.keypoints - whole.keypoints)[0, :, :2].T)
        assert np.median(distances) < 1
        assert distances.max() < 5

    drive(work)


def test_found_people_have_the_same_joints_whether_the_detectors_picture_was_kept_or_not(two_women, monkeypatch):
    async def work(pipeline: Pipeline) -> None:
        people = []
        for kept in (100, -1):  # admitted crops up to which it is
            monkeypatch.setattr("app.inference.pipeline._KEPT_PICTURES", kept)
            people += (await pipeline.estimate(replace(task([two_women]), boxes=[None], max_people=1))).people
        np.testing.assert_array_equal(people[0].keypoints, people[1].keypoints)

    drive(work)


def test_a_large_photo_of_somebody_small_is_decoded_again_for_the_crop(t_pose, reductions_asked):
    pixels = cv2.imdecode(np.frombuffer(t_pose, np.uint8), cv2.IMREAD_COLOR)
    photo = cv2.imencode(".jpg", cv2.copyMakeBorder(pixels, 1080, 1080, 1620, 1620, cv2.BORDER_CONSTANT, value=(90,) * 3))

    async def work(pipeline: Pipeline) -> None:
        reductions_asked.clear()  # of the models' own test pictures
        searched = replace(task([photo[1].tobytes()]), boxes=[None], max_people=1)
        (people,) = (await pipeline.estimate(searched)).people
        assert reductions_asked == [8, 2]
        assert np.abs(people.boxes[0, 1::2] - [BOX[0, 1] + 1080, BOX[0, 3]]).max() < 100  # top and height

    drive(work)


def test_the_wait_before_a_picture_is_drawn_is_told_as_queue(t_pose, monkeypatch):
    encode, slow_first = drawing.encode, iter([1, 0])

    def slowly(*drawn: Any) -> bytes:
        time.sleep(next(slow_first))
        return encode(*drawn)

    async def work(pipeline: Pipeline) -> None:
        monkeypatch.setattr(drawing, "encode", slowly)
        slow = asyncio.create_task(pipeline.estimate(task([t_pose], drawn=Drawing(".jpg", 0.2))))
        quick = asyncio.create_task(pipeline.estimate(task([t_pose], drawn=Drawing(".jpg", 0.2))))
        seconds = (await quick).seconds
        assert seconds["queue"] > 0.5 > seconds["encode"]
        await slow

    drive(work)


def test_a_picture_is_drawn_within_the_deadline_and_its_room(t_pose, monkeypatch):
    encode = drawing.encode

    async def work(pipeline: Pipeline) -> None:
        admitted = []

        def seen(pixels: np.ndarray, extension: str) -> bytes:
            admitted.append((pixels.shape, pipeline.scheduler.admission.admitted))
            return encode(pixels, extension)

        monkeypatch.setattr(drawing, "encode", seen)
        drawn = (await pipeline.estimate(task([t_pose], drawn=Drawing(".png", 0.2)))).drawn
        assert cv2.imdecode(np.frombuffer(drawn, np.uint8), cv2.IMREAD_COLOR).shape == (720, 1080, 3)
        assert admitted == [((720, 1080, 3), 1)]
        assert pipeline.scheduler.admission.admitted == 0
        monkeypatch.setattr(drawing, "encode", lambda *_: time.sleep(3))
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            await pipeline.estimate(task([t_pose], 1, Drawing(".jpg", 0.2)))
        assert time.monotonic() - started < 2.5
        assert pipeline.scheduler.admission.admitted == 0

    drive(work)


def test_nobody_has_as_many_columns_as_somebody(t_pose):
    async def work(pipeline: Pipeline) -> None:
        for boxes in (BOX, np.zeros((0, 4))):
            (people,) = (await pipeline.estimate(replace(task([t_pose]), boxes=[boxes]))).people
            assert people.keypoints.shape == (len(boxes), 17, 4)

    drive(work)
