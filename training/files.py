"""Files that are each there whole or not at all: a full disk or a killed process leaves what was there before."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


class DataError(ValueError):
    """A file is missing, damaged or not what it should be; the message names it and says what is wrong."""


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless they are there. Raises DataError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made: {error.strerror}") from error


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[BinaryIO]:
    """A stream whose bytes become `file` once all are on the disk. Raises DataError where they cannot be written."""
    with _told(file), _temporary(file) as temporary:
        with temporary.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)


def write_whole(file: Path, content: bytes | str) -> None:
    """Replace `file` by this content. Raises DataError."""
    write_together({file: content})


def write_together(contents: dict[Path, bytes | str]) -> None:
    """Replace files by these contents, none of them before all are on the disk. Raises DataError."""
    with contextlib.ExitStack() as to_remove:
        temporaries = {file: to_remove.enter_context(_temporary(file)) for file in contents}
        for file, content in contents.items():
            with _told(file), temporaries[file].open("wb") as out:
                out.write(content.encode() if isinstance(content, str) else content)
                out.flush()
                os.fsync(out.fileno())
        for file, temporary in temporaries.items():
            with _told(file):
                temporary.replace(file)


@contextlib.contextmanager
def _temporary(file: Path) -> Iterator[Path]:
    """A place beside `file` for its new content, which is removed in the end where it is still there."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")  # another process may write the same file
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _told(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{file} cannot be written: {error.strerror}") from error
