"""Twenty thousand broken pictures: none is answered by a 5xx, none harms a request beside it."""

import io
import threading
from http.client import HTTPConnection

import cv2
import httpx
import numpy as np
import pytest
from PIL import Image

FORMATS = ("JPEG", "PNG", "WebP", "BMP", "TIFF", "GIF")
PER_FORMAT = 3_400
JPEG = {"Content-Type": "image/jpeg"}
BOX = "295,15,545,595"


def pictures(format_: str) -> list[bytes]:
    """Small whole files of a format: plain, grey, and with extras of its own (EXIF, progressive, several frames)."""
    random = np.random.default_rng(7)
    pixels = cv2.GaussianBlur(random.integers(0, 256, (24, 32, 3), dtype=np.uint8), (0, 0), 2)
    colour = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    extras = {
        "JPEG": [{"exif": exif}, {"progressive": True}, {"quality": 5}],
        "PNG": [{"exif": exif}, {"compress_level": 0}],
        "WebP": [{"lossless": True}, {"exif": exif}, {"save_all": True, "append_images": [colour.rotate(90)]}],
        "TIFF": [{"compression": "tiff_lzw"}, {"compression": "packbits"}, {"save_all": True, "append_images": [colour]}],
    }
    files = []
    variants = [(colour, {}), (colour.convert("L"), {}), (colour.convert("P"), {})]
    for picture, options in [*variants, *((colour, extra) for extra in extras.get(format_, []))]:
        with io.BytesIO() as file:
            (picture.convert("RGB") if picture.mode == "P" and format_ in ("JPEG", "WebP") else picture).save(
                file, format_, **options
            )
            files.append(file.getvalue())
    return files


def broken(data: bytes, random: np.random.Generator) -> bytes:
    """The file after one to four mutations."""
    content = bytearray(data)
    for _ in range(random.integers(1, 5)):
        at = int(random.integers(0, max(1, len(content))))
        some = random.integers(0, 256, int(random.integers(1, 9)), dtype=np.uint8).tobytes()
        match random.integers(0, 7):
            case 0:
                content[at : at + 1] = bytes([content[at] ^ 1 << int(random.integers(0, 8))]) if content else b""
            case 1:
                content[at : at + len(some)] = some
            case 2:
                content[at:at] = some
            case 3:
                del content[at : at + len(some)]
            case 4:
                del content[max(2, at) :]
            case 5:  # numbers in headers
                extremes = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1", b"\1\0\0\0", b"\xff\xff")
                content[at % 64 : at % 64 + 4] = extremes[int(random.integers(0, len(extremes)))]
            case 6:
                content[at:at] = content[int(random.integers(0, max(1, len(content)))) :][:200]
    return bytes(content)


@pytest.mark.parametrize("format_", FORMATS)
def test_broken_pictures_are_people_or_problems_and_harm_nobody_beside_them(service, t_pose, format_):
    random = np.random.default_rng(FORMATS.index(format_))
    files = pictures(format_)
    expected = service.client.post("/v1/pose", params={"boxes": BOX}, content=t_pose, headers=JPEG).json()
    beside: list[bool] = []
    done = threading.Event()

    def ask_for_the_whole_picture() -> None:
        with httpx.Client(base_url=service.client.base_url, timeout=60) as client:
            while not done.is_set():
                answer = client.post("/v1/pose", params={"boxes": BOX}, content=t_pose, headers=JPEG)
                beside.append(answer.status_code == 200 and answer.json() == expected)
                done.wait(0.5)

    neighbour = threading.Thread(target=ask_for_the_whole_picture)
    neighbour.start()
    statuses = set()
    url = service.client.base_url
    connection = HTTPConnection(url.host, url.port)  # takes a quarter of the time that httpx does
    try:
        for _ in range(PER_FORMAT):
            data = broken(files[int(random.integers(0, len(files)))], random)
            boxes = "4,4,9,9" if random.random() < 0.02 else ""
            connection.request("POST", f"/v1/pose?boxes={boxes}", data, JPEG)
            answer = connection.getresponse()
            told = answer.read()
            statuses.add(answer.status)
            assert answer.status < 500, (told, data.hex())
    finally:
        connection.close()
        done.set()
        neighbour.join()
    assert statuses <= {200, 413, 422}
    assert 422 in statuses
    assert beside
    assert all(beside)
