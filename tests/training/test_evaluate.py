"""Evaluation: COCO's measures and the reference's suppression against the reference's own figures; sets from files."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from app.inference.pose import PoseModel
from training import evaluate, oks
from training.data import Picture

REFERENCE = Path(__file__).parents[1] / "data/reference"
STORED = Path(__file__).parents[2] / "model_store/lpn50/1"


@pytest.fixture(scope="module")
def reference_results():
    return json.loads((REFERENCE / "coco_results_after_oks_nms.json").read_text())


def test_the_references_results_get_the_references_ap(reference_results):
    truth = json.loads((REFERENCE / "annotations_mini.json").read_text())
    measures = oks.evaluate_results(truth, reference_results)
    assert measures["ap"] == pytest.approx(0.8308580858, abs=1e-9)
    assert measures["ap50"] == pytest.approx(0.917, abs=5e-4)
    assert measures["ar"] == pytest.approx(0.925, abs=5e-4)


def test_the_reference_keeps_seven_of_eight_and_so_do_we(reference_results):
    with np.load(REFERENCE / "parity.npz") as parity:
        predictions, boxes = parity["all_preds"].astype(np.float64), parity["all_boxes"]
        image_ids = parity["image_id"]
    scores = evaluate.person_scores(predictions, boxes[:, 5])
    results = [
        {"image_id": int(image), "category_id": 1, "keypoints": joints.ravel().tolist(), "score": float(score)}
        for image, joints, score in zip(image_ids, predictions, scores, strict=True)
    ]
    kept = oks.suppress_twins(results, boxes[:, 4].tolist())
    assert len(kept) == 7
    found = sorted((person["image_id"], round(person["score"], 4)) for person in kept)
    assert found == sorted((person["image_id"], round(person["score"], 4)) for person in reference_results)


def test_labelled_boxes_are_clipped_as_the_reference_clips_them():
    people = [
        {"bbox": [-10, 5, 50, 20], "num_keypoints": 3},
        {"bbox": [90, 70, 30, 30], "num_keypoints": 3},
        {"bbox": [0, 0, 9, 9], "num_keypoints": 0},
        {"bbox": [0, 0, 9, 9], "num_keypoints": 5, "iscrowd": 1},
    ]
    boxes = evaluate.labelled_boxes(Picture({"width": 100, "height": 80}, people, b""))
    np.testing.assert_array_equal(boxes.places, [[0, 5, 49, 19], [90, 70, 9, 9]])


def test_torso_hits_count_joints_within_a_fifth_of_the_torso():
    labels = np.zeros((17, 3))
    labels[[5, 12, 9]] = [[0, 0, 2], [30, 40, 2], [60, 0, 2]]  # the torso is 50 long
    found = np.zeros((1, 17, 3))
    found[0, [5, 12, 9], :2] = [[0, 9.9], [30, 40], [60, 10.1]]
    person = {"keypoints": labels.ravel().tolist(), "num_keypoints": 3}
    np.testing.assert_array_equal(evaluate.torso_hits([person], found), [[True, False, True]])


def test_the_torso_goes_across_the_other_way_where_a_joint_is_unlabelled():
    labels = np.zeros((17, 3))
    labels[[6, 11, 12]] = [[0, 0, 2], [30, 40, 2], [0, 40, 2]]
    found = np.zeros((1, 17, 3))
    found[0, [6, 11, 12], :2] = [[9.9, 0], [30, 50.1], [0, 40]]
    person = {"keypoints": labels.ravel().tolist(), "num_keypoints": 3}
    np.testing.assert_array_equal(evaluate.torso_hits([person], found), [[True, False, True]])


def test_someone_outside_the_picture_leaves_the_others_with_their_boxes():
    outside = {"id": 1, "bbox": [120, 5, 50, 20], "num_keypoints": 3}
    inside = {"id": 2, "bbox": [10, 5, 50, 20], "num_keypoints": 3}
    people, boxes = evaluate.labelled_people(Picture({"width": 100, "height": 80}, [outside, inside], b""))
    assert [person["id"] for person in people] == [2]
    np.testing.assert_array_equal(boxes, [[10, 5, 49, 19]])


@pytest.mark.parametrize("extra", [{"num_keypoints": 0, "keypoints": [0] * 51}, {}, {"iscrowd": 1}])
def test_people_without_keypoints_and_crowds_count_for_nothing(reference_results, extra):
    truth = json.loads((REFERENCE / "annotations_mini.json").read_text())
    image = truth["images"][0]["id"]
    truth["annotations"].append(
        {"id": 99, "image_id": image, "category_id": 1, "bbox": [0, 0, 90, 90], "area": 5000, **extra}
    )
    assert oks.evaluate_results(truth, reference_results)["ap"] == pytest.approx(0.8308580858, abs=1e-9)


def test_pictures_are_taken_a_few_at_a_time_and_given_in_their_order():
    taken = []

    def pictures():
        for number in range(20):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(2) as pool:
        results = evaluate.in_order(pool, lambda number: -number, pictures(), ahead=3)
        assert next(results) == 0
        assert len(taken) == 4
        assert list(results) == [-number for number in range(1, 20)]


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory):
    """A user's own COCO folder: one photo whose labels are what the shipped model finds, so that AP must be 1."""
    folder = tmp_path_factory.mktemp("coco")
    photo = REFERENCE / "astronaut_384.png"
    (folder / "images").mkdir()
    (folder / "images/1.png").write_bytes(photo.read_bytes())
    model = PoseModel.load(STORED)
    box = [60.0, 10.0, 250.0, 360.0]
    clipped = [60.0, 10.0, 249.0, 359.0]
    crops = model.cut(cv2.imread(str(photo)), np.array([clipped]))
    joints = model.to_picture(model.plain.run(crops.pixels).values, crops)[0]
    joints[:, 2] = 2
    person = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 45000.0, "iscrowd": 0}
    person |= {"num_keypoints": 17, "keypoints": joints.ravel().tolist()}
    images = [{"id": 1, "file_name": "1.png", "width": 384, "height": 384}]
    content = {"images": images, "annotations": [person], "categories": [{"id": 1, "name": "person"}]}
    (folder / "people.json").write_text(json.dumps(content))
    (folder / "boxes.json").write_text(
        json.dumps([{"image_id": 1, "category_id": 1, "bbox": clipped, "score": 0.9}, {"image_id": 1, "category_id": 2}])
    )
    return folder


@pytest.mark.parametrize("detections", [[], ["--detections", "boxes.json"]])
def test_a_folder_of_ones_own_is_measured(coco_folder, monkeypatch, capsys, detections):
    monkeypatch.chdir(coco_folder)
    command = ["evaluate", "--annotations", "people.json", "--images", "images", "--store", str(STORED.parents[1])]
    monkeypatch.setattr("sys.argv", command + detections)
    evaluate.main()
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].startswith("| people | 1 | 1.000 | 1.000 |")
    assert rows[3].startswith("| people, flip test | 1 |")


def test_a_running_service_is_measured_without_the_model_at_hand(coco_folder, service, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(coco_folder)
    command = ["evaluate", "--annotations", "people.json", "--images", "images", "--store", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*command, "--server", str(service.client.base_url)])
    evaluate.main()
    assert capsys.readouterr().out.splitlines()[2].startswith("| people | 1 | 1.000 | 1.000 |")


@pytest.mark.parametrize("flip_test", [False, True])
def test_the_service_finds_what_the_stored_model_finds(service, flip_test):
    picture = Picture({"file_name": "1.png"}, [], (REFERENCE / "astronaut_384.png").read_bytes())
    boxes = np.array([[60.25, 10.0, 249.0, 359.0], [-20.0, 30.5, 180.0, 300.0]])
    local = evaluate.local_estimator(PoseModel.load(STORED), flip_test)(picture, boxes)
    served = evaluate.server_estimator(service.client, "lpn50", flip_test)(picture, boxes)
    np.testing.assert_allclose(served[..., :2], local[..., :2], rtol=0, atol=0.0051)  # two decimals
    np.testing.assert_allclose(served[..., 2], local[..., 2], rtol=0, atol=0.000051)  # four


def test_figures_are_recorded_in_model_toml_beside_those_of_other_sets(tmp_path):
    file = tmp_path / "model.toml"
    file.write_text('name = "x"\n\n[accuracy."old"]\nap = 0.1\n\n[accuracy."coco, flip test"]\nap = 0.2\n')
    evaluate.record(file, {"coco, flip test": {"people": 2.0, "ap": 0.25, "ap_medium": -1.0}})
    assert file.read_text() == (
        'name = "x"\n\n[accuracy."old"]\nap = 0.1\n\n[accuracy."coco, flip test"]\npeople = 2.0\nap = 0.25\n'
    )
