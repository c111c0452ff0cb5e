"""Twice the requests that the lanes can run, in virtual time: what is answered, and what is run in vain."""

import asyncio
import selectors
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from app.inference import scheduler
from app.inference.admission import QueueFull
from app.inference.scheduler import BatchResult, Network, Scheduler
from app.telemetry.metrics import Metrics


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer, and whose threads take `seconds` for each crop of a batch."""

    def __init__(self, seconds: float) -> None:
        outer = self

        class Selector(selectors.DefaultSelector):
            def select(self, timeout: float | None = None) -> Any:
                outer.now += max(0.0, timeout or 0.0)
                return super().select(0)

        self.now, self.seconds = 0.0, seconds
        super().__init__(Selector())

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        done = self.create_future()
        _, crops = arguments
        self.call_later(self.seconds * len(crops), lambda: done.done() or done.set_result(function(*arguments)))
        return done


@pytest.mark.parametrize(
    ("milliseconds", "lanes", "crops", "patience"),
    [(9.5, 2, 4, 2.0), (14, 2, 1, 2.0), (27, 1, 4, 10.0), (40, 2, 4, 10.0), (9.5, 2, 4, 10.0), (9.5, 2, 30, 2.0)],
)
def test_overload_is_refused_and_not_run_in_vain(monkeypatch, milliseconds, lanes, crops, patience):
    loop, seconds = VirtualLoop(milliseconds / 1000), 60
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=loop.time))
    outcomes: Counter[str] = Counter()
    ran: list[int] = []
    waits: list[int] = []

    def network(batch: np.ndarray) -> BatchResult:
        ran.append(len(batch))
        return BatchResult(np.zeros((len(batch), 1), np.float32), milliseconds / 1000 * len(batch), 0.0)

    async def ask(running: Scheduler, asked: Network) -> None:
        deadline = loop.time() + patience
        try:
            with running.admission.admit(crops, deadline=deadline) as room:
                await running.run(asked, np.zeros((crops, 1), np.uint8), deadline, room)
            outcomes["answered"] += 1
        except QueueFull as full:
            outcomes["refused"] += 1
            waits.append(full.retry_after)
        except TimeoutError:
            outcomes["late"] += 1

    async def main() -> None:
        running = Scheduler(lanes, 400, 4, Metrics())
        running.admission.seconds_per_crop = milliseconds / 1000
        running.start()
        asked, tasks = Network("n", network), []
        while loop.time() < seconds:
            tasks.append(asyncio.create_task(ask(running, asked)))
            await asyncio.sleep(milliseconds / 1000 * crops / lanes / 2)
        await asyncio.gather(*tasks)
        await running.stop()

    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
    possible = seconds * lanes * 1000 / milliseconds / crops
    assert outcomes["answered"] > 0.95 * possible
    assert outcomes["refused"] > 0.8 * possible
    assert max(waits) < patience
    assert outcomes["answered"] * crops > 0.95 * sum(ran)
