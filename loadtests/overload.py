"""More photos than can be answered: `.venv/bin/python loadtests/overload.py [--times 3] [--seconds 20]`, a running service.

A photo of two people comes, without boxes unless `--query` has some, first from eight clients that wait for their answers,
then so many times as often as those were answered, whatever comes back. What is answered then, in the last two thirds of the
time, and how long answers and refusals take is printed. Loopback on one machine: the client's own work is in the figures, and
takes from the service's.
"""

import argparse
import asyncio
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

PHOTO = Path(__file__).parent.parent / "tests/data/photos/two_women_outdoors_cc0.jpg"
CLIENTS = 8


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer's status, the milliseconds that it took, and when it came."""

    status: int
    milliseconds: float
    came: float


class Clients:
    """Clients of one service, each with a connection, as many as have a request on its way: httpx's own pool of so many would
    be what is measured."""

    def __init__(self, url: str, photo: bytes, query: str) -> None:
        at = urlsplit(url)
        self._address = at.hostname, at.port or 80
        head = (
            f"POST /v1/pose?{query} HTTP/1.1\r\nHost: {at.netloc}\r\n"
            f"Content-Type: image/jpeg\r\nContent-Length: {len(photo)}\r\n\r\n"
        )
        self._request = head.encode() + photo
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self) -> Answer:
        """One request and its answer; a connection that the service has no room for is one as well, of status 0."""
        started = time.perf_counter()
        status = 0
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
            writer.write(self._request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
            status = int(head.split()[1])
            if b"connection: close" in head:
                writer.close()
            else:
                self._idle.append((reader, writer))
        came = time.perf_counter()
        return Answer(status, (came - started) * 1000, came)


async def capacity(clients: Clients, seconds: float) -> float:
    """Answers a second to clients that wait for them."""
    end = time.perf_counter() + seconds
    answers: list[Answer] = []

    async def client() -> None:
        while time.perf_counter() < end:
            answers.append(await clients.ask())

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return sum(answer.status == 200 for answer in answers) / seconds


async def measure(url: str, times: float, seconds: float, query: str = "") -> None:
    """Measure and print."""
    clients = Clients(url, PHOTO.read_bytes(), query)
    await capacity(clients, 1)
    able = await capacity(clients, seconds / 2)
    asking: list[asyncio.Task[Answer]] = []
    started = time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        while len(asking) < passed * able * times:
            asking.append(asyncio.create_task(clients.ask()))
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
    parser.add_argument("--query", default="", help="options of each request: boxes=140,200,225,640&timeout_ms=2000")
    arguments = parser.parse_args()
    try:
        asyncio.run(measure(arguments.url, arguments.times, arguments.seconds, arguments.query))
    except (OSError, ZeroDivisionError) as error:
        raise SystemExit(f"{arguments.url} gives no answer: {error}") from error


if __name__ == "__main__":
    main()
