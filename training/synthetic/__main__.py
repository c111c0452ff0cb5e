"""Rendered people as a COCO keypoint set: `python -m training.synthetic --assets DIR --count N --out DIR`.

Writes rendered.json and rendered-0.zip; a picture depends on the seed and its number alone.
"""

import argparse
import json
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from training.data import Picture
from training.files import DataError, whole_file, write_whole
from training.keypoints import NAMES, SKELETON
from training.synthetic.assets import Assets, load_assets
from training.synthetic.backgrounds import background, read_backgrounds
from training.synthetic.labels import annotations
from training.synthetic.people import Regions
from training.synthetic.render import OVERSAMPLED, photographed, render
from training.synthetic.scene import random_scene

_SIDES = (256, 448)  # of pictures, in pixels


@dataclass(frozen=True, slots=True)
class Studio:
    """What pictures are made from."""

    assets: Assets
    regions: Regions
    photos: list[Picture]
    seed: int

    def picture(self, number: int) -> tuple[npt.NDArray[np.uint8], list[dict[str, Any]]]:
        """Picture `number` [H, W, 3] (BGR) and its annotations without ids. Raises DataError."""
        rng = np.random.default_rng((self.seed, number))
        height, width = rng.integers(*_SIDES, 2, endpoint=True).tolist()
        drawn = (height * OVERSAMPLED, width * OVERSAMPLED)
        scene = random_scene(self.assets, self.regions, drawn[1], drawn[0], rng)
        behind, before = background(self.photos, *drawn, rng), background(self.photos, *drawn, rng)
        colours, seen = render(scene, behind, before, rng)
        people = annotations(scene, seen, self.assets.body.slack, OVERSAMPLED)
        return photographed(colours, (height, width), rng), people


def write_set(studio: Studio, count: int, out: Path) -> None:
    """Write pictures 0 … count - 1 as the set `rendered`. Raises DataError."""
    out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "person", "keypoints": NAMES, "skeleton": SKELETON}],
    }
    started = told = time.monotonic()
    with whole_file(out / "rendered-0.zip") as file, zipfile.ZipFile(file, "w") as archive:
        for number in range(count):
            pixels, people = studio.picture(number)
            name = f"{number:06d}.webp"
            data = cv2.imencode(".webp", pixels, [cv2.IMWRITE_WEBP_QUALITY, 92])[1].tobytes()
            archive.writestr(
                zipfile.ZipInfo(name), data
            )  # ZipInfo: without the time, so that the same seed gives the same file
            height, width = pixels.shape[:2]
            content["images"].append(
                {"id": number, "file_name": name, "zip": "rendered-0.zip", "width": width, "height": height}
            )
            for person in people:
                content["annotations"].append({"id": len(content["annotations"]), "image_id": number, **person})
            now = time.monotonic()
            if now - told > 5 or number == count - 1:
                labelled = sum(person["num_keypoints"] > 0 for person in content["annotations"])
                rate = labelled / (now - started)
                print(
                    f"{number + 1} of {count} pictures, {labelled} people, {rate:.1f} people/s", file=sys.stderr, flush=True
                )
                told = now
    write_whole(out / "rendered.json", json.dumps(content))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.synthetic", description="Rendered people as a COCO keypoint set."
    )
    parser.add_argument("--assets", type=Path, required=True, help="folder of poses.npz, anny_compact.npz and the garments")
    parser.add_argument(
        "--backgrounds", type=Path, help="COCO file of photos with nobody in them; without it plain gradients"
    )
    parser.add_argument("--count", type=int, required=True, help="pictures; there are about two people in each")
    parser.add_argument("--out", type=Path, required=True, help="folder for rendered.json and rendered-0.zip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hdm05", action="store_true", help="poses_hdm05.npz too, whose licence is CC BY-SA 3.0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        assets = load_assets(arguments.assets, arguments.hdm05)
        photos = read_backgrounds(arguments.backgrounds)
        studio = Studio(assets, Regions.of(assets.body), photos, arguments.seed)
        write_set(studio, arguments.count, arguments.out)
    except DataError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
