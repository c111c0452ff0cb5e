"""The client: what it gives of a real service's answers, what it asks again, and what it raises."""

import asyncio
import json
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import httpx
import numpy as np
import pytest

from app import client as client_module
from app.client import AsyncPoseClient, NoAnswer, PoseClient, Refused
from tests.conftest import PHOTOS, TWO_WOMEN_BOXES

PHOTO = PHOTOS / "two_women_outdoors_cc0.jpg"
NOBODY = np.full((64, 96, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def pose_client(service):
    with PoseClient(str(service.client.base_url)) as client:
        yield client


def test_the_people_of_a_photo(pose_client, service, two_women):
    pose = pose_client.estimate(PHOTO)
    data = service.client.post("/v1/pose", content=two_women, headers={"Content-Type": "image/jpeg"}).json()
    assert data["images"][0].pop("file_name") is None
    assert pose.coco["images"][0].pop("file_name") == PHOTO.name
    assert pose.coco == data
    assert (pose.width, pose.height) == (1280, 845)
    people = data["annotations"]
    assert len(people) == 2
    for row, person in enumerate(people):
        joints = np.reshape(person["keypoints"], (17, 3))
        np.testing.assert_array_equal(pose.keypoints[row, :, :2], joints[:, :2])
        np.testing.assert_array_equal(pose.keypoints[row, :, 2], person["keypoint_scores"])
        np.testing.assert_array_equal(pose.visible[row], joints[:, 2] == 2)
        np.testing.assert_array_equal(pose.errors[row], person["keypoint_errors"])
        np.testing.assert_array_equal(pose.boxes[row], person["bbox"])
        assert (pose.scores[row], pose.box_scores[row]) == (person["score"], person["bbox_score"])
    assert pose.names[0] == "nose"
    assert pose.skeleton[0] == (16, 14)


def test_a_path_bytes_and_pixels_are_pictures(pose_client):
    of_bytes, of_path = (
        pose_client.estimate(picture, TWO_WOMEN_BOXES) for picture in (bytearray(PHOTO.read_bytes()), str(PHOTO))
    )
    assert of_bytes.coco["annotations"] == of_path.coco["annotations"]
    pixels = cv2.imread(str(PHOTO))
    of_pixels, of_png = (
        pose_client.estimate(picture, TWO_WOMEN_BOXES) for picture in (pixels, cv2.imencode(".png", pixels)[1].tobytes())
    )
    assert of_pixels.coco == of_png.coco
    # A large JPEG is decoded smaller where its people allow.
    assert np.median(np.abs(of_pixels.keypoints - of_path.keypoints)) < 1
    grey = pose_client.estimate(np.ascontiguousarray(pixels[..., 1]), TWO_WOMEN_BOXES)
    assert grey.keypoints.shape == (2, 17, 3)


@pytest.mark.parametrize("boxes", [TWO_WOMEN_BOXES, np.array(TWO_WOMEN_BOXES, np.float32)])
def test_boxes_are_the_people(pose_client, boxes):
    np.testing.assert_array_equal(pose_client.estimate(PHOTO, boxes).boxes, TWO_WOMEN_BOXES)


def test_thousands_of_boxes_reach_the_service(pose_client):
    with pytest.raises(Refused, match="holds 4000 boxes; at most 100 a picture are taken") as refused:
        pose_client.estimate(PHOTO, np.tile(TWO_WOMEN_BOXES, (2000, 1)) + 1 / 3)
    assert refused.value.code == "too_many_boxes"


def test_boxes_that_are_no_numbers_and_options_that_there_are_not(pose_client):
    with pytest.raises(ValueError, match="boxes are finite numbers; box 1 is not"):
        pose_client.estimate(PHOTO, [[0, 0, 9, 9], [0, 0, float("nan"), 9]])
    with pytest.raises(ValueError, match="there is no option 'format'; there are model, "):
        pose_client.estimate(PHOTO, format="results")


@pytest.mark.parametrize("boxes", [[1, 2, 3, 4], [[1, 2, 3]], [[[1, 2, 3, 4]]], [{"x": 1}], [[1, 2, 3, 4], [1]], ["1,2,3,4"]])
def test_boxes_of_another_form(pose_client, boxes):
    with pytest.raises(ValueError, match=r"boxes are \[N, 4\], x, y, width, height of each[;:] "):
        pose_client.estimate(PHOTO, boxes)


def test_a_picture_has_the_name_of_its_file_with_boxes_and_without(pose_client):
    for boxes in (TWO_WOMEN_BOXES, None):
        assert pose_client.estimate(PHOTO, boxes).coco["images"][0]["file_name"] == PHOTO.name
        assert pose_client.estimate(PHOTO.read_bytes(), boxes).coco["images"][0]["file_name"] is None


IN_TWO_PROCESSES = """
import os, sys
import numpy as np
from app.client import PoseClient

client = PoseClient(sys.argv[1], retries=0)
client.models()  # a connection is kept
children = []
for width in (101, 202):
    if (child := os.fork()) == 0:
        right = all(client.estimate(np.zeros((64, width, 3), np.uint8), []).width == width for _ in range(20))
        os._exit(not right)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def test_processes_that_are_forked_get_their_own_answers(service):
    command = [sys.executable, "-W", "ignore", "-c", IN_TWO_PROCESSES, str(service.client.base_url)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1080"),
        ("HTTP_PROXY", "socks://127.0.0.1:1080"),
        ("HTTPS_PROXY", "127.0.0.1:bad"),
        ("no_proxy", "[::1]"),
    ],
)
def test_a_proxy_that_cannot_be_used(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    for kind in (PoseClient, AsyncPoseClient):
        with pytest.raises(ValueError, match="what HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or NO_PROXY says cannot be used: "):
            kind("http://localhost:8000")


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_certificates_that_cannot_be_read(content, monkeypatch, tmp_path):
    file = tmp_path / "ca.pem"
    if content:
        file.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    for kind in (PoseClient, AsyncPoseClient):
        with pytest.raises(ValueError, match="the certificates that SSL_CERT_FILE or SSL_CERT_DIR names cannot be read: "):
            kind("http://localhost:8000")


def test_options_reach_the_service(pose_client):
    pose = pose_client.estimate(PHOTO, max_people=1, keypoint_threshold=1.0, flip_test=True)
    assert pose.keypoints.shape == (1, 17, 3)
    assert not pose.visible.any()
    assert (pose.keypoints[..., 2] > 0).all()
    with pytest.raises(Refused, match=r"query\.max_people is 1000; at most 100 is taken") as refused:
        pose_client.estimate(PHOTO, max_people=1000)
    assert refused.value.errors == [{"loc": ["query", "max_people"], "msg": "is 1000; at most 100 is taken"}]


@pytest.mark.parametrize("boxes", [None, []])
def test_nobody(pose_client, boxes):
    pose = pose_client.estimate(NOBODY, boxes)
    shapes = pose.boxes.shape, pose.scores.shape, pose.keypoints.shape, pose.visible.shape, pose.errors.shape
    assert shapes == ((0, 4), (0,), (0, 17, 3), (0, 17), (0, 17))


def test_models(pose_client, service):
    assert pose_client.models() == service.client.get("/v1/models").json()["models"]


def test_a_refusal_tells_what_the_service_told(pose_client, service):
    with pytest.raises(Refused) as refused:
        pose_client.estimate(b"no picture")
    assert (refused.value.status, refused.value.code) == (422, "invalid_image")
    service.wait_until(lambda: refused.value.request_id in service.log)


def test_errors_come_through_from_another_process():
    refused = Refused(422, "invalid_box", "boxes.0 has no area", "r-1", [{"loc": ["boxes", 0], "msg": "has no area"}])
    copy = pickle.loads(pickle.dumps(refused))
    assert (type(copy), str(copy), vars(copy)) == (Refused, str(refused), vars(refused))
    assert str(pickle.loads(pickle.dumps(NoAnswer("nobody there")))) == "nobody there"


def test_a_key(start_service):
    url = str(start_service(api_keys="sesame").client.base_url)
    with PoseClient(url) as stranger, pytest.raises(Refused) as refused:
        stranger.estimate(NOBODY)
    assert refused.value.code == "unauthorized"
    with PoseClient(url, key="sesame") as known:
        assert len(known.estimate(NOBODY).scores) == 0
    with pytest.raises(ValueError, match="the key holds characters"):
        PoseClient(url, key="sesame\r")


def test_a_service_that_warms_up_is_waited_for(start_service):
    service = start_service(wait=False)
    with PoseClient(str(service.client.base_url), retries=60) as client:
        assert len(client.estimate(NOBODY).scores) == 0


def test_a_full_queue_is_asked_again(start_service):
    url = str(start_service(queue_crops=2).client.base_url)
    with PoseClient(url, retries=100) as client, ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: len(client.estimate(PHOTO, TWO_WOMEN_BOXES).scores), range(8)))
    assert found == [2] * 8
    with PoseClient(url, retries=0) as hasty, ThreadPoolExecutor(8) as threads:
        errors = [job.exception() for job in [threads.submit(hasty.estimate, PHOTO, TWO_WOMEN_BOXES) for _ in range(8)]]
    assert {error.code for error in errors if error} == {"queue_full"}


def test_many_at_once(service):
    async def ask():
        async with AsyncPoseClient(str(service.client.base_url)) as client:
            poses = await asyncio.gather(*(client.estimate(PHOTO, TWO_WOMEN_BOXES) for _ in range(8)))
            return poses, await client.models()

    poses, models = asyncio.run(ask())
    assert [pose.coco["annotations"] for pose in poses] == [poses[0].coco["annotations"]] * 8
    assert models[0]["name"] == "lpn50"


def test_async_asks_again_and_sends_so_many_at_once():
    at_work, most, refused = 0, 0, [httpx.Response(503, headers={"Retry-After": "0"})]

    async def answer(_):
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await asyncio.sleep(0.01)
        at_work -= 1
        return refused.pop() if refused else httpx.Response(404)

    async def ask():
        async with AsyncPoseClient(transport=httpx.MockTransport(answer), at_once=3) as client:
            return await asyncio.gather(*(client.estimate(b"x") for _ in range(9)), return_exceptions=True)

    assert [error.status for error in asyncio.run(ask())] == [404] * 9
    assert most == 3


@pytest.mark.parametrize("named", ["60", "86400", "9" * 400])
def test_no_wait_that_a_service_names_is_longer_than_a_minute(named):
    assert 60 <= client_module._wait_after(httpx.Response(503, headers={"Retry-After": named}), 0, 4) <= 60 * 1.3


def broken(error, times):
    """A network that breaks so many requests off before it says that nobody is there; and what it was asked."""
    asked = []

    def answer(request):
        asked.append(request)
        if len(asked) <= times:
            raise error
        return httpx.Response(404, text="nothing here")

    return httpx.MockTransport(answer), asked


@pytest.mark.parametrize(
    "error", [httpx.ReadError("reset"), httpx.RemoteProtocolError("gone"), httpx.ConnectError("refused")]
)
def test_a_broken_connection_is_asked_again(error):
    transport, asked = broken(error, 2)
    with (
        PoseClient(transport=transport) as client,
        pytest.raises(Refused, match="http://localhost:8000 answers 404 Not Found"),
    ):
        client.estimate(NOBODY)
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("error", "times"), [(httpx.ReadTimeout("slow"), 1), (httpx.DecodingError("gzip"), 1), (httpx.ConnectError("refused"), 3)]
)
def test_who_does_not_answer_is_not_asked_for_ever(error, times):
    transport, asked = broken(error, 100)
    with (
        PoseClient(transport=transport, retries=2) as client,
        pytest.raises(NoAnswer, match=f"http://localhost:8000 gives no answer: {error}"),
    ):
        client.estimate(NOBODY)
    assert len(asked) == times


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b'{"title": "Bad Gateway"}',
        b"[]",
        b'{"type": 7, "detail": "x"}',
        b'{"type": "about:blank", "detail": "x"}',
        b'{"type": "https://gateway.example/errors/unauthorized", "detail": "x"}',
        b'{"type": "/problems/internal_error", "detail": null}',
        b"[" * 100_000,
    ],
)
def test_a_problem_of_something_before_the_service(content):
    headers = {"Content-Type": "application/problem+json"}
    transport = httpx.MockTransport(lambda _: httpx.Response(502, content=content, headers=headers))
    with PoseClient(transport=transport) as client, pytest.raises(Refused, match="answers 502 Bad Gateway") as refused:
        client.estimate(NOBODY)
    assert refused.value.code == ""


@pytest.mark.parametrize(("named", "least"), [("0", 0), ("1", 1), ("Wed, 21 Oct 2026 07:28:00 GMT", 0), ("later", 0)])
def test_the_wait_that_is_named_is_waited(named, least):
    answers = [httpx.Response(429, headers={"Retry-After": named}), httpx.Response(404)]
    started = time.monotonic()
    with PoseClient(transport=httpx.MockTransport(lambda _: answers.pop(0))) as client, pytest.raises(Refused, match="404"):
        client.estimate(NOBODY)
    assert least <= time.monotonic() - started < least + 5


# a score that is no double
HUGE = (
    b'{"info": {"model": "m", "model_version": "1"}, "images": [{"width": 9, "height": 9}], "categories": '
    b'[{"keypoints": [], "skeleton": []}], "annotations": '
    b'[{"keypoints": [], "keypoint_scores": [], "keypoint_errors": [], "bbox": [1, 1, 2, 2], "bbox_score": 1, "score": 1'
    + b"0" * 400
    + b"}]}"
)


@pytest.mark.parametrize(
    "content", [b"<html>", b"[]", b"{}", b'{"images": [1, 2]}', b'{"models": [{}]}', b"[" * 100_000, HUGE]
)
def test_an_answer_of_another_service(content):
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=content))
    with PoseClient(transport=transport) as client:
        with pytest.raises(NoAnswer, match="http://localhost:8000 is no pose service"):
            client.estimate(NOBODY)
        with pytest.raises(NoAnswer, match="http://localhost:8000 is no pose service"):
            client.models()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda answer: answer.pop("info"),
        lambda answer: answer.update(info=None),
        lambda answer: answer["info"].update(model=7),
        lambda answer: answer["categories"][0]["skeleton"].append([1, 18]),
        lambda answer: answer["categories"][0]["skeleton"].append([1.5, 2]),
        lambda answer: answer["categories"][0].update(keypoints=list(range(17))),
        lambda answer: answer["annotations"][0]["keypoints"].__setitem__(0, float("nan")),
    ],
)
def test_an_answer_that_nobody_could_draw(pose_client, t_pose, spoil):
    answer = pose_client.estimate(t_pose, max_people=1).coco
    spoil(answer)
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=json.dumps(answer)))
    with PoseClient(transport=transport) as client, pytest.raises(NoAnswer, match="is no pose service"):
        client.estimate(t_pose)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 4), np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros(4, np.uint8)],
)
def test_pixels_of_another_kind(pose_client, pixels):
    with pytest.raises(ValueError, match=r"pixels are uint8 \[H, W\] or \[H, W, 3\]; these are"):
        pose_client.estimate(pixels)
    with pytest.raises(ValueError, match=r"None is no picture; cv2\.imread gives it"):
        pose_client.estimate(None)
    with pytest.raises(ValueError, match="these are float32"):
        pose_client.estimate(np.zeros((4, 4, 3), np.float32))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "http://", "http://localhost:port", ""])
def test_no_address(url):
    with pytest.raises(ValueError, match="is no address of a service"):
        PoseClient(url)
