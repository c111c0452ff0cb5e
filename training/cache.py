"""Pictures of many sizes with what is known of each: written once into two files of a cache, then mapped from them."""

import hashlib
import logging
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from training.files import DataError, make_folder, whole_file

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pictures:
    """Picture i is `pixels[offsets[i]:offsets[i + 1]]`, [heights[i], widths[i], 3] BGR."""

    pixels: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    heights: npt.NDArray[np.int64]
    widths: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.heights)

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        """The pixels [H, W, 3] of picture `index`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.pixels[start:end].reshape(self.heights[index], self.widths[index], 3)


def cached(folder: Path, name: str, source: Path, write: Callable[[BinaryIO], dict[str, Any]]) -> dict[str, Any]:
    """The fields of `Pictures`, and what else `write` gave, from `name`.npz and `name`.bin in a folder.

    Where they are missing, or were made from another content of the file `source`, `write` puts the pixels of all pictures
    into a stream and gives the other fields. Raises DataError where `source` cannot be read, or the two cannot be written or
    do not belong together, and what `write` raises.
    """
    index_file, pixel_file = folder / f"{name}.npz", folder / f"{name}.bin"
    try:
        made_from = hashlib.sha256(source.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}") from error
    if not index_file.exists() or _source_of(index_file) not in (made_from, None):
        if index_file.exists():
            log.info("%s has changed: its cache is made anew", source)
        make_folder(folder)
        with whole_file(pixel_file) as out:
            fields = write(out)
        with whole_file(index_file) as out:  # last, so that an interrupted run leaves no half-made cache behind
            np.savez(out, source=made_from, **fields)
    try:
        with np.load(index_file) as index:
            fields = {"pixels": np.memmap(pixel_file, np.uint8, "r"), **index}
        del fields["source"]
        whole = len(fields["pixels"]) == fields["offsets"][-1]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        whole = False
    if not whole:
        raise DataError(f"{index_file} and {pixel_file.name} do not belong together: delete both, and they are made anew")
    return fields


def _source_of(index_file: Path) -> str | None:
    """The hash of what a cache was made from; "" where it does not say, None where it cannot be read."""
    try:
        with np.load(index_file) as index:
            return str(index["source"]) if "source" in index else ""
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
