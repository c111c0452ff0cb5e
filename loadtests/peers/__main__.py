"""This service beside what else one would build around its model: a plain FastAPI app, LitServe, PyTorch.

    .venv/bin/pip install litserve
    .venv/bin/python -m loadtests.peers [--rounds 3] [--requests 100] [--peers service plain …]

Every one takes the same form, a photo and a box, and decodes, cuts, and finds the joints by the same functions; what differs
is who runs what when. They are measured in turns, one at a time. PyTorch needs `scripts/environment training`.
"""

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np

from loadtests.load import Clients, Photo, measure
from loadtests.peers.work import HOST

ROOT = Path(__file__).parent.parent.parent
CORES = len(os.sched_getaffinity(0))
PEERS = {  # what it is, and its module with arguments
    "service": ("this service", "app"),
    "plain": ("FastAPI, ONNX Runtime as it comes", "loadtests.peers.plain", "{port}", 0),
    "plain-1": ("FastAPI, one thread a call", "loadtests.peers.plain", "{port}", 1),
    "litserve": ("LitServe, ONNX Runtime as it comes", "loadtests.peers.lit", "{port}", 0, 1),
    "litserve-1": ("LitServe, a worker a core, one thread a call", "loadtests.peers.lit", "{port}", 1, CORES),
    "torch": ("FastAPI, PyTorch as it comes, float32", "loadtests.peers.plain", "{port}", "torch"),
}


@contextmanager
def running(peer: str, port: int, photo: Photo) -> Iterator[None]:
    """A peer's process from its first answer on, and its end with all of its workers."""
    command = ["-m", *(str(part).format(port=port) for part in PEERS[peer][1:])]
    environment = os.environ | {"POSE_PORT": str(port), "POSE_LOG_LEVEL": "ERROR"}
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        if not _answers(process, port, photo):
            raise SystemExit(f"{peer} does not answer; run {' '.join(command)} to see why")
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # LitServe's workers would outlive it
        process.wait()


def _answers(process: subprocess.Popen[bytes], port: int, photo: Photo) -> bool:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            asyncio.run(measure(f"http://{HOST}:{port}", photo, [Clients(1, 1, form=True)], 20))
        except (httpx.HTTPError, ValueError):
            time.sleep(0.5)
        else:
            return True
    return False


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="This service beside others around the same model.")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    photo = Photo(1)
    print("| round | peer | clients | requests | p50 ms | p95 ms | p99 ms | requests/s |")
    print("| --- " * 8 + "|")
    rates: dict[tuple[str, int], list[float]] = {}
    for number in range(1, arguments.rounds + 1):
        for peer in arguments.peers:
            with socket.create_server((HOST, 0)) as free:
                port = free.getsockname()[1]
            with running(peer, port, photo):
                for count in arguments.clients:
                    group = Clients(count, 1, form=True)
                    seconds = asyncio.run(measure(f"http://{HOST}:{port}", photo, [group], arguments.requests))
                    requests = len(group.milliseconds)
                    p50, p95, p99 = np.percentile(group.milliseconds, [50, 95, 99])
                    rates.setdefault((peer, count), []).append(requests / seconds)
                    row = f"{requests} | {p50:.1f} | {p95:.1f} | {p99:.1f} | {requests / seconds:.1f}"
                    print(f"| {number} | {PEERS[peer][0]} | {count} | {row} |", flush=True)
    first = arguments.peers[0]
    for (peer, count), values in rates.items():
        if peer != first:
            ratios = [own / value for own, value in zip(rates[first, count], values, strict=True)]
            told = f"{np.median(ratios):.2f} times [{min(ratios):.2f}, {max(ratios):.2f}]"
            print(f"{count} clients: {PEERS[first][0]} answers {told} as many as {PEERS[peer][0]}")


if __name__ == "__main__":
    main()
