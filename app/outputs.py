"""The files that `lpn` writes: each is there whole or not at all, whatever stops the run."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def check_regular(file: Path) -> None:
    """Raise UsageError where something else than a file is there, as a device or links that go round."""
    place = real(file)
    if os.path.lexists(place) and not place.is_file():
        raise click.UsageError(f"{file} is there, and is no regular file.")


def real(file: Path) -> Path:
    """The absolute path without links."""
    return Path(os.path.realpath(file))  # Path.resolve() raises where links go round
