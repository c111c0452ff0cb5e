"""People in the boxes that a detector finds for them, as a set of their own."""

import json
from pathlib import Path

import pytest

from training import found
from training.data import cached_people

ROOT = Path(__file__).parents[2]
STORE = ROOT / "model_store"
PHOTO = ROOT / "tests/data/reference/astronaut_384.png"
LABELLED = [60.0, 10.0, 250.0, 360.0]  # the astronaut, from the hair to the photo's lower edge


@pytest.fixture
def people(tmp_path):
    """Three copies of a photo: its person and a place without anybody; the person without keypoints; nobody at all."""
    joints = [150.0, 60.0, 2] * 17
    rows = [(1, LABELLED, joints), (1, [300.0, 250.0, 60.0, 120.0], joints), (2, LABELLED, None)]
    annotations = []
    for number, (image, box, keypoints) in enumerate(rows, 1):
        person = {"id": number, "image_id": image, "bbox": box, "area": 45_000.0, "category_id": 1, "iscrowd": 0}
        annotations.append(person | ({"keypoints": keypoints, "num_keypoints": 17} if keypoints else {}))
    for image in (1, 2, 3):
        (tmp_path / f"{image}.png").write_bytes(PHOTO.read_bytes())
    images = [{"id": image, "file_name": f"{image}.png", "width": 384, "height": 384} for image in (1, 2, 3)]
    file = tmp_path / "people.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}))
    return file


def run(monkeypatch, people: Path, out: Path) -> None:
    monkeypatch.setattr("sys.argv", ["found", "--store", str(STORE), "--annotations", str(people), "--out", str(out)])
    found.main()


def test_who_is_found_is_a_set_to_train_on_in_the_box_that_was_found(people, tmp_path, monkeypatch, capsys):
    out = tmp_path / "people_found.json"
    run(monkeypatch, people, out)
    content = json.loads(out.read_text())
    (person,) = content["annotations"]
    assert [image["id"] for image in content["images"]] == [1]
    before = json.loads(people.read_text())["annotations"][0]
    assert person | {"bbox": LABELLED} == before
    assert person["bbox"] != LABELLED
    assert person["bbox"] == pytest.approx(LABELLED, abs=60)
    assert capsys.readouterr().out == f"1 people in {out}\n"
    assert len(cached_people(out, tmp_path / "cache", 64)) == 1


def test_a_set_of_people_whom_the_detector_does_not_find_is_told_so(people, tmp_path, monkeypatch):
    content = json.loads(people.read_text())
    content["annotations"] = content["annotations"][1:]
    people.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="holds nobody with keypoints whom the detector finds"):
        run(monkeypatch, people, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
