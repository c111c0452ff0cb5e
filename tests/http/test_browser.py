"""The pages in a real browser, by the DevTools protocol: what a person does on them and what is then seen."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

PHOTOS = Path(__file__).parents[1] / "data/photos"
# Chrome first: Ubuntu's Chromium is a snap, which sees no files of ours.
BROWSER = next(filter(None, map(shutil.which, ("google-chrome", "chromium", "chromium-browser"))), None)
SWITCHES = [
    "--headless",
    "--no-sandbox",  # which root has none of, in a container
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--remote-debugging-port=0",
    "--window-size=1240,870",
    "--use-fake-ui-for-media-stream",  # the camera is granted
    "--use-fake-device-for-media-stream",
]

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is on the PATH")


class Page:
    """A page of a browser: what its scripts see, and what they throw."""

    def __init__(self, connection: ClientConnection) -> None:
        """Take the page that the connection is of."""
        self.connection = connection
        self.count = 0
        self.errors: list[str] = []
        self.command("Page.enable")
        self.command("Runtime.enable")

    def command(self, method: str, **arguments: object) -> dict[str, Any]:
        """Send a command of the protocol, and wait until it is done."""
        self.count += 1
        self.connection.send(json.dumps({"id": self.count, "method": method, "params": arguments}))
        while (message := json.loads(self.connection.recv(60))).get("id") != self.count:
            if message["method"] == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(message["params"]["exceptionDetails"]))
        assert "error" not in message, message
        return message["result"]

    def open(self, url: str) -> None:
        """Load another page, as if nothing had been open."""
        self.command("Page.navigate", url="about:blank")
        self.command("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def tell(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        result = self.command(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> None:
        """Look again and again until the expression is true."""
        until = time.monotonic() + seconds
        while not self.tell(f"Boolean({expression})"):
            assert time.monotonic() < until, (
                f"{expression}: not within {seconds} s. The page: {self.tell('document.body.innerText')}"
            )
            time.sleep(0.05)

    def text(self, name: str) -> str:
        """The text of the element of this name."""
        return self.tell(f"document.getElementById('{name}').textContent")

    def hidden(self, name: str) -> bool:
        """Whether nothing is seen of the element of this name."""
        return not self.tell(f"document.getElementById('{name}').checkVisibility()")

    def click(self, name: str) -> None:
        """Press the button of this name."""
        self.tell(f"document.getElementById('{name}').click()")

    def write(self, name: str, text: str) -> None:
        """Write into a field, and leave it."""
        self.tell(f"document.getElementById('{name}').value = {json.dumps(text)}")
        for event in ("input", "change"):
            self.tell(f"document.getElementById('{name}').dispatchEvent(new Event('{event}'))")

    def choose(self, file: Path) -> None:
        """Choose a file as the photo."""
        chosen = self.command("Runtime.evaluate", expression="document.getElementById('file')")["result"]
        self.command("DOM.setFileInputFiles", files=[str(file)], objectId=chosen["objectId"])

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drag the mouse from one place of the photo to another, in its pixels."""
        canvas = "document.getElementById('canvas').getBoundingClientRect()"
        left, top, width = self.tell(f"(({{left, top, width}}) => [left, top, width])({canvas})")
        scale = width / self.answer()["images"][0]["width"]
        places = [{"x": left + (x + 0.5) * scale, "y": top + (y + 0.5) * scale} for x, y in (start, end)]
        for kind, place, buttons in (("Pressed", places[0], 1), ("Moved", places[1], 1), ("Released", places[1], 0)):
            self.command(
                "Input.dispatchMouseEvent", type=f"mouse{kind}", button="left", buttons=buttons, clickCount=1, **place
            )

    def answer(self) -> dict[str, Any]:
        """The answer that the page shows."""
        return json.loads(self.text("json"))

    def picture(self) -> np.ndarray:
        """The canvas, BGR."""
        url = self.tell("document.getElementById('canvas').toDataURL('image/png')")
        return cv2.imdecode(np.frombuffer(base64.b64decode(url.partition(",")[2]), np.uint8), cv2.IMREAD_COLOR)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, t_pose: bytes) -> Iterator[int]:
    """A browser whose camera sees the T-pose, as the port of its debugger."""
    folder = tmp_path_factory.mktemp("browser")
    frame = cv2.resize(cv2.imdecode(np.frombuffer(t_pose, np.uint8), cv2.IMREAD_COLOR), (960, 720))
    (folder / "camera.mjpeg").write_bytes(cv2.imencode(".jpg", frame)[1].tobytes())
    switches = [
        *SWITCHES,
        f"--user-data-dir={folder / 'profile'}",
        f"--use-file-for-fake-video-capture={folder / 'camera.mjpeg'}",
    ]
    environment = os.environ | {"HOME": str(folder)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([BROWSER, *switches, "about:blank"], env=environment, stdout=log, stderr=log)
    try:
        told = folder / "profile/DevToolsActivePort"
        until = time.monotonic() + 60
        while not (told.exists() and told.read_text().count("\n")):
            if process.poll() is not None or time.monotonic() > until:  # as a snap's
                pytest.skip(f"{BROWSER} does not start: {(folder / 'log').read_text()[-500:]}")
            time.sleep(0.05)
        yield int(told.read_text().split("\n")[0])
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


@pytest.fixture
def page(browser: int) -> Iterator[Page]:
    """A new page, whose scripts must not throw anything."""
    target = httpx.put(f"http://127.0.0.1:{browser}/json/new?about:blank", timeout=60).raise_for_status().json()
    try:
        with connect(target["webSocketDebuggerUrl"], max_size=None, open_timeout=60, ping_interval=None) as connection:
            page = Page(connection)
            yield page
            assert page.errors == []
    finally:
        httpx.get(f"http://127.0.0.1:{browser}/json/close/{target['id']}", timeout=60)


PEOPLE = "/^\\d+ (person|people) by /.test(document.getElementById('status').textContent)"
PROBLEM = "document.getElementById('status').classList.contains('problem')"


def joints_drawn(picture: np.ndarray, answer: dict[str, Any]) -> list[bool]:
    """Whether each sure wrist and ankle lies on a dot in the colour of its side."""
    (image,) = answer["images"]
    scale = picture.shape[1] / image["width"]
    drawn = []
    for person in answer["annotations"]:
        places = np.array(person["keypoints"]).reshape(-1, 3)[:, :2]
        for name, place, score in zip(answer["categories"][0]["keypoints"], places, person["keypoint_scores"], strict=True):
            if score > 0.5 and name.endswith(("wrist", "ankle")):
                column, row = np.round((place + 0.5) * scale).astype(int)
                blue, _, red = picture[row, column].astype(int)
                drawn.append((blue - red if name.startswith("left") else red - blue) > 100)
    return drawn


def test_the_example_is_answered_and_its_skeleton_drawn(page, service):
    page.open(f"http://127.0.0.1:{service.port}/#example")
    page.wait(PEOPLE)
    answer = page.answer()
    picture = page.picture()
    assert not page.hidden("answer")
    assert page.hidden("invitation")
    assert sum(joints_drawn(picture, answer)) >= 4
    assert page.tell("document.querySelectorAll('#timing tr').length") >= 8


def test_a_chosen_photo_is_asked_for_as_the_shown_command_asks(page, service, tmp_path):
    page.open(f"http://127.0.0.1:{service.port}/")
    page.choose(PHOTOS / "two_women_outdoors_cc0.jpg")
    page.wait(PEOPLE)
    assert page.text("status").startswith("2 people by lpn50/1 in ")
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    shutil.copy(PHOTOS / "two_women_outdoors_cc0.jpg", tmp_path)
    command = ["sh", "-c", page.text("curl")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, timeout=60)
    assert json.loads(run.stdout)["annotations"] == page.answer()["annotations"]


def test_joints_below_the_least_score_are_not_drawn(page, service):
    page.open(f"http://127.0.0.1:{service.port}/")
    page.choose(PHOTOS / "t_pose_cc0.jpg")
    page.wait(PEOPLE)
    assert sum(joints_drawn(page.picture(), page.answer())) >= 3
    page.write("threshold", "1")
    assert sum(joints_drawn(page.picture(), page.answer())) == 0
    assert page.text("least") == "1.00"


def test_a_box_that_is_dragged_is_asked_for_and_can_be_taken_back(page, service):
    page.open(f"http://127.0.0.1:{service.port}/")
    page.choose(PHOTOS / "two_women_outdoors_cc0.jpg")
    page.wait(PEOPLE)
    found = [person["bbox"] for person in page.answer()["annotations"]]
    page.drag((20, 20), (120, 180))  # where nobody is
    page.wait("document.getElementById('places').value !== ''")
    page.wait(PEOPLE)
    boxes = [person["bbox"] for person in page.answer()["annotations"]]
    assert boxes[:2] == found
    np.testing.assert_allclose(boxes[2], [20, 20, 100, 160], atol=2)
    page.click("undo")
    page.wait("document.getElementById('places').value === ''")
    page.wait(PEOPLE)
    assert [person["bbox"] for person in page.answer()["annotations"]] == found
    assert page.hidden("undo")


def test_boxes_can_be_written(page, service):
    page.open(f"http://127.0.0.1:{service.port}/")
    page.choose(PHOTOS / "t_pose_cc0.jpg")
    page.wait(PEOPLE)
    page.write("places", "295,15,545")
    assert page.text("status") == "A box is x,y,width,height in pixels of the photo; “295,15,545” is none."
    page.write("places", "295,15,545,595; 5000,5000,10,10")
    page.wait(f"{PROBLEM} && !/is none/.test(document.getElementById('status').textContent)")
    assert "Box 2" in page.text("status")
    page.write("places", "295,15,545,595")
    page.wait(PEOPLE)
    assert [person["bbox"] for person in page.answer()["annotations"]] == [[295, 15, 545, 595]]


def test_a_file_that_is_no_picture_is_refused_with_the_services_own_words(page, service):
    page.open(f"http://127.0.0.1:{service.port}/")
    page.choose(Path(__file__))
    page.wait(PROBLEM)
    assert page.text("status").startswith("A picture cannot be read. The photo is not a JPEG")
    assert not page.hidden("invitation")
    page.choose(PHOTOS / "t_pose_cc0.jpg")
    page.wait(PEOPLE)
    assert page.hidden("invitation")


def test_a_key_is_asked_for_where_the_service_wants_one(page, start_service):
    service = start_service(api_keys="schlüssel")
    page.open(f"http://127.0.0.1:{service.port}/#example")
    page.wait("!document.getElementById('keys').hidden")
    page.wait("document.getElementById('status').textContent === 'This service wants an API key.'")
    for key, told in (
        ("wrong", "'This key is not accepted.' === status"),
        ("schlüssel", "/^1 person by |^2 people by /.test(status)"),
    ):
        page.write("key", key)
        page.tell("document.getElementById('keys').requestSubmit()")
        page.wait(f"((status) => {told})(document.getElementById('status').textContent)")


def test_people_before_the_camera_are_followed_until_it_is_stopped(page, service):
    page.open(f"http://127.0.0.1:{service.port}/")
    page.click("start")
    page.wait("/^[1-9] (person|people)\\.$/.test(document.getElementById('status').textContent)")
    assert np.all(page.picture() == (255, 140, 50), axis=2).sum() > 100  # the left limbs
    page.wait("/frames a second/.test(document.getElementById('rate').textContent)")
    page.click("film")
    assert page.text("status") == "The camera is off."
    service.wait_until(lambda: service.metric("pose_streams") == 0)


def test_the_api_is_shown(page, service):
    page.open(f"http://127.0.0.1:{service.port}/docs")
    page.wait("/\\/v1\\/pose/.test(document.getElementById('api').textContent)")
    assert page.text("status") == ""
