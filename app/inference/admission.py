"""Who is let into the queue: as many crops as it has room for, and none that would be late."""

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager

from app.telemetry.metrics import Metrics


class QueueFull(Exception):
    """The queue has no room, or no time, for a request's crops; `retry_after` is the seconds until it should."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooManyCrops(Exception):
    """A request with more crops than the queue can ever hold."""


class Room:
    """The room in the queue that a request holds: for each crop, until it has run."""

    def __init__(self, admission: "Admission") -> None:
        self.crops = 0
        self._admission = admission

    def resize(self, crops: int, leave: int = 0) -> None:
        """Hold room for so many crops instead, and leave some to others. Raises QueueFull or TooManyCrops; what was held is
        held on then."""
        limit = self._admission.limit
        if crops > limit:
            raise TooManyCrops(f"The request holds {crops} crops; the queue takes at most {limit}.")
        excess = self._admission.admitted - self.crops + crops + leave - limit
        if excess > 0:
            told = f"The queue holds at most {limit} crops and has no room for the {crops} of this request."
            raise QueueFull(told, self._admission.wait_for(excess))
        self._hold(crops)

    def give_back(self, crops: int) -> None:
        """Hold room for so many crops less, as far as any is held."""
        self._hold(max(0, self.crops - crops))

    def _hold(self, crops: int) -> None:
        self._admission.hold(crops - self.crops)
        self.crops = crops


class Admission:
    """Lets in at most `limit` crops at once, which `lanes` threads run in turns: one crop of each request after another."""

    def __init__(self, limit: int, lanes: int, metrics: Metrics) -> None:
        self.limit = limit
        self.lanes = lanes
        self.admitted = 0
        self.seconds_per_crop = 0.05  # of one lane: set at warm-up, then a moving average of the batches
        self._rooms: set[Room] = set()
        self._metrics = metrics

    @contextmanager
    def admit(self, crops: int, leave: int = 0, deadline: float = math.inf) -> Iterator[Room]:
        """Hold room for a request's crops until each has run or the request ends, where so much of it is left to others and
        the deadline, on the event loop's clock, is far enough. Raises QueueFull or TooManyCrops at once."""
        room = Room(self)
        try:
            room.resize(crops, leave)  # first: more crops than there is ever room for are not to come again
            self._check_time(crops, deadline)
            self._rooms.add(room)
            yield room
        finally:
            self._rooms.discard(room)
            room.give_back(room.crops)

    def crops_until(self, deadline: float) -> float:
        """How many crops the lanes run until then."""
        return self.lanes * max(0.0, deadline - asyncio.get_running_loop().time()) / self.seconds_per_crop

    def wait_for(self, crops: float) -> int:
        """The whole seconds, at least one, in which the lanes run so many crops."""
        return max(1, math.ceil(crops * self.seconds_per_crop / self.lanes))

    def hold(self, crops: int) -> None:
        """Count so many crops more (or less) as admitted."""
        self.admitted += crops
        self._metrics.admitted_crops.set(self.admitted)

    def _check_time(self, crops: int, deadline: float) -> None:
        """Refuse a request whose last crop would come too late: where all are let in, all are late together, and what was run
        of them was run in vain.

        Of each other request as many crops run before that last one as it has itself, and then of those that come in the
        places of others: in all a few more than a turn of all for each of its crops. A request that would be late alone is
        tried: to come back would not help it.
        """
        others = [room.crops for room in self._rooms if room.crops]
        turns = 2 * sum(min(held, crops) for held in others)
        in_time = self.crops_until(deadline)
        if crops <= in_time < min(turns, 1.25 * len(others) * crops) + crops:
            told = f"The crops of others leave no time for the {crops} of this request before its deadline."
            raise QueueFull(told, self.wait_for((turns + crops - in_time) / 2))
