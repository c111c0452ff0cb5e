"""What a full queue does: `.venv/bin/python loadtests/full_queue.py [--url …] [--refusals 500]`, against a running service.

Large requests keep the queue full; meanwhile others are refused (429), and probes and metrics are asked. How long each answer
takes is printed. Loopback on one machine: the client's own work is in the figures.
"""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import numpy as np

PHOTO = Path(__file__).parent.parent / "tests/data/photos/t_pose_cc0.jpg"
BOX = "295,15,545,595"
JPEG = {"Content-Type": "image/jpeg"}


async def milliseconds(asked: Callable[[], Awaitable[httpx.Response]], status: int) -> float | None:
    """How long an answer takes; None where it is of another status."""
    started = time.perf_counter()
    answer = await asked()
    return (time.perf_counter() - started) * 1000 if answer.status_code == status else None


async def measure(url: str, refusals: int, fillers: int) -> None:
    """Fill the queue, measure, and print."""
    photo = PHOTO.read_bytes()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, headers=JPEG, limits=limits) as client:

        def post(boxes: int) -> Awaitable[httpx.Response]:
            return client.post("/v1/pose", params={"boxes": ";".join([BOX] * boxes), "timeout_ms": 60_000}, content=photo)

        async def keep_full() -> None:
            while True:
                answer = await post(100)
                if answer.status_code == 429:
                    await asyncio.sleep(0.05)

        filling = [asyncio.create_task(keep_full()) for _ in range(fillers)]
        while (await post(100)).status_code != 429:
            pass
        took: dict[str, list[float]] = {"429": [], "/livez": [], "/readyz": [], "/metrics": []}
        while len(took["429"]) < refusals:
            ms = await milliseconds(lambda: post(100), 429)
            took["429"] += [] if ms is None else [ms]
            for path in ("/livez", "/readyz", "/metrics"):
                ms = await milliseconds(lambda path=path: client.get(path), 200)
                took[path] += [] if ms is None else [ms]
        for task in filling:
            task.cancel()
        await asyncio.gather(*filling, return_exceptions=True)
        print("| answer | count | p50 ms | p99 ms | most ms |\n| --- | --- | --- | --- | --- |")
        for name, values in took.items():
            p50, p99, most = np.percentile(values, [50, 99, 100])
            print(f"| {name} | {len(values)} | {p50:.1f} | {p99:.1f} | {most:.1f} |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What a full queue does.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--refusals", type=int, default=500)
    parser.add_argument("--fillers", type=int, default=8, help="clients that keep the queue full")
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.url, arguments.refusals, arguments.fillers))


if __name__ == "__main__":
    main()
