"""How accurate a model is: `python -m training.evaluate --model lpn50 --data DATA`, or on a COCO folder of your own.

    python -m training.evaluate --model lpn50 --annotations measured.json --images val2017/ \
        [--detections boxes.json] [--flip-test]

Pictures go through the service's own code, or with --server through a running service. Each set counts on its own.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from app.inference.session import take_one_thread_each
from app.vision import box
from app.vision.people import person_scores
from training.accuracy import Accuracy, decoder_table, joint_table, record, share_draws, table
from training.command import coco_model, measuring_parser, model_folder, one_line_faults, positive
from training.data import ASPECT, Picture, in_order, person_category_of, read_annotations, read_pictures
from training.decoders import all_decoders
from training.estimators import FLIPPED, PLAIN, Estimator, decoder_of, local_estimator, server_estimator
from training.files import DataError
from training.keypoints import NAMES
from training.oks import evaluate_results, suppress_twins

Float64 = npt.NDArray[np.float64]

DEV_SETS = ("coco", "lspet", "mpii", "studio")
_PICTURES_AHEAD = 4  # a thread: enough to keep it busy, and a large set is never in memory as a whole


@dataclass(frozen=True, slots=True)
class Boxes:
    """The boxes [N, 4] of a picture and their scores [N]; where they are labelled people's own, these [N] too."""

    places: Float64
    scores: Float64
    people: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    """What one way of finding keypoints gave: results as COCO has them, their boxes' areas, and `torso_hits`."""

    results: list[dict[str, Any]]
    areas: list[float]
    hits: list[Float64]


def labelled_people(picture: Picture) -> tuple[list[dict[str, Any]], Float64]:
    """The annotations of people with keypoints, and their boxes [N, 4] clipped as in lib/dataset/coco.py:161.

    Crowds are left out, and boxes of which the picture shows nothing.
    """
    people = [annotation for annotation in picture.annotations if _counts(annotation)]
    places = np.array([a["bbox"] for a in people], np.float64).reshape(-1, 4)
    low = np.maximum(places[:, :2], 0)
    limit = np.array([picture.image["width"], picture.image["height"]]) - 1
    high = np.minimum(limit, low + np.maximum(places[:, 2:] - 1, 0))
    seen = np.flatnonzero((high > low).all(axis=1))
    return [people[i] for i in seen], np.hstack([low, high - low])[seen]


def _counts(annotation: dict[str, Any]) -> bool:
    return annotation.get("num_keypoints", 0) > 0 and not annotation.get("iscrowd", 0)


def labelled_boxes(picture: Picture) -> Boxes:
    """The clipped boxes of the picture's labelled people, each with score 1."""
    people, places = labelled_people(picture)
    return Boxes(places, np.ones(len(places)), people)


def detected_boxes(file: Path, person: Any = 1) -> Callable[[Picture], Boxes]:
    """The boxes of a COCO detection file, raw as they stand, but those of other categories than `person` or without area.

    Raises DataError.
    """
    by_image: dict[int, list[Float64]] = {}
    categories = set()
    try:
        for detection in json.loads(file.read_bytes()):
            categories.add(detection["category_id"])
            if detection["category_id"] == person:
                row = np.array([*detection["bbox"], detection["score"]], np.float64)
                if row.shape != (5,) or not np.isfinite(row).all():
                    raise ValueError(f"box {detection['bbox']} with score {detection['score']}")  # noqa: TRY301
                if row[2] > 0 and row[3] > 0:
                    by_image.setdefault(detection["image_id"], []).append(row)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{file} is no list of detections: {error}") from error
    if person not in categories:
        there = ", ".join(map(str, categories)) or "none"
        raise DataError(f"{file} has no detections of category {person}, people in the annotations; of its own: {there}")

    def boxes(picture: Picture) -> Boxes:
        found = np.array(by_image.get(picture.image["id"], []), np.float64).reshape(-1, 5)
        return Boxes(found[:, :4], found[:, 4])

    return boxes


def evaluate_set(
    annotation_file: Path,
    image_folder: Path | None,
    boxes_of: Callable[[Picture], Boxes],
    estimate: Estimator,
    threads: int = 1,
) -> dict[str, Accuracy]:
    """For each way of the estimator: COCO's measures, and for boxes that are the labelled people's own the PCK@0.2.

    Raises DataError where the set cannot be read, holds nobody with keypoints, or no picture has a box.
    """
    ground_truth = read_annotations(annotation_file)
    if not any(annotation["num_keypoints"] for annotation in ground_truth["annotations"]):
        raise DataError(f"{annotation_file} holds nobody with keypoints")
    ways: dict[str, _Found] = {}

    def one(picture: Picture) -> tuple[Picture, Boxes, dict[str, Float64]]:
        boxes = boxes_of(picture)
        return picture, boxes, estimate(picture, boxes.places) if len(boxes.places) else {}

    with ThreadPoolExecutor(threads) as pool:
        found = in_order(pool, one, read_pictures(annotation_file, image_folder), threads * _PICTURES_AHEAD)
        for picture, boxes, keypoints_of in _shown(found, annotation_file):
            areas = box.centres_and_sizes(boxes.places, ASPECT)[1].prod(axis=1).tolist()
            for way, keypoints in keypoints_of.items():
                so_far = ways.setdefault(way, _Found([], [], []))
                so_far.areas.extend(areas)
                so_far.results.extend(_as_results(picture, keypoints, boxes))
                if boxes.people is not None:
                    so_far.hits.append(torso_hits(boxes.people, keypoints))
    if not ways:
        raise DataError(f"there is no box in any picture of {annotation_file}")
    return {way: _accuracy(ground_truth, found) for way, found in ways.items()}


def _as_results(picture: Picture, keypoints: Float64, boxes: Boxes) -> list[dict[str, Any]]:
    scores = person_scores(keypoints, boxes.scores)
    return [
        {"image_id": picture.image["id"], "category_id": 1, "keypoints": joints, "score": score}
        for joints, score in zip(keypoints.reshape(-1, 51).tolist(), scores.tolist(), strict=True)
    ]


def _accuracy(ground_truth: dict[str, Any], found: _Found) -> Accuracy:
    measures, ap = evaluate_results(ground_truth, suppress_twins(found.results, found.areas))
    draws = {"ap": ap}
    by_joint: dict[str, float] = {}
    labelled = [hits[~np.isnan(hits)] > 0 for hits in found.hits]
    if any(hits.size for hits in labelled):
        measures["pck"] = float(np.concatenate(labelled).mean())
        draws["pck"] = share_draws(labelled)
        by_joint = _pck_by_joint(np.concatenate(found.hits))
    people = sum(_counts(annotation) for annotation in ground_truth["annotations"])
    return Accuracy(people, measures, draws, by_joint)


def _pck_by_joint(hits: Float64) -> dict[str, float]:
    """The share of hits, as `torso_hits` gives them, of each kind of joint that is labelled; left and right are one kind."""
    kinds: dict[str, list[int]] = {}
    for joint, name in enumerate(NAMES):
        kinds.setdefault(name.removeprefix("left_").removeprefix("right_"), []).append(joint)
    of_kinds = {kind: hits[:, joints] for kind, joints in kinds.items()}
    return {kind: float(np.nanmean(each)) for kind, each in of_kinds.items() if not np.isnan(each).all()}


def torso_hits(people: list[dict[str, Any]], keypoints: Float64) -> Float64:
    """For each of the M people with a torso: which joints are found, in `keypoints` [N, 17, 3], within 0.2 of it.

    [M, 17]: 1 for found, 0 for missed, nan for unlabelled.

    The torso is the distance from the left shoulder to the right hip, or across the other way where one is unlabelled.
    PCK@0.2 is the share of hits among all labelled joints of all these people together.
    """
    hits: list[Float64] = []
    for person, found in zip(people, keypoints, strict=True):
        labels = np.array(person["keypoints"], np.float64).reshape(-1, 3)
        labelled = labels[:, 2] > 0
        for shoulder, hip in ((5, 12), (6, 11)):
            if labelled[shoulder] and labelled[hip]:
                torso = np.linalg.norm(labels[shoulder, :2] - labels[hip, :2])
                near = np.linalg.norm(found[:, :2] - labels[:, :2], axis=1) <= 0.2 * torso
                hits.append(np.where(labelled, near, np.nan))
                break
    return np.array(hits).reshape(-1, len(NAMES))


def _shown(results: Iterable[Any], annotation_file: Path) -> Iterable[Any]:
    """The same, with a counter on a terminal."""
    for count, result in enumerate(results, 1):
        if sys.stderr.isatty():
            print(f"\r{annotation_file.stem}: {count} pictures", end="", file=sys.stderr)
        yield result
    if sys.stderr.isatty():
        print(file=sys.stderr)


def _way(flip_test: bool) -> str:
    return FLIPPED if flip_test else PLAIN


@contextlib.contextmanager
def _server_faults(url: str | None) -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DataError(f"{url} gives no answer: {error}") from error


def dev_sets(data: Path) -> dict[str, Path]:
    """The files of the dev sets that a folder has. Raises DataError where it has no dev/coco.json."""
    files = {name: data / "dev" / f"{name}.json" for name in DEV_SETS}
    if not files["coco"].exists():
        raise DataError(f"{files['coco']} is not there; --data names the folder of dev/")
    return {name: file for name, file in files.items() if file.exists()}


def _measure(arguments: argparse.Namespace) -> None:
    sets: dict[str, tuple[Path, Path | None]]
    if arguments.annotations:
        sets = {arguments.annotations.stem: (arguments.annotations, arguments.images)}
    else:
        sets = {name: (file, None) for name, file in dev_sets(arguments.data).items()}
    boxes_of: Callable[[Picture], Boxes] = labelled_boxes
    if arguments.detections:
        boxes_of = detected_boxes(arguments.detections, person_category_of(arguments.annotations))
    flip_tests = [True] if arguments.flip_test else [False, True]
    with _server_faults(arguments.server), httpx.Client(base_url=arguments.server or "", timeout=120) as client:
        if arguments.server:
            estimate = server_estimator(client, arguments.model, flip_tests)
        else:
            model = coco_model(model_folder(arguments.store, arguments.model))
            kept = decoder_of(model)
            decoders = [kept, *(each for each in all_decoders() if each.name != kept.name)] if arguments.ablation else [kept]
            estimate = local_estimator(model, decoders, flip_tests)
        found = {name: evaluate_set(*files, boxes_of, estimate, arguments.threads) for name, files in sets.items()}
    if arguments.ablation:
        for name, ways in found.items():
            rows = {d.name: (ways[d.name + PLAIN], ways[d.name + FLIPPED]) for d in decoders}
            print(f"{name}, {rows[kept.name][0].people} people:\n")
            print(decoder_table(rows, kept.name), end="\n\n")
        return
    figures = {name + _way(f): found[name][_way(f)].figures for f in flip_tests for name in found}
    print(table(figures))
    by_joint = {name + _way(f): found[name][_way(f)].by_joint for f in flip_tests for name in found}
    if any(by_joint.values()):
        print(f"\nPCK@0.2 by joint:\n\n{joint_table(by_joint)}")
    if arguments.write:
        record(model_folder(arguments.store, arguments.model) / "model.toml", figures)


def main() -> None:
    """The command line."""
    parser = measuring_parser("python -m training.evaluate", "Measure a model's accuracy.", "lpn50")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with dev/ sets")
    parser.add_argument("--annotations", type=Path, help="a COCO keypoint file instead of the dev sets")
    parser.add_argument("--images", type=Path, help="the folder of its pictures")
    parser.add_argument("--detections", type=Path, help="a COCO detection file for --annotations; else the labelled boxes")
    parser.add_argument("--flip-test", action="store_true", help="only with flip test; by default both ways")
    parser.add_argument(
        "--ablation", action="store_true", help="decode the same heatmaps in every way: argmax, β, quarter shift"
    )
    parser.add_argument("--server", help="measure the service at this URL instead of the stored model")
    parser.add_argument("--threads", type=positive, default=1, help="pictures that are worked on at a time")
    parser.add_argument("--write", action="store_true", help="record the figures in the stored model's model.toml")
    arguments = parser.parse_args()
    if arguments.ablation and (arguments.server or arguments.flip_test or arguments.write):
        parser.error("--ablation goes with none of --server, --flip-test and --write")
    if arguments.detections and not arguments.annotations:
        parser.error("--detections are of one set: name it by --annotations")
    if arguments.write and (arguments.detections or arguments.server):
        parser.error("--write records what the stored model finds from labelled boxes: not with --detections or --server")
    take_one_thread_each()
    with one_line_faults():
        _measure(arguments)


if __name__ == "__main__":
    main()
