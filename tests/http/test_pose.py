"""POST /v1/pose: three bodies, two JSON formats, a drawn picture; the options and what they change."""

import base64
import contextlib
import io
import json

import cv2
import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from app.api.bodies import PICTURE_TYPES
from app.vision.drawing import draw_people

T_POSE = "295,15,545,595"
TWO_WOMEN = "140,200,225,640;620,20,655,825"
BACKGROUND = "0,0,150,150"  # of the two women's picture
T_POSE_BOXES = [[295, 15, 545, 595]]
TWO_WOMEN_BOXES = [[140, 200, 225, 640], [620, 20, 655, 825]]


def post_picture(client: httpx.Client, picture: bytes, accept: str = "*/*", **options: object) -> httpx.Response:
    return client.post("/v1/pose", params=options, content=picture, headers={"Content-Type": "image/jpeg", "Accept": accept})


def post_json(client: httpx.Client, pictures: list[dict], **options: object) -> httpx.Response:
    return client.post("/v1/pose", json={"images": pictures, **options})


def text(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


@pytest.fixture(scope="module")
def plain(client, t_pose) -> dict:
    """The answer to the plainest request."""
    answer = post_picture(client, t_pose, boxes=T_POSE)
    assert answer.status_code == 200
    return answer.json()


@pytest.fixture(scope="module")
def scene(client, two_women) -> list[dict]:
    """Two people, and what is made of a box of background: joints of every score."""
    return post_picture(client, two_women, boxes=f"{TWO_WOMEN};{BACKGROUND}").json()["annotations"]


# Bodies


def test_a_picture_alone_is_answered_with_the_keypoints_of_its_people(plain):
    (person,) = plain["annotations"]
    assert plain["images"] == [{"id": 0, "width": 1080, "height": 720, "file_name": None}]
    assert person["id"] == 1
    assert person["image_id"] == 0
    assert person["bbox"] == [295, 15, 545, 595]
    assert person["area"] == 545 * 595
    assert person["iscrowd"] == 0
    assert person["segmentation"] == []
    assert person["bbox_score"] == 1
    assert len(person["keypoints"]) == 51
    assert len(person["keypoint_scores"]) == 17


def test_the_joints_lie_where_the_person_stands(plain):
    x, y, _ = np.reshape(plain["annotations"][0]["keypoints"], (17, 3)).T
    nose, ankles, wrists = 0, [15, 16], [9, 10]
    assert ((x > 230) & (x < 905) & (y > -60) & (y < 690)).all()
    assert y[nose] < y[ankles].min()
    assert np.ptp(x[wrists]) > 250  # the arms are spread


@pytest.mark.parametrize(
    "kind",
    [*PICTURE_TYPES, "IMAGE/JPEG; a=b"],
)
def test_what_the_bytes_are_is_found_from_the_bytes(client, t_pose, plain, kind):
    answer = client.post("/v1/pose", params={"boxes": T_POSE}, content=t_pose, headers={"Content-Type": kind})
    assert answer.json() == plain


def test_a_form_gives_the_same_numbers_as_a_picture(client, t_pose, plain):
    for boxes in (T_POSE, json.dumps(T_POSE_BOXES), json.dumps([T_POSE_BOXES])):
        answer = client.post("/v1/pose", files={"image": ("a.jpg", t_pose)}, data={"boxes": boxes})
        assert answer.json()["annotations"] == plain["annotations"]
        assert answer.json()["images"][0]["file_name"] == "a.jpg"


@pytest.mark.parametrize("name", ['name="image"', "name=image", 'name="image"; filename=""'])
def test_a_picture_of_a_form_needs_no_file_name(client, t_pose, plain, name):
    form = b"--x\r\nContent-Disposition: form-data; " + name.encode() + b"\r\n\r\n" + t_pose + b"\r\n--x"
    form += b'\r\nContent-Disposition: form-data; name="boxes"\r\n\r\n' + T_POSE.encode() + b"\r\n--x--\r\n"
    answer = client.post("/v1/pose", content=form, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert answer.json() == plain


@pytest.mark.parametrize(
    "name",
    [b"; filename=\"=?utf-8?B?w6QiLmpwZw==?=\"; filename*=utf-8''%C3%A4%22.jpg", b"; FILENAME*=UTF-8'de'%C3%A4%22.jpg"],
)
def test_a_file_name_of_a_form_may_be_percent_encoded(client, t_pose, name):
    form = b"--x\r\nContent-Disposition: form-data; name=image" + name + b"\r\n\r\n" + t_pose + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = client.post("/v1/pose", params={"boxes": ""}, content=form, headers=kind)
    assert answer.json()["images"][0]["file_name"] == 'ä".jpg'


@pytest.mark.parametrize("charset", ["UTF-8", "utf8", "US-ASCII", "ISO-8859-1"])
def test_a_form_may_name_the_charset_that_its_client_names_by_itself(client, t_pose, charset):
    """As Apache's HttpClient 5.1 does."""
    head = '--x\r\nContent-Disposition: form-data; name="image"; filename="ü.jpg"\r\n\r\n'
    part = head.encode("latin-1" if charset == "ISO-8859-1" else "utf-8") + t_pose + b"\r\n--x--\r\n"
    kind = {"Content-Type": f"multipart/form-data; charset={charset}; boundary=x"}
    answer = client.post("/v1/pose?boxes=", content=part, headers=kind)
    assert answer.status_code == 200, answer.text
    assert answer.json()["images"][0]["file_name"] == "ü.jpg"


def test_boxes_of_a_form_may_be_repeated(client, t_pose):
    fields = [("image", ("a.jpg", t_pose)), *(("boxes", (None, T_POSE)) for _ in range(40))]
    assert len(client.post("/v1/pose", files=fields).json()["annotations"]) == 40


def test_options_of_a_form_may_stand_in_the_query(client, t_pose, plain):
    answer = client.post("/v1/pose", params={"boxes": T_POSE}, files={"image": t_pose})
    assert answer.json()["annotations"] == plain["annotations"]


def test_json_gives_the_same_numbers_as_a_picture(client, t_pose, plain):
    for data in (
        text(t_pose),
        "data:image/jpeg;base64," + text(t_pose),
        "DATA:IMAGE/JPEG;BASE64," + base64.encodebytes(t_pose).decode(),  # in lines
    ):
        answer = post_json(client, [{"data": data, "boxes": T_POSE_BOXES}])
        assert answer.json() == plain


def test_options_of_json_may_stand_in_the_query(client, t_pose):
    body = {"images": [{"data": text(t_pose), "boxes": T_POSE_BOXES}]}
    assert isinstance(client.post("/v1/pose", params={"format": "results"}, json=body).json(), list)


def test_boxes_that_are_repeated_have_the_room_of_one_field(client, t_pose):
    form = {"boxes": ["12;" * 300_000, "12;" * 300_000]}
    answer = client.post("/v1/pose", files={"image": t_pose}, data=form)
    assert (answer.status_code, answer.json()["type"]) == (400, "/problems/malformed_body")
    assert answer.json()["detail"] == "The fields boxes of the form have over 1,048,576 bytes together."


def test_a_box_and_its_area_are_told_in_the_same_decimals(client, two_women):
    (person,) = post_picture(client, two_women, boxes="-0.001,200.004,225.126,640.999").json()["annotations"]
    assert json.dumps(person["bbox"]) == "[0.0, 200.0, 225.13, 641.0]"
    assert person["area"] == pytest.approx(225.13 * 641, abs=0.005)


def test_boxes_of_a_query_may_be_joined_repeated_or_json(client, two_women):
    joined = post_picture(client, two_women, boxes=TWO_WOMEN).json()
    assert len(joined["annotations"]) == 2
    assert post_picture(client, two_women, boxes=TWO_WOMEN.split(";")).json() == joined
    assert post_picture(client, two_women, boxes=json.dumps(TWO_WOMEN_BOXES)).json() == joined


def test_pictures_and_people_keep_their_order_ids_and_names(client, t_pose, two_women):
    pictures = [
        {"data": text(two_women), "id": 70, "file_name": "b.jpg", "boxes": TWO_WOMEN_BOXES[::-1]},
        {"data": text(t_pose), "id": 7, "file_name": "ä/a.jpg", "boxes": T_POSE_BOXES},
    ]
    answer = post_json(client, pictures).json()
    assert [(i["id"], i["file_name"], i["width"]) for i in answer["images"]] == [(70, "b.jpg", 1280), (7, "ä/a.jpg", 1080)]
    assert [(a["id"], a["image_id"], a["bbox"]) for a in answer["annotations"]] == [
        (1, 70, [620, 20, 655, 825]),
        (2, 70, [140, 200, 225, 640]),
        (3, 7, [295, 15, 545, 595]),
    ]


def test_a_form_takes_several_pictures_with_boxes_for_each(client, t_pose, two_women, plain):
    answer = client.post(
        "/v1/pose",
        files=[("image", ("b.jpg", two_women)), ("image", ("a.jpg", t_pose)), ("image", ("c.jpg", t_pose))],
        data={"boxes": json.dumps([TWO_WOMEN_BOXES, T_POSE_BOXES, []])},
    ).json()
    assert [image["id"] for image in answer["images"]] == [0, 1, 2]
    assert [image["file_name"] for image in answer["images"]] == ["b.jpg", "a.jpg", "c.jpg"]
    assert [person["image_id"] for person in answer["annotations"]] == [0, 0, 1]
    assert answer["annotations"][2]["keypoints"] == plain["annotations"][0]["keypoints"]


def test_a_person_is_the_same_alone_and_among_others(client, t_pose, two_women):
    together = post_json(
        client, [{"data": text(two_women), "boxes": TWO_WOMEN_BOXES}, {"data": text(t_pose), "boxes": T_POSE_BOXES * 6}]
    ).json()["annotations"]
    alone = post_picture(client, two_women, boxes=TWO_WOMEN.split(";")[1]).json()["annotations"]
    np.testing.assert_allclose(together[1]["keypoints"], alone[0]["keypoints"], atol=0.011)
    for person in together[3:]:
        np.testing.assert_allclose(person["keypoints"], together[2]["keypoints"], atol=0.011)


# Formats


def test_coco_loads_as_a_data_set(client, two_women, tmp_path):
    file = tmp_path / "people.json"
    file.write_bytes(post_picture(client, two_women, boxes=TWO_WOMEN).content)
    with contextlib.redirect_stdout(None):
        data_set = COCO(str(file))
    (person,) = data_set.loadCats(data_set.getCatIds(["person"]))
    assert (len(person["keypoints"]), len(person["skeleton"])) == (17, 19)
    assert [data_set.anns[i]["bbox"] for i in data_set.getAnnIds(imgIds=[0])] == TWO_WOMEN_BOXES


def test_results_load_beside_a_data_set_and_are_evaluated(client, two_women, tmp_path):
    file = tmp_path / "people.json"
    file.write_bytes(post_picture(client, two_women, boxes=TWO_WOMEN, keypoint_threshold=0).content)
    results = post_picture(client, two_women, boxes=TWO_WOMEN, format="results").json()
    with contextlib.redirect_stdout(None):
        data_set = COCO(str(file))
        evaluation = COCOeval(data_set, data_set.loadRes(results), "keypoints")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_results_hold_the_same_people_as_coco(client, two_women):
    people = post_picture(client, two_women, boxes=TWO_WOMEN).json()["annotations"]
    results = post_picture(client, two_women, boxes=TWO_WOMEN, format="results").json()
    for person, result in zip(people, results, strict=True):
        joints, found = np.reshape(person["keypoints"], (17, 3)), np.reshape(result["keypoints"], (17, 3))
        assert result.keys() == {"image_id", "category_id", "keypoints", "score", "bbox"}
        assert (found[:, :2] == joints[:, :2]).all()
        assert found[:, 2].tolist() == person["keypoint_scores"]
        assert (result["image_id"], result["category_id"]) == (person["image_id"], 1)
        assert (result["score"], result["bbox"]) == (person["score"], person["bbox"])


def test_a_persons_score_is_the_mean_of_the_joints_above_a_fifth(scene):
    for person in scene:
        scores = np.array(person["keypoint_scores"])
        # A joint told as 0.2 is above it or not: scores are told in four decimals, and counted by all.
        means = {scores[counted].mean() for counted in (scores > 0.2, scores >= 0.2)}
        assert any(person["score"] == pytest.approx(mean, abs=2e-4) for mean in means)
    assert (scores <= 0.2).any()  # of the background


def test_places_have_two_decimals_and_scores_four(plain):
    person = plain["annotations"][0]
    assert np.round(person["keypoints"], 2).tolist() == person["keypoints"]
    assert np.round(person["keypoint_scores"], 4).tolist() == person["keypoint_scores"]


def test_info_names_the_model_its_version_and_the_services(client, plain):
    from app import __version__

    (model,) = [model for model in client.get("/v1/models").json()["models"] if model["default"] and model["kind"] == "pose"]
    info = plain["info"]
    assert (info["model"], info["model_version"], info["service_version"]) == (model["name"], model["version"], __version__)


# Options


def test_keypoint_threshold_moves_visibility_but_no_place_and_no_score(client, t_pose, plain):
    default = plain["annotations"][0]
    scores = np.array(default["keypoint_scores"])
    for threshold in (0, float(np.median(scores)), 1):
        (person,) = post_picture(client, t_pose, boxes=T_POSE, keypoint_threshold=threshold).json()["annotations"]
        joints = np.reshape(person["keypoints"], (17, 3))
        assert (joints[:, :2] == np.reshape(default["keypoints"], (17, 3))[:, :2]).all()
        assert person["keypoint_scores"] == default["keypoint_scores"]
        assert set(joints[:, 2]) <= {0, 2}
        assert (joints[:, 2] == 2).sum() == person["num_keypoints"] == (scores >= threshold).sum()


def test_keypoint_threshold_is_the_models_unless_it_is_given_and_may_be_zero(client, two_women, scene):
    models = client.get("/v1/models").json()["models"]
    default = next(model["keypoint_threshold"] for model in models if model["default"] and model["kind"] == "pose")
    every = post_picture(client, two_women, boxes=f"{TWO_WOMEN};{BACKGROUND}", keypoint_threshold=0).json()["annotations"]
    for people, threshold in ((scene, default), (every, 0)):
        scores = np.array([person["keypoint_scores"] for person in people])
        visible = np.reshape([person["keypoints"] for person in people], (3, 17, 3))[:, :, 2]
        assert (visible == np.where(scores >= threshold, 2, 0)).all()
        assert scores.min() < default < scores.max()


def test_flip_test_moves_places_a_little(client, t_pose, plain):
    flipped = post_picture(client, t_pose, boxes=T_POSE, flip_test=True).json()["annotations"][0]
    before, after = (np.reshape(p["keypoints"], (17, 3))[:, :2] for p in (plain["annotations"][0], flipped))
    moved = np.linalg.norm(after - before, axis=1)
    assert moved.max() > 0
    assert np.median(moved) < 20


def test_an_empty_list_of_boxes_means_nobody(client, t_pose):
    for answer in (
        post_picture(client, t_pose, boxes=""),
        post_picture(client, t_pose, boxes="[]"),
        post_json(client, [{"data": text(t_pose), "boxes": []}]),
        client.post("/v1/pose", files={"image": t_pose}, data={"boxes": "[[]]"}),
    ):
        assert answer.status_code == 200
        assert answer.json()["annotations"] == []
        assert answer.json()["images"][0]["width"] == 1080
    assert post_picture(client, t_pose, boxes="", format="results").json() == []


def test_a_model_is_named_with_and_without_its_version(client, t_pose, plain):
    info = plain["info"]
    for model in (info["model"], f"{info['model']}/{info['model_version']}"):
        assert post_picture(client, t_pose, boxes=T_POSE, model=model).json() == plain


def test_a_box_may_reach_over_the_picture(client, t_pose):
    (person,) = post_picture(client, t_pose, boxes="-300,-300,2000,2000").json()["annotations"]
    assert person["bbox"] == [-300, -300, 2000, 2000]


# A picture back


@pytest.mark.parametrize(("accept", "magic"), [("image/jpeg", b"\xff\xd8\xff"), ("image/png", b"\x89PNG")])
def test_accept_asks_for_the_picture_with_skeletons_drawn(client, t_pose, accept, magic):
    model = client.get("/v1/models/lpn50").json()
    (person,) = post_picture(client, t_pose, boxes=T_POSE).json()["annotations"]
    people = np.reshape(person["keypoints"], (1, 17, 3))
    people[0, :, 2] = person["keypoint_scores"]
    scores = np.unique(person["keypoint_scores"])
    threshold = float(scores[len(scores) // 2 - 1 :][:2].mean())  # so that half of the joints are drawn, and none is at it
    original = cv2.imdecode(np.frombuffer(t_pose, np.uint8), cv2.IMREAD_COLOR)
    expected = [original.copy(), original.copy()]
    for picture, side in zip(expected, (-0.005, 0.005), strict=True):  # places in JSON are rounded, perhaps over half a pixel
        draw_people(picture, np.add(people, [side, side, 0]), model["skeleton"], model["keypoints"], threshold)
    answer = post_picture(client, t_pose, accept, boxes=T_POSE, keypoint_threshold=threshold)
    assert answer.headers["content-type"] == accept
    assert answer.content.startswith(magic)
    drawn = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR)
    assert (cv2.absdiff(drawn, original).max(axis=2) > 60).sum() > 500
    unlike = [cv2.absdiff(drawn, picture).max(axis=2) > 60 for picture in expected]
    assert (unlike[0] & unlike[1]).mean() < 1e-4


def test_a_drawn_picture_is_upright(client, t_pose):
    exif = Image.Exif()
    exif[0x112] = 8
    with Image.open(io.BytesIO(t_pose)) as picture, io.BytesIO() as file:
        picture.save(file, "JPEG", exif=exif)
        answer = post_picture(client, file.getvalue(), "image/png", boxes="100,100,400,800")
    with Image.open(io.BytesIO(answer.content)) as drawn:
        assert drawn.size == (720, 1080)


def test_accept_is_weighed_as_the_client_weighs_it(client, t_pose):
    for accept, kind in (
        ("*/*", "application/json"),
        ("", "application/json"),
        ("application/*", "application/json"),
        ("image/*", "image/jpeg"),
        ("image/png, application/json;q=0.5", "image/png"),
        ("image/png;q=0.5, application/json", "application/json"),
        ("text/html, */*;q=0.1", "application/json"),
    ):
        assert post_picture(client, t_pose, accept, boxes=T_POSE).headers["content-type"] == kind


def test_accept_may_be_written_in_several_lines(client, t_pose):
    for lines, kind in ((("text/html", "image/png"), "image/png"), (("image/png;q=0.5", "*/*"), "application/json")):
        headers = [("Content-Type", "image/jpeg"), *(("Accept", line) for line in lines)]
        answer = client.post("/v1/pose", params={"boxes": T_POSE}, content=t_pose, headers=headers)
        assert answer.headers["content-type"] == kind


def test_other_kinds_of_answer_are_not_acceptable(client, t_pose):
    for accept in ("text/html", "image/webp", "application/json;q=0", "nonsense"):
        answer = post_picture(client, t_pose, accept, boxes=T_POSE)
        assert (answer.status_code, answer.json()["type"]) == (406, "/problems/not_acceptable"), accept


@pytest.mark.parametrize("accept", ["image/jpeg, application/json;q=0.5", "image/*, */*;q=0.8"])
def test_several_pictures_are_answered_in_json_where_that_is_taken_too(client, t_pose, accept):
    files = [("image", t_pose), ("image", t_pose)]
    answer = client.post("/v1/pose", files=files, data={"boxes": "[[],[]]"}, headers={"Accept": accept})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")


def test_several_pictures_cannot_be_drawn(client, t_pose):
    answer = client.post(
        "/v1/pose",
        files=[("image", t_pose), ("image", t_pose)],
        data={"boxes": "[[],[]]"},
        headers={"Accept": "image/jpeg"},
    )
    assert (answer.status_code, answer.json()["type"]) == (406, "/problems/not_acceptable")
