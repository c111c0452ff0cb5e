"""The way of a request: requests take turns on the picture threads, and hold their room until all is done."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from app.inference.pipeline import Pipeline, PoseTask
from app.settings import Settings
from app.telemetry.metrics import Metrics
from app.vision import image

BOX = np.array([[295.0, 15, 545, 595]])


def drive(work: Callable[[Pipeline], Coroutine[Any, Any, None]]) -> None:
    """Run `work` with a pipeline of one lane that is started and stopped."""

    async def main() -> None:
        pipeline = Pipeline(Settings(lanes=1), Metrics())
        await pipeline.start()
        try:
            await asyncio.wait_for(work(pipeline), 60)
        finally:
            await pipeline.stop()

    asyncio.run(main())


def task(pictures: list[bytes], seconds: float = 30, draw: Any = None) -> PoseTask:
    deadline = asyncio.get_running_loop().time() + seconds
    return PoseTask(pictures, [BOX] * len(pictures), None, False, None, 50, draw, deadline)


def test_a_request_of_one_picture_does_not_wait_for_all_of_another(t_pose, monkeypatch):
    decode, decoded = image.decode, []

    def slow(data: bytes, *limits: int) -> np.ndarray:
        decoded.append(data)
        time.sleep(0.05)
        return decode(data, *limits)

    monkeypatch.setattr(image, "decode", slow)
    alone = t_pose + b"another file of the same picture"

    async def work(pipeline: Pipeline) -> None:
        decoded.clear()  # of golden crops
        many = asyncio.create_task(pipeline.estimate(task([t_pose] * 12)))
        await asyncio.sleep(0.02)
        await pipeline.estimate(task([alone]))
        assert decoded.index(alone) <= 2
        assert len((await many).people) == 12

    drive(work)


def test_the_time_until_a_thread_is_free_is_told_as_queue(t_pose, monkeypatch):
    decode = image.decode
    monkeypatch.setattr(image, "decode", lambda *all_: time.sleep(0.2) or decode(*all_))

    async def work(pipeline: Pipeline) -> None:
        first = asyncio.create_task(pipeline.estimate(task([t_pose])))
        await asyncio.sleep(0.02)
        second = await pipeline.estimate(task([t_pose]))
        assert (await first).seconds["queue"] < 0.1 < second.seconds["queue"]

    drive(work)


def test_a_picture_is_drawn_within_the_deadline_and_its_room(t_pose):
    async def work(pipeline: Pipeline) -> None:
        admitted = []

        def draw(pixels: np.ndarray, *_: object) -> bytes:
            admitted.append((pixels.shape, pipeline.scheduler.admitted))
            return b"drawn"

        assert (await pipeline.estimate(task([t_pose], draw=draw))).drawn == b"drawn"
        assert admitted == [((720, 1080, 3), 1)]
        assert pipeline.scheduler.admitted == 0
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            await pipeline.estimate(task([t_pose], 1, lambda *_: time.sleep(3)))
        assert time.monotonic() - started < 2.5
        assert pipeline.scheduler.admitted == 0

    drive(work)
