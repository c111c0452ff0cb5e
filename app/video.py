"""`lpn track`: a video → one line of JSON a frame, and the video with the people drawn on it."""

import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import click
import cv2
import numpy as np
import numpy.typing as npt
from starlette.datastructures import QueryParams

from app.api.bodies import read_stream_options
from app.api.formats import coco_frame
from app.api.pose import threshold_of
from app.api.problems import Problem, problem_of
from app.api.stream import frame_task
from app.inference.follower import Followed, Follower
from app.inference.model_store import ModelDescription
from app.inference.models import ModelNotFound
from app.inference.pipeline import NotReady, PictureError, Pipeline
from app.inference.scheduler import BatchFailed, LaneLost
from app.outputs import check_regular, real, whole_file
from app.settings import Settings
from app.telemetry.metrics import Metrics
from app.vision import drawing

UInt8 = npt.NDArray[np.uint8]

_USUAL_RATE = 30.0  # frames a second, of a video that does not say
_DAMAGED_IN_A_ROW = 1000  # then a video has ended, however many frames its header claims
_LIKELY_RATE = 240.0  # the most that is believed where OpenCV guesses the rate by times that may be uneven
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # that MP4 and QuickTime begin with, after a length
_MATROSKA = b"\x1aE\xdf\xa3"  # WebM too, which may tell …
_DEFAULT_DURATION = b"\x23\xe3\x83"  # … how long a frame is seen
_HOLE_SECONDS = 1.0  # without a frame, which is told where damage leaves no other trace


class Frames:
    """The frames of a video: how many there are by its own account (0: it does not say), how many a second (where the rate
    varies, at its begin or on average), and how many were read."""

    def __init__(self, file: Path, capture: cv2.VideoCapture) -> None:
        rate = capture.get(cv2.CAP_PROP_FPS)
        counted = not file.is_file() or _has_table(file)  # a pipe has no second begin
        told = counted or _tells_duration(file)
        trimmed = _trimmed(file) if file.is_file() else None
        self.file = file
        self.count = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self.rate = rate if 0 < rate < (1000 if told else _LIKELY_RATE + 1) else _USUAL_RATE
        self.uncounted = not counted or trimmed is not None
        self._per_second = self.rate
        if not counted and rate > 0:  # OpenCV makes the count of the length and the rate
            self.count = round(self.count * self.rate / rate)
        if trimmed:  # OpenCV counts the frames, too, that FFmpeg leaves out
            seen, whole = trimmed
            self._per_second = self.count / whole
            self.count = round(self._per_second * seen)
        self.size = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        self.read = 0
        self._capture = capture
        self._seconds = -1.0  # of the last one that was read …
        self._lasts = 1 / self.rate  # … and for how long it is seen
        self._damaged = 0  # before it
        self._hole = 0.0, 0.0  # the longest time between two that were read

    def __iter__(self) -> Iterator[tuple[int, int, float, UInt8]]:
        """Of each frame its place, how many damaged ones were passed over before it, its seconds and its pixels."""
        tried = failed = 0
        while True:
            whole, frame = self._capture.read()
            tried += 1
            if whole:
                told, before = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000, self._seconds
                self._seconds = told if told > before else before + 1 / self.rate
                if self.read:
                    self._lasts = self._seconds - before
                    self._hole = max(self._hole, (before, self._seconds), key=lambda ends: ends[1] - ends[0])
                self.read += 1
                passed, failed = failed, 0
                self._damaged += passed
                yield tried - 1, passed, self._seconds, frame.astype(np.uint8, copy=False)
                continue
            failed += 1
            if (tried >= self.count and not self.uncounted) or failed >= _DAMAGED_IN_A_ROW:
                return

    @property
    def missing(self) -> int:
        """How many could not be read. Where a video tells no number, OpenCV makes one of its length and first rate; where it
        was trimmed, its table counts what is not seen.

        So one that ends in a still picture looks like one that breaks off.
        """
        if not (self.uncounted and self.read):
            return self.count - self.read
        return self._damaged + max(0, round(self.count - (self._seconds + self._lasts) * self._per_second))

    @property
    def hole(self) -> tuple[float, float] | None:
        """From when to when an uncounted video shows no frame, where that is long: it is damaged there, or stands still."""
        begin, end = self._hole
        return self._hole if self.uncounted and end - begin >= max(_HOLE_SECONDS, 10 / self.rate) else None


def _has_table(file: Path) -> bool:
    """Whether a file is of a kind that counts its frames: MP4, QuickTime or AVI."""
    begin = _begin(file)
    return begin[4:] in _BOXES or begin[:4] == b"RIFF"


def _tells_duration(file: Path) -> bool:
    """Whether a file is Matroska and says how long its frames are seen: without, OpenCV guesses the rate there, too."""
    begin = _begin(file, 65_536)
    return begin[:4] == _MATROSKA and _DEFAULT_DURATION in begin


def _begin(file: Path, size: int = 8) -> bytes:
    with file.open("rb") as opened:
        return opened.read(size)


def _trimmed(file: Path) -> tuple[float, float] | None:
    """The seconds that an MP4 file shows of its pictures, and those that it holds; None where it shows all.

    Who trims one without encoding it anew leaves frames before the cut, for others to be decoded, and has an edit list say
    where it begins (ISO/IEC 14496-12, 8.6.6).
    """
    with file.open("rb") as opened:
        if opened.read(8)[4:] not in _BOXES:
            return None
        try:
            for movie in _boxes(opened, (0, file.stat().st_size), b"moov"):
                for track in _boxes(opened, movie, b"trak"):
                    if _content(opened, track, b"mdia", b"hdlr")[8:12] == b"vide":
                        return _seen_of(opened, movie, track)
        except (struct.error, ZeroDivisionError):  # damaged
            pass
    return None


def _seen_of(opened: BinaryIO, movie: tuple[int, int], track: tuple[int, int]) -> tuple[float, float] | None:
    scale, _ = _times(_content(opened, movie, b"mvhd"))
    own_scale, length = _times(_content(opened, track, b"mdia", b"mdhd"))
    edits = _content(opened, track, b"edts", b"elst")
    layout = struct.Struct(">Qqi" if edits[:1] == b"\1" else ">Iii")
    rows = edits[8 : 8 + (len(edits) - 8) // layout.size * layout.size]
    seen = sum(lasts for lasts, begin, _ in layout.iter_unpack(rows) if begin >= 0)  # others show nothing
    # The edits are in the movie's units, and so may be less by one of them where nothing is left out.
    return (seen / scale, length / own_scale) if seen and (seen + 1) / scale < length / own_scale else None


def _times(header: bytes) -> tuple[int, int]:
    """The units in a second, and how many of them it lasts, of a header of a movie or of a track's media."""
    scale, length = struct.unpack_from(">IQ" if header[:1] == b"\1" else ">II", header, 20 if header[:1] == b"\1" else 12)
    return scale, length


def _boxes(opened: BinaryIO, place: tuple[int, int], kind: bytes) -> Iterator[tuple[int, int]]:
    """Where the contents of the boxes of a kind begin and end, of those that lie next to each other there."""
    begin, end = place
    while begin + 8 <= end:
        opened.seek(begin)
        size, found, longer = struct.unpack(">I4sQ", opened.read(16).ljust(16, b"\0"))
        head = 16 if size == 1 else 8
        size = longer if size == 1 else size or end - begin
        if size < head:
            return
        if found == kind:
            yield begin + head, min(begin + size, end)
        begin += size


def _content(opened: BinaryIO, place: tuple[int, int], *path: bytes) -> bytes:
    """The content of a box within boxes, b"" where there is none."""
    for kind in path:
        place = next(_boxes(opened, place, kind), (0, 0))
    opened.seek(place[0])
    return opened.read(place[1] - place[0])


@contextmanager
def frames_of(file: Path) -> Iterator[Frames]:
    """The frames of a video file, upright."""
    capture = cv2.VideoCapture(_for_opencv(file))
    try:
        if not capture.isOpened():
            raise click.UsageError(f"{file} is no video that can be read.")
        yield Frames(file, capture)
    finally:
        capture.release()


def _for_opencv(file: Path) -> str:
    """The absolute path: of a relative one FFmpeg takes what stands before a colon for a protocol. Raises UsageError."""
    path = str(file.absolute())
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise click.UsageError(f"{file}: its path is not UTF-8, and videos are read and written by such alone.") from error
    return path


def told_missing(frames: Frames) -> int:
    """1, once it is told, where more of the frames could not be read than a video may be wrong about how many it has."""
    missing = frames.missing
    if frames.hole:
        begin, end = frames.hole
        click.echo(f"{frames.file}: there is no frame between {begin:.1f} and {end:.1f} s.", err=True)
    if frames.read and missing <= max(2, frames.count / 100):
        return 0
    click.echo(f"{frames.file}: {missing} of {frames.count} frames could not be read.", err=True)
    return 1


def check_outputs(video: Path, out: Path | None, draw: Path | None) -> None:
    """Raise UsageError where what is written would take the place of what is read, or of what is also written."""
    if draw is not None and draw.suffix.lower() != ".mp4":
        raise click.UsageError(f"--draw {draw}: the video is written as .mp4.")
    if draw is not None:
        _for_opencv(draw)
    written = [file for file in (out, draw) if file is not None]
    for file in written:
        check_regular(file)
    if len({real(file) for file in (video, *written)}) < 1 + len(written):
        raise click.UsageError("VIDEO, --out and --draw must be different files.")


async def track(
    frames: Frames,
    out: Path | None,
    draw: Path | None,
    settings: Settings,
    given: dict[str, Any],
    tick: Callable[[int], Any],
) -> None:
    """Follow the people of the frames and write them to `out`, and into a video `draw`; to standard output without both."""
    pipeline = Pipeline(settings, Metrics())
    if pipeline.models.detector is None:
        raise click.UsageError("There is no detector, which finds the people: POSE_DETECTOR names it.")
    try:
        options = read_stream_options(QueryParams({name: str(value) for name, value in given.items()}), settings)
        model = pipeline.models.find(options.model).description
    except (Problem, ModelNotFound) as error:
        raise click.UsageError(problem_of(error).detail.removeprefix("query.")) from error
    threshold = threshold_of(options, model)
    follower = Follower(pipeline)
    try:
        with ExitStack() as opened:
            film = opened.enter_context(_film(draw, frames)) if draw else None
            lines: BinaryIO | None = None if draw else sys.stdout.buffer
            if out:
                half = opened.enter_context(whole_file(out))
                lines = opened.enter_context(half.open("wb"))
            await pipeline.start()
            for number, passed, seconds, frame in frames:
                started = time.perf_counter()
                try:
                    data = drawing.encode(frame, ".bmp")
                    try:
                        followed = await follower.follow(frame_task(data, options, settings), seconds)
                    except LaneLost:  # as where the machine stood still: no reason to lose what was read before
                        followed = await follower.follow(frame_task(data, options, settings), seconds)
                except PictureError as error:
                    raise click.ClickException(f"{frames.file}: {problem_of(error).detail}") from error
                except (LaneLost, BatchFailed, NotReady) as error:
                    cause = f" ({error.__cause__})" if error.__cause__ else ""
                    raise click.ClickException(f"{frames.file}, frame {number}: {error}{cause}") from error
                if lines:
                    total = time.perf_counter() - started
                    lines.write(coco_frame(number, passed, followed, model, threshold, total) + b"\n")
                if film:
                    _draw(frame, followed, model, threshold)
                    film.write(frame)
                tick(1)
    finally:
        await pipeline.stop()


def _draw(frame: UInt8, followed: Followed, model: ModelDescription, threshold: float) -> None:
    people, joints = followed.people, model.keypoints
    drawing.draw_people(frame, people.keypoints, joints.skeleton, joints.names, threshold)
    drawing.draw_numbers(frame, people.boxes, followed.ids)


@contextmanager
def _film(file: Path, frames: Frames) -> Iterator[cv2.VideoWriter]:
    """A video to write, as large and as fast as the frames."""
    rate = round(frames.rate, 3 if frames.rate < 65 else 2 if frames.rate < 655 else 1)  # MPEG-4 has 16 bits for it
    with whole_file(file) as half:
        film = cv2.VideoWriter(_for_opencv(half), cv2.VideoWriter.fourcc(*"mp4v"), rate, frames.size)
        try:
            if not film.isOpened():
                raise click.UsageError(f"{file} cannot be written.")
            yield film
            film.release()
            if _frames_in(half) != frames.read:  # the writer does not tell of a full disk
                raise click.ClickException(f"{file} could not be written whole; is the disk full?")
        finally:
            film.release()


def _frames_in(file: Path) -> int:
    capture = cv2.VideoCapture(str(file))
    try:
        return int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    finally:
        capture.release()
