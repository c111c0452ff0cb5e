"""Calibration: the fit finds what the errors follow, and the service answers by it."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from app.inference.model_store import CalibrationTable
from app.inference.pose import PoseModel
from app.vision import box
from training import calibrate
from training.data import read_pictures
from training.evaluate import DEV_SETS, labelled_people

REFERENCE = Path(__file__).parents[1] / "data/reference"
STORED = Path(__file__).parents[2] / "model_store/lpn50/1"
TRUE = CalibrationTable(intercepts=(0.5, -0.5, 1.0), score=-0.4, spread=0.8)


@pytest.fixture(scope="module")
def measured():
    """Errors that follow TRUE, each from 0 to many times what is expected."""
    rng = np.random.default_rng(0)
    joints = rng.integers(0, 3, 20_000)
    signs = np.log(np.stack([rng.uniform(0.05, 1, 20_000), rng.uniform(1, 20, 20_000)], axis=1)).astype(np.float32)
    errors = calibrate.expected(TRUE, calibrate.Joints(joints, signs, joints, joints == 0)) * rng.exponential(1, 20_000)
    return calibrate.Joints(joints, signs, errors, rng.random(20_000) < 0.5)


def test_the_fit_finds_what_the_errors_follow(measured):
    table = calibrate.fit(measured.part(True), 3)
    np.testing.assert_allclose(table.intercepts, TRUE.intercepts, atol=0.1)
    np.testing.assert_allclose([table.score, table.spread], [TRUE.score, TRUE.spread], atol=0.06)


def test_people_that_were_not_fitted_have_the_errors_that_are_expected(measured):
    table, held_out = calibrate.fit(measured.part(True), 3), measured.part(False)
    for wanted, found in calibrate.reliability(calibrate.expected(table, held_out), held_out.errors):
        assert found == pytest.approx(wanted, rel=0.15)


def test_a_joint_that_nobody_has_stays_near_the_others(measured):
    intercepts = calibrate.fit(measured.part(True), 4).intercepts
    assert intercepts[3] == pytest.approx(np.mean(intercepts[:3]), abs=0.01)


@pytest.fixture
def store(tmp_path):
    """A store with a copy of the shipped model, to be calibrated anew."""
    folder = tmp_path / "store/lpn50/1"
    folder.mkdir(parents=True)
    for file in ("model.onnx", "model.toml", "golden.png"):
        (folder / file).write_bytes((STORED / file).read_bytes())
    return tmp_path / "store"


@pytest.fixture
def data(tmp_path):
    """Dev sets of three photos each, one person a photo, labelled anywhere."""
    rng = np.random.default_rng(2)
    (tmp_path / "data/dev").mkdir(parents=True)
    photos = {"astronaut_384.png": (384, 384), "camera_400.png": (400, 400), "drawing_560x360.png": (560, 360)}
    for name in DEV_SETS:
        images = [
            {"id": n, "file_name": photo, "zip": "a.zip", "width": width, "height": height}
            for n, (photo, (width, height)) in enumerate(photos.items())
        ]
        people = [
            {"id": n, "image_id": n, "bbox": [20, 20, 200, 250], "num_keypoints": 17, "iscrowd": 0, "area": 20000.0,
             "keypoints": np.hstack([rng.uniform(20, 220, (17, 2)), np.full((17, 1), 2)]).ravel().tolist()}
            for n in range(3)
        ]  # fmt: skip
        (tmp_path / f"data/dev/{name}.json").write_text(json.dumps({"images": images, "annotations": people}))
    with zipfile.ZipFile(tmp_path / "data/dev/a.zip", "w") as archive:
        for photo in photos:
            archive.write(REFERENCE / photo, photo)
    return tmp_path / "data"


def test_a_calibration_is_written_into_model_toml_and_the_rest_stays(store, data, monkeypatch, capsys):
    before = PoseModel.load(store / "lpn50/1").description
    monkeypatch.setattr("sys.argv", ["calibrate", "--store", str(store), "--data", str(data), "--write"])
    for _ in range(2):  # the second time it is replaced
        calibrate.main()
    assert "| coco, the other half |" in capsys.readouterr().out
    after = PoseModel.load(store / "lpn50/1").description
    assert after.calibration is not None
    assert after.model_copy(update={"calibration": None}) == before.model_copy(update={"calibration": None})
    assert (store / "lpn50/1/reliability.png").read_bytes().startswith(b"\x89PNG")
    assert (store / "lpn50/1/model.toml").read_text().count("[calibration]") == 1
    coco = calibrate.labelled_joints(PoseModel.load(store / "lpn50/1"), data / "dev/coco.json")
    assert after.calibration == calibrate.fit(coco.part(True), 17)  # on one half, so that the other can check it


@pytest.mark.parametrize("kept", [0, 1, 2])  # alone, which is in one half or in the other
def test_too_few_pictures_are_told_and_leave_the_model_as_it_was(store, data, monkeypatch, kept):
    file = data / "dev/coco.json"
    content = json.loads(file.read_text())
    content["images"] = [image for image in content["images"] if image["id"] == kept]
    content["annotations"] = [person for person in content["annotations"] if person["image_id"] == kept]
    file.write_text(json.dumps(content))
    before = (store / "lpn50/1/model.toml").read_bytes()
    monkeypatch.setattr("sys.argv", ["calibrate", "--store", str(store), "--data", str(data), "--write"])
    with pytest.raises(SystemExit, match=r"coco\.json has too few pictures: all of them fall into one half"):
        calibrate.main()
    assert (store / "lpn50/1/model.toml").read_bytes() == before


def test_errors_are_in_cells_of_the_heatmap(store, data):
    model, expected = PoseModel.load(store / "lpn50/1"), []
    for picture in read_pictures(data / "dev/coco.json"):
        people, boxes = labelled_people(picture)
        crops = model.cut(picture.pixels(), boxes)
        (affine,) = box.crop_affines(crops.centres, crops.sizes, 48, 64)
        labels = np.reshape(people[0]["keypoints"], (17, 3))[:, :2] @ affine[:, :2].T + affine[:, 2]
        expected.append(np.linalg.norm(model.plain.run(crops.pixels).values[0, :, :2] - labels, axis=1))
    measured = calibrate.labelled_joints(model, data / "dev/coco.json")
    np.testing.assert_allclose(measured.errors, np.concatenate(expected), rtol=1e-3)
