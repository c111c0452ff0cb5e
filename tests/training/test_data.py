"""What is taken for labels, and which pictures an int8 model is calibrated on."""

import json

import cv2
import numpy as np
import PIL.Image
import pytest

from training.data import read_annotations, read_pictures
from training.files import DataError
from training.int8 import samples_of
from training.keypoints import NAMES

JOINTS = [5.0, 5.0, 2] * 17


def coco(folder, count, labelled, **more):
    """A COCO file of so many small pictures; each `labelled`-th shows a person with keypoints."""
    images = [{"id": n, "file_name": f"{n}.png", "width": 8, "height": 8} for n in range(count)]
    for image in images:
        cv2.imwrite(str(folder / image["file_name"]), np.zeros((8, 8, 3), np.uint8))
    people = [
        {"id": n, "image_id": n, "category_id": 1, "bbox": [0, 0, 8, 8], "area": 64, "keypoints": JOINTS} | more
        for n in range(0, count, labelled)
    ]
    file = folder / "people.json"
    file.write_text(json.dumps({"images": images, "annotations": people}))
    return file


@pytest.mark.parametrize(("count", "labelled", "samples"), [(300, 1, 128), (300, 4, 75), (8, 2, 4)])
def test_an_int8_model_is_calibrated_on_labelled_pictures(tmp_path, count, labelled, samples):
    file = coco(tmp_path, count, labelled)
    seen = []

    def sample(picture):
        seen.append(picture.image["id"])
        return np.zeros((2, 2, 3), np.uint8)

    assert len(samples_of(file, sample)) == samples
    assert all(number % labelled == 0 for number in seen)
    assert max(seen) == (count - 1) // labelled * labelled


def test_how_many_joints_are_labelled_is_counted(tmp_path):
    file = coco(tmp_path, 1, 1, num_keypoints=17, keypoints=[0.0] * 51)
    assert read_annotations(file)["annotations"][0]["num_keypoints"] == 0


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("keypoint_weights", [-1.0] * 17, "keypoint_weights that are not between 0 and 1"),
        ("keypoint_weights", [1.5] * 17, "keypoint_weights that are not between 0 and 1"),
        ("area", -5, "area -5, which is no number of 0 or more"),
        ("area", 0, "annotation 0 has keypoints and no area over 0"),
        ("iscrowd", None, "iscrowd None, which is neither 0 nor 1"),
        ("iscrowd", "0", "iscrowd '0', which is neither 0 nor 1"),
        ("id", "seven", "'seven' has an id that is no whole number"),
        ("keypoints", [1e39, 1.0, 2.0] * 17, "keypoints beyond 1,000,000 pixels"),
        ("bbox", [10**400, 1, 2, 3], "too large"),
    ],
)
def test_labels_out_of_range_are_refused(tmp_path, key, value, told):
    file = coco(tmp_path, 1, 1, **{key: value})
    with pytest.raises(DataError, match=told):
        read_annotations(file)


def with_categories(file, categories):
    file.write_text(json.dumps(json.loads(file.read_text()) | {"categories": categories}))
    return file


def test_keypoints_of_another_order_than_cocos_are_refused(tmp_path):
    file = coco(tmp_path, 1, 1)
    others = {"id": 2, "name": "dog", "keypoints": ["tail"]}
    read_annotations(with_categories(file, [others, {"id": 1, "name": "person", "keypoints": NAMES}]))
    other_order = ["pelvis", *NAMES[1:]]
    with pytest.raises(DataError, match="keypoints are not COCO's 17 in COCO's order: pelvis, left_eye"):
        read_annotations(with_categories(file, [{"id": 1, "name": "person", "keypoints": other_order}]))


def test_a_file_without_a_category_of_people_is_refused(tmp_path):
    file = with_categories(coco(tmp_path, 1, 1), [{"id": 1, "name": "car"}, {"id": 2, "name": "Person"}])
    with pytest.raises(DataError, match="none of its categories is called person: car, Person"):
        read_annotations(file)


def test_people_are_those_of_the_category_with_keypoints(tmp_path):
    file = coco(tmp_path, 1, 1, category_id=7)
    people = [{"id": number, "name": "person", "keypoints": joints} for number, joints in ((2, []), (7, NAMES))]
    assert len(read_annotations(with_categories(file, people))["annotations"]) == 1
    with pytest.raises(DataError, match="no annotation is of its category person, 2; they are of 7"):
        read_annotations(with_categories(file, people[:1]))


def test_people_without_an_area_get_one_as_cocos_masks_have(tmp_path, caplog):
    file = coco(tmp_path, 1, 1)
    file.write_text(file.read_text().replace('"area": 64, ', ""))
    assert read_annotations(file)["annotations"][0]["area"] == pytest.approx(0.52 * 64)
    assert caplog.messages == ["1 people have no area: 0.52 of their box is taken, as COCO's masks have in the median"]


def test_pictures_that_are_stored_turned_are_told_once(tmp_path, caplog):
    file = coco(tmp_path, 3, 1)
    list(read_pictures(file))
    assert not caplog.messages
    turn = PIL.Image.Exif()
    turn[0x0112] = 3
    for number in (1, 2):
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png", exif=turn)
    list(read_pictures(file))
    assert [told.split(".")[0] for told in caplog.messages] == ["1"]


def test_people_without_keypoints_may_have_null_for_them(tmp_path):
    file = coco(tmp_path, 1, 1, keypoints=None)
    assert read_annotations(file)["annotations"][0]["num_keypoints"] == 0


@pytest.mark.parametrize("key", ["images", "annotations"])
def test_files_that_were_put_together_as_they_are_are_refused(tmp_path, key):
    file = coco(tmp_path, 2, 1)
    content = json.loads(file.read_text())
    content[key].append(content[key][0])
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"two {key} have the id {content[key][0]['id']}"):
        read_annotations(file)


def test_a_name_that_no_file_can_have_is_told(tmp_path):
    file = coco(tmp_path, 1, 1)
    file.write_text(file.read_text().replace("0.png", "0\\u0000.png"))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_pictures(file))
