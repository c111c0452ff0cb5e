"""POST /v1/pose without boxes: the detector finds the people."""

import base64
import itertools

import cv2
import httpx
import numpy as np
import pytest
from PIL import Image

JPEG = {"Content-Type": "image/jpeg"}
T_POSE_BOX = (295, 15, 545, 595)
TWO_WOMEN_BOXES = ((140, 200, 225, 640), (620, 20, 655, 825))


def find(client: httpx.Client, picture: bytes, **options: object) -> list[dict]:
    answer = client.post("/v1/pose", params=options, content=picture, headers=JPEG)
    assert answer.status_code == 200, answer.text
    return answer.json()["annotations"]


def overlap(first: list[float], second: list[float]) -> float:
    """Intersection over union of two boxes (x, y, width, height)."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = first, second
    common = max(0, min(ax + aw, bx + bw) - max(ax, bx)) * max(0, min(ay + ah, by + bh) - max(ay, by))
    return common / (aw * ah + bw * bh - common)


def jpeg(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", pixels)[1].tobytes()


@pytest.fixture(scope="module")
def pixels(t_pose) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(t_pose, np.uint8), cv2.IMREAD_COLOR)


def test_a_photo_alone_is_enough(client, t_pose):
    best = find(client, t_pose)[0]
    assert overlap(best["bbox"], T_POSE_BOX) > 0.7
    assert 0 < best["bbox_score"] <= 1
    assert best["num_keypoints"] >= 12


def test_found_people_have_the_joints_of_given_boxes(client, t_pose):
    best = find(client, t_pose)[0]
    (given,) = find(client, t_pose, boxes=",".join(map(str, best["bbox"])))
    # Boxes are answered rounded: a crop's values differ by a level here and there, and int8 makes more of it.
    apart = np.abs(np.subtract(best["keypoints"], given["keypoints"])).reshape(17, 3).max(axis=1)
    assert np.median(apart) < 1
    assert apart.max() < best["bbox"][3] / 128  # half a cell
    assert best["score"] == pytest.approx(given["score"] * best["bbox_score"], abs=0.01)


def test_everybody_is_found_and_the_best_comes_first(client, two_women):
    people = find(client, two_women)
    for box in TWO_WOMEN_BOXES:
        assert max(overlap(person["bbox"], box) for person in people) > 0.6
    scores = [person["score"] for person in people]
    assert scores == sorted(scores, reverse=True)
    assert [person["id"] for person in people] == list(range(1, len(people) + 1))


def test_options_say_how_many_and_how_sure(client, two_women):
    default = client.get("/v1/models").json()["models"][-1]["detection_threshold"]
    everybody = find(client, two_women, detection_threshold=0.01)
    assert min(person["bbox_score"] for person in everybody) < default
    (most_surely_found,) = find(client, two_women, detection_threshold=0.01, max_people=1)
    assert most_surely_found["bbox_score"] == max(person["bbox_score"] for person in everybody)
    assert all(person["bbox_score"] >= 0.3 for person in find(client, two_women, detection_threshold=0.3))
    assert find(client, two_women, detection_threshold=1) == []


def test_fifty_people_are_taken_where_a_request_names_no_number(service, client, two_women):
    before = service.metric("pose_crops_total", model="lpn50/1")
    find(client, two_women, detection_threshold=0)
    assert 40 < service.metric("pose_crops_total", model="lpn50/1") - before <= 50  # some lie in the letterbox's rim


def test_nobody_is_found_twice_though_several_boxes_show_the_same_person(client, two_women):
    people = find(client, two_women, detection_threshold=0.02)
    for box in TWO_WOMEN_BOXES:
        assert sum(overlap(person["bbox"], box) > 0.5 for person in people) == 1
    boxes = ";".join(",".join(map(str, box)) for box in TWO_WOMEN_BOXES)
    assert len(find(client, two_women, boxes=f"{boxes};{boxes}")) == 4  # given boxes are all answered


def test_nobody_is_found_where_nobody_is(client):
    answer = client.post("/v1/pose", content=jpeg(np.full((480, 640, 3), 90, np.uint8)), headers=JPEG)
    assert answer.json()["annotations"] == []
    assert answer.json()["images"] == [{"id": 0, "width": 640, "height": 480, "file_name": None}]


@pytest.mark.parametrize("scale", [0.5, 2, 4])  # below, at and above the size that is decoded smaller for the detector
def test_any_size_of_the_photo_gives_the_same_people(client, t_pose, pixels, scale):
    before = find(client, t_pose)[0]
    scaled = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    after = find(client, jpeg(scaled))[0]
    assert overlap([value / scale for value in after["bbox"]], before["bbox"]) > 0.85


@pytest.mark.parametrize("extension", [".png", ".webp", ".bmp"])
def test_any_format_gives_the_same_people(client, t_pose, pixels, extension):
    after = find(client, cv2.imencode(extension, pixels)[1].tobytes())[0]
    assert overlap(after["bbox"], find(client, t_pose)[0]["bbox"]) > 0.9


def test_exif_orientation_is_applied_before_people_are_found(client, t_pose, tmp_path):
    rotated = Image.open(__file__.replace("http/test_found_people.py", "data/photos/t_pose_cc0.jpg")).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    rotated.save(tmp_path / "rotated.jpg", exif=exif, quality=95)
    best = find(client, (tmp_path / "rotated.jpg").read_bytes())[0]
    assert overlap(best["bbox"], find(client, t_pose)[0]["bbox"]) > 0.85


def test_pictures_of_one_request_are_searched_together_and_boxed_ones_are_not(service, client, t_pose, two_women):
    before = service.metric("pose_searched_images_total")
    images = [
        {"data": base64.b64encode(two_women).decode()},
        {"data": base64.b64encode(t_pose).decode(), "boxes": [list(T_POSE_BOX)]},
        {"data": base64.b64encode(t_pose).decode()},
        {"data": base64.b64encode(t_pose).decode(), "boxes": []},
    ]
    people = client.post("/v1/pose", json={"images": images}).json()["annotations"]
    assert service.metric("pose_searched_images_total") == before + 2
    by_picture = {n: [*group] for n, group in itertools.groupby(people, key=lambda person: person["image_id"])}
    assert [person["bbox"] for person in by_picture[0]] == [person["bbox"] for person in find(client, two_women)]
    assert [person["bbox"] for person in by_picture[1]] == [list(T_POSE_BOX)]
    assert [person["keypoints"] for person in by_picture[2]] == [person["keypoints"] for person in find(client, t_pose)]
    assert 3 not in by_picture


def test_the_time_of_detection_is_told(client, t_pose):
    header = client.post("/v1/pose", content=t_pose, headers=JPEG).headers["Server-Timing"]
    times = {name: float(rest.removeprefix("dur=")) for name, rest in (part.split(";") for part in header.split(", "))}
    assert times["detect"] > 0
    assert times["detect"] < times["total"]


def test_a_broken_picture_is_told_by_its_place(client, t_pose):
    answer = client.post("/v1/pose", files=[("image", t_pose), ("image", t_pose[:5000])])
    assert answer.status_code == 422
    assert answer.json()["type"] == "/problems/invalid_image"
    assert answer.json()["errors"][0]["loc"] == ["images", 1]


def test_people_beyond_the_queue_are_refused_and_their_room_is_given_back(start_service, two_women):
    small = start_service(queue_crops=1)
    answer = small.client.post("/v1/pose", content=two_women, headers=JPEG)
    assert answer.status_code == 413
    assert "1" in answer.json()["detail"]
    assert len(find(small.client, two_women, max_people=1)) == 1


def test_no_more_people_are_found_than_boxes_may_be_given(start_service, two_women):
    assert len(find(start_service(max_boxes=1, lanes=1).client, two_women)) == 1


def test_the_detector_is_among_the_models(client):
    (detector,) = [model for model in client.get("/v1/models").json()["models"] if model["kind"] == "detector"]
    assert detector["default"]
    assert 0 < detector["detection_threshold"] < 1
    assert client.get(f"/v1/models/{detector['name']}").json() == detector
    answer = client.post("/v1/pose", params={"model": detector["name"]}, content=b"", headers=JPEG)
    assert answer.status_code == 404


def test_without_a_detector_the_service_asks_for_boxes(start_service, t_pose):
    alone = start_service(detector="")
    for answer in (
        alone.client.post("/v1/pose", content=t_pose, headers=JPEG),
        alone.client.post("/v1/pose", json={"images": [{"data": base64.b64encode(t_pose).decode()}]}),
        alone.client.post("/v1/pose", files={"image": t_pose}),
        alone.client.post("/v1/pose", files={"image": t_pose}, data={"boxes": "[null]"}),  # to be searched, as for several
    ):
        assert answer.status_code == 422
        assert answer.json()["type"] == "/problems/invalid_option"
        assert answer.json()["errors"][0]["loc"] == ["boxes"]
    assert {model["kind"] for model in alone.client.get("/v1/models").json()["models"]} == {"pose"}
