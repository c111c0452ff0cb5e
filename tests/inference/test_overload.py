"""More requests than the lanes can run, in virtual time: what is answered, and what is run in vain."""

import asyncio
import selectors
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
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


@dataclass
class Run:
    """What became of requests for `crops` crops each, which have `patience` seconds."""

    milliseconds: float  # that a lane takes for a crop
    lanes: int
    crops: int
    patience: float
    outcomes: Counter[str] = field(default_factory=Counter)
    ran: int = 0  # crops
    waits: list[int] = field(default_factory=list)  # that the refused are told

    def requests(self, monkeypatch: pytest.MonkeyPatch, starts: Iterable[float], measured: float | None = None) -> None:
        """Send one at each of the seconds. `measured`: the milliseconds a crop by the warm-up, if not the true ones."""
        loop = VirtualLoop(self.milliseconds / 1000)
        monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=loop.time))

        async def main() -> None:
            running = Scheduler(self.lanes, 400, 4, Metrics())
            running.admission.seconds_per_crop = (measured or self.milliseconds) / 1000
            running.start()
            network = Network("n", self._network)
            await asyncio.gather(*(self._ask(running, network, start) for start in starts))
            await running.stop()

        try:
            loop.run_until_complete(main())
        finally:
            loop.close()

    def _network(self, batch: np.ndarray) -> BatchResult:
        self.ran += len(batch)
        return BatchResult(np.zeros((len(batch), 1), np.float32), self.milliseconds / 1000 * len(batch), 0.0)

    async def _ask(self, running: Scheduler, network: Network, start: float) -> None:
        await asyncio.sleep(start)
        deadline = asyncio.get_running_loop().time() + self.patience
        try:
            with running.admission.admit(self.crops, deadline=deadline) as room:
                await running.run(network, np.zeros((self.crops, 1), np.uint8), deadline, room)
            self.outcomes["answered"] += 1
        except QueueFull as full:
            self.outcomes["refused"] += 1
            self.waits.append(full.retry_after)
        except TimeoutError:
            self.outcomes["late"] += 1


@pytest.mark.parametrize(
    ("milliseconds", "lanes", "crops", "patience"),
    [(9.5, 2, 4, 2.0), (14, 2, 1, 2.0), (27, 1, 4, 10.0), (40, 2, 4, 10.0), (9.5, 2, 4, 10.0), (9.5, 2, 30, 2.0)],
)
def test_overload_is_refused_and_not_run_in_vain(monkeypatch, milliseconds, lanes, crops, patience):
    run, seconds = Run(milliseconds, lanes, crops, patience), 60
    run.requests(monkeypatch, np.arange(0, seconds, milliseconds / 1000 * crops / lanes / 2))  # twice what the lanes can
    possible = seconds * lanes * 1000 / milliseconds / crops
    assert run.outcomes["answered"] > 0.95 * possible
    assert run.outcomes["refused"] > 0.8 * possible
    assert max(run.waits) < patience
    assert run.outcomes["answered"] * crops > 0.95 * run.ran


@pytest.mark.parametrize(("milliseconds", "crops", "count"), [(14, 1, 280), (14, 5, 50), (9.5, 5, 80), (9.5, 30, 13)])
def test_of_what_comes_at_once_hardly_any_is_refused_that_would_be_in_time(monkeypatch, milliseconds, crops, count):
    run = Run(milliseconds, 2, crops, patience=2.0)
    run.requests(monkeypatch, [0.0] * count)
    assert run.outcomes["late"] == 0
    assert run.outcomes["answered"] >= 0.8 * min(count, 2 * 2000 / milliseconds / crops)


def test_a_warm_up_on_cores_that_others_used_is_soon_forgotten(monkeypatch):
    bursts = Run(9.5, 2, crops=5, patience=2.0)
    bursts.requests(monkeypatch, [3.0 * burst for burst in range(10) for _ in range(36)], measured=300)
    assert bursts.outcomes["answered"] > 0.8 * 360
    assert bursts.outcomes["late"] == 0
