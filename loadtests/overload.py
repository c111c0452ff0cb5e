"""More photos than can be answered: `.venv/bin/python loadtests/overload.py [--times 3] [--seconds 20]`, a running service.

A photo of two people comes without boxes, first from eight clients that wait for their answers, then so many times as often
as those were answered, whatever comes back. What is answered then, in the last two thirds of the time, and how long answers
and refusals take is printed. Loopback on one machine: the client's own work is in the figures, and takes from the service's.
"""

import argparse
import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

PHOTO = Path(__file__).parent.parent / "tests/data/photos/two_women_outdoors_cc0.jpg"
CLIENTS = 8


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer's status, the milliseconds that it took, and when it came."""

    status: int
    milliseconds: float
    came: float


async def ask(http: httpx.AsyncClient, photo: bytes) -> Answer:
    """One request and its answer."""
    started = time.perf_counter()
    answer = await http.post("/v1/pose", content=photo, headers={"Content-Type": "image/jpeg"})
    came = time.perf_counter()
    return Answer(answer.status_code, (came - started) * 1000, came)


async def capacity(http: httpx.AsyncClient, photo: bytes, seconds: float) -> float:
    """Answers a second to clients that wait for them."""
    end = time.perf_counter() + seconds
    answers: list[Answer] = []

    async def client() -> None:
        while time.perf_counter() < end:
            answers.append(await ask(http, photo))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return sum(answer.status == 200 for answer in answers) / seconds


async def measure(url: str, times: float, seconds: float) -> None:
    """Measure and print."""
    photo = PHOTO.read_bytes()
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as http:
        await capacity(http, photo, 1)
        able = await capacity(http, photo, seconds / 2)
        asking: list[asyncio.Task[Answer]] = []
        started = time.perf_counter()
        while (passed := time.perf_counter() - started) < seconds:
            while len(asking) < passed * able * times:
                asking.append(asyncio.create_task(ask(http, photo)))
            await asyncio.sleep(0.004)
        answers = await asyncio.gather(*asking)
    told = [answer for answer in answers if started + seconds / 3 < answer.came < started + seconds]
    statuses = Counter(answer.status for answer in told)
    share = statuses[200] / (seconds * 2 / 3) / able
    print(
        f"{able:.1f} answers a second to {CLIENTS} clients; {share:.0%} of that while {times:g} times as many are asked for."
    )
    print("\n| answer | count | p50 ms | p99 ms | most ms |\n| --- | --- | --- | --- | --- |")
    for status, count in sorted(statuses.items()):
        p50, p99, most = np.percentile([answer.milliseconds for answer in told if answer.status == status], [50, 99, 100])
        print(f"| {status} | {count} | {p50:.1f} | {p99:.1f} | {most:.1f} |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="More photos than can be answered.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--times", type=float, default=3, help="requests for each one that can be answered")
    parser.add_argument("--seconds", type=float, default=20)
    arguments = parser.parse_args()
    try:
        asyncio.run(measure(arguments.url, arguments.times, arguments.seconds))
    except httpx.TransportError as error:
        raise SystemExit(f"{arguments.url} gives no answer: {error}") from error


if __name__ == "__main__":
    main()
