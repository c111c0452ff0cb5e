"""All that pictures are made from, and the one place where it comes together: scenes, their drawing, photos, labels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from training.data import People, cut_out, gathered
from training.synthetic.assets import Assets, Body, load_assets
from training.synthetic.backgrounds import Photo, background, read_photos
from training.synthetic.body import sketch
from training.synthetic.labels import annotations
from training.synthetic.people import Regions
from training.synthetic.photo import OVERSAMPLED, photographs, random_shot
from training.synthetic.render import render
from training.synthetic.scene import random_scenes

UInt8 = npt.NDArray[np.uint8]

_CROPS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Studio:
    """Assets and what is known of their body, on the CPU and on the device that draws, and photos for backgrounds."""

    assets: Assets
    sketched: Body
    assets_there: Assets
    regions_there: Regions
    photos: list[Photo]

    @classmethod
    def open(cls, folder: Path, hdm05: bool, backgrounds: list[Path], device: torch.device) -> Self:
        """Read the assets in a folder, with the poses of HDM05 or not, and the photos of COCO files. Raises DataError."""
        assets = load_assets(folder, hdm05)
        photos = read_photos(backgrounds)
        return cls(assets, sketch(assets.body), assets.on(device), Regions.of(assets.body).on(device), photos)

    def pictures(self, size: tuple[int, int], rngs: list[np.random.Generator]) -> list[tuple[UInt8, list[dict[str, Any]]]]:
        """A picture (height, width) from each generator [H, W, 3] (BGR), with its annotations without ids."""
        drawn_size = (size[0] * OVERSAMPLED, size[1] * OVERSAMPLED)
        scenes = random_scenes(self.assets, self.sketched, drawn_size, rngs)
        shots = [random_shot(rng) for rng in rngs]
        behind, before = ([background(self.photos, *size, rng) for rng in rngs] for _ in range(2))
        with torch.inference_mode():
            drawn = render(self.assets_there, self.regions_there, scenes)
            pixels = photographs(drawn, behind, before, shots)
            people = annotations(drawn, self.assets.body.slack, OVERSAMPLED)
        return list(zip(pixels, people, strict=True))

    def people(self, count: int, height: int, seed: tuple[int, ...]) -> People:
        """That many people, each of a scene of its own, as crops for networks of input `height`."""
        found: list[tuple[UInt8, dict[str, Any]]] = []
        size = (height * 5 // 4, height)
        for start in range(0, count, _CROPS_AT_ONCE):
            rngs = [np.random.default_rng((*seed, number)) for number in range(start, min(start + _CROPS_AT_ONCE, count))]
            for pixels, people in self.pictures(size, rngs):
                found.append(cut_out(pixels, {"id": len(found), **_largest(people, size)}, height))
        return gathered(found)


def _largest(people: list[dict[str, Any]], size: tuple[int, int]) -> dict[str, Any]:
    """The labelled person with the largest area; where nobody is seen, the whole picture without a joint."""
    nobody = {"bbox": [0, 0, size[1], size[0]], "keypoints": [0] * 51, "area": 0}
    return max((person for person in people if person["num_keypoints"]), key=lambda person: person["area"], default=nobody)
