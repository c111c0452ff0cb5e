"""Mixed pictures for a long time below what the service can do: `.venv/bin/python loadtests/soak.py [--minutes 60]`.

Starts a service of its own and checks the status of every answer. Nothing may grow: memory, descriptors, waiting times; the
exit code is 1 where something did.
"""

import argparse
import asyncio
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import httpx
import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parent.parent
BOX = "295,15,545,595"
GROWTH = 1.10  # of resident memory from the middle of the run to its end
SLOWER = 1.20  # the last tenth's 99th percentile against the median of the earlier tenths'
IN_FLIGHT = 48  # requests, at most
LOOK_SECONDS = 5.0  # from one look at memory and descriptors to the next


class Fault(Exception):
    """A request got no answer, or one that it must not get."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of request: its body, options, the statuses that it may be answered with, and how often it is sent."""

    name: str
    body: bytes
    options: dict[str, str]
    statuses: tuple[int, ...]
    share: float


def kinds() -> list[Kind]:
    """The mixture: given boxes mostly, then searched photos, small and large ones, other formats, and faults."""
    photo = (ROOT / "tests/data/photos/t_pose_cc0.jpg").read_bytes()
    women = (ROOT / "tests/data/photos/two_women_outdoors_cc0.jpg").read_bytes()
    pixels = cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR)
    large = cv2.imencode(".jpg", cv2.resize(pixels, None, fx=3, fy=3))[1].tobytes()
    small = cv2.imencode(".webp", cv2.resize(pixels, None, fx=0.4, fy=0.4))[1].tobytes()
    return [
        Kind("one box", photo, {"boxes": BOX}, (200,), 40),
        Kind("four boxes", photo, {"boxes": ";".join([BOX] * 4)}, (200,), 10),
        Kind("searched", women, {}, (200,), 20),
        Kind("searched, large", large, {}, (200,), 3),
        Kind("searched, small WebP", small, {"format": "results"}, (200,), 15),
        Kind("flip test", photo, {"boxes": BOX, "flip_test": "true"}, (200,), 4),
        Kind("drawn", photo, {"boxes": BOX}, (200,), 2),
        Kind("too late", photo, {"boxes": BOX, "timeout_ms": "1"}, (200, 504), 2),
        Kind("cut off", photo[: len(photo) // 2], {"boxes": BOX}, (422,), 2),
        Kind("wrong option", photo, {"boxes": "1,2,3"}, (422,), 2),
    ]


@dataclass(frozen=True, slots=True)
class Service:
    """A running service and a client for it."""

    process: subprocess.Popen[bytes]
    client: httpx.AsyncClient

    def megabytes(self) -> float:
        """Resident memory in MiB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def descriptors(self) -> int:
        """Open descriptors."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    async def ask(self, kind: Kind) -> None:
        """Send a request of a kind and check the status of its answer."""
        headers = {"Content-Type": "image/jpeg"} | ({"Accept": "image/jpeg"} if kind.name == "drawn" else {})
        started = time.perf_counter()
        try:
            answer = await self.client.post("/v1/pose", params=kind.options, content=kind.body, headers=headers)
        except httpx.HTTPError as error:
            seconds = time.perf_counter() - started
            raise Fault(f"{kind.name}: {error!r} after {seconds:.1f} s; the service: {self.process.poll()}") from error
        if answer.status_code not in kind.statuses:
            raise Fault(f"{kind.name}: {answer.status_code} {answer.text[:200]}")


@asynccontextmanager
async def running_service() -> AsyncIterator[Service]:
    """The service on a free port."""
    process = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-m", "app"],
        cwd=ROOT,
        env=os.environ | {"POSE_PORT": "0", "POSE_LOG_LEVEL": "ERROR", "POSE_TIMEOUT_MS": "60000"},
        stderr=subprocess.PIPE,
    )
    try:
        if process.stderr is None:
            raise ValueError("the service has no standard error")
        found = re.search(rb"listens on (\S+)", process.stderr.readline())
        if not found:
            raise ValueError("the service did not start")
        async with httpx.AsyncClient(
            base_url=found[1].decode(), timeout=120, limits=httpx.Limits(max_connections=64)
        ) as client:
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.1)
            yield Service(process, client)
    finally:
        process.terminate()
        process.wait(60)


async def capacity(service: Service, mixture: list[Kind], seconds: float) -> float:
    """Requests a second of the mixture that sixteen clients get answered, each waiting for its answer."""
    started, answered = time.perf_counter(), 0
    draw = random.Random(1)

    async def client() -> None:
        nonlocal answered
        while time.perf_counter() < started + seconds:
            await service.ask(draw.choices(mixture, [kind.share for kind in mixture])[0])
            answered += 1

    await asyncio.gather(*(client() for _ in range(16)))
    return answered / (time.perf_counter() - started)  # the last answers come after the time is up


async def soak(pictures: int, minutes: float, load: float, measured: float) -> bool:
    """Run it, until so many pictures are sent or so many minutes are over, and print what was seen; whether nothing grew.

    A request is timed from when it is due: where the service falls behind and requests wait to be sent, that is part of their
    time.
    """
    mixture, draw = kinds(), random.Random(2)
    async with running_service() as service:
        looks = [(service.megabytes(), service.descriptors())]
        rate = load * await capacity(service, mixture, measured)
        print(f"{rate:.1f} pictures a second, {load:.0%} of what sixteen clients got", flush=True)
        milliseconds: list[float] = []  # in the order of sending
        sent: Counter[str] = Counter()
        free = asyncio.Semaphore(IN_FLIGHT)

        async def one(number: int, kind: Kind, due: float) -> None:
            try:
                await service.ask(kind)
                milliseconds[number] = (time.perf_counter() - due) * 1000
            finally:
                free.release()

        started = looked = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            while len(milliseconds) < pictures and time.perf_counter() < started + 60 * minutes:
                due = started + len(milliseconds) / rate
                await asyncio.sleep(due - time.perf_counter())
                await free.acquire()
                (kind,) = draw.choices(mixture, [each.share for each in mixture])
                sent[kind.name] += 1
                milliseconds.append(0.0)
                group.create_task(one(len(milliseconds) - 1, kind, due))
                if time.perf_counter() > looked:
                    looks.append((service.megabytes(), service.descriptors()))
                    looked += LOOK_SECONDS
            seconds = time.perf_counter() - started
        print(f"planned {rate:.1f} a second, sent {len(milliseconds) / seconds:.1f}")
        await asyncio.sleep(6)
        await service.client.get("/livez")  # by now the others are idle for longer than the client keeps them
        left = service.descriptors()
    return _told(seconds, sent, np.array(milliseconds), looks, left)


def _told(
    seconds: float, sent: Counter[str], milliseconds: npt.NDArray[np.float64], looks: list[tuple[float, int]], left: int
) -> bool:
    """Print what was seen: `looks` are resident memory and descriptors under load, `left` the descriptors after it."""
    memory, descriptors = zip(*looks, strict=True)
    start, middle, end = memory[len(looks) // 10], memory[len(looks) // 2], memory[-1]
    p99 = [float(np.percentile(tenth, 99)) for tenth in np.array_split(milliseconds, 10)]
    print(f"{len(milliseconds)} answered, sent in {seconds / 60:.1f} minutes: {dict(sent)}")
    print(f"resident memory, MiB: {start:.0f} after a tenth, {middle:.0f} in the middle, {end:.0f} at the end")
    print(f"descriptors: {descriptors[0]} at the start, {max(descriptors)} at most, {left} at the end")
    print(f"p99 of each tenth, from when each request was due, ms: {' '.join(f'{ms:.0f}' for ms in p99)}")
    return bool(end <= GROWTH * middle and left <= descriptors[0] + 4 and p99[-1] <= SLOWER * np.median(p99[:-1]))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Mixed pictures for a long time.")
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=60, help="stop after so long, if the pictures last")
    parser.add_argument("--load", type=float, default=0.8, help="share of the measured capacity")
    parser.add_argument("--measured", type=float, default=20, help="seconds of measuring the capacity")
    arguments = parser.parse_args()
    try:
        flat = asyncio.run(soak(arguments.pictures, arguments.minutes, arguments.load, arguments.measured))
    except* Fault as faults:
        raise SystemExit(str(faults.exceptions[0])) from faults
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
