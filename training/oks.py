"""Object keypoint similarity: COCO's evaluation, and the reference's suppression of people found twice."""

import contextlib
import io
from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from training.accuracy import ap_draws
from training.files import DataError
from training.keypoints import SIGMAS

Float64 = npt.NDArray[np.float64]

_SAME_PERSON = 0.9  # the reference's OKS_THRE
_MEASURES = ("ap", "ap50", "ap75", "ap_medium", "ap_large", "ar")


def joint_similarities(squared_distances: Float64, areas: Any) -> Float64:
    """COCO's likeness of joints, 0…1, by their squared distances [..., 17] and their people's areas [...]."""
    return np.asarray(np.exp(-squared_distances / (2 * (np.asarray(areas)[..., None] + np.spacing(1)) * (2 * SIGMAS) ** 2)))


def similarities(keypoints: Float64, areas: Float64) -> Float64:
    """Pairwise OKS [N, N] of people by keypoints [N, 17, 2] over all joints (zhang943/lpn-pytorch, lib/nms/nms.py)."""
    distances = ((keypoints[:, None] - keypoints[None]) ** 2).sum(axis=3)
    return np.asarray(joint_similarities(distances, (areas[:, None] + areas[None]) / 2).mean(axis=2))


def suppress_twins(results: list[dict[str, Any]], areas: list[float]) -> list[dict[str, Any]]:
    """Results without those whose OKS to a better one of their picture exceeds 0.9; `areas` are the padded boxes'."""
    by_image: dict[int, list[int]] = defaultdict(list)
    for index, result in enumerate(results):
        by_image[result["image_id"]].append(index)
    kept = []
    for members in by_image.values():
        order = sorted(members, key=lambda index: -results[index]["score"])
        keypoints = np.array([results[index]["keypoints"] for index in order]).reshape(-1, 17, 3)[..., :2]
        alike = similarities(keypoints, np.array([areas[index] for index in order])) > _SAME_PERSON
        left = np.ones(len(order), bool)
        for place, index in enumerate(order):
            if left[place]:
                kept.append(results[index])
                left &= ~alike[place]
    return kept


def coco_evaluation(ground_truth: dict[str, Any], results: list[dict[str, Any]], kind: str) -> COCOeval:
    """COCO's evaluation of people's "keypoints" or boxes ("bbox"), summed up; its annotations are numbered from 1."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        annotations = enumerate(ground_truth["annotations"], 1)  # COCOeval takes what matches annotation 0 for unmatched
        people = [annotation | {"id": number} for number, annotation in annotations]
        category = {"id": 1, "name": "person"}
        truth.dataset = {"info": {}, **ground_truth, "categories": [category], "annotations": people}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in results]), kind)
        evaluation.params.catIds = [1]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def evaluate_results(ground_truth: dict[str, Any], results: list[dict[str, Any]]) -> tuple[dict[str, float], Float64]:
    """COCO's AP, AP50, AP75, AP of medium and large people, and AR (pycocotools), and AP over drawn pictures [1000].

    Annotations without keypoints and crowds count neither for nor against. A measure is -1 where
    there are no such people. Raises DataError for places or scores that are not finite: COCOeval takes them for perfect.
    """
    if not all(np.isfinite([*result["keypoints"], result["score"]]).all() for result in results):
        raise DataError("the model finds keypoints or scores that are not finite")
    unlabelled = {"iscrowd": 0, "num_keypoints": 0, "keypoints": [0] * 51}  # boxes alone, which COCOeval then ignores
    people = [unlabelled | annotation for annotation in ground_truth["annotations"]]
    evaluation = coco_evaluation({**ground_truth, "annotations": people}, results, "keypoints")
    of_all_sizes = evaluation.evalImgs[: len(evaluation.params.imgIds)]
    draws = ap_draws([match for match in of_all_sizes if match is not None], evaluation.params.recThrs)
    return dict(zip(_MEASURES, map(float, evaluation.stats[:6]), strict=True)), draws
