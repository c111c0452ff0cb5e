"""Found people measured: COCO results, and data sets whose pictures go by their names."""

import json
from pathlib import Path

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
