"""The queue: crops of many requests → batches → results.

The event loop alone owns the queue; a lane is one thread that is handed a batch the moment it is free, and no batch waits to
be filled. Crops that wait are dropped when their client goes or their deadline passes.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from app.inference.admission import Admission, Room
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_TEND_SECONDS = 0.25  # between two looks at the lanes
_SUSPECT = 3  # batches of a network in a row that failed: it is tried on a crop of zeros …
_TRIED_SECONDS = 10.0  # … which may take so long
_STOP_SECONDS = 2.0  # for the batches that run when the scheduler is stopped
_STALLED_TIMES = 50  # a lane that runs this many times its usual time a crop …
_STALLED_SECONDS = 5.0  # … and at least so long, stands still


class ShuttingDown(Exception):
    """The scheduler was stopped while the crops waited."""


class LaneLost(Exception):
    """The lane that ran a batch died or stood still."""


class BatchFailed(Exception):
    """The network raised an error on a batch."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What a network makes of a batch: values [N, …], and the seconds spent in the network and on its keypoints."""

    values: npt.NDArray[np.float32]
    infer_seconds: float
    keypoint_seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """Something that lanes run: `run` takes a batch [N, …] on any thread. Only crops for one network share a batch.

    `alone` is the same with the help of the other cores, for a crop beside which there is nothing to do. A detector's crops
    are whole pictures: of any shape, run one by one, and counted apart.
    """

    name: str
    run: Callable[[npt.NDArray[np.uint8]], BatchResult]
    alone: Callable[[npt.NDArray[np.uint8]], BatchResult] | None = None
    counts: Literal["crops", "pictures"] = "crops"


@dataclass(slots=True, eq=False)
class Ticket:
    """The crops of one request for one network, and what has become of them."""

    network: Network
    crops: Sequence[npt.NDArray[np.uint8]]
    deadline: float  # on the event loop's clock
    enqueued: float
    answer: asyncio.Future[None]
    results: list[npt.NDArray[np.float32]]  # nothing where a crop has not run
    room: Room | None = None  # that its crops hold
    next: int = 0  # the first crop that no batch has taken
    left: int = 0  # crops without a result
    queue_seconds: float = 0.0  # until the last crop was taken, but for the lanes' time of its own before
    infer_seconds: float = 0.0  # its crops' share of the batches that held them
    keypoint_seconds: float = 0.0

    @property
    def waiting(self) -> int:
        return len(self.crops) - self.next


@dataclass(slots=True, eq=False)
class _Lane:
    """One thread and the batch it runs."""

    number: int
    thread: ThreadPoolExecutor
    members: list[tuple[Ticket, int]] = field(default_factory=list)
    started: float = 0.0
    task: asyncio.Task[None] | None = None
    lost: bool = False


class Scheduler:
    """Shares `lanes` threads among all requests; at most `queue_crops` crops are admitted at once."""

    def __init__(self, lanes: int, queue_crops: int, max_batch_crops: int, metrics: Metrics) -> None:
        self.max_batch_crops = max_batch_crops
        self.admission = Admission(queue_crops, lanes, metrics)
        self._metrics = metrics
        self.lanes = lanes
        self._lanes: list[_Lane] = []
        self._tickets: deque[Ticket] = deque()
        self._tender: asyncio.Task[None] | None = None
        self.quickest: dict[Network, float] = {}  # seconds a crop of each network on one lane, from the warm-up on
        self._started_lanes = 0
        self._standing = 0  # lanes that stood still, were replaced, and have not come back since
        self._failures: dict[Network, int] = {}  # batches in a row
        self._trials: dict[Network, asyncio.Task[None]] = {}
        self._failing: set[Network] = set()  # also on zeros, so that no request is at fault

    @property
    def waiting(self) -> int:
        """Crops that no lane has taken yet."""
        return sum(ticket.waiting for ticket in self._tickets)

    @property
    def ready(self) -> bool:
        """Whether lanes are there to take work, not all cores lost to lanes that stand still, and no network always fails."""
        return self._running and self._standing < self.lanes and not self._failing

    @property
    def _running(self) -> bool:
        return self._tender is not None and not self._tender.done()

    def start(self) -> None:
        """Open the lanes. Call it on the event loop that will submit."""
        self._lanes = [self._new_lane() for _ in range(self.lanes)]
        self._tender = asyncio.create_task(self._tend())

    async def stop(self) -> None:
        """Close the lanes; whatever still waits is answered with ShuttingDown."""
        tasks = [task for task in (self._tender, *self._trials.values()) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._tickets:
            _fail(self._tickets.popleft(), ShuttingDown("The service is shutting down."))
        running = [lane.task for lane in self._lanes if lane.task]
        if running:
            await asyncio.wait(running, timeout=_STOP_SECONDS)
        for lane in self._lanes:
            lane.thread.shutdown(wait=False)

    async def run(
        self, network: Network, crops: Sequence[npt.NDArray[np.uint8]], deadline: float, room: Room | None = None
    ) -> Ticket:
        """Run a network on crops, of one shape but for pictures, and give the finished ticket, whose results are in order.

        `room`: what the crops hold, given back one by one as they finish. Raises TimeoutError past the deadline, BatchFailed
        or LaneLost where a batch fails, and ShuttingDown. If the caller is cancelled, the crops that wait are dropped.
        """
        if self._tender is not None and not self._running:
            raise ShuttingDown("The service is shutting down.")
        loop = asyncio.get_running_loop()
        ticket = Ticket(
            network,
            crops,
            deadline,
            loop.time(),
            loop.create_future(),
            [np.empty(0, np.float32)] * len(crops),
            room,
            left=len(crops),
        )
        if len(crops) == 0:
            return ticket
        self._tickets.append(ticket)
        self._fill_lanes()
        try:
            async with asyncio.timeout_at(deadline):
                await ticket.answer
        except (TimeoutError, asyncio.CancelledError) as error:
            # A caller whose own time-out is of the same deadline cancels. uvloop's clock and timers tell whole milliseconds.
            passed = isinstance(error, TimeoutError) or loop.time() >= deadline - 0.002
            self._drop(ticket, "deadline" if passed else "disconnect")
            raise
        return ticket

    def _fill_lanes(self) -> None:
        for lane in self._lanes:
            if lane.task is None and not lane.lost:
                members = self._next_batch()
                if not members:
                    break
                lane.members, lane.started = members, time.monotonic()
                alone = not self._tickets and not self._standing and all(other.task is None for other in self._lanes)
                lane.task = asyncio.create_task(self._run_batch(lane, alone))
        self._metrics.queue_crops.set(self.waiting)

    def _next_batch(self) -> list[tuple[Ticket, int]]:
        """The crops for a free lane: one of each waiting request in turn, so that none waits behind a large one."""
        now = asyncio.get_running_loop().time()
        for ticket in [ticket for ticket in self._tickets if ticket.deadline <= now]:
            self._drop(ticket, "deadline")
        self._tickets = deque(ticket for ticket in self._tickets if ticket.waiting)  # others failed with a batch
        if not self._tickets:
            return []
        network = self._tickets[0].network
        waiting = sum(ticket.waiting for ticket in self._tickets if ticket.network is network)
        # While a network is tried, its crop of zeros shares no batch with those of requests, which may be at fault.
        single = network.counts == "pictures" or network in self._trials
        size = 1 if single else min(self.max_batch_crops, math.ceil(waiting / len(self._lanes)))
        members: list[tuple[Ticket, int]] = []
        others: deque[Ticket] = deque()
        while self._tickets and len(members) < size:
            ticket = self._tickets.popleft()
            if ticket.network is not network:
                others.append(ticket)
                continue
            running = self._running_seconds(ticket) if ticket.next else 0.0
            own = (ticket.infer_seconds + ticket.keypoint_seconds + running) / len(self._lanes)
            ticket.queue_seconds = max(0.0, now - ticket.enqueued - own)
            self._metrics.queue_wait.observe(now - ticket.enqueued)
            members.append((ticket, ticket.next))
            ticket.next += 1
            if ticket.waiting:
                self._tickets.append(ticket)
        self._tickets.extendleft(reversed(others))
        return members

    def _running_seconds(self, ticket: Ticket) -> float:
        """The lanes' seconds so far for the ticket's crops that are being run."""
        now = time.monotonic()
        return sum(
            (now - lane.started) * sum(each is ticket for each, _ in lane.members) / len(lane.members)
            for lane in self._lanes
            if lane.members
        )

    async def _run_batch(self, lane: _Lane, alone: bool) -> None:
        """Run a lane's batch on its thread, answer its members, and hand the lane its next batch."""
        members, network, began = lane.members, lane.members[0][0].network, lane.started
        run = network.alone if alone and network.alone else network.run
        crops = [ticket.crops[index] for ticket, index in members]
        self._metrics.workers_busy.inc()
        loop = asyncio.get_running_loop()
        try:
            outcome = await loop.run_in_executor(lane.thread, _guarded, run, crops)
        except Exception as error:  # noqa: BLE001 - the thread itself is gone
            outcome = error
        finally:
            if not lane.lost:
                self._metrics.workers_busy.dec()
        if lane.lost:  # stood still, was replaced, and its members have been answered
            lane.thread.shutdown(wait=False)
            self._standing -= 1
            return
        took = time.monotonic() - lane.started
        self._metrics.network_seconds.labels(network.name).inc(took)
        lane.members, lane.task = [], None
        if isinstance(outcome, BatchResult) and len(outcome.values) == len(members):
            if lane.started == began:  # the process was never stopped
                self._learn(network, took / len(members), helped=run is not network.run)
            self._failures.pop(network, None)
            self._deliver(members, outcome)
        elif isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
            self._replace(lane, members, f"lane {lane.number} died of {type(outcome).__name__}")
        else:  # it raised an exception, or gave what is no result of so many crops
            cause = outcome if isinstance(outcome, Exception) else ValueError("it gave no result of as many crops")
            if all(ticket.answer.done() for ticket, _ in members):  # else it is logged under the ids of their requests
                log.error("a batch failed whose requests had ended", exc_info=cause)
            _fail_all(members, BatchFailed(f"The network {network.name} failed on a batch of {len(members)}."), cause)
            self._failures[network] = self._failures.get(network, 0) + 1
            if self._failures[network] >= _SUSPECT and network not in self._trials and self._running:
                self._trials[network] = asyncio.create_task(self._try(network, np.zeros_like(crops[0])))
        self._fill_lanes()

    async def _try(self, network: Network, crop: npt.NDArray[np.uint8]) -> None:
        """Run a network on a crop, again and again until that succeeds; while it does not, the network is failing."""
        while True:
            try:
                await self.run(network, [crop], asyncio.get_running_loop().time() + _TRIED_SECONDS)
                break
            except BatchFailed:
                if network not in self._failing:
                    log.exception("the network %s fails on zeros too; no work is taken meanwhile", network.name)
                self._failing.add(network)
            except (LaneLost, TimeoutError):
                log.warning("the network %s gave nothing for zeros in time", network.name)
            await asyncio.sleep(_TEND_SECONDS)
        self._failing.discard(network)
        del self._trials[network]

    def _learn(self, network: Network, seconds: float, helped: bool) -> None:
        """A crop of a batch has taken so long. The warm-up may have been slow, on cores that others used: a rate far too slow
        is corrected at once, since who is refused by it teaches no other."""
        usual = self.admission.seconds_per_crop
        if helped:  # by other lanes' cores: one lane by itself takes no longer than all together
            self.admission.seconds_per_crop = min(usual, self.lanes * seconds)
            return
        usual = min(usual, 2 * seconds)
        self.admission.seconds_per_crop = usual + 0.1 * (seconds - usual)
        self.quickest[network] = min(seconds, self.quickest.get(network, seconds))

    def _deliver(self, members: list[tuple[Ticket, int]], result: BatchResult) -> None:
        network = members[0][0].network
        counter = self._metrics.crops if network.counts == "crops" else self._metrics.searched_images
        counter.labels(network.name).inc(len(members))
        self._metrics.batch_crops.labels(network.name).observe(len(members))
        for (ticket, index), values in zip(members, result.values, strict=True):
            ticket.infer_seconds += result.infer_seconds / len(members)
            ticket.keypoint_seconds += result.keypoint_seconds / len(members)
            ticket.results[index] = values
            ticket.left -= 1
            if ticket.room is not None:
                ticket.room.give_back(1)
            if ticket.left == 0 and not ticket.answer.done():
                ticket.answer.set_result(None)

    def _drop(self, ticket: Ticket, reason: str) -> None:
        """Forget the crops of a ticket that no batch has taken."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            self._metrics.dropped_crops.labels(reason).inc(ticket.waiting)
            self._metrics.queue_crops.set(self.waiting)
        _fail(ticket, TimeoutError())

    async def _tend(self) -> None:
        """Replace lanes that stand still, now and then. While the whole process was stopped, none did."""
        while True:
            slept = time.monotonic()
            await asyncio.sleep(_TEND_SECONDS)
            stopped = time.monotonic() - slept - _TEND_SECONDS
            for lane in list(self._lanes):
                if lane.task is None:
                    continue
                if stopped > 1:
                    lane.started = min(lane.started + stopped, time.monotonic())  # a batch may have begun since
                usual = max(self.admission.seconds_per_crop, self.quickest.get(lane.members[0][0].network, 0.0))
                limit = max(_STALLED_SECONDS, _STALLED_TIMES * usual * len(lane.members))
                if time.monotonic() - lane.started > limit:
                    self._standing += 1
                    self._metrics.workers_busy.dec()
                    self._replace(lane, lane.members, f"lane {lane.number} has stood still for {limit:.1f} s")
                    self._fill_lanes()

    def _replace(self, lane: _Lane, members: list[tuple[Ticket, int]], why: str) -> None:
        """Answer a lost lane's members and open another lane in its place."""
        log.error("%s; another takes its place", why)
        self._metrics.lanes_replaced.inc()
        lane.lost = True
        self._lanes[self._lanes.index(lane)] = self._new_lane()
        _fail_all(members, LaneLost("The lane that ran this request's crops was lost."))

    def _new_lane(self) -> _Lane:
        self._started_lanes += 1
        number = self._started_lanes
        return _Lane(number, ThreadPoolExecutor(1, f"lane-{number}"))


def _guarded(
    run: Callable[[npt.NDArray[np.uint8]], BatchResult], crops: list[npt.NDArray[np.uint8]]
) -> BatchResult | BaseException:
    """Run the network on crops of one shape; what it raises comes back as a value: no SystemExit reaches the event loop."""
    try:
        return run(np.stack(crops))
    except BaseException as error:  # noqa: BLE001
        return error


def _fail_all(members: list[tuple[Ticket, int]], error: Exception, cause: Exception | None = None) -> None:
    for ticket, _ in members:
        own = type(error)(*error.args)  # one each, since it holds the frames of whoever awaits it
        own.__cause__ = cause
        _fail(ticket, own)


def _fail(ticket: Ticket, error: Exception) -> None:
    """Answer a ticket with an error; its crops that wait are skipped, and its caller may be gone."""
    ticket.next = len(ticket.crops)
    if not ticket.answer.done():
        ticket.answer.set_exception(error)
        ticket.answer.exception()  # mark it as seen: the caller may have left
