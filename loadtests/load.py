"""Latency and throughput of a running service: `.venv/bin/python loadtests/load.py [--clients 1 2 8] [--requests 100]`.

Sends one of the repository's photos with one box again and again from a fixed number of clients, each waiting for its answer,
and checks every answer. Loopback on one machine: the client's own work is in the figures.
"""

import argparse
import asyncio
import time
from pathlib import Path

import httpx
import numpy as np

PHOTO = Path(__file__).parent.parent / "tests/data/photos/t_pose_cc0.jpg"
BOX = "295,15,545,595"


async def measure(url: str, clients: int, requests: int, boxes: int) -> str:
    """One line of the table: `requests` requests of `boxes` boxes each from `clients` clients."""
    photo = PHOTO.read_bytes()
    milliseconds: list[float] = []
    left = iter(range(requests))

    async def client(http: httpx.AsyncClient) -> None:
        for _ in left:
            started = time.perf_counter()
            answer = await http.post(
                "/v1/pose",
                params={"boxes": ";".join([BOX] * boxes)},
                content=photo,
                headers={"Content-Type": "image/jpeg"},
            )
            milliseconds.append((time.perf_counter() - started) * 1000)
            if len(answer.raise_for_status().json()["annotations"]) != boxes:
                raise ValueError(f"an answer holds other than {boxes} people")

    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        started = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        seconds = time.perf_counter() - started
    p50, p95, p99 = np.percentile(milliseconds, [50, 95, 99])
    rates = f"{requests / seconds:.1f} | {requests * boxes / seconds:.1f}"
    return f"| {clients} | {boxes} | {requests} | {p50:.1f} | {p95:.1f} | {p99:.1f} | {rates} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Latency and throughput of a running service.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--boxes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--requests", type=int, default=100)
    arguments = parser.parse_args()
    print("| clients | boxes | requests | p50 ms | p95 ms | p99 ms | requests/s | people/s |")
    print("| --- " * 8 + "|")
    for boxes in arguments.boxes:
        for clients in arguments.clients:
            print(asyncio.run(measure(arguments.url, clients, arguments.requests, boxes)), flush=True)


if __name__ == "__main__":
    main()
