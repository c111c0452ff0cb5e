"""Threads that decode, cut and draw pictures, on which requests take turns."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

_STALLED_SECONDS = 30.0  # a picture that is worked on for so long is not done any more: the slowest take some seconds


class PictureThreads:
    """So many threads. A request begins as many jobs at once; after them it is the turn of other requests."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool = ThreadPoolExecutor(count, "pictures")
        self._begun: dict[object, float] = {}  # when the jobs that are on threads were
        self._told = False
        self._heavy = asyncio.Lock()

    @property
    def why_stalled(self) -> str | None:
        """That every thread has been at one picture for too long, which the log is told once; None where one is free."""
        begun = list(self._begun.values())  # which the threads change meanwhile
        stalled = len(begun) >= self._count and time.monotonic() - max(begun) > _STALLED_SECONDS
        why = f"All threads that decode pictures have been at one for over {_STALLED_SECONDS:.0f} s." if stalled else None
        if why and not self._told:
            log.error(why)
        self._told = stalled
        return why

    async def run(
        self, work: Callable[[int], T], numbers: Sequence[int], heavy: Callable[[int], bool] = lambda _: False
    ) -> tuple[list[T], float]:
        """What `work` makes of each number, and the seconds until the first was begun. Once one fails, those that wait are
        dropped. Of all that are `heavy` one is on a thread at a time, and the others keep none waiting."""
        asked = time.perf_counter()
        waits: list[float] = []
        # And with it the body: a job lies in the threads' queue until its turn, even where it is cancelled, and holds this.
        held = [work]

        def timed(number: int) -> T:
            waits.append(time.perf_counter() - asked)
            job = object()
            self._begun[job] = time.monotonic()
            try:
                return held[0](number)
            finally:
                del self._begun[job]

        turns = asyncio.Semaphore(self._count)
        loop = asyncio.get_running_loop()

        def over(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._heavy.release)

        async def in_turn(number: int) -> T:
            async with turns:
                if alone := heavy(number):
                    await self._heavy.acquire()
                job = self._pool.submit(timed, number)
                if alone:
                    job.add_done_callback(over)  # not before, though whoever asked may have left
                return await asyncio.wrap_future(job)

        jobs = [asyncio.ensure_future(in_turn(number)) for number in numbers]
        try:
            return await asyncio.gather(*jobs), min(waits, default=0.0)
        except BaseException:
            held.clear()
            for job in jobs:
                job.cancel()
            raise

    def close(self) -> None:
        """Drop the jobs that wait; one that has begun goes on to its end."""
        self._pool.shutdown(wait=False, cancel_futures=True)
