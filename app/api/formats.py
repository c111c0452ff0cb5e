"""People → the JSON formats. Places are rounded to 2 decimals, scores to 4."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson

from app import __version__
from app.api.bodies import PictureIn
from app.inference.follower import Followed
from app.inference.model_store import ModelDescription
from app.inference.pipeline import People
from app.telemetry.metrics import STAGES
from app.vision.people import SCORE_DECIMALS, visible


def coco_data_set(
    pictures: Sequence[PictureIn], people: Sequence[People], model: ModelDescription, threshold: float
) -> bytes:
    """A COCO keypoint data set that pycocotools.COCO loads; keypoints scored below `threshold` have v = 0."""
    annotations: list[dict[str, Any]] = []
    for picture, found in zip(pictures, people, strict=True):
        for person in _annotations(found, threshold):
            annotations.append({"id": len(annotations) + 1, "image_id": picture.id, **person})
    images = [_image(picture.id, found, picture.file_name) for picture, found in zip(pictures, people, strict=True)]
    return orjson.dumps(_data_set(model, images, annotations))


def coco_frame(
    number: int, skipped: int, followed: Followed, model: ModelDescription, threshold: float, total: float
) -> bytes:
    """The same of one frame of a stream, whose number is the image's id: each person has a `track_id` besides, and beside the
    data set stand the frames that were passed over before this one, and the milliseconds of each stage and of all, which took
    `total` seconds."""
    people = zip(followed.ids, _annotations(followed.people, threshold), strict=True)
    annotations = [
        {"id": place, "image_id": number, "track_id": track, **person} for place, (track, person) in enumerate(people, 1)
    ]
    data_set = _data_set(model, [_image(number, followed.people, None)], annotations)
    seconds = followed.seconds | {"total": total}
    timing = {stage: round(seconds[stage] * 1000, 2) for stage in STAGES if stage in seconds}
    return orjson.dumps({**data_set, "skipped": skipped, "timing": timing})


def coco_results(pictures: Sequence[PictureIn], people: Sequence[People]) -> bytes:
    """A list of results that COCO.loadRes takes and COCOeval evaluates."""
    each = zip(pictures, people, strict=True)
    return orjson.dumps(
        [result_of({"image_id": picture.id, **person}) for picture, found in each for person in _annotations(found, 0.0)]
    )


def result_of(person: dict[str, Any]) -> dict[str, Any]:
    """A person's annotation as COCO's results have it: with the joints' scores in place of their visibility."""
    keypoints = person["keypoints"].copy()
    keypoints[2::3] = person["keypoint_scores"]
    told = person | {"keypoints": keypoints}
    return {name: told[name] for name in ("image_id", "category_id", "keypoints", "score", "bbox")}


def _data_set(model: ModelDescription, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "info": {
            "description": "People and their keypoints",
            "model": model.name,
            "model_version": model.version,
            "service_version": __version__,
        },
        "images": images,
        "categories": [
            {
                "id": 1,
                "name": "person",
                "supercategory": "person",
                "keypoints": model.keypoints.names,
                "skeleton": model.keypoints.skeleton,
            }
        ],
        "annotations": annotations,
    }


def _image(id_: int, found: People, file_name: str | None) -> dict[str, Any]:
    return {"id": id_, "width": found.width, "height": found.height, "file_name": file_name}


def _annotations(found: People, threshold: float) -> Iterator[dict[str, Any]]:
    """Each person of a picture as COCO has them, without ids."""
    scores = np.round(found.keypoints[..., 2], SCORE_DECIMALS)
    seen = visible(found.keypoints, threshold)
    keypoints = np.concatenate([np.round(found.keypoints[..., :2], 2), 2.0 * seen[..., None]], axis=2)
    boxes = np.round(found.boxes, 2) + 0.0  # and no -0.0
    columns = (
        boxes.tolist(),
        np.round(boxes[:, 2] * boxes[:, 3], 2).tolist(),  # of the box as it is told
        seen.sum(axis=1).tolist(),
        [person.ravel().tolist() for person in keypoints],
        scores.tolist(),
        np.round(found.scores, 4).tolist(),
        np.round(found.box_scores, 4).tolist(),
        _errors(found),
    )
    for box, area, count, joints, joint_scores, score, box_score, errors in zip(*columns, strict=True):
        yield {
            "category_id": 1,
            "bbox": box,
            "area": area,
            "iscrowd": 0,
            "segmentation": [],  # CVAT and older versions of datumaro take no annotation without
            "num_keypoints": count,
            "keypoints": joints,
            "keypoint_scores": joint_scores,
            "keypoint_errors": errors,
            "score": score,
            "bbox_score": box_score,
        }


def _errors(found: People) -> list[list[float] | None]:
    """The expected error of each joint of each person, in pixels; None where the model has no calibration."""
    if found.keypoints.shape[2] < 4:
        return [None] * len(found.keypoints)
    return [person.tolist() for person in np.round(found.keypoints[..., 3], 2)]
