"""The detector's figures on boxes that are known."""

import json
import re
import tomllib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from app.inference.detector import Detector
from app.inference.model_store import load_model
from training.data import Picture
from training.detector.evaluate import compared, detections, figures, main, posed, threshold_for
from training.detector.export import export
from training.detector.network import PersonDetector
from training.export import halved_weights
from training.plots import precision_recall_plot

TRUTH = {
    "images": [{"id": 1, "width": 640, "height": 480}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 99, 200], "area": 12_000, "iscrowd": 0, "num_keypoints": 9},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [200, 0, 50, 60], "area": 2_000, "iscrowd": 0, "num_keypoints": 0},
        {"id": 3, "image_id": 1, "category_id": 1, "bbox": [300, 0, 20, 30], "area": 300, "iscrowd": 0, "num_keypoints": 4},
        {"id": 4, "image_id": 1, "category_id": 1, "bbox": [400, 0, 200, 200], "area": 9_000, "iscrowd": 1},
        {"id": 5, "image_id": 1, "category_id": 1, "bbox": [0, 300, 90, 90], "area": 4_000, "iscrowd": 0,
         "iscrowd_unknown": True, "num_keypoints": 0},
    ],
}  # fmt: skip


def _found(box, score):
    return {"image_id": 1, "category_id": 1, "bbox": box, "score": score}


EXACT = [_found([0, 0, 99, 200], 0.9), _found([200, 0, 50, 60], 0.6), _found([300, 0, 20, 30], 0.4)]


def test_exact_boxes_are_perfect_and_crowds_do_not_count():
    more = [*EXACT, _found([420, 20, 40, 90], 0.95), _found([0, 300, 90, 90], 0.99)]
    measures, truth, precision = compared(TRUTH, more)
    assert measures["ap"] == pytest.approx(1)
    assert (precision > 0.999).all()
    assert sorted(truth.scores.tolist()) == [0.4, 0.6, 0.9]


def test_recall_goes_by_threshold_size_and_keypoints():
    _, truth, _ = compared(TRUTH, EXACT)
    assert truth.recall(0.5) == pytest.approx(2 / 3)
    assert truth.recall(0.5, keypoints_only=True) == 0.5
    assert truth.recall(0.5, 32**2, keypoints_only=True) == 1
    assert truth.recall(0.7, 32**2, 96**2) == 0
    assert truth.recall(0.7, 1e6) == -1  # there is nobody of that size


def test_a_misplaced_box_finds_nobody():
    measures, truth, _ = compared(TRUTH, [_found([60, 0, 100, 200], 0.9)])
    assert measures["ap50"] == 0
    assert truth.recall(0.01) == 0


def test_nothing_found_is_zero():
    measures, truth, _ = compared(TRUTH, [])
    assert measures["ap"] == 0
    assert truth.recall(0.01) == 0


def test_the_threshold_lets_through_as_many_boxes_as_allowed():
    scores = [0.9, 0.553, 0.55, 0.3]
    for photos, passing in ((10, 1), (20, 2), (5, 0), (100, 4)):
        threshold = threshold_for(scores, photos, 0.1)
        assert sum(score >= threshold for score in scores) <= photos * 0.1
        assert sum(score >= threshold - 0.01 for score in scores) >= passing
    assert threshold_for([], 10, 0.1) == 0.01


def test_the_card_has_all_figures():
    measures, truth, precision = compared(TRUTH, EXACT)
    rows = figures(measures, truth, [0.9, 0.2], 10, 0.5)
    assert rows["recall_keypoints_over_32"] == 1
    assert rows["nobody_boxes"] == 0.1
    assert precision_recall_plot({"drawn": precision}).startswith(b"\x89PNG")


def test_annotations_may_be_numbered_from_nought():
    truth = {**TRUTH, "annotations": [each | {"id": each["id"] - 1} for each in TRUTH["annotations"]]}
    assert compared(truth, EXACT)[0]["ap"] == pytest.approx(1)
    assert sorted(compared(truth, EXACT)[1].scores.tolist()) == [0.4, 0.6, 0.9]


@pytest.mark.filterwarnings("default")  # PyTorch's exporter warns of its own future
def test_the_command_measures_records_and_draws(tmp_path, monkeypatch, capsys):
    torch.manual_seed(1)
    folder = export(halved_weights(PersonDetector(16).state_dict()), tmp_path / "store", "person-det", "1")
    photo = cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8))[1].tobytes()
    person = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 60, 110], "area": 4000, "iscrowd": 0}
    for name, people in (("pose/dev/coco", [person]), ("detect/dev/nobody", [])):
        file = tmp_path / f"{name}.json"
        file.parent.mkdir(parents=True)
        (file.parent / "1.png").write_bytes(photo)
        images = [{"id": 1, "file_name": "1.png", "width": 160, "height": 120}]
        file.write_text(json.dumps({"images": images, "annotations": people}))
    command = ["evaluate", "--model", "person-det", "--store", str(tmp_path / "store"), "--data", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(tmp_path / "out"), "--write"])
    main()
    threshold = re.search(r"\| threshold \| ([\d.]+) \|", capsys.readouterr().out)[1]
    description = tomllib.loads((folder / "model.toml").read_text())
    assert description["detection"]["threshold"] == pytest.approx(float(threshold))
    assert "ap" in description["accuracy"]["coco"]
    assert load_model(folder).description.detection.threshold == description["detection"]["threshold"]
    assert isinstance(json.loads((tmp_path / "out/detections.json").read_text()), list)
    assert cv2.imread(str(tmp_path / "out/precision_recall.png")) is not None


def test_boxes_are_in_the_pixels_of_the_picture(t_pose):
    store = Path(__file__).parents[3] / "model_store"
    detector = Detector.opened(load_model(store / "person-det/1"), 100)
    picture = Picture({"id": 1, "file_name": "a.jpg", "width": 1080, "height": 720}, [], t_pose)
    found = detections(detector, iter([picture]))
    assert found[0]["bbox"] == pytest.approx([295, 15, 545, 595], abs=100)
    assert min(side for each in found for side in each["bbox"][2:]) >= 1  # none in the letterbox's rim


def test_poses_are_measured_from_the_best_boxes_of_each_picture():
    results = [{"image_id": image, "score": 1 - place / 30} for image in (1, 2) for place in range(30)]
    assert posed([*results, {"image_id": 3, "score": 0.04}]) == results[:20] + results[30:50]
