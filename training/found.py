"""The people of a set in the boxes that a detector finds for them, as a set of their own: a service crops people so.

`python -m training.found --model person-det --annotations DATA/train/coco.json --out DATA/train/coco_found.json`
"""

import json
from pathlib import Path
from typing import Any

import torch

from app.inference.detector import Detector
from app.inference.model_store import load_model
from app.inference.session import take_one_thread_each
from training.command import measuring_parser, model_folder, new_set_arguments, one_line_faults
from training.data import read_annotations, read_pictures, set_of
from training.detector.evaluate import FOUND_LIMIT, detections, posed
from training.detector.loss import pairwise_iou
from training.files import DataError, write_whole

_SAME = 0.35  # intersection over union with the labelled box; below, the box shows somebody else as well


def in_found_boxes(detector: Detector, annotation_file: Path) -> dict[str, Any]:
    """The content of a COCO keypoint file with the boxes that the detector finds, and without those whom it does not find.

    Boxes choose their person among all who are labelled, the best box first. Raises DataError.
    """
    content = read_annotations(annotation_file)
    labelled: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for person in content["annotations"]:
        labelled[person["image_id"]].append(person)
    people = []
    for result in posed(detections(detector, read_pictures(annotation_file))):
        candidates = labelled[result["image_id"]]
        if not candidates:
            continue
        overlaps = pairwise_iou(_corners([result]), _corners(candidates))[0]
        nearest = int(overlaps.argmax())
        if overlaps[nearest] >= _SAME:
            people.append(candidates.pop(nearest) | {"bbox": result["bbox"]})
    people = [person for person in people if person["num_keypoints"] > 0]
    if not people:
        raise DataError(f"{annotation_file} holds nobody with keypoints whom the detector finds")
    return set_of(content, people)


def _corners(boxes: list[dict[str, Any]]) -> torch.Tensor:
    """`bbox` of each as x1, y1, x2, y2 [N, 4]."""
    places = torch.tensor([each["bbox"] for each in boxes], dtype=torch.float32)
    places[:, 2:] += places[:, :2]
    return places


def main() -> None:
    """The command line."""
    parser = measuring_parser(
        "python -m training.found", "Write a set of people in the boxes that a detector finds.", "person-det"
    )
    arguments = new_set_arguments(parser)
    take_one_thread_each()
    with one_line_faults():
        detector = Detector.opened(load_model(model_folder(arguments.store, arguments.model)), FOUND_LIMIT)
        found = in_found_boxes(detector, arguments.annotations)
        write_whole(arguments.out, json.dumps(found))
    print(f"{len(found['annotations'])} people in {arguments.out}")


if __name__ == "__main__":
    main()
