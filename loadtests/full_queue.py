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
TRY_AGAIN = 0.05
"""Seconds after which a client that fills the queue asks again where it was refused."""


class Fault(Exception):
    """An answer that neither a full queue nor a free one gives."""


async def timed(asked: Awaitable[httpx.Response], *statuses: int) -> tuple[int, float]:
    """An answer's status, which must be one of these, and the milliseconds that it took."""
    started = time.perf_counter()
    answer = await asked
    if answer.status_code not in statuses:
        raise Fault(f"{answer.request.url.path}: {answer.status_code} {answer.text[:200]}")
    return answer.status_code, (time.perf_counter() - started) * 1000


async def until_full(post: Callable[[], Awaitable[tuple[bool, float]]]) -> None:
    """Ask until a request is refused; Fault where the clients that fill the queue are too few for that."""
    for _ in range(20):
        if (await post())[0]:
            return
        await asyncio.sleep(TRY_AGAIN * 2)  # the next room is the fillers'
    raise Fault("20 requests in turn found room in the queue: it takes more --fillers to fill it")


async def measure(url: str, refusals: int, fillers: int) -> None:
    """Fill the queue, measure, and print."""
    photo = PHOTO.read_bytes()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, headers=JPEG, limits=limits) as client:

        async def post() -> tuple[bool, float]:
            """Whether a request of 100 crops was refused, and the milliseconds that it took."""
            params = {"boxes": ";".join([BOX] * 100), "timeout_ms": 60_000}
            status, ms = await timed(client.post("/v1/pose", params=params, content=photo), 200, 429)
            return status == 429, ms

        async def keep_full() -> None:
            while True:
                refused, _ = await post()
                if refused:
                    await asyncio.sleep(TRY_AGAIN)

        took: dict[str, list[float]] = {"429": [], "/livez": [], "/readyz": [], "/metrics": []}
        async with asyncio.TaskGroup() as group:  # which ends with the first fault of any of them
            filling = [group.create_task(keep_full()) for _ in range(fillers)]
            await until_full(post)
            while len(took["429"]) < refusals:
                refused, ms = await post()
                took["429"] += [ms] if refused else []
                for path in ("/livez", "/readyz", "/metrics"):
                    took[path].append((await timed(client.get(path), 200))[1])
            for task in filling:
                task.cancel()
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
    try:
        asyncio.run(measure(arguments.url, arguments.refusals, arguments.fillers))
    except* Fault as faults:
        raise SystemExit(str(faults.exceptions[0])) from faults
    except* httpx.TransportError as errors:
        raise SystemExit(f"{arguments.url} gives no answer: {errors.exceptions[0]}") from errors


if __name__ == "__main__":
    main()
