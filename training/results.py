"""How accurate found people are: `python -m training.results people.json --annotations measured.json`.

`people.json` is what `lpn predict val2017/ --out people.json` has written, so that detector and pose network are measured as
the service answers, or anybody's COCO results.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from app.vision import box
from app.vision.tracking import same_boxes
from training.accuracy import interval, table
from training.command import one_line_faults
from training.data import ASPECT, read_annotations
from training.files import DataError
from training.keypoints import NAMES
from training.oks import evaluate_results

Float64 = npt.NDArray[np.float64]

_SAME_PERSON = 0.5  # overlap of a found and a labelled box


def read_results(file: Path, ground_truth: dict[str, Any]) -> list[dict[str, Any]]:
    """The people of COCO results, or of a data set with scores, whose pictures go by their file names. Raises DataError."""
    try:
        content = json.loads(file.read_bytes())
        if isinstance(content, dict):
            labelled = {image["file_name"]: image for image in ground_truth["images"]}
            for image in content["images"]:
                _check_size(image, labelled[image["file_name"]])
            people = content["annotations"]
            pictures = {image["id"]: labelled[image["file_name"]]["id"] for image in content["images"]}
        else:
            people, pictures = content, {image["id"]: image["id"] for image in ground_truth["images"]}
        results = [{"image_id": pictures[person["image_id"]], **_joints_and_score(person)} for person in people]
    except KeyError as error:
        raise DataError(f"{file}: {error} is not there, or is no picture of the annotations") from error
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file} holds no COCO results of people: {error}") from error
    if not results:
        raise DataError(f"{file} holds nobody")
    return results


def _check_size(found: dict[str, Any], labelled: dict[str, Any]) -> None:
    """Raise ValueError where somebody was found in pixels of another picture than the labels', the turned one perhaps."""
    sizes = [(image.get("width"), image.get("height")) for image in (found, labelled)]
    if None not in sizes[0] and sizes[0] != sizes[1]:
        told = " and ".join(f"{width} × {height}" for width, height in sizes)
        raise ValueError(
            f"{labelled['file_name']} has {told} pixels here and in the annotations; people are found in the upright "
            "picture, so save pictures turned, without EXIF, before they are labelled"
        )


def _joints_and_score(person: dict[str, Any]) -> dict[str, Any]:
    """And, under names that COCO's loadRes does not know, what the service tells besides: the box and the expected errors."""
    joints = np.array(person["keypoints"], np.float64)
    if joints.shape != (3 * len(NAMES),):
        raise ValueError(f"somebody has keypoints of {joints.size} numbers in place of {3 * len(NAMES)}")
    more = {}
    if person.get("keypoint_errors") is not None:
        errors, place = (np.array(person[name], np.float64) for name in ("keypoint_errors", "bbox"))
        more = {"errors": errors.reshape(len(NAMES)), "box": place.reshape(4)}
    return {"category_id": 1, "keypoints": joints.tolist(), "score": float(person["score"]), **more}


def expected_and_found(results: list[dict[str, Any]], ground_truth: dict[str, Any]) -> tuple[int, Float64]:
    """How many labelled people have a result of their own whose box overlaps theirs by half, and of their labelled joints the
    expected and the found error [M, 2], as shares of the padded box's height."""
    found = defaultdict(list)
    for result in results:
        if "errors" in result:
            found[result["image_id"]].append(result)
    labelled = defaultdict(list)
    for person in ground_truth["annotations"]:
        if person["num_keypoints"] > 0:
            labelled[person["image_id"]].append(person)
    people, rows = 0, [np.zeros((0, 2))]
    for image, persons in labelled.items():
        if not (near := found[image]):
            continue
        boxes = np.array([each["bbox"] for each in persons], np.float64)
        for which, whose in same_boxes(np.array([each["box"] for each in near]), boxes, _SAME_PERSON):
            people += 1
            joints, labels = (np.reshape(each["keypoints"], (-1, 3)) for each in (near[which], persons[whose]))
            distances = np.linalg.norm((joints - labels)[:, :2], axis=1)
            (height,) = box.centres_and_sizes(near[which]["box"][None], ASPECT)[1][:, 1]
            rows.append((np.stack([near[which]["errors"], distances], axis=1) / height)[labels[:, 2] > 0])
    return people, np.concatenate(rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.results", description="Measure found people by COCO's AP.")
    parser.add_argument("results", type=Path, help="what lpn predict has written, or COCO results")
    parser.add_argument("--annotations", type=Path, required=True, help="a COCO keypoint file of the same pictures")
    arguments = parser.parse_args()
    with one_line_faults():
        ground_truth = read_annotations(arguments.annotations)
        results = read_results(arguments.results, ground_truth)
        measures, draws = evaluate_results(ground_truth, results)
        people = sum(a["num_keypoints"] > 0 and not a.get("iscrowd", 0) for a in ground_truth["annotations"])
        low, high = interval(draws)
        print(table({arguments.annotations.stem: measures | {"people": people, "ap_low": low, "ap_high": high}}))
        matched, errors = expected_and_found(results, ground_truth)
        if len(errors):
            expected, found = 100 * errors.mean(axis=0)
            print(f"\nkeypoint_errors of {matched} people whose boxes overlap by half ({len(errors)} joints):")
            print(f"expected {expected:.2f} %, found {found:.2f} % of the padded box's height")


if __name__ == "__main__":
    main()
