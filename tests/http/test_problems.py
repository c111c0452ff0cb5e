"""Bad input gives the answer of the table of problems, and nothing else."""

import asyncio
import base64
import io
import json
import re
import struct
import zlib
from pathlib import Path

import httpx
import pytest
from PIL import Image
from starlette.requests import Request

from app.api.bodies import _of_few_parts, _parsed_form
from app.api.problems import PROBLEMS, Problem
from app.settings import Settings

BOX = "295,15,545,595"
BOXES = [[295, 15, 545, 595]]


def assert_problem(answer: httpx.Response, status: int, code: str, *told: str) -> dict:
    """The answer is that problem with the fields of the table, and its detail tells what is asked for."""
    problem = answer.json()
    assert (answer.status_code, problem["type"]) == (status, f"/problems/{code}"), problem
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem.keys() - {"errors"} == {"type", "title", "status", "detail", "request_id"}
    assert (problem["status"], problem["title"]) == (status, PROBLEMS[code][1])
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert "total;dur=" in answer.headers["server-timing"]
    for error in problem.get("errors", []):
        assert error.keys() == {"loc", "msg"}
        assert isinstance(error["loc"], list)
    assert not re.search(
        r"\.py|/app/|Traceback|OpenCV|cv2|onnx|numpy|pydantic|starlette|orjson|Error\b", answer.text, re.IGNORECASE
    )
    for part in told:
        assert part in problem["detail"], problem["detail"]
    return problem


def post(client: httpx.Client, content: bytes, kind: str = "image/jpeg", **options: object) -> httpx.Response:
    return client.post("/v1/pose", params={"boxes": BOX} | options, content=content, headers={"Content-Type": kind})


def post_json(client: httpx.Client, content: object, **options: object) -> httpx.Response:
    body = content if isinstance(content, bytes) else json.dumps(content)
    return client.post("/v1/pose", params=options, content=body, headers={"Content-Type": "application/json"})


@pytest.fixture(scope="module")
def small() -> bytes:
    """A picture of 200 × 100 pixels."""
    with io.BytesIO() as file:
        Image.new("RGB", (200, 100), (10, 120, 200)).save(file, "PNG")
        return file.getvalue()


def image(small: bytes, **fields: object) -> dict:
    return {"data": base64.b64encode(small).decode(), "boxes": [[1, 2, 30, 40]]} | fields


def png(width: int, height: int, rows: bytes) -> bytes:
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return png_of(header, (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))


def png_of(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# Pictures


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"hello, this is a text and not a picture",
        b"BMW is a car, and this is a text that begins like a bitmap, and goes on for a while",
        b"<html></html>",
        b"GIF89a" + bytes(100),
        b"%PDF-1.7\n",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xd9",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\x04\0\0\0WEBP",
        b"BM",
        b"II*\0",
        b"MM\0*\xff\xff\xff\xff",
        bytes(1000),
    ],
)
def test_what_is_not_a_picture_is_an_invalid_image(client, content):
    assert_problem(post(client, content), 422, "invalid_image", "images.0")


def test_a_files_name_in_its_place_is_told_as_such(client):
    """What curl sends without the @."""
    assert_problem(post(client, b"photos/people.jpg"), 422, "invalid_image", "images.0", "'photos/people.jpg'", "@")
    form = client.post("/v1/pose", files={"image": (None, "people.jpg")})
    assert_problem(form, 422, "invalid_image", "images.0", "'people.jpg'", "@")


def test_one_bad_picture_refuses_its_request(client, small):
    pictures = [image(small), image(small[:-20]), image(small)]
    problem = assert_problem(post_json(client, {"images": pictures}), 422, "invalid_image", "images.1", "PNG")
    assert problem["errors"][0]["loc"] == ["images", 1]


def test_a_decompression_bomb_is_refused_by_its_header(client, service):
    bomb = png(20_000, 20_000, bytes(2501 * 20_000))
    assert len(bomb) < 60_000
    before = service.metric("process_resident_memory_bytes")
    service.forget_peak_memory()
    for _ in range(5):
        assert_problem(post(client, bomb), 413, "image_too_large", "20000 × 20000", "50,000,000")
    assert service.peak_memory < before + 30e6


def written(picture: Image.Image, format_: str, **options: object) -> bytes:
    with io.BytesIO() as file:
        picture.save(file, format_, **options)
        return file.getvalue()


def test_what_hides_in_a_small_picture_is_not_decoded(client, service):
    """A large second frame, a large thumbnail, colour tables and texts of a size that nothing holds."""
    small, large = Image.new("RGB", (40, 30)), Image.new("L", (8000, 3000))
    exif = Image.Exif()
    exif[0x9286] = b"ASCII\0\0\0" + written(large.resize((4000, 3000)), "JPEG", quality=1)[:60_000]
    text = zlib.compress(bytes(100 * 2**20), 9)
    whole = written(small, "PNG")
    hidden = struct.pack(">I", len(text) + 3) + b"zTXta\0\0" + text
    hidden += struct.pack(">I", zlib.crc32(hidden[4:]))
    tables = (
        b"BM" + struct.pack("<IHHI", 2000, 0, 0, 1078) + struct.pack("<IiiHHIIiiII", 40, 9, 9, 1, 8, 0, 0, 0, 0, 2**31, 0)
    )
    files = {
        "second frame": (written(small, "TIFF", save_all=True, append_images=[large], compression="tiff_lzw"), 200),
        "frames": (written(small, "WebP", save_all=True, append_images=[small] * 200), 200),
        "thumbnail": (written(small, "JPEG", exif=exif), 200),
        "text": (whole[:33] + hidden + whole[33:], 200),
        "colour table": (tables + bytes(2000), 422),
    }
    before = service.metric("process_resident_memory_bytes")
    service.forget_peak_memory()
    for name, (data, status) in files.items():
        answer = post(client, data, boxes="1,1,9,9")
        assert answer.status_code == status, (name, answer.text)
        if status == 200:
            assert (answer.json()["images"][0]["width"], answer.json()["images"][0]["height"]) == (40, 30), name
    assert service.peak_memory < before + 20e6  # the second frame alone is 72 MB as the service reads it


def test_of_an_animated_png_one_picture_alone_is_in_memory(client, service):
    side = 2000
    frame = struct.pack(">IIIIHHBB", side, side, 0, 0, 1, 10, 0, 0)
    data = png_of(
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 16, 6, 0, 0, 0)),
        (b"acTL", struct.pack(">II", 2, 0)),
        (b"IDAT", zlib.compress(bytes((1 + 8 * side) * side))),
        (b"fcTL", struct.pack(">I", 0) + frame),
        (b"fdAT", struct.pack(">I", 1) + b"x"),
        (b"IEND", b""),
    )
    before = service.metric("process_resident_memory_bytes")
    service.forget_peak_memory()
    assert post(client, data, boxes="1,1,9,9").status_code == 200
    assert service.peak_memory < before + 60e6  # of 4 million pixels, read 6 bytes a pixel; as an animation 36


def test_a_picture_too_long_to_crop_is_refused(client):
    assert_problem(post(client, png(32_767, 10, bytes(4097 * 10)), boxes="1,1,9,9"), 413, "image_too_large", "32,766")
    assert post(client, png(32_766, 10, bytes(4097 * 10)), boxes="32000,1,700,9").status_code == 200


def test_a_picture_of_one_pixel_is_answered(client):
    answer = post(client, png(1, 1, b"\0\x80"), boxes="0,0,1,1")
    assert answer.status_code == 200
    assert answer.json()["images"] == [{"id": 0, "width": 1, "height": 1, "file_name": None}]


def test_too_many_pictures_are_refused(client, small):
    many = [("image", small)] * 17
    assert_problem(client.post("/v1/pose", files=many), 413, "too_many_images", "17", "16")
    assert_problem(client.post("/v1/pose", files=many * 20), 413, "too_many_images", "more than 160", "16")
    assert_problem(post_json(client, {"images": [image(small)] * 17}), 413, "too_many_images", "17", "16")


# Boxes


@pytest.mark.parametrize(
    "box",
    [
        "nan,1,2,3",
        "1,inf,2,3",
        "1,2,-inf,3",
        "1,2,3",
        "1,2,3,4,5",
        "1,2,3,",
        "a,b,c,d",
        "1 2 3 4",
        "{}",
        "[1,2,3,4]",
        "[[1,2,3]]",
        "[[1,2,3,null]]",
        '[["1",2,3,4]]',
        "[[1,2,3,true]]",
        "[[1,2,3,4]",
        "null",
        "[7]",
        "[" * 300 + "]" * 300,
        "[[1,2,3,1e999]]",
        "[[1,2,3,NaN]]",
        "0,0,0,0",
        "10,10,0,5",
        "10,10,5,-5",
        "-50,10,20,20",
        "10,-50,20,20",
        "5000,10,20,20",
        "10,5000,20,20",
        "0,0,1e300,1e300",
        "-1e308,0,1e308,1e308",
        "0,0,1e-300,1e-300",
    ],
)
def test_a_box_that_shows_nobody_is_an_invalid_box(client, small, box):
    assert_problem(post(client, small, boxes=box), 422, "invalid_box", "boxes")
    assert_problem(client.post("/v1/pose", files={"image": small}, data={"boxes": box}), 422, "invalid_box", "boxes")


@pytest.mark.parametrize(
    "boxes",
    [
        7,
        "1,2,3,4",
        {},
        [1, 2, 3, 4],
        [[1, 2, 3]],
        [[1, 2, 3, "4"]],
        [[1, 2, 3, True]],
        [[1, 2, 3, None]],
        [None],
        [[0, 0, 0, 0]],
        [[2**64, 0, 1, 1]],
        [[-(2**63), 0, 1, 1]],
    ],
)
def test_a_bad_box_of_json_is_an_invalid_box(client, small, boxes):
    assert_problem(post_json(client, {"images": [image(small, boxes=boxes)]}), 422, "invalid_box", "images.0.boxes")


def test_the_bad_box_is_named(client, small):
    pictures = [image(small), image(small, boxes=[[1, 1, 9, 9], [1, 1, 9, 9], [300, 1, 9, 9]])]
    problem = assert_problem(post_json(client, {"images": pictures}), 422, "invalid_box", "300", "200 × 100")
    assert problem["errors"][0]["loc"] == ["images", 1, "boxes", 2]


@pytest.mark.parametrize("count", [101, 10_000])
def test_too_many_boxes_are_refused(client, small, count):
    assert_problem(post_json(client, {"images": [image(small, boxes=[[1, 1, 9, 9]] * count)]}), 413, "too_many_boxes", "100")
    form = {"boxes": ";".join(["1,1,9,9"] * count)}
    assert_problem(client.post("/v1/pose", files={"image": small}, data=form), 413, "too_many_boxes", str(count), "100")


def test_a_hundred_boxes_are_taken(client, small):
    assert len(post(client, small, boxes=";".join(["1,1,90,90"] * 100)).json()["annotations"]) == 100


def test_more_crops_than_the_queue_can_ever_hold_are_refused(client, small):
    pictures = [image(small, boxes=[[1, 1, 9, 9]] * 100) for _ in range(5)]
    assert_problem(post_json(client, {"images": pictures}), 413, "too_many_boxes", "500", "400")


def test_boxes_of_several_pictures_must_be_a_list_for_each(client, small):
    files = [("image", small)] * 2
    for boxes in ("1,1,9,9", "[[1,1,9,9]]", "[[[1,1,9,9]]]", "[]", "{}", "[1,2]", "[[[1,1,9,9]],3]"):
        assert_problem(client.post("/v1/pose", files=files, data={"boxes": boxes}), 422, "invalid_box", "boxes")


# Options


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"unknown": "1"}, "is not known; known are model, format"),
        ({"Boxes": "1,2,3,4"}, "is not known"),
        ({"format": "xml"}, "must be 'coco' or 'results'; it is \"xml\""),
        ({"format": ""}, ""),
        ({"keypoint_threshold": "1.01"}, ""),
        ({"keypoint_threshold": "-0.1"}, ""),
        ({"keypoint_threshold": "nan"}, "must be a finite number"),
        ({"keypoint_threshold": "high"}, ""),
        ({"detection_threshold": "2"}, ""),
        ({"max_people": "0"}, 'must be 1 or more; it is "0"'),
        ({"max_people": "101"}, ""),
        ({"max_people": "1.5"}, ""),
        ({"flip_test": "maybe"}, 'must be true or false; it is "maybe"'),
        ({"timeout_ms": "0"}, ""),
        ({"timeout_ms": "60001"}, ""),
        ({"timeout_ms": "-5"}, ""),
        ({"timeout_ms": "9" * 50}, ""),
        ({"timeout_ms": "soon"}, 'must be a whole number; it is "soon"'),
        ({"model": "m" * 129}, "must be of 128 characters at most"),
    ],
)
def test_an_option_unknown_or_out_of_range_is_an_invalid_option(client, small, options, told):
    (name,) = options
    form = {"boxes": "1,1,9,9"} | options
    in_query = post(client, small, **options)
    assert_problem(in_query, 422, "invalid_option", f"{name} {told}")
    for where, answer in (
        (["query"], in_query),
        (["form"], client.post("/v1/pose", files={"image": small}, data=form)),
        ([], post_json(client, {"images": [image(small)]} | options)),
    ):
        assert assert_problem(answer, 422, "invalid_option", name)["errors"][0]["loc"] == [*where, name]


@pytest.mark.parametrize(
    "options",
    [
        {"flip_test": "true"},
        {"flip_test": 1},
        {"timeout_ms": True},
        {"timeout_ms": "5000"},
        {"max_people": 1.5},
        {"max_people": -1e300},
        {"keypoint_threshold": True},
        {"keypoint_threshold": "0.5"},
        {"format": None},
    ],
)
def test_an_option_of_another_type_is_an_invalid_option_of_json(client, small, options):
    (name,) = options
    assert_problem(post_json(client, {"images": [image(small)]} | options), 422, "invalid_option", name)


def test_numbers_of_json_may_be_written_with_a_point(client, small):
    answer = post_json(client, {"images": [image(small, id=7.0)], "timeout_ms": 9000.0, "keypoint_threshold": 0})
    assert answer.status_code == 200
    assert answer.json()["images"][0]["id"] == 7


def test_boxes_of_a_query_are_not_taken_beside_json(client, small):
    problem = assert_problem(post_json(client, {"images": [image(small)]}, boxes="1,1,9,9"), 422, "invalid_option", "boxes")
    assert "each picture" in problem["detail"]


def test_problems_stay_small_whatever_is_sent(client, small):
    for options in ({"x" * 5_000_000: 1}, {f"unknown{i}": i for i in range(100_000)}, {"format": "y" * 1_000_000}):
        answer = post_json(client, {"images": [image(small)]} | options)
        assert_problem(answer, 422, "invalid_option")
        assert len(answer.content) < 10_000


def test_problems_stay_small_whatever_is_in_the_head(client, small):
    long = "ä" * 5_000
    assert_short(client.get(f"/v1/models/{long}"), 404, "model_not_found")
    assert_short(post(client, small, "image/" + "x" * 60_000), 415, "unsupported_media_type")
    assert_short(client.post(f"/v1/pose?{long}=1&{long}=2", files={"image": small}), 422, "invalid_option")
    assert_short(client.post("/v1/pose", files={"image": small, long[:2_000]: small}), 422, "invalid_option")


def assert_short(answer: httpx.Response, status: int, code: str) -> None:
    assert assert_problem(answer, status, code)["detail"].endswith("…")
    assert len(answer.content) < 5_000


def test_what_is_wrong_in_the_query_beside_a_form_is_told_of_the_query(client, small):
    for beside, code, field in (
        ({"foo": "1"}, "invalid_option", "foo"),
        ({"timeout_ms": "x"}, "invalid_option", "timeout_ms"),
        ({"boxes": "1,2,3"}, "invalid_box", "boxes.0"),
    ):
        in_query = client.post("/v1/pose", params=beside, files={"image": small})
        assert_problem(in_query, 422, code, f"query.{field} ")
        in_form = client.post("/v1/pose", data=beside, files={"image": small})
        assert_problem(in_form, 422, code, f"form.{field} ")
    two = [("image", small), ("image", small)]
    answer = client.post("/v1/pose", params={"boxes": "1,2,3,4"}, files=two)
    assert_problem(answer, 422, "invalid_box", "query.boxes ")
    both = client.post(
        "/v1/pose", params={"boxes": "", "flip_test": "true"}, files={"image": small}, data={"format": "results"}
    )
    assert both.json() == []  # an empty list means nobody


def test_an_option_given_twice_is_an_invalid_option(client, small):
    assert_problem(post(client, small, format=["coco", "coco"]), 422, "invalid_option", "format", "twice")
    files = {"image": small}
    twice = {"boxes": "1,1,9,9", "format": ["coco", "results"]}
    assert_problem(client.post("/v1/pose", files=files, data=twice), 422, "invalid_option", "format", "twice")
    query = {"format": "coco"}
    for answer in (
        client.post("/v1/pose", params=query, files=files, data={"boxes": "1,1,9,9", "format": "coco"}),
        post_json(client, {"images": [image(small)], "format": "coco"}, **query),
    ):
        assert_problem(answer, 422, "invalid_option", "format")


@pytest.mark.parametrize("model", ["nobody", "lpn50/999", "../lpn50", "lpn50/", "LPN50", "", "ä"])
def test_a_model_that_there_is_not_is_not_found(client, small, model):
    assert_problem(post(client, small, model=model, boxes="1,1,9,9"), 404, "model_not_found")


def test_an_option_with_a_file_name_is_told_so(client, small):
    form = {"image": ("a.jpg", small), "boxes": ("blob", b"[[1, 2, 30, 40]]")}
    assert_problem(client.post("/v1/pose", files=form), 422, "invalid_option", "form.boxes", "must have no file name")


# JSON


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{]", b"[", b"nonsense", b"\xff\xfe", b"[]", b"7", b"null", b'{"images": NaN}', b'{"images": "\\ud800"}'],
)
def test_broken_json_is_a_malformed_body(client, content):
    assert_problem(post_json(client, content), 400, "malformed_body")


def test_json_may_begin_with_a_byte_order_mark(client, small):
    content = json.dumps({"images": [image(small)]}).encode()
    assert post_json(client, b"\xef\xbb\xbf" + content).json() == post_json(client, content).json()


def test_deep_json_is_a_malformed_body(client):
    assert_problem(post_json(client, b'{"images":' + b"[" * 1_000_000), 400, "malformed_body")


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"images": []},
        {"images": 7},
        {"images": {}},
        {"images": [7]},
        {"images": [{}]},
        {"images": [{"data": 7}]},
        {"images": [{"data": None}]},
        {"images": [{"data": "", "url": "http://localhost/a.jpg"}]},
        {"images": [{"data": "", "id": -1}]},
        {"images": [{"data": "", "id": "seven"}]},
        {"images": [{"data": "", "id": "7"}]},
        {"images": [{"data": "", "id": True}]},
        {"images": [{"data": "", "id": 2**53}]},
        {"images": [{"data": "", "file_name": 7}]},
        {"images": [{"data": "", "file_name": "n" * 1025}]},
    ],
)
def test_a_json_body_of_another_shape_is_an_invalid_option(client, content):
    assert_problem(post_json(client, content), 422, "invalid_option", "images")


def test_ids_must_differ(client, small):
    for ids, clash in (({"id": 3}, {"id": 3}), 3), (({"id": 1}, {}), 1):
        answer = post_json(client, {"images": [image(small, **id_) for id_ in ids]})
        assert_problem(answer, 422, "invalid_option", f"images.1.id is {clash}, as another picture's")
        assert answer.json()["errors"][0]["loc"] == ["images", 1, "id"]


@pytest.mark.parametrize(
    "data", ["????", "AAA", "AA=A", "ä", "data:image/png,hello", "data:", "QUJD QUJD", "http://localhost/a.jpg"]
)
def test_invalid_base64_is_an_invalid_image(client, small, data):
    assert_problem(post_json(client, {"images": [image(small, data=data)]}), 422, "invalid_image", "images.0.data")


def test_base64_beyond_ascii_is_refused_before_it_is_copied(client):
    data = "A" * 4_000_000 + "\U0001f600"
    assert_problem(post_json(client, {"images": [{"data": data}]}), 422, "invalid_image", "images.0.data", "base64")
    told = assert_problem(post_json(client, {"images": [], "model": data}), 422, "invalid_option", "model")
    assert len(told["detail"]) < 300


@pytest.mark.parametrize("text", ["[],", "1,", ";"])
def test_endless_boxes_are_refused_before_they_are_made(client, small, text):
    form = {"image": ("a.png", small), "boxes": (None, text * 60_000)}
    assert_problem(client.post("/v1/pose", files=form), 413, "too_many_boxes", "form.boxes", "50,000")


def test_empty_base64_is_an_invalid_image(client, small):
    for data in ("", "data:image/png;base64,"):
        assert_problem(post_json(client, {"images": [image(small, data=data)]}), 422, "invalid_image", "images.0", "empty")


# Forms

BOUNDARY = "multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
FIELD = b'--x\r\nContent-Disposition: form-data; name="boxes"\r\n\r\n'


def test_a_form_of_long_work_is_refused_wherever_it_is_cut():
    delimiter = b"\r\n--x"

    async def of(body: bytes, size: int) -> bytes:
        async def stream():
            for start in range(0, len(body), size):
                yield body[start : start + size]

        return b"".join([chunk async for chunk in _of_few_parts(stream(), delimiter, 3)])

    for size in (1, 3, 7, 1000):
        for well in (b"--x" + 3 * delimiter + b"--", b"--x" + b" " * 100 + b"\r\n\n--x" + b" " * 200):
            assert asyncio.run(of(well, size)) == well
        for ill in (b"--x" + 4 * delimiter, b"--x" + b" " * 101, b"abc" + delimiter + b"\t" * 101):
            with pytest.raises(Problem, match="boundary"):
                asyncio.run(of(ill, size))


@pytest.mark.parametrize("size", [100, 10_000, 10**6])
def test_what_a_form_has_too_many_of_is_told_however_it_comes(size):
    """The system hands over a body in pieces as it likes: one of 340 pictures may come in one."""

    async def refused(body: bytes) -> Problem:
        pieces = [body[start : start + size] for start in range(0, len(body), size)]

        async def receive():
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

        request = Request({"type": "http", "headers": [(b"content-type", BOUNDARY.encode())]}, receive)
        with pytest.raises(Problem) as raised:
            await _parsed_form(request, Settings())
        return raised.value

    pictures, fields = (asyncio.run(refused(340 * (part + b"abc\r\n") + b"--x--\r\n")) for part in (PART, FIELD))
    assert (pictures.code, pictures.detail) == (
        "too_many_images",
        "The request holds more than 160 pictures; at most 16 are taken.",
    )
    assert (fields.code, fields.detail) == ("malformed_body", "The form holds over 132 fields beside its pictures.")


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("multipart/form-data", PART + b"abc\r\n--x--\r\n"),
        ("multipart/form-data; boundary=", PART + b"abc\r\n--x--\r\n"),
        ("multipart/form-data; boundary=other", PART + b"abc\r\n--x--\r\n"),
        ("multipart/form-data; boundary=" + "x" * 300, b"--x--\r\n"),
        ("multipart/form-data; boundary=ä".encode(), b"--x--\r\n"),
        (BOUNDARY, b""),
        (BOUNDARY, b"nonsense"),
        (BOUNDARY, b"--x"),
        (BOUNDARY, PART),
        (BOUNDARY, PART + b"abc"),
        (BOUNDARY, PART + b"abc\r\n--x"),
        (BOUNDARY, PART + b"abc\r\n" + PART),
        (BOUNDARY, b"--x\r\n\r\nabc\r\n--x--\r\n"),
        (BOUNDARY, b"--x\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--x--\r\n"),
        (BOUNDARY, b"--x\r\nContent-Disposition\r\n\r\nabc\r\n--x--\r\n"),
        (BOUNDARY, b"--x\r\n" + b"A" * 100_000 + b": b\r\n\r\nabc\r\n--x--\r\n"),
        (BOUNDARY, b"--x\r\n" + b"A: b\r\n" * 10_000 + b"\r\nabc\r\n--x--\r\n"),
        (BOUNDARY, b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nabc\r\n' * 1000 + b"--x--\r\n"),
        (BOUNDARY, PART + b"\r\n--xy" * 1000 + b"\r\n--x--\r\n"),
        (BOUNDARY, b"--x" + b" " * 101 + PART[3:] + b"abc\r\n--x--\r\n"),
        (BOUNDARY, PART + b"abc\r\n--x" + b"\t" * 100_000 + b"--\r\n"),
    ],
)
def test_a_broken_form_is_a_malformed_body(client, kind, content):
    answer = client.post("/v1/pose", content=content, headers={"Content-Type": kind})
    assert_problem(answer, 400, "malformed_body")


def test_a_form_truncated_at_any_length_is_a_malformed_body(client, small):
    content = PART + small + b'\r\n--x\r\nContent-Disposition: form-data; name="boxes"\r\n\r\n1,1,9,9\r\n--x--'
    headers = {"Content-Type": BOUNDARY}
    assert client.post("/v1/pose", content=content, headers=headers).status_code == 200
    for length in range(0, len(content) - 1, 7):
        assert_problem(client.post("/v1/pose", content=content[:length], headers=headers), 400, "malformed_body")


def test_a_form_without_a_picture_is_an_invalid_image(client, small):
    for part in ({"boxes": (None, "1,1,9,9")}, {"image": (None, "people.jpg")}):
        assert_problem(client.post("/v1/pose", files=part), 422, "invalid_image", "image")


def test_a_form_of_too_many_fields_is_told_so(client, small):
    fields = [("image", ("a", small)), *(("boxes", (None, "1,1,9,9")) for _ in range(101))]
    assert_problem(client.post("/v1/pose", files=fields), 413, "too_many_boxes", "101")
    fields += [("boxes", (None, "1,1,9,9"))] * 32
    assert_problem(client.post("/v1/pose", files=fields), 400, "malformed_body", "132 fields")


@pytest.mark.parametrize("charset", ["unicode_escape", "utf-7", "idna", "punycode", "utf-16", "rot13", "zlib", "nonsense"])
def test_a_form_in_another_charset_than_utf8_is_a_malformed_body(client, small, charset):
    part = PART.replace(b'"a"', rb'"\ud800"') + small + b"\r\n--x\r\n" + rb'Content-Disposition: form-data; name="\ud800"'
    content = part + b"\r\n\r\n" + rb"\ud800" + b"\r\n--x--\r\n"
    answer = client.post("/v1/pose", content=content, headers={"Content-Type": f"{BOUNDARY}; charset={charset}"})
    assert_problem(answer, 400, "malformed_body")


def test_a_field_of_bytes_that_are_no_text_is_an_unknown_option(client, small):
    part = b'--x\r\nContent-Disposition: form-data; name="\xff\xfe"\r\n\r\n\xff\r\n'
    for kind in (BOUNDARY, BOUNDARY + "; charset=UTF-8"):
        answer = client.post("/v1/pose", content=part + PART + small + b"\r\n--x--\r\n", headers={"Content-Type": kind})
        assert_problem(answer, 422, "invalid_option")


def test_a_file_part_of_another_name_is_an_invalid_option(client, small):
    answer = client.post("/v1/pose", files={"image": small, "picture": small})
    assert_problem(answer, 422, "invalid_option", "picture")


# Kinds and routes


@pytest.mark.parametrize(
    "kind", ["text/plain", "image/gif", "application/x-www-form-urlencoded", "nonsense", "", "application/json5"]
)
def test_another_kind_of_body_is_an_unsupported_media_type(client, small, kind):
    assert_problem(post(client, small, kind), 415, "unsupported_media_type", "image/jpeg")


def test_a_compressed_body_is_an_unsupported_media_type(client, small):
    for coding in ("gzip", "br, gzip"):
        answer = client.post("/v1/pose", content=small, headers={"Content-Type": "image/png", "Content-Encoding": coding})
        assert_problem(answer, 415, "unsupported_media_type", f"Content-Encoding is {coding}")
    for coding in ("Identity", ""):
        as_it_is = {"Content-Type": "image/png", "Content-Encoding": coding}
        assert client.post("/v1/pose", params={"boxes": "1,1,9,9"}, content=small, headers=as_it_is).status_code == 200


def test_a_body_without_a_kind_is_an_unsupported_media_type(client, small):
    request = client.build_request("POST", "/v1/pose", params={"boxes": BOX}, content=small)
    request.headers.pop("content-type", None)
    assert_problem(client.send(request), 415, "unsupported_media_type", "missing")


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/docs/", "/redoc", "/static", "/v1", "/v1/pose/", "/v1/pose/x", "/..%2f..%2fetc/passwd", "/%00", "/docs//"],
)
def test_another_path_is_not_found(client, path):
    assert_problem(client.get(path), 404, "not_found")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts threads by /proc")
def test_what_is_not_found_opens_no_threads(service, client):
    """FastAPI runs a plain function that answers exceptions on one of forty threads."""

    def threads() -> str:
        return re.search(r"^Threads:\s+(\d+)$", Path(f"/proc/{service.process.pid}/status").read_text(), re.MULTILINE)[1]

    before = threads()
    assert_problem(client.get("/nothing"), 404, "not_found")
    assert threads() == before


@pytest.mark.parametrize(
    "path", ["/v1/models/", "/v1/models/nobody", "/v1/models/lpn50/999", "/v1/models/lpn50/1/2", "/v1/models/..%2f.."]
)
def test_a_model_that_there_is_not_has_no_page(client, path):
    assert_problem(client.get(path), 404, "model_not_found")


def test_another_method_is_not_allowed(client):
    for method, path, allowed in (
        ("GET", "/v1/pose", "POST"),
        ("DELETE", "/v1/pose", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("POST", "/livez", "GET, HEAD"),
        ("PATCH", "/metrics", "GET, HEAD"),
    ):
        answer = client.request(method, path)
        assert_problem(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == allowed


# Request ids


def test_a_request_id_is_given_back_or_made(client):
    for given in ("a", "A-b_c.9", "x" * 128):
        assert client.get("/livez", headers={"X-Request-ID": given}).headers["x-request-id"] == given
    for given in ("", "x" * 129, "a b", "ä".encode(), "a/b", "<script>"):
        made = client.get("/livez", headers={"X-Request-ID": given}).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", made)


def test_a_small_json_body_of_objects_without_number_is_not_read(client, small):
    picture = image(small)
    for many in (b"[]," * 100_001 + b"[]", b"1," * 200_001 + b"1"):
        body = json.dumps({"images": [picture | {"boxes": "?"}]}).encode().replace(b'"?"', b"[" + many + b"]")
        assert_problem(post_json(client, body), 400, "malformed_body", "200,000")


def test_a_field_of_a_form_may_not_be_a_body_of_its_own(client, small):
    answer = client.post("/v1/pose", files={"image": small}, data={"boxes": "[" + "[]," * 400_000 + "]"})
    assert_problem(answer, 400, "malformed_body", "1,048,576")
