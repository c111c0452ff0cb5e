"""Files that are there whole or not at all: a full disk or a killed process leaves what was there before."""

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
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")  # another process may write the same file
    try:
        with temporary.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
    except OSError as error:
        raise DataError(f"{file} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(file: Path, content: bytes | str) -> None:
    """Replace `file` by this content. Raises DataError."""
    write_together({file: content})


def write_together(contents: dict[Path, bytes | str]) -> None:
    """Replace files by these contents, none of them before all are on the disk. Raises DataError."""
    with contextlib.ExitStack() as files:
        for file, content in contents.items():
            out = files.enter_context(whole_file(file))
            out.write(content.encode() if isinstance(content, str) else content)
            out.flush()
