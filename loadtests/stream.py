"""Frames a second of streams: `.venv/bin/python loadtests/stream.py [--clients 1 2 4] [--post]`, against a running service.

The frames are windows that wander over a photo of two people, of which each client has --ahead on their way. With --post they
are requests without boxes instead. Loopback on one machine: the client's own work is in the figures.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import cv2
import httpx
import numpy as np
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

PHOTO = Path(__file__).parent.parent / "tests/data/photos/two_women_outdoors_cc0.jpg"
WINDOW = (900, 720)
JPEG = {"Content-Type": "image/jpeg"}


class Fault(Exception):
    """A frame was refused."""


def frames() -> list[bytes]:
    """JPEG files of 900×720 pixels, whose window goes to and fro, 8 pixels a frame."""
    photo = np.asarray(cv2.imread(str(PHOTO)))
    width, height = WINDOW
    there = range(0, photo.shape[1] - width, 8)
    windows = [photo[photo.shape[0] - height :, left : left + width] for left in (*there, *reversed(there))]
    return [cv2.imencode(".jpg", window)[1].tobytes() for window in windows]


@contextmanager
def streaming(url: str) -> Iterator[tuple[Callable[[bytes], None], Callable[[], dict]]]:
    """Ways to send a frame and to take the next answer of a stream."""
    with connect(f"{url.replace('http', 'ws', 1)}/v1/stream", max_size=None) as stream:
        yield stream.send, lambda: json.loads(stream.recv())


@contextmanager
def posting(url: str, ahead: int) -> Iterator[tuple[Callable[[bytes], None], Callable[[], dict]]]:
    """The same of requests, of which so many are on their way."""
    with httpx.Client(base_url=url, timeout=60, headers=JPEG) as client, ThreadPoolExecutor(ahead) as pool:
        asked: list = []
        yield (
            lambda frame: asked.append(pool.submit(client.post, "/v1/pose", content=frame)),
            lambda: asked.pop(0).result().json(),
        )


def ask(url: str, way: list[bytes], seconds: float, ahead: int, post: bool) -> tuple[list[float], int]:
    """What one client sees: the milliseconds of each frame that is answered, and the people in all of them."""
    frame = itertools.cycle(way)
    took: list[float] = []
    people = 0
    with posting(url, ahead) if post else streaming(url) as (send, take):
        sent: list[float] = []
        until = time.perf_counter() + seconds
        while sent or time.perf_counter() < until:
            while len(sent) < ahead and time.perf_counter() < until:
                sent.append(time.perf_counter())
                send(next(frame))
            answer = take()
            if "annotations" not in answer:
                raise Fault(str(answer))
            del sent[: answer.get("skipped", 0)]
            took.append((time.perf_counter() - sent.pop(0)) * 1000)
            people += len(answer["annotations"])
    return took, people


def measure(url: str, clients: int, seconds: float, ahead: int, post: bool) -> str:
    """A row of the table."""
    way = frames()
    with ThreadPoolExecutor(clients) as pool:
        started = time.perf_counter()
        seen = list(pool.map(partial(ask, url, way, seconds, ahead), itertools.repeat(post, clients)))
        elapsed = time.perf_counter() - started
    milliseconds = [each for took, _ in seen for each in took]
    p50, p95, p99 = np.percentile(milliseconds, [50, 95, 99])
    people = sum(found for _, found in seen) / len(milliseconds)
    return f"| {clients} | {len(milliseconds) / elapsed:.1f} | {people:.2f} | {p50:.1f} | {p95:.1f} | {p99:.1f} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Frames a second of streams.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--ahead", type=int, default=2, help="frames that a client has on their way")
    parser.add_argument("--post", action="store_true", help="the same frames as requests, for comparison")
    arguments = parser.parse_args()
    print("| clients | frames/s | people a frame | p50 ms | p95 ms | p99 ms |\n| --- | --- | --- | --- | --- | --- |")
    try:
        for clients in arguments.clients:
            print(measure(arguments.url, clients, arguments.seconds, arguments.ahead, arguments.post), flush=True)
    except Fault as fault:
        raise SystemExit(str(fault)) from fault
    except (httpx.TransportError, WebSocketException, OSError) as error:
        raise SystemExit(f"{arguments.url} gives no answer: {error}") from error


if __name__ == "__main__":
    main()
