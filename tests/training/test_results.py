"""Found people measured: COCO results, and data sets whose pictures go by their names."""

import json
from pathlib import Path

import numpy as np
import pytest

from training import results
from training.files import DataError

REFERENCE = Path(__file__).parents[1] / "data/reference"
ANNOTATIONS = REFERENCE / "annotations_mini.json"


@pytest.fixture
def found():
    return json.loads((REFERENCE / "coco_results_after_oks_nms.json").read_text())


def _measured(monkeypatch, capsys, file):
    monkeypatch.setattr("sys.argv", ["results", str(file), "--annotations", str(ANNOTATIONS)])
    results.main()
    return capsys.readouterr().out


def test_the_references_results_get_the_references_ap(monkeypatch, capsys):
    assert "| annotations_mini | 4 | 0.831 [" in _measured(monkeypatch, capsys, REFERENCE / "coco_results_after_oks_nms.json")


def test_pictures_of_a_data_set_go_by_their_names(monkeypatch, capsys, found, tmp_path):
    names = {image["id"]: image["file_name"] for image in json.loads(ANNOTATIONS.read_text())["images"]}
    places = {id_: place for place, id_ in enumerate(reversed(names))}
    images = [{"id": place, "file_name": names[id_]} for id_, place in places.items()]
    people = [person | {"image_id": places[person["image_id"]]} for person in found]
    file = tmp_path / "people.json"
    file.write_text(json.dumps({"images": images, "annotations": people}))
    assert "| 0.831 [" in _measured(monkeypatch, capsys, file)


def test_people_found_in_a_picture_of_another_size_than_the_labels_are_refused(found, tmp_path):
    truth = json.loads(ANNOTATIONS.read_text())
    for image in truth["images"]:
        image["width"], image["height"] = image["height"], image["width"] + 1
    file = tmp_path / "people.json"
    file.write_text(json.dumps({"images": truth["images"], "annotations": found}))
    with pytest.raises(
        DataError, match=r"people.json .* pixels here and in the annotations; people are found in the upright"
    ):
        results.read_results(file, json.loads(ANNOTATIONS.read_text()))


def test_expected_errors_are_compared_with_those_of_the_people_that_were_found(monkeypatch, capsys, found, tmp_path):
    """Each labelled person is found once in the labelled box, with joints a tenth of the padded box's height too low."""
    people, joints = [], 0
    for person in json.loads(ANNOTATIONS.read_text())["annotations"]:
        if not person["num_keypoints"]:
            continue
        _, _, width, height = person["bbox"]
        padded = 1.25 * max(height, width / 0.75)
        keypoints = np.reshape(person["keypoints"], (17, 3)) + np.array([0, padded / 10, 0])
        answered = {
            "image_id": person["image_id"],
            "bbox": person["bbox"],
            "keypoints": keypoints.ravel().tolist(),
            "score": 1,
        }
        far = answered | {"bbox": [0, 0, 1, 1], "keypoint_errors": [1000.0] * 17}
        people += [far, answered | {"keypoint_errors": [padded / 20] * 17}]
        joints += person["num_keypoints"]
    file = tmp_path / "people.json"
    file.write_text(json.dumps(people))
    told = _measured(monkeypatch, capsys, file)
    assert f"keypoint_errors of {len(people) // 2} people whose boxes overlap by half ({joints} joints)" in told
    assert "expected 5.00 %, found 10.00 %" in told


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda people: people[0].update(image_id=5), "5 is not there, or is no picture of the annotations"),
        (lambda people: people[0].pop("score"), "'score' is not there"),
        (lambda people: people[0].update(keypoints=[1, 2, 2]), "keypoints of 3 numbers in place of 51"),
        (lambda people: people[0].update(score="high"), "no COCO results of people"),
        (lambda people: people.clear(), "holds nobody"),
    ],
)
def test_what_is_no_result_is_named(found, tmp_path, spoil, told):
    spoil(found)
    file = tmp_path / "people.json"
    file.write_text(json.dumps(found))
    with pytest.raises(DataError, match=told):
        results.read_results(file, json.loads(ANNOTATIONS.read_text()))
