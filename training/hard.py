"""The people of a set whom a model finds badly but not hopelessly, as a set of their own, to be drawn more often.

`python -m training.hard --model lpn50/1 --annotations DATA/train/coco.json --out DATA/train/coco_hard.json`
"""

import json
from pathlib import Path
from typing import Any

from app.inference.pose import PoseModel
from app.inference.session import take_one_thread_each
from training.command import coco_model, measuring_parser, model_folder, new_set_arguments, one_line_faults
from training.data import read_annotations, set_of
from training.files import DataError, write_whole
from training.sheet import found_people

# OKS to the labels. Those below are mostly hidden, or labelled at one or two joints; those above are found.
_HARD = (0.3, 0.8)


def hard_people(model: PoseModel, annotation_file: Path) -> dict[str, Any]:
    """The content of a COCO keypoint file without the people whom the model finds well or not at all. Raises DataError."""
    least, most = _HARD
    hard = {person["id"] for person, alike, *_ in found_people(model, annotation_file) if least <= alike < most}
    if not hard:
        raise DataError(f"{annotation_file} holds nobody whom the model finds with a similarity of {least} to {most}")
    content = read_annotations(annotation_file)
    return set_of(content, [annotation for annotation in content["annotations"] if annotation["id"] in hard])


def main() -> None:
    """The command line."""
    parser = measuring_parser("python -m training.hard", "Write a set of the people whom a model finds badly.", "lpn50")
    arguments = new_set_arguments(parser)
    take_one_thread_each()
    with one_line_faults():
        model = coco_model(model_folder(arguments.store, arguments.model))
        hard = hard_people(model, arguments.annotations)
        write_whole(arguments.out, json.dumps(hard))
    print(f"{len(hard['annotations'])} people in {arguments.out}")


if __name__ == "__main__":
    main()
