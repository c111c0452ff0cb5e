"""Whatever is sent, the answer is people or a problem of the table, and never a defect of the service."""

import base64
import io
import json

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from app.api.problems import PROBLEMS
from app.api.schemas import Options

with io.BytesIO() as file:
    Image.new("RGB", (40, 30), (200, 100, 50)).save(file, "PNG")
    PICTURE = file.getvalue()

EXAMPLES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

NUMBERS = st.one_of(st.integers(-60, 60), st.floats(), st.integers(-(2**70), 2**70))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8))
ANYTHING = st.recursive(
    SCALARS, lambda some: st.lists(some, max_size=4) | st.dictionaries(st.text(max_size=6), some, max_size=3)
)
BOXES = st.lists(st.lists(NUMBERS, min_size=3, max_size=5), max_size=4)
NAMES = st.sampled_from(["boxes", *Options.model_fields, "other"])
VALUES = st.one_of(
    st.text(max_size=12), NUMBERS.map(str), st.sampled_from(["coco", "results", "true", "lpn50"]), BOXES.map(str)
)
DATA = st.one_of(st.just(base64.b64encode(PICTURE).decode()), st.text(max_size=20))
IMAGES = st.fixed_dictionaries({"data": DATA}, optional={"boxes": BOXES | ANYTHING, "id": ANYTHING, "file_name": ANYTHING})


def assert_answered(answer: httpx.Response) -> None:
    if answer.status_code == 200:
        assert answer.headers["content-type"] == "application/json"
    else:
        code = answer.json()["type"].removeprefix("/problems/")
        assert answer.status_code == PROBLEMS[code][0] < 500 or code == "deadline_exceeded", answer.text
        assert answer.headers["content-type"] == "application/problem+json"


@EXAMPLES
@given(st.lists(st.tuples(NAMES, VALUES), max_size=4), st.just(PICTURE) | st.binary(max_size=200))
def test_any_query(client, options, picture):
    assert_answered(client.post("/v1/pose", params=options, content=picture, headers={"Content-Type": "image/png"}))


@EXAMPLES
@given(st.lists(IMAGES | ANYTHING, max_size=3) | ANYTHING, st.dictionaries(NAMES, ANYTHING, max_size=3))
def test_any_json(client, images, options):
    content = json.dumps({"images": images} | options)
    assert_answered(client.post("/v1/pose", content=content, headers={"Content-Type": "application/json"}))


@EXAMPLES
@given(st.lists(st.tuples(NAMES, VALUES), max_size=3), st.integers(0, 3), st.binary(max_size=30))
def test_any_form(client, options, count, ending):
    parts = [f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode() for name, value in options]
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    body = b"".join(parts + [head + PICTURE + b"\r\n"] * count) + b"--x--" + ending
    assert_answered(client.post("/v1/pose", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"}))


@EXAMPLES
@given(
    st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=60),
    st.text("*/;,=q.01 imagejpno", max_size=40),
)
def test_any_headers(client, kind, accept):
    kind = kind.strip(" \xa0\x85")
    headers = {"Content-Type": kind.encode("latin-1"), "Accept": accept.strip(), "X-Request-ID": kind.encode("latin-1")}
    answer = client.post("/v1/pose?boxes=1,1,9,9", content=PICTURE, headers=headers)
    if not answer.headers["content-type"].startswith("image/"):
        assert_answered(answer)
