"""Ten thousand random schedules: whatever arrives, fails, stands still, leaves or stops, each request is answered once."""

import asyncio
import random
import time
from collections import Counter

import numpy as np
import pytest

from app.inference import scheduler
from app.inference.admission import QueueFull, TooManyCrops
from app.inference.scheduler import (
    BatchFailed,
    BatchResult,
    LaneLost,
    Network,
    Scheduler,
    ShuttingDown,
)
from app.telemetry.metrics import Metrics

SCHEDULES = 10_000
AT_ONCE = 50  # schedules that share a loop's time, since most of it is waiting
STOOD_STILL = 0.2  # seconds after which a lane counts as lost here


def doubled(batch: np.ndarray) -> BatchResult:
    return BatchResult(batch.astype(np.float32) * 2, 0.0, 0.0)


def slow(batch: np.ndarray) -> BatchResult:
    time.sleep(0.001)
    return doubled(batch)


def fails(batch: np.ndarray) -> BatchResult:
    raise ValueError("on command")


def dies(batch: np.ndarray) -> BatchResult:
    raise SystemExit


def stands_still(batch: np.ndarray) -> BatchResult:
    time.sleep(2 * STOOD_STILL)
    return doubled(batch)


def gives_too_few(batch: np.ndarray) -> BatchResult:
    return doubled(batch[1:])


# What a network does, and the errors that its requests may be answered with.
KINDS = {
    doubled: (),
    slow: (),
    fails: (BatchFailed,),
    dies: (LaneLost,),
    stands_still: (LaneLost,),
    gives_too_few: (BatchFailed,),
}
LIKELY = (600, 250, 50, 30, 1.5, 20)


class Schedule:
    """One random schedule, drawn from its seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.metrics = Metrics()
        self.scheduler = Scheduler(
            self.random.randint(1, 3), self.random.randint(1, 30), self.random.randint(1, 5), self.metrics
        )
        self.scheduler.admission.seconds_per_crop = 1e-5
        self.networks = {kind: Network(kind.__name__, kind) for kind in KINDS}
        self.stops = self.random.random() < 0.2
        self.outcomes: list[str] = []

    async def run(self) -> None:
        self.scheduler.start()
        count = self.random.randint(1, 10)
        requests = [asyncio.create_task(self.request(number)) for number in range(count)]
        if self.stops:
            await asyncio.sleep(self.random.random() * 0.004)
            await self.scheduler.stop()
        await asyncio.wait_for(asyncio.gather(*requests), 20)
        assert len(self.outcomes) == count
        # A network of which three batches in a row have failed is tried on a crop of the scheduler's own, which may wait.
        waiting = [ticket for ticket in self.scheduler._tickets if ticket.waiting]
        assert [ticket for ticket in waiting if ticket.network not in self.scheduler._trials] == []
        assert self.scheduler.admission.admitted == 0
        await self.scheduler.stop()
        assert self.scheduler.waiting == 0

    async def request(self, number: int) -> None:
        draw = self.random
        crops = draw.randint(0, 6)
        (kind,) = draw.choices(list(KINDS), LIKELY)
        client = draw.choice(["waits", "waits", "waits", "leaves", "hurries"])
        await asyncio.sleep(draw.random() * 0.004)
        values = [(16 * number + i) % 256 for i in range(crops)]
        deadline = asyncio.get_running_loop().time() + (0.002 if client == "hurries" else 30)
        job = asyncio.create_task(self.admitted(self.networks[kind], values, deadline))
        if client == "leaves":
            await asyncio.sleep(draw.random() * 0.002)
            job.cancel()
        await asyncio.wait({job})
        self.outcomes.append(self.judged(job, kind, client, values))

    async def admitted(self, network: Network, values: list[int], deadline: float) -> list:
        with self.scheduler.admission.admit(len(values)) as room:
            if len(values) > 1:
                room.resize(len(values) - 1)
                room.resize(len(values))
            batch = np.array(values, np.uint8).reshape(-1, 1)
            ticket = await self.scheduler.run(network, batch, deadline, room if len(values) % 2 else None)
        return ticket.results

    def judged(self, job: asyncio.Task, kind: object, client: str, values: list[int]) -> str:
        """The outcome's name, once it is sure that it may be."""
        if job.cancelled():
            assert client == "leaves"
            return "left"
        error = job.exception()
        if error is None:
            assert [float(result[0]) for result in job.result()] == [2.0 * value for value in values]
            return "answered"
        allowed = {*KINDS[kind], QueueFull, TooManyCrops}
        if type(error) is LaneLost and LaneLost not in allowed and not self.stops:
            return "starved"  # a lane may stand still because the machine does
        if client == "hurries":
            allowed.add(TimeoutError)
        if self.stops:
            allowed |= {ShuttingDown, LaneLost, BatchFailed}
        assert type(error) in allowed, (kind, client, error)
        return type(error).__name__


@pytest.mark.parametrize("part", range(10))
def test_every_request_is_answered_exactly_once(part, monkeypatch):
    monkeypatch.setattr(scheduler, "_STALLED_SECONDS", STOOD_STILL)
    monkeypatch.setattr(scheduler, "_TEND_SECONDS", STOOD_STILL / 5)
    monkeypatch.setattr(scheduler.log, "disabled", True)  # failures on command need no tracebacks
    size = SCHEDULES // 10
    outcomes: Counter[str] = Counter()

    async def main() -> None:
        for first in range(part * size, (part + 1) * size, AT_ONCE):
            schedules = [Schedule(seed) for seed in range(first, first + AT_ONCE)]
            await asyncio.gather(*(schedule.run() for schedule in schedules))
            outcomes.update(outcome for schedule in schedules for outcome in schedule.outcomes)

    asyncio.run(main())
    assert outcomes["starved"] < 0.1 * outcomes.total()
    assert outcomes.keys() >= {"answered", "left", "BatchFailed", "LaneLost", "TimeoutError", "QueueFull", "TooManyCrops"}
