"""The files that `lpn` writes: each is there whole or not at all, whatever stops the run, and beside it what goes on."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO, FileIO
from pathlib import Path
from typing import BinaryIO

import click


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Where to write what `file` is to hold, which takes its place once it is written; a link's target is replaced.

    An OSError that names no other file names this one.
    """
    place = real(file)
    half = place.with_name(f"{secrets.token_hex(4)}.tmp{file.suffix}")  # OpenCV goes by the suffix
    try:
        half.touch()
        try:
            yield half
            with half.open("rb") as written:
                os.fsync(written.fileno())
            half.replace(place)
        finally:
            half.unlink(missing_ok=True)
    except OSError as error:
        if error.filename in (None, str(half)):
            raise OSError(error.errno, error.strerror, str(file)) from error
        raise


class Part:
    """Lines of a run, under a head that tells what they are of: OUT.part, in which an interrupted run has left some; without
    a file in memory. Each is read again by its place. Raises UsageError where it is another run's, and OSError."""

    def __init__(self, file: Path | None, head: bytes) -> None:
        self.file = file
        memory = BytesIO()
        self._written: FileIO | BytesIO = memory if file is None else _locked(file)
        self._read: BinaryIO = memory if file is None else file.open("rb")  # a place of its own: reads are buffered
        self._begin, self._end = len(head), 0
        if not (found := self._read.readline()):
            self.append(head)
        elif found != head:
            told = "start that one again, or delete the file."
            raise click.UsageError(f"{file} is of a run with other options: {told}")
        else:
            self._end = len(head)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """The place and the text of each that an interrupted run has left, to be read before others are appended."""
        self._read.seek(self._begin)
        for line in self._read:
            if line.endswith(b"\n"):
                yield self._end, line
                self._end += len(line)
        self._written.truncate(self._end)  # the last one may have broken off …
        self._read.seek(0, os.SEEK_END)  # … and is not to be read from the buffer

    def append(self, line: bytes) -> int:
        """Its place. Raises OSError that names the file."""
        place, left = self._end, line
        try:
            while left:  # on a disk that is nearly full, a part is written before the rest fails
                left = left[self._written.write(left) :]
        except OSError as error:
            with suppress(OSError):
                self._written.truncate(place)
            raise OSError(error.errno, error.strerror, self.file and str(self.file)) from error
        self._end += len(line)
        return place

    def line_at(self, place: int) -> bytes:
        """The line there."""
        self._read.seek(place)
        line = self._read.readline()
        self._written.seek(0, os.SEEK_END)  # of lines in memory both are one
        return line

    @property
    def holds_lines(self) -> bool:
        return self._end > self._begin

    def close(self, kept: bool) -> None:
        """Close it; the file is deleted where it is not to be kept."""
        if self.file is not None and not kept:
            self.file.unlink(missing_ok=True)
        self._read.close()
        self._written.close()


def _locked(file: Path) -> FileIO:
    opened = FileIO(str(file), "a+")
    with suppress(OSError):  # there are file systems without locks: two runs are not told from each other there
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise click.UsageError(f"{file}: another run is writing it.") from error
    return opened


def check_regular(file: Path) -> None:
    """Raise UsageError where something else than a file is there, as a device or links that go round."""
    place = real(file)
    if os.path.lexists(place) and not place.is_file():
        raise click.UsageError(f"{file} is there, and is no regular file.")


def real(file: Path) -> Path:
    """The absolute path without links."""
    return Path(os.path.realpath(file))  # Path.resolve() raises where links go round
