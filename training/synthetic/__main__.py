"""Rendered people as a COCO keypoint set: `python -m training.synthetic --assets DIR --count N --out DIR`.

Writes rendered.json and rendered-0.zip. Pictures are made in groups of one size; on a CPU a picture depends on the seed and
its number alone, not on how many are made or by how many threads.
"""

import argparse
import hashlib
import json
import os
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import torch

from app.inference.session import usable_cores
from training.command import one_line_faults
from training.data import in_order
from training.files import make_folder, whole_file
from training.keypoints import NAMES, SKELETON
from training.synthetic.studio import Studio
from training.trainer import add_device

_SIDES = (256, 448)  # of pictures, in pixels
_GROUP = 16  # pictures that are drawn together
_REPORT_SECONDS = 5


def group(studio: Studio, number: int, count: int, seed: int) -> list[tuple[bytes, tuple[int, int], list[dict[str, Any]]]]:
    """Group `number` of pictures, of which only those below `count` are kept: WebP files, sizes and annotations."""
    height, width = np.random.default_rng((seed, number, 1)).integers(*_SIDES, 2, endpoint=True).tolist()
    first = number * _GROUP
    rngs = [np.random.default_rng((seed, each)) for each in range(first, first + _GROUP)]
    made = studio.pictures((height, width), rngs)[: count - first]
    quality = [cv2.IMWRITE_WEBP_QUALITY, 92]
    return [(cv2.imencode(".webp", pixels, quality)[1].tobytes(), (height, width), people) for pixels, people in made]


def write_set(studio: Studio, count: int, seed: int, out: Path, threads: int) -> None:
    """Write pictures 0 … count - 1 as the set `rendered`. Raises DataError."""
    make_folder(out)
    category = {"id": 1, "name": "person", "keypoints": NAMES, "skeleton": SKELETON}
    with whole_file(out / "rendered.json") as labels, whole_file(out / "rendered-0.zip") as file:
        images, people = _write_pictures(studio, count, seed, file, threads)
        pictures = hashlib.sha256(Path(file.name).read_bytes()).hexdigest()  # labels may be those of other pictures
        content = {"info": {"pictures": pictures}, "images": images, "annotations": people, "categories": [category]}
        labels.write(json.dumps(content).encode())
        labels.flush()
        os.fsync(labels.fileno())  # before either file takes its place: no labels beside other pictures


def _write_pictures(
    studio: Studio, count: int, seed: int, file: BinaryIO, threads: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write the pictures as a zip file: their images and annotations."""
    images: list[dict[str, Any]] = []
    people: list[dict[str, Any]] = []
    started = told = time.monotonic()
    with zipfile.ZipFile(file, "w") as archive, ThreadPoolExecutor(threads) as pool:
        groups = in_order(pool, lambda number: group(studio, number, count, seed), range(-(-count // _GROUP)), threads)
        for data, (height, width), seen in (picture for pictures in groups for picture in pictures):
            number = len(images)
            name = f"{number:06d}.webp"
            archive.writestr(zipfile.ZipInfo(name), data)  # ZipInfo: without the time, for the same bytes again
            images.append({"id": number, "file_name": name, "zip": "rendered-0.zip", "width": width, "height": height})
            people += [{"id": len(people) + place + 1, "image_id": number, **person} for place, person in enumerate(seen)]
            now = time.monotonic()
            if now - told > _REPORT_SECONDS or number == count - 1:
                labelled = sum(person["num_keypoints"] > 0 for person in people)
                rate = f"{labelled / (now - started):.1f} people/s"
                print(f"{number + 1} of {count} pictures, {labelled} people, {rate}", file=sys.stderr, flush=True)
                told = now
    file.flush()
    return images, people


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.synthetic", description="Rendered people as a COCO keypoint set."
    )
    parser.add_argument("--assets", type=Path, required=True, help="folder of poses.npz, anny_compact.npz and the garments")
    parser.add_argument(
        "--backgrounds",
        type=Path,
        nargs="+",
        default=[],
        help="COCO files of photos; what they show beside their people's boxes is used. Without them plain gradients",
    )
    parser.add_argument("--count", type=int, required=True, help="pictures; there are about two people in each")
    parser.add_argument("--out", type=Path, required=True, help="folder for rendered.json and rendered-0.zip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hdm05", action="store_true", help="poses_hdm05.npz too, whose licence is CC BY-SA 3.0")
    add_device(parser)
    arguments = parser.parse_args()
    if arguments.count < 1 or arguments.seed < 0:
        parser.error("--count must be at least 1 and --seed at least 0")
    device = arguments.device
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    threads = usable_cores() if device.type == "cpu" else 2
    with one_line_faults():
        studio = Studio.open(arguments.assets, arguments.hdm05, arguments.backgrounds, device)
        write_set(studio, arguments.count, arguments.seed, arguments.out, threads)


if __name__ == "__main__":
    main()
