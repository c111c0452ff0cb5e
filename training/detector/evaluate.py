"""How well people are found: `python -m training.detector.evaluate --model person-det --data DATA --out FOLDER`.

Pictures go through the service's own code. People: COCO's measures of boxes, and the share found at the default threshold.
Photos of nobody: the boxes found in them, which choose that threshold. Into FOLDER go detections.json (COCO results, for
`training.evaluate --detections`) and precision_recall.png; --write records the figures and the threshold in model.toml.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from app.inference.detector import Detector
from app.inference.model_store import load_model
from app.inference.session import take_one_thread_each
from app.vision import detection
from training.accuracy import record
from training.command import measuring_parser, model_folder, one_line_faults
from training.data import Picture, person_category_of, read_annotations, read_pictures
from training.detector.data import is_ignored
from training.files import make_folder, write_whole
from training.oks import coco_evaluation
from training.plots import precision_recall_plot

Float64 = npt.NDArray[np.float64]

FALSE_ALARMS = 0.1  # boxes per photo of nobody that the default threshold may let through
FOUND_LIMIT = 100  # boxes of a picture, as COCO counts
_LEAST_SCORE = 0.01
_POSED, _POSED_SCORE = 20, 0.05  # of a picture's boxes, and from which score on, that a pose network is measured from
_MEASURES = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar": 8}  # COCOeval.stats
_SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, np.inf)}


@dataclass(frozen=True, slots=True)
class Truth:
    """The people of a set that count: areas [P] as COCO gives them, keypoints or not [P], and the score that finds each [P].

    The score is that of the box that COCO's matching gives a person at IoU 0.5; 0 for people who are not found.
    """

    areas: Float64
    with_keypoints: npt.NDArray[np.bool_]
    scores: Float64

    def recall(self, threshold: float, low: float = 0.0, high: float = np.inf, keypoints_only: bool = False) -> float:
        """The share found at a threshold, of people with areas from `low` to `high`; -1 where there are none."""
        chosen = (self.areas >= low) & (self.areas < high) & (self.with_keypoints | (not keypoints_only))
        return float((self.scores[chosen] >= threshold).mean()) if chosen.any() else -1.0


def detections(detector: Detector, pictures: Iterator[Picture]) -> list[dict[str, Any]]:
    """The boxes of every picture as COCO results, best first, but those in the letterbox's rim, as in the service."""
    results = []
    for picture in pictures:
        pixels = picture.pixels()
        letterbox, gain = detector.letterbox(pixels, 1)
        rows = np.asarray(detector.network.run(letterbox[None]).values[0], np.float32)
        people = detector.found(rows, _LEAST_SCORE, FOUND_LIMIT)
        boxes = detection.to_picture(people[:, :4], gain, pixels.shape[1], pixels.shape[0])
        on_it = detection.on_picture(boxes)
        boxes, people = boxes[on_it], people[on_it]
        results += [
            {"image_id": picture.image["id"], "category_id": 1, "bbox": box, "score": score}
            for box, score in zip(boxes.round(2).tolist(), people[:, 4].astype(float).round(5).tolist(), strict=True)
        ]
    return results


def posed(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best boxes of each picture: each costs a pose, and those of the lowest scores are hardly anybody's."""
    taken: Counter[int] = Counter()
    kept = []
    for result in results:
        if result["score"] >= _POSED_SCORE and taken[result["image_id"]] < _POSED:
            taken[result["image_id"]] += 1
            kept.append(result)
    return kept


def compared(truth: dict[str, Any], results: list[dict[str, Any]]) -> tuple[dict[str, float], Truth, Float64]:
    """COCO's measures of boxes, what became of each person, and the precision [101] at recalls of 0, 0.01, … 1 (IoU 0.5).

    Crowds and boxes that may be crowds count neither for nor against.
    """
    annotations = [annotation | {"iscrowd": int(is_ignored(annotation))} for annotation in truth["annotations"]]
    if not results:
        results = [{"image_id": truth["images"][0]["id"], "category_id": 1, "bbox": [0, 0, 0, 0], "score": 0.0}]
    evaluation = coco_evaluation({**truth, "annotations": annotations}, results, "bbox")
    measures = {name: float(evaluation.stats[place]) for name, place in _MEASURES.items()}
    scores: dict[int, float] = {}
    for picture in evaluation.evalImgs:
        if picture is not None and picture["aRng"] == evaluation.params.areaRng[0]:
            for person, match in zip(picture["gtIds"], picture["gtMatches"][0], strict=True):
                scores[person] = evaluation.cocoDt.anns[int(match)]["score"] if match > 0 else 0.0
    people = [annotation for annotation in evaluation.cocoGt.dataset["annotations"] if not annotation["iscrowd"]]
    outcome = Truth(
        np.array([person["area"] for person in people], np.float64),
        np.array([person.get("num_keypoints", 0) > 0 for person in people], np.bool_),
        np.array([scores.get(person["id"], 0.0) for person in people], np.float64),
    )
    return measures, outcome, np.asarray(evaluation.eval["precision"][0, :, 0, 0, -1], np.float64)


def threshold_for(scores: list[float], photos: int, boxes_per_photo: float) -> float:
    """The least threshold in hundredths at which so many photos of nobody give at most so many boxes each."""
    ordered = sorted(scores, reverse=True)
    allowed = int(boxes_per_photo * photos + 1e-9)
    first_too_many = ordered[allowed] if len(ordered) > allowed else 0.0
    return float(np.floor(first_too_many * 100 + 1e-9) / 100 + 0.01)


def figures(
    measures: dict[str, float], truth: Truth, nobody_scores: list[float], photos: int, threshold: float
) -> dict[str, float]:
    """All figures of the card, by name; people's sizes are by area."""
    over = 32.0**2
    rows = measures | {"threshold": threshold, "recall": truth.recall(threshold)}
    for name, (low, high) in _SIZES.items():
        rows[f"recall_{name}"] = truth.recall(threshold, low, high)
    rows["recall_keypoints_over_32"] = truth.recall(threshold, over, keypoints_only=True)
    rows["nobody_boxes"] = sum(score >= threshold for score in nobody_scores) / photos
    return rows


def report(rows: dict[str, float], truth: Truth, nobody_scores: list[float], photos: int) -> str:
    """The figures, and recall against false alarms at several thresholds, as Markdown tables."""
    lines = ["| measure | value |", "| --- | --- |", *(f"| {name} | {value:.3f} |" for name, value in rows.items())]
    lines += ["", "| threshold | recall, keypoints, over 32² | recall of all | boxes a photo of nobody |", "| --- " * 4 + "|"]
    for threshold in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        alarms = sum(score >= threshold for score in nobody_scores) / photos
        key = truth.recall(threshold, 32.0**2, keypoints_only=True)
        lines.append(f"| {threshold} | {key:.3f} | {truth.recall(threshold):.3f} | {alarms:.2f} |")
    return "\n".join(lines)


def _measure(arguments: argparse.Namespace) -> None:
    folder = model_folder(arguments.store, arguments.model)
    if arguments.out:
        make_folder(arguments.out)
    detector = Detector.opened(load_model(folder), FOUND_LIMIT)
    people_file, nobody_file = (arguments.data / name for name in ("pose/dev/coco.json", "detect/dev/nobody.json"))
    results = detections(detector, read_pictures(people_file))
    measures, truth, precision = compared(read_annotations(people_file), results)
    nobody = [result["score"] for result in detections(detector, read_pictures(nobody_file))]
    photos = len(read_annotations(nobody_file)["images"])
    threshold = threshold_for(nobody, photos, FALSE_ALARMS)
    rows = figures(measures, truth, nobody, photos, threshold)
    print(report(rows, truth, nobody, photos))
    if arguments.out:
        person = {"category_id": person_category_of(people_file)}
        write_whole(arguments.out / "detections.json", json.dumps([result | person for result in posed(results)]))
        curves = {f"{detector.description.id}, AP50 {measures['ap50']:.3f}": precision}
        write_whole(arguments.out / "precision_recall.png", precision_recall_plot(curves))
    if arguments.write:
        file = folder / "model.toml"
        write_whole(file, re.sub(r"(?m)^threshold = .*$", f"threshold = {threshold:.2f}", file.read_text(), count=1))
        record(file, {"coco": rows})


def main() -> None:
    """The command line."""
    parser = measuring_parser("python -m training.detector.evaluate", "Measure a person detector.", "person-det")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder with pose/dev and detect/dev")
    parser.add_argument("--out", type=Path, help="folder for detections.json and precision_recall.png")
    parser.add_argument("--write", action="store_true", help="record figures and threshold in the stored model's model.toml")
    arguments = parser.parse_args()
    take_one_thread_each()
    with one_line_faults():
        _measure(arguments)


if __name__ == "__main__":
    main()
