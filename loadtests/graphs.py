"""How long graphs take on one thread: `.venv/bin/python -m loadtests.graphs A/model.onnx B/model.onnx … [--batch 1]`.

The graphs take turns, and the ratio to the first is that of each round. Times are the thread's own, in milliseconds of CPU a
picture; a busy machine still lengthens them, since its caches are shared.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import onnxruntime

from app.inference.session import open_session

_RUNS = 10  # of a graph in a round


def milliseconds(session: onnxruntime.InferenceSession, batch: int, size: tuple[int, int]) -> float:
    """The CPU time that a picture takes, over some runs of random pictures, of `size` where the graph takes any."""
    given = session.get_inputs()[0]
    height, width = (side if isinstance(side, int) else own for side, own in zip(given.shape[1:3], size, strict=True))
    pictures = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
    session.run(None, {given.name: pictures})
    started = time.thread_time()
    for _ in range(_RUNS):
        session.run(None, {given.name: pictures})
    return (time.thread_time() - started) * 1000 / (_RUNS * batch)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time graphs on one thread.")
    parser.add_argument("graphs", type=Path, nargs="+", metavar="MODEL.onnx")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", type=int, nargs=2, default=(416, 416), help="height and width of what a detector searches")
    arguments = parser.parse_args()
    try:
        sessions = [open_session(graph.read_bytes()) for graph in arguments.graphs]
    except OSError as error:
        raise SystemExit(f"{error.filename} cannot be read: {error.strerror}") from error
    batch, size = arguments.batch, arguments.size
    times = np.array([[milliseconds(session, batch, size) for session in sessions] for _ in range(arguments.rounds)])
    print("| graph | CPU ms a picture | quicker than the first by (10–90 % of rounds) |\n| --- | --- | --- |")
    for graph, own in zip(arguments.graphs, times.T, strict=True):
        low, middle, high = np.percentile(times[:, 0] / own, [10, 50, 90])
        print(f"| {graph} | {np.median(own):.2f} | {middle:.2f} [{low:.2f}, {high:.2f}] |")


if __name__ == "__main__":
    main()
