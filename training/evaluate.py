"""How accurate a model is: `python -m training.evaluate --model lpn50 --data DATA`, or on a COCO folder of your own.

    python -m training.evaluate --model lpn50 --annotations person_keypoints_val2017.json --images val2017/ \
        [--detections boxes.json] [--flip-test]

Pictures go through the service's own code, or with --server through a running service. Each set counts on its own.
"""

import argparse
import json
import sys
import tomllib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from app.inference.model_store import stored_models
from app.inference.pose import PoseModel, person_scores
from app.inference.session import take_one_thread_each
from app.vision import box
from training.data import ASPECT, Picture, read_pictures
from training.oks import evaluate_results, suppress_twins

Float64 = npt.NDArray[np.float64]
Estimator = Callable[[Picture, Float64], Float64]  # a picture and boxes [N, 4] → keypoints [N, 17, 3]

DEV_SETS = ("coco", "lspet", "mpii", "studio")
_BATCH = 8
_PICTURES_AHEAD = 4  # a thread: enough to keep it busy, and a large set is never in memory as a whole


@dataclass(frozen=True, slots=True)
class Boxes:
    """The boxes [N, 4] of a picture and their scores [N]."""

    places: Float64
    scores: Float64


def local_estimator(model: PoseModel, flip_test: bool) -> Estimator:
    """The model itself, as the service runs it."""
    network = model.with_flip_test if flip_test else model.plain

    def estimate(picture: Picture, boxes: Float64) -> Float64:
        crops = model.cut(picture.pixels(), boxes)
        found = [network.run(crops.pixels[i : i + _BATCH]).values for i in range(0, len(boxes), _BATCH)]
        return model.to_picture(np.concatenate(found), crops)

    return estimate


def server_estimator(client: httpx.Client, model: str, flip_test: bool) -> Estimator:
    """A running service, through HTTP and its JSON."""

    def estimate(picture: Picture, boxes: Float64) -> Float64:
        options: dict[str, str | int] = {"format": "results", "model": model, "flip_test": flip_test, "timeout_ms": 60_000}
        written = ";".join(",".join(map(repr, map(float, place))) for place in boxes)
        answer = client.post(
            "/v1/pose",
            params={"boxes": written, **options},
            content=picture.data,
            headers={"Content-Type": "application/octet-stream"},
        )
        if answer.is_error:
            raise ValueError(f"{picture.image['file_name']}: the service answered {answer.status_code}: {answer.text}")
        return np.array([person["keypoints"] for person in answer.json()]).reshape(len(boxes), 17, 3)

    return estimate


def labelled_people(picture: Picture) -> tuple[list[dict[str, Any]], Float64]:
    """The annotations of people with keypoints, and their boxes [N, 4] clipped as in lib/dataset/coco.py:161.

    Crowds are left out, and boxes of which the picture shows nothing.
    """
    people = [a for a in picture.annotations if a.get("num_keypoints", 0) > 0 and not a.get("iscrowd", 0)]
    places = np.array([a["bbox"] for a in people], np.float64).reshape(-1, 4)
    low = np.maximum(places[:, :2], 0)
    limit = np.array([picture.image["width"], picture.image["height"]]) - 1
    high = np.minimum(limit, low + np.maximum(places[:, 2:] - 1, 0))
    seen = np.flatnonzero((high > low).all(axis=1))
    return [people[i] for i in seen], np.hstack([low, high - low])[seen]


def labelled_boxes(picture: Picture) -> Boxes:
    """The clipped boxes of the picture's labelled people, each with score 1."""
    _, places = labelled_people(picture)
    return Boxes(places, np.ones(len(places)))


def detected_boxes(file: Path) -> Callable[[Picture], Boxes]:
    """The boxes of a COCO detection file, raw as they stand; other categories than 1 are left out."""
    by_image: dict[int, list[dict[str, Any]]] = {}
    for detection in json.loads(file.read_text()):
        if detection["category_id"] == 1:
            by_image.setdefault(detection["image_id"], []).append(detection)

    def boxes(picture: Picture) -> Boxes:
        found = by_image.get(picture.image["id"], [])
        places = np.array([detection["bbox"] for detection in found], np.float64).reshape(-1, 4)
        return Boxes(places, np.array([detection["score"] for detection in found], np.float64))

    return boxes


def evaluate_set(
    annotation_file: Path,
    image_folder: Path | None,
    boxes_of: Callable[[Picture], Boxes],
    estimate: Estimator,
    threads: int = 1,
) -> dict[str, float]:
    """COCO's measures of one set, and for boxes that are the labelled people's own the PCK@0.2 of the torso."""
    results: list[dict[str, Any]] = []
    areas: list[float] = []
    hits: list[npt.NDArray[np.bool_]] = []

    def one(picture: Picture) -> tuple[Picture, Boxes, Float64]:
        boxes = boxes_of(picture)
        return picture, boxes, estimate(picture, boxes.places) if len(boxes.places) else np.zeros((0, 17, 3))

    with ThreadPoolExecutor(threads) as pool:
        found = in_order(pool, one, read_pictures(annotation_file, image_folder), threads * _PICTURES_AHEAD)
        for picture, boxes, keypoints in _shown(found, annotation_file):
            scores = person_scores(keypoints, boxes.scores)
            areas += box.centres_and_sizes(boxes.places, ASPECT)[1].prod(axis=1).tolist()
            results += [
                {"image_id": picture.image["id"], "category_id": 1, "keypoints": joints, "score": score}
                for joints, score in zip(keypoints.reshape(-1, 51).tolist(), scores.tolist(), strict=True)
            ]
            if boxes_of is labelled_boxes:
                hits += torso_hits(labelled_people(picture)[0], keypoints)
    measures = evaluate_results(json.loads(annotation_file.read_text()), suppress_twins(results, areas))
    if hits:
        measures["pck"] = float(np.concatenate(hits).mean())
    return {"people": float(len(results)), **measures}


def torso_hits(people: list[dict[str, Any]], keypoints: Float64) -> list[npt.NDArray[np.bool_]]:
    """For each of people with a torso: which labelled joints are found, in `keypoints` [N, 17, 3], within 0.2 of it.

    The torso is the distance from the left shoulder to the right hip, or across the other way where one is unlabelled.
    PCK@0.2 is the share of hits among all labelled joints of all these people together.
    """
    hits = []
    for person, found in zip(people, keypoints, strict=True):
        labels = np.array(person["keypoints"], np.float64).reshape(-1, 3)
        labelled = labels[:, 2] > 0
        for shoulder, hip in ((5, 12), (6, 11)):
            if labelled[shoulder] and labelled[hip]:
                torso = np.linalg.norm(labels[shoulder, :2] - labels[hip, :2])
                hits.append(np.linalg.norm(found[:, :2] - labels[:, :2], axis=1)[labelled] <= 0.2 * torso)
                break
    return hits


def table(rows: dict[str, dict[str, float]]) -> str:
    """The measures of sets as a Markdown table."""
    lines = ["| set | people | AP | AP50 | AP75 | APM | APL | AR | PCK@0.2 |", "| --- " * 9 + "|"]
    for name, measures in rows.items():
        values = [measures.get(key) for key in ("ap", "ap50", "ap75", "ap_medium", "ap_large", "ar", "pck")]
        cells = ["" if value is None or value < 0 else f"{value:.3f}" for value in values]  # COCOeval: -1 for no such people
        lines.append(f"| {name} | {measures['people']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def record(model_file: Path, rows: dict[str, dict[str, float]]) -> None:
    """Write figures into the accuracy tables of a model.toml; those of other sets stay. -1 (no such people) is left out."""
    text = model_file.read_text()
    sections = [text.split("[accuracy", 1)[0].rstrip()]
    for name, measures in (tomllib.loads(text).get("accuracy", {}) | rows).items():
        figures = [f"{key} = {round(value, 4)}" for key, value in measures.items() if value >= 0]
        sections.append("\n".join([f"[accuracy.{json.dumps(name)}]", *figures]))
    model_file.write_text("\n\n".join(sections) + "\n")


def in_order(pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable[Any], ahead: int) -> Iterator[Any]:
    """As pool.map, but at most `ahead` items are taken before their turn, where pool.map would take all at once."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _shown(results: Iterable[Any], annotation_file: Path) -> Iterable[Any]:
    """The same, with a counter on a terminal."""
    for count, result in enumerate(results, 1):
        if sys.stderr.isatty():
            print(f"\r{annotation_file.stem}: {count} pictures", end="", file=sys.stderr)
        yield result
    if sys.stderr.isatty():
        print(file=sys.stderr)


def model_folder(store: Path, wanted: str) -> Path:
    """The folder of a model by name (its newest version) or name/version. Raises SystemExit."""
    for name, version, folder in reversed(list(stored_models(store))):
        if wanted in (name, f"{name}/{version}"):
            return folder
    raise SystemExit(f"there is no model {wanted} in {store}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description="Measure a model's accuracy.")
    parser.add_argument("--model", default="lpn50", help="name or name/version")
    parser.add_argument("--store", type=Path, default=Path("model_store"))
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with dev/ sets")
    parser.add_argument("--annotations", type=Path, help="a COCO keypoint file instead of the dev sets")
    parser.add_argument("--images", type=Path, help="the folder of its pictures")
    parser.add_argument("--detections", type=Path, help="a COCO detection file; without it the labelled boxes")
    parser.add_argument("--flip-test", action="store_true", help="only with flip test; by default the dev sets go both ways")
    parser.add_argument("--server", help="measure the service at this URL instead of the stored model")
    parser.add_argument("--threads", type=int, default=1, help="pictures that are worked on at a time")
    parser.add_argument("--write", action="store_true", help="record the figures in the stored model's model.toml")
    arguments = parser.parse_args()
    take_one_thread_each()
    sets = {name: (arguments.data / "dev" / f"{name}.json", None) for name in DEV_SETS}
    if arguments.annotations:
        sets = {arguments.annotations.stem: (arguments.annotations, arguments.images)}
    boxes_of = detected_boxes(arguments.detections) if arguments.detections else labelled_boxes
    rows = {}
    with httpx.Client(base_url=arguments.server or "", timeout=120) as client:
        for flip_test in (True,) if arguments.flip_test else (False, True):
            if arguments.server:
                estimate = server_estimator(client, arguments.model, flip_test)
            else:
                estimate = local_estimator(PoseModel.load(model_folder(arguments.store, arguments.model)), flip_test)
            for name, (annotations, images) in sets.items():
                row = name + (", flip test" if flip_test else "")
                rows[row] = evaluate_set(annotations, images, boxes_of, estimate, arguments.threads)
    print(table(rows))
    if arguments.write:
        record(model_folder(arguments.store, arguments.model) / "model.toml", rows)


if __name__ == "__main__":
    main()
