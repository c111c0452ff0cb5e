"""Latency and throughput of a running service: `.venv/bin/python loadtests/load.py [--clients 1 2 8] [--requests 100]`.

Sends one of the repository's photos with boxes (0: none, the detector searches it) again and again from a fixed number of
clients, each waiting for its answer, and checks every answer. `--mixed` shows whether boxed and searched pictures starve one
another, `--enlarged 4` sends the photo with 12 megapixels. Loopback on one machine: the client's own work is in the figures.
"""

import argparse
import asyncio
import time
from pathlib import Path

import cv2
import httpx
import numpy as np

PHOTO = Path(__file__).parent.parent / "tests/data/photos/t_pose_cc0.jpg"
BOX = (295, 15, 545, 595)


class Photo:
    """The repository's photo, each side `enlarged` times larger, and the box of the person on it."""

    def __init__(self, enlarged: int) -> None:
        self.box = ",".join(str(value * enlarged) for value in BOX)
        self.file = PHOTO.read_bytes()
        if enlarged > 1:
            pixels = cv2.resize(cv2.imread(str(PHOTO)), None, fx=enlarged, fy=enlarged, interpolation=cv2.INTER_CUBIC)
            self.file = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


class Clients:
    """Clients that send the photo with `boxes` boxes, alone or in a form, and how many milliseconds their answers took."""

    def __init__(self, count: int, boxes: int, form: bool = False) -> None:
        self.count = count
        self.boxes = boxes
        self.form = form
        self.sent = 0
        self.milliseconds: list[float] = []

    async def ask(self, http: httpx.AsyncClient, photo: Photo) -> None:
        """One request and its answer."""
        self.sent += 1
        options = {"boxes": ";".join([photo.box] * self.boxes)} if self.boxes else {"max_people": "1"}
        started = time.perf_counter()
        if self.form:
            answer = await http.post("/v1/pose", data=options, files={"image": ("photo.jpg", photo.file, "image/jpeg")})
        else:
            answer = await http.post("/v1/pose", params=options, content=photo.file, headers={"Content-Type": "image/jpeg"})
        self.milliseconds.append((time.perf_counter() - started) * 1000)
        people = len(answer.raise_for_status().json()["annotations"])
        if people != (self.boxes or 1):
            raise ValueError(f"an answer holds {people} people")

    def row(self, seconds: float, beside: str = "") -> str:
        """A line of the table."""
        requests = len(self.milliseconds)
        p50, p95, p99 = np.percentile(self.milliseconds, [50, 95, 99])
        rates = f"{requests / seconds:.1f} | {requests * (self.boxes or 1) / seconds:.1f}"
        boxes = self.boxes or "found"
        return f"| {self.count} | {boxes} | {beside}{requests} | {p50:.1f} | {p95:.1f} | {p99:.1f} | {rates} |"


async def measure(url: str, photo: Photo, groups: list[Clients], requests: int) -> float:
    """The seconds that it took until each group had `requests` answers; a group that is done goes on meanwhile."""

    async def client(http: httpx.AsyncClient, group: Clients) -> None:
        while any(other.sent < requests for other in groups):
            await group.ask(http, photo)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        started = time.perf_counter()
        await asyncio.gather(*(client(http, group) for group in groups for _ in range(group.count)))
        return time.perf_counter() - started


async def mixed(url: str, photo: Photo, requests: int) -> None:
    """Four clients with a box and four without, each alone and then together."""
    print("| clients | boxes | beside | requests | p50 ms | p95 ms | p99 ms | requests/s | people/s |")
    print("| --- " * 9 + "|")
    for kinds in ([1], [0], [1, 0]):
        groups = [Clients(4, boxes) for boxes in kinds]
        seconds = await measure(url, photo, groups, requests)
        for group in groups:
            beside = "".join(f"4 × {other.boxes or 'found'}" for other in groups if other is not group) or "nothing"
            print(group.row(seconds, f"{beside} | "), flush=True)


async def alone(url: str, photo: Photo, clients: list[int], boxes: list[int], requests: int) -> None:
    """Every number of clients with every number of boxes."""
    print("| clients | boxes | requests | p50 ms | p95 ms | p99 ms | requests/s | people/s |")
    print("| --- " * 8 + "|")
    for number in boxes:
        for count in clients:
            group = Clients(count, number)
            print(group.row(await measure(url, photo, [group], requests)), flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Latency and throughput of a running service.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--boxes", type=int, nargs="+", default=[0, 1, 4], help="a photo; 0: the detector finds them")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--enlarged", type=int, default=1, help="times that each side of the photo is larger")
    parser.add_argument("--mixed", action="store_true", help="boxed and searched pictures alone and together")
    arguments = parser.parse_args()
    if min(arguments.requests, arguments.enlarged, *arguments.clients) < 1 or min(arguments.boxes) < 0:
        parser.error("--requests, --clients and --enlarged are at least 1, --boxes at least 0")
    photo = Photo(arguments.enlarged)
    if arguments.mixed:
        measured = mixed(arguments.url, photo, arguments.requests)
    else:
        measured = alone(arguments.url, photo, arguments.clients, arguments.boxes, arguments.requests)
    try:
        asyncio.run(measured)
    except httpx.TransportError as error:
        raise SystemExit(f"{arguments.url} gives no answer: {error}") from error
    except httpx.HTTPStatusError as error:
        raise SystemExit(f"{arguments.url} refuses: {error.response.text}") from error


if __name__ == "__main__":
    main()
