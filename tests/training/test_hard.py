"""People whom a model finds badly, as a set of their own."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from app.inference.pose import PoseModel
from training import hard
from training.data import cached_people

ROOT = Path(__file__).parents[2]
STORED = ROOT / "model_store/lpn50/1"
PHOTO = ROOT / "tests/data/reference/astronaut_384.png"
BOX = [60.0, 10.0, 250.0, 360.0]


@pytest.fixture
def people(tmp_path):
    """Two copies of a photo: labels as the model finds them, moved by some pixels, and moved far; and as found alone."""
    model = PoseModel.load(STORED)
    crops = model.cut(cv2.imread(str(PHOTO)), np.array([[60.0, 10.0, 249.0, 359.0]]))
    found = model.to_picture(model.plain.run(crops.pixels).values, crops)[0, :, :2]
    annotations = []
    for number, (image, moved) in enumerate([(1, 0), (1, 15), (1, 150), (2, 0)], 1):
        joints = np.column_stack([found + moved, np.full(17, 2)])
        person = {"id": number, "image_id": image, "bbox": BOX, "area": 45_000.0, "keypoints": joints.ravel().tolist()}
        annotations.append(person | {"num_keypoints": 17, "category_id": 1, "iscrowd": 0})
    for image in (1, 2):
        (tmp_path / f"{image}.png").write_bytes(PHOTO.read_bytes())
    images = [{"id": image, "file_name": f"{image}.png", "width": 384, "height": 384} for image in (1, 2)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    file = tmp_path / "people.json"
    file.write_text(json.dumps(content))
    return file


def run(monkeypatch, people: Path, out: Path) -> None:
    command = ["hard", "--store", str(STORED.parents[1]), "--annotations", str(people), "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    hard.main()


def test_those_found_badly_but_not_hopelessly_are_a_set_to_train_on(people, tmp_path, monkeypatch, capsys):
    out = tmp_path / "people_hard.json"
    run(monkeypatch, people, out)
    content = json.loads(out.read_text())
    assert [person["id"] for person in content["annotations"]] == [2]
    assert [image["id"] for image in content["images"]] == [1]
    assert capsys.readouterr().out == f"1 people in {out}\n"
    assert len(cached_people(out, tmp_path / "cache", 64)) == 1


def test_a_set_of_people_whom_the_model_finds_well_is_told_so(people, tmp_path, monkeypatch):
    content = json.loads(people.read_text())
    content["annotations"] = [person for person in content["annotations"] if person["id"] in (1, 4)]
    people.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="holds nobody whom the model finds with a similarity of"):
        run(monkeypatch, people, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_a_set_is_not_written_over_the_one_that_is_read(people, monkeypatch, capsys):
    before = people.read_bytes()
    with pytest.raises(SystemExit):
        run(monkeypatch, people, people)
    assert "--out is the file that is read" in capsys.readouterr().err
    assert people.read_bytes() == before


def test_a_set_that_could_not_be_written_is_told_before_the_work(people, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, people, tmp_path / "nowhere/people_hard.json")
    assert f"argument --out: {tmp_path / 'nowhere'} is no folder that can be written to" in capsys.readouterr().err
