"""How accurate found people are: `python -m training.results people.json --annotations person_keypoints_val2017.json`.

`people.json` is what `lpn predict val2017/ --out people.json` has written, so that detector and pose network are measured as
the service answers, or anybody's COCO results.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from training.accuracy import interval, table
from training.command import one_line_faults
from training.data import read_annotations
from training.files import DataError
from training.keypoints import NAMES
from training.oks import evaluate_results


def read_results(file: Path, ground_truth: dict[str, Any]) -> list[dict[str, Any]]:
    """The people of COCO results, or of a data set with scores, whose pictures go by their file names. Raises DataError."""
    try:
        content = json.loads(file.read_bytes())
        if isinstance(content, dict):
            numbers = {image["file_name"]: image["id"] for image in ground_truth["images"]}
            people, pictures = content["annotations"], {each["id"]: numbers[each["file_name"]] for each in content["images"]}
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


def _joints_and_score(person: dict[str, Any]) -> dict[str, Any]:
    joints = np.array(person["keypoints"], np.float64)
    if joints.shape != (3 * len(NAMES),):
        raise ValueError(f"somebody has keypoints of {joints.size} numbers in place of {3 * len(NAMES)}")
    return {"category_id": 1, "keypoints": joints.tolist(), "score": float(person["score"])}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.results", description="Measure found people by COCO's AP.")
    parser.add_argument("results", type=Path, help="what lpn predict has written, or COCO results")
    parser.add_argument("--annotations", type=Path, required=True, help="a COCO keypoint file of the same pictures")
    arguments = parser.parse_args()
    with one_line_faults():
        ground_truth = read_annotations(arguments.annotations)
        measures, draws = evaluate_results(ground_truth, read_results(arguments.results, ground_truth))
        people = sum(a["num_keypoints"] > 0 and not a.get("iscrowd", 0) for a in ground_truth["annotations"])
        low, high = interval(draws)
        print(table({arguments.annotations.stem: measures | {"people": people, "ap_low": low, "ap_high": high}}))


if __name__ == "__main__":
    main()
