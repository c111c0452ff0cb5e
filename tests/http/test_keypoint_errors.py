"""keypoint_errors: pixels where the model is calibrated, null where it is not."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest

T_POSE = "295,15,545,595"
TWO_WOMEN = "140,200,225,640;620,20,655,825"
SHIPPED = Path(__file__).parents[2] / "model_store/lpn50/1"
CALIBRATION = f"[calibration]\nintercepts = {[0.1 * joint for joint in range(17)]}\nscore = -0.5\nspread = 1.0\n"


@pytest.fixture(scope="module")
def calibrated(start_service, tmp_path_factory):
    """A service with the shipped network: `sure` is calibrated, version 2 with e times the nose's error; `unsure` is not."""
    store = tmp_path_factory.mktemp("store")
    described = re.sub(r"(?m)^\[calibration\]\n(.+\n)*", "", (SHIPPED / "model.toml").read_text())
    later = CALIBRATION.replace("[0.0, 0.1, ", "[1.0, 0.1, ")
    for name, version, more in (("sure", "1", CALIBRATION), ("sure", "2", later), ("unsure", "1", "")):
        folder = store / name / version
        folder.mkdir(parents=True)
        for file in ("model.onnx", "golden.png"):
            (folder / file).symlink_to(SHIPPED / file)
        text = described.replace('name = "lpn50"', f'name = "{name}"').replace('version = "1"', f'version = "{version}"')
        (folder / "model.toml").write_text(text.replace("[keypoints]", f"{more}\n[keypoints]"))
    return start_service(model_store=store, detector="", default_model="sure", max_batch_crops=2).client


def _answer(client, picture, boxes, **options):
    answer = client.post(
        "/v1/pose", params={"boxes": boxes, **options}, content=picture, headers={"Content-Type": "image/jpeg"}
    )
    assert answer.status_code == 200
    return answer.json()


def _errors(client, picture, boxes, **options):
    people = _answer(client, picture, boxes, **options)["annotations"]
    return np.array([person["keypoint_errors"] for person in people], float)


def test_each_joint_has_its_expected_error_in_pixels(calibrated, two_women):
    errors = _errors(calibrated, two_women, TWO_WOMEN)
    assert errors.shape == (2, 17)
    assert (errors > 0).all()
    np.testing.assert_array_equal(np.round(errors, 2), errors)


def test_each_joint_has_the_calibration_of_its_own_and_the_latest_version_is_taken(calibrated, t_pose):
    first, latest, second = (_errors(calibrated, t_pose, T_POSE, model=name)[0] for name in ("sure/1", "sure", "sure/2"))
    assert (latest == second).all()
    np.testing.assert_allclose(second[0] / first[0], np.e, rtol=0.01)
    np.testing.assert_array_equal(second[1:], first[1:])


def test_a_picture_of_twice_the_size_has_twice_the_error(calibrated, t_pose):
    picture = cv2.imdecode(np.frombuffer(t_pose, np.uint8), cv2.IMREAD_COLOR)
    larger = cv2.imencode(".png", cv2.resize(picture, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR))[1].tobytes()
    twice = ",".join(str(2 * int(value)) for value in T_POSE.split(","))
    ratio = _errors(calibrated, larger, twice) / _errors(calibrated, t_pose, T_POSE)
    np.testing.assert_allclose(np.median(ratio), 2, rtol=0.1)


def test_a_blurred_person_has_larger_errors(calibrated, t_pose):
    picture = cv2.imdecode(np.frombuffer(t_pose, np.uint8), cv2.IMREAD_COLOR)
    blurred = cv2.imencode(".png", cv2.GaussianBlur(picture, (0, 0), 20))[1].tobytes()
    assert _errors(calibrated, blurred, T_POSE).mean() > 1.2 * _errors(calibrated, t_pose, T_POSE).mean()


def test_the_flip_test_has_errors_too(calibrated, t_pose):
    flipped, plain = (_errors(calibrated, t_pose, T_POSE, flip_test=flip_test) for flip_test in (True, False))
    assert flipped.shape == (1, 17)
    np.testing.assert_allclose(np.median(flipped / plain), 1, atol=0.25)


def test_without_calibration_there_is_null(calibrated, two_women):
    answer = _answer(calibrated, two_women, TWO_WOMEN, model="unsure")
    assert [person["keypoint_errors"] for person in answer["annotations"]] == [None, None]


def test_everything_else_is_the_same_with_and_without(calibrated, two_women):
    answers = [_answer(calibrated, two_women, TWO_WOMEN, model=model, format="results") for model in ("sure", "unsure")]
    assert answers[0] == answers[1]
    assert all(len(person["keypoints"]) == 51 for person in answers[0])
    coco = [_answer(calibrated, two_women, TWO_WOMEN, model=m)["annotations"] for m in ("sure", "unsure")]
    assert [p | {"keypoint_errors": None} for p in coco[0]] == coco[1]
