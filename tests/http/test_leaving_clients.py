"""Ten thousand clients that leave early, at every stage of their request: nothing of them stays."""

import socket
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest

CLIENTS = 10_000
BOXES = "4,4,9,9;6,6,12,12"
JPEG = {"Content-Type": "image/jpeg"}


@pytest.fixture(scope="module")
def left(start_service):
    """A service that many clients have left, what it held before them, and how many requests it saw whole."""
    service = start_service()
    picture = cv2.imencode(".jpg", np.full((24, 32, 3), 99, np.uint8))[1].tobytes()
    picture += bytes(20_000)  # which is passed over, and is seen in the sum where bodies are kept
    head = f"POST /v1/pose?boxes={BOXES} HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
    request = f"{head}Content-Length: {len(picture)}\r\n\r\n".encode() + picture
    for _ in range(20):  # so that all that is made once has been made
        assert service.client.post("/v1/pose", params={"boxes": BOXES}, content=picture, headers=JPEG).status_code == 200
    before = descriptors(service.process.pid), service.metric("process_resident_memory_bytes")
    random = np.random.default_rng(7)
    whole = 0
    for _ in range(CLIENTS):
        with socket.create_connection(("127.0.0.1", service.port), timeout=20) as sock:
            if random.random() < 0.5:
                sock.sendall(request)
                whole += 1
            else:
                sock.sendall(request[: int(random.integers(0, len(request)))])
            if random.random() < 0.5:  # a reset rather than a farewell
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    service.wait_until(lambda: service.metric("pose_http_requests_in_flight") == 1, 60)  # the question itself
    return service, before, whole


def descriptors(process: int) -> int:
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors by /proc")
def test_no_descriptor_stays_open(left):
    service, (before, _), _ = left
    service.wait_until(lambda: descriptors(service.process.pid) <= before + 2)


def test_no_memory_stays_held(left):
    service, (_, before), _ = left
    assert service.metric("process_resident_memory_bytes") < before + 64 * 2**20


def test_most_of_their_work_was_never_done(left):
    """A crop runs for nobody only where its batch had begun before its client was seen to leave."""
    service, _, whole = left
    assert service.metric("pose_crops_total") - 2 * 20 < 0.25 * 2 * whole


def test_the_queue_is_empty_and_its_room_free(left):
    service, _, _ = left
    assert service.metric("pose_queue_crops") == 0
    service.wait_until(lambda: service.metric("pose_inference_workers_busy") == 0)
    crop = cv2.imencode(".jpg", np.full((24, 32, 3), 99, np.uint8))[1].tobytes()
    boxes = ";".join(["4,4,9,9"] * 100)
    answer = httpx.post(
        service.client.base_url.join("/v1/pose"),
        params={"boxes": boxes, "timeout_ms": 60_000},
        content=crop,
        headers=JPEG,
        timeout=90,
    )
    assert answer.status_code == 200
