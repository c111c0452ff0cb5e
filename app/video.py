"""`lpn track`: a video → one line of JSON a frame, and the video with the people drawn on it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import numpy.typing as npt

from app.api import schemas
from app.api.formats import coco_frame
from app.api.pose import threshold_of
from app.api.problems import problem_of
from app.api.stream import check_ready, frame_task
from app.inference.follower import Followed, Follower
from app.inference.model_store import ModelDescription
from app.inference.pipeline import ModelNotFound, NoDetector, Pipeline
from app.settings import Settings
from app.telemetry.metrics import STAGES, Metrics
from app.vision import drawing

UInt8 = npt.NDArray[np.uint8]

_CODECS = {".mp4": "mp4v", ".webm": "VP80"}
_USUAL_RATE = 30.0  # frames a second, of a video that does not say


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames of a video, how many there are if it says so (else 0), and how many a second."""

    capture: cv2.VideoCapture
    count: int
    rate: float

    def __iter__(self) -> Iterator[UInt8]:
        while (read := self.capture.read())[0]:
            yield read[1].astype(np.uint8, copy=False)


@contextmanager
def frames_of(file: Path) -> Iterator[Frames]:
    """The frames of a video file, upright."""
    capture = cv2.VideoCapture(str(file))
    try:
        if not capture.isOpened():
            raise click.UsageError(f"{file} is no video that can be read.")
        rate = capture.get(cv2.CAP_PROP_FPS)
        yield Frames(capture, max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT))), rate if 0 < rate < 1000 else _USUAL_RATE)
    finally:
        capture.release()


async def track(
    frames: Frames,
    out: Path | None,
    draw: Path | None,
    settings: Settings,
    given: dict[str, Any],
    tick: Callable[[int], Any],
) -> None:
    """Follow the people of the frames and write them to `out`, and into a video `draw`; to standard output without both."""
    options = schemas.Options(**given)
    pipeline = Pipeline(settings, Metrics())
    await pipeline.start()
    try:
        check_ready(pipeline, options)
    except (ModelNotFound, NoDetector) as error:
        raise click.UsageError(problem_of(error).detail) from error
    model = pipeline.find(options.model).description
    follower = Follower(pipeline)
    with ExitStack() as opened:
        lines = opened.enter_context(out.open("wb")) if out else None if draw else sys.stdout.buffer
        film = opened.enter_context(_film(draw, frames)) if draw else None
        for number, frame in enumerate(frames):
            task = frame_task(drawing.encode(frame, ".bmp"), options, settings)
            followed = await follower.follow(task, number / frames.rate)
            if lines:
                lines.write(_line(number, followed, model, threshold_of(options, model)))
            if film:
                _draw(frame, followed, model, threshold_of(options, model))
                film.write(frame)
            tick(1)
    await pipeline.stop()


def _line(number: int, followed: Followed, model: ModelDescription, threshold: float) -> bytes:
    milliseconds = {stage: followed.seconds[stage] * 1000 for stage in STAGES if stage in followed.seconds}
    return coco_frame(number, 0, followed, model, threshold, milliseconds) + b"\n"


def _draw(frame: UInt8, followed: Followed, model: ModelDescription, threshold: float) -> None:
    people, joints = followed.people, model.keypoints
    drawing.draw_people(frame, people.keypoints, joints.skeleton, joints.names, threshold)
    drawing.draw_numbers(frame, people.boxes, followed.ids)


@contextmanager
def _film(file: Path, frames: Frames) -> Iterator[cv2.VideoWriter]:
    """A video to write, as large and as fast as the frames."""
    if file.suffix.lower() not in _CODECS:
        raise click.UsageError(f"{file} cannot be written; a video is one of {', '.join(_CODECS)}.")
    codec = cv2.VideoWriter.fourcc(*_CODECS[file.suffix.lower()])
    size = int(frames.capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(frames.capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    film = cv2.VideoWriter(str(file), codec, frames.rate, size)
    try:
        if not film.isOpened():
            raise click.UsageError(f"{file} cannot be written.")
        yield film
    finally:
        film.release()
