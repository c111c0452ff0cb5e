"""A sheet of the people whom a model finds best and worst, from a COCO folder of one's own.

`python -m training.sheet --model lpn50 --annotations people.json --images photos/ --out sheet.jpg`
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from app.inference.pose import PoseModel
from app.inference.session import take_one_thread_each
from app.vision import drawing
from training.command import coco_model, file_to_write, measuring_parser, model_folder, one_line_faults
from training.data import read_pictures
from training.estimators import cut
from training.evaluate import labelled_people
from training.files import DataError, write_whole
from training.oks import joint_similarities

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_EACH = 12  # of the best, and of the worst
_COLUMNS = 6


@dataclass(frozen=True, slots=True)
class Person:
    """How like the labels the found keypoints are, 0…1, and the crop [H, W, 3] with their skeleton on it."""

    similarity: float
    crop: UInt8


def similarity(found: Float64, labels: Float64, area: float) -> float:
    """COCO's OKS of keypoints [17, 2] to labels [17, 3], over the labelled joints."""
    labelled = labels[:, 2] > 0
    alike = joint_similarities(((found - labels[:, :2]) ** 2).sum(axis=1), area)
    return float(alike[labelled].mean())


def found_people(
    model: PoseModel, annotation_file: Path, image_folder: Path | None = None
) -> Iterator[tuple[dict[str, Any], float, Float32, UInt8]]:
    """Each labelled person of a set: annotation, similarity to what the model finds in their box, that in cells [17, 3] with
    scores, and their crop [H, W, 3]. Raises DataError.
    """
    for picture in read_pictures(annotation_file, image_folder):
        people, boxes = labelled_people(picture)
        if not people:
            continue
        crops = cut(model, picture, boxes)
        cells = model.plain.run(crops.pixels).values[..., :3]
        places = model.to_picture(cells, crops)[..., :2]
        for person, found, cell, pixels in zip(people, places, cells, crops.pixels, strict=True):
            labels = np.array(person["keypoints"], np.float64).reshape(-1, 3)
            yield person, similarity(found, labels, person["area"]), cell, pixels


def people_of(model: PoseModel, annotation_file: Path, image_folder: Path | None) -> list[Person]:
    """The best and the worst found people of a set, best first. Raises DataError."""
    joints = model.description.keypoints
    kept: list[Person] = []
    for _, alike, cells, pixels in found_people(model, annotation_file, image_folder):
        stride = pixels.shape[0] / model.description.heatmap.height
        on_crop = np.concatenate([cells[:, :2] * stride, cells[:, 2:]], axis=1).astype(np.float64)
        drawing.draw_people(pixels, on_crop[None], joints.skeleton, joints.names, joints.threshold)
        kept.append(Person(alike, pixels))
        if len(kept) >= 4 * _EACH:
            kept = _ends(kept)
    if not kept:
        raise DataError(f"{annotation_file} holds nobody with keypoints")
    return _ends(kept)


def _ends(people: list[Person]) -> list[Person]:
    """The best and the worst, best first."""
    ordered = sorted(people, key=lambda each: -each.similarity)
    return ordered if len(ordered) <= 2 * _EACH else ordered[:_EACH] + ordered[-_EACH:]


def sheet(people: list[Person]) -> bytes:
    """The people in rows of six as a JPEG file, with their similarity in the corner."""
    height, width = people[0].crop.shape[:2]
    rows = -(-len(people) // _COLUMNS)
    tiles = np.full((rows * height, _COLUMNS * width, 3), 255, np.uint8)
    for place, person in enumerate(people):
        y, x = place // _COLUMNS * height, place % _COLUMNS * width
        tiles[y : y + height, x : x + width] = person.crop
        for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
            label = f"{person.similarity:.2f}"
            cv2.putText(tiles, label, (x + 5, y + 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, thickness, cv2.LINE_AA)
    return drawing.encode(tiles, ".jpg")


def main() -> None:
    """The command line."""
    parser = measuring_parser("python -m training.sheet", "Draw the best and the worst found people.", "lpn50")
    parser.add_argument("--annotations", type=Path, required=True, help="a COCO keypoint file")
    parser.add_argument("--images", type=Path, help="the folder of its pictures")
    parser.add_argument("--out", type=file_to_write, required=True, help="the sheet, a .jpg")
    arguments = parser.parse_args()
    take_one_thread_each()
    with one_line_faults():
        model = coco_model(model_folder(arguments.store, arguments.model))
        write_whole(arguments.out, sheet(people_of(model, arguments.annotations, arguments.images)))


if __name__ == "__main__":
    main()
