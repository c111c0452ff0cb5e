"""Bodies that are too large, too slow or broken off; a full queue, deadlines, and clients that leave."""

import asyncio
import re
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest

HUNDRED_MB = 100 * 2**20
PIECE = bytes(2**16)
BOX = "295,15,545,595"
HEAD = b"POST /v1/pose?boxes=295,15,545,595 HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
JPEG = {"Content-Type": "image/jpeg"}


def pieces() -> Iterator[bytes]:
    for _ in range(HUNDRED_MB // len(PIECE)):
        yield PIECE


def connection(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def read_answer(sock: socket.socket) -> bytes:
    """Read until the end of the answer's JSON body or of the connection."""
    answer = b""
    while b"}" not in answer and (data := sock.recv(65_536)):
        answer += data
    return answer


# Size


def test_a_client_that_sends_all_before_it_reads_finds_the_refusal(service):
    with connection(service.port) as sock:
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % HUNDRED_MB)
        for piece in pieces():
            sock.sendall(piece)
        assert re.match(rb"HTTP/1\.1 413 .*104,857,600", read_answer(sock), re.DOTALL)
    with connection(service.port) as sock:
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for piece in pieces():
            sock.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
        sock.sendall(b"0\r\n\r\n")
        assert re.match(rb"HTTP/1\.1 413 .*more than 33,554,432 bytes", read_answer(sock), re.DOTALL)


def test_a_body_declared_too_large_is_refused_before_it_is_sent(service):
    with connection(service.port) as sock:
        sock.sendall(HEAD + b"Content-Length: 99999999999999999\r\n\r\n")
        assert b"body_too_large" in read_answer(sock)


def test_large_bodies_of_every_kind_are_refused_likewise(client):
    form = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    starts = {"image/jpeg": b"", "multipart/form-data; boundary=x": form, "application/json": b'{"images": [{"data": "'}
    for kind, start in starts.items():
        for content in (start + bytes(40 * 2**20), (part for part in (start, *pieces()))):
            answer = client.post("/v1/pose", content=content, headers={"Content-Type": kind})
            assert (answer.status_code, answer.json()["type"]) == (413, "/problems/body_too_large")


def test_all_bodies_together_are_bounded(start_service):
    service = start_service(max_body_bytes=2**20, queue_bytes=2**20, lanes=1)
    part, rest = bytes(600_000), bytes(400_000)
    head = HEAD + b"Content-Length: 1000000\r\n\r\n"
    with connection(service.port) as first, connection(service.port) as second:
        first.sendall(head + part)
        service.wait_until(lambda: service.metric("pose_http_requests_in_flight") == 2)
        second.sendall(head + part)
        answer = read_answer(second)
        assert b"429" in answer.split(b"\r\n")[0]
        assert b"/problems/queue_full" in answer
        assert b"1,048,576 bytes" in answer
        assert b"retry-after: 1" in answer.lower()
        first.sendall(rest)  # which was there before is not disturbed
        assert b"/problems/invalid_image" in read_answer(first)
    for _ in range(3):  # and what was answered holds no room
        answer = service.client.post("/v1/pose", params={"boxes": BOX}, content=part + rest, headers=JPEG)
        assert answer.json()["type"] == "/problems/invalid_image"


def test_the_largest_body_is_taken_whatever_all_together_may_have(start_service, t_pose):
    service = start_service(max_body_bytes=2**20, queue_bytes=1024, lanes=1)
    assert service.client.post("/v1/pose", params={"boxes": BOX}, content=t_pose, headers=JPEG).status_code == 200


def test_a_body_counts_until_its_request_is_answered(start_service, t_pose):
    service = start_service(max_body_bytes=2**20, queue_bytes=2**20, lanes=1)
    padded = t_pose + bytes(700_000 - len(t_pose))
    waiting = InBackground(service, padded)
    service.wait_until(lambda: service.metric("pose_queue_crops") > 0)
    refused = service.client.post("/v1/pose", params={"boxes": BOX}, content=padded, headers=JPEG)
    assert (refused.status_code, refused.json()["type"]) == (429, "/problems/queue_full")
    assert refused.headers["Connection"] == "close"  # the next try may reach another replica
    assert "bytes of bodies" in refused.json()["detail"]
    waiting.join()
    assert waiting.answer.status_code == 200


@pytest.mark.parametrize("content", [bytes(30 * 2**20), pieces])
def test_bodies_of_refused_requests_are_let_go_at_once(start_service, content):
    """Not when the next collection of cycles comes: what was raised holds the frames that hold the body."""
    service = start_service(lanes=1)
    memory = []
    for _ in range(8):
        body = content() if callable(content) else content
        service.client.post("/v1/pose", params={"boxes": BOX}, content=body, headers=JPEG)
        memory.append(service.metric("process_resident_memory_bytes"))
    assert max(memory[2:]) - min(memory[2:]) < 10e6, memory  # up to two bodies of 31 MB where they wait for a collection


def test_a_body_of_just_the_limit_is_read(client):
    answer = client.post("/v1/pose", params={"boxes": BOX}, content=bytes(32 * 2**20), headers=JPEG)
    assert answer.json()["type"] == "/problems/invalid_image"


@pytest.mark.parametrize(
    ("size", "asked", "accept", "count"),
    [
        ((6000, 4000), {"boxes": "1,1,900,900"}, "image/jpeg", 12),  # 72 MB each, to be drawn on
        ((1000, 1000), {}, "application/json", 250),  # 3 MB each, while the detector works
    ],
)
def test_decoded_pictures_of_waiting_requests_are_not_kept(start_service, size, asked, accept, count):
    """They are decoded again in their turn."""
    picture = cv2.imencode(".png", np.full((*size[::-1], 3), 99, np.uint8))[1].tobytes()  # which is not decoded smaller
    service = start_service(lanes=1)
    peak = Path(f"/proc/{service.process.pid}/status")
    if not peak.exists():
        pytest.skip("reads the peak of the memory from /proc")

    async def ask_all(count: int) -> set[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=service.client.base_url, timeout=120, limits=limits) as client:
            params, headers = asked | {"timeout_ms": "60000"}, JPEG | {"Accept": accept}
            asking = [client.post("/v1/pose", params=params, content=picture, headers=headers) for _ in range(count)]
            return {answer.status_code for answer in await asyncio.gather(*asking)}

    def kilobytes() -> int:
        return int(re.search(r"VmHWM:\s*(\d+)", peak.read_text())[1])

    assert asyncio.run(ask_all(1)) == {200}
    alone = kilobytes()
    assert asyncio.run(ask_all(count)) == {200}
    assert kilobytes() < alone + 450_000


# Time


@pytest.fixture(scope="module")
def narrow(start_service):
    """A service with one lane and a queue of 100 crops, that waits a second for a body."""
    return start_service(lanes=1, queue_crops=100, body_timeout_s=1)


def trickle(sock: socket.socket, piece: bytes) -> None:
    """Send a piece now and then until an answer comes: what counts the time since the last piece never gives one."""
    until = time.monotonic() + 10
    while not select.select([sock], [], [], 0.05)[0]:
        assert time.monotonic() < until, "no answer comes while pieces do"
        sock.sendall(piece)


def test_a_body_that_does_not_arrive_in_time_is_refused(narrow):
    for head in (b"Content-Length: 1000\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"):
        with connection(narrow.port) as sock:
            started = time.monotonic()
            sock.sendall(HEAD + head)
            answer = read_answer(sock)
            assert 0.9 < time.monotonic() - started < 5
            assert b"408" in answer.split(b"\r\n")[0]
            assert b"/problems/request_timeout" in answer
            assert b"within 1 seconds; 3 bytes came" in answer
            assert sock.recv(100) == b""  # the rest is not waited for any longer


def test_a_body_that_trickles_in_is_refused(narrow):
    with connection(narrow.port) as sock:
        sock.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        trickle(sock, b"a")
        assert b"408" in read_answer(sock).split(b"\r\n")[0]


def test_a_body_that_breaks_off_disturbs_nobody(narrow):
    for head in (b"Content-Length: 1000\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"):
        with connection(narrow.port) as sock:
            sock.sendall(HEAD + head)
    narrow.wait_until(lambda: narrow.metric("pose_http_requests_in_flight") == 1)  # the one that asks
    assert "a request failed" not in narrow.log


# Queue

LARGE = ";".join([BOX] * 100)


class InBackground(threading.Thread):
    """A request of 100 crops by a client of its own; `answer` once it has ended."""

    def __init__(self, service, picture: bytes, **options: object) -> None:
        super().__init__()
        self.answer: httpx.Response | None = None
        self._send = lambda: httpx.post(
            service.client.base_url.join("/v1/pose"),
            params={"boxes": LARGE, "flip_test": True, "timeout_ms": 60_000} | options,
            content=picture,
            headers=JPEG,
            timeout=90,
        )
        self.start()

    def run(self) -> None:
        self.answer = self._send()


@pytest.fixture
def busy(narrow, t_pose) -> Iterator:
    """The narrow service while it answers a request of 100 crops."""
    request = InBackground(narrow, t_pose)
    narrow.wait_until(lambda: narrow.metric("pose_queue_crops") > 0)
    yield narrow
    request.join()
    assert request.answer.status_code == 200


def test_a_full_queue_refuses_at_once_and_says_when_to_return(busy, t_pose):
    before = busy.metric("pose_rejected_total", code="queue_full")
    answer = busy.client.post("/v1/pose", params={"boxes": LARGE}, content=t_pose, headers=JPEG)
    assert busy.metric("pose_queue_crops") > 0  # the large request, whose room it did not wait for, goes on
    assert (answer.status_code, answer.json()["type"]) == (429, "/problems/queue_full")
    assert int(answer.headers["retry-after"]) >= 1
    assert "100 crops" in answer.json()["detail"]
    assert busy.metric("pose_rejected_total", code="queue_full") == before + 1


def test_after_the_seconds_of_retry_after_there_is_room(busy, t_pose):
    """Room comes back crop by crop, at the measured rate, long before the large request has ended."""
    asked = {"boxes": ";".join([BOX] * 50), "timeout_ms": 60_000}
    refused = busy.client.post("/v1/pose", params=asked, content=t_pose, headers=JPEG)
    assert refused.status_code == 429
    told = int(refused.headers["retry-after"])
    assert 1 <= told <= 60
    time.sleep(told)
    until = time.monotonic() + told  # the machine may have turned to other work meanwhile
    while busy.client.post("/v1/pose", params=asked, content=t_pose, headers=JPEG).status_code == 429:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_probes_and_metrics_answer_whatever_the_load(busy):
    for path in ("/livez", "/readyz", "/metrics", "/v1/models"):
        assert busy.client.get(path).status_code == 200
    assert busy.metric("pose_queue_crops") > 0  # none waited for the large request
    assert busy.metric("pose_inference_workers_busy") == 1


def test_a_small_request_does_not_wait_behind_a_large_one(start_service, two_women, t_pose):
    service = start_service(lanes=2)
    large = InBackground(service, t_pose)
    service.wait_until(lambda: service.metric("pose_queue_crops") > 50)
    answer = service.client.post("/v1/pose", params={"boxes": BOX}, content=two_women, headers=JPEG)
    assert answer.status_code == 200
    assert large.is_alive()
    large.join()
    assert large.answer.status_code == 200


def test_crops_of_concurrent_requests_share_batches(narrow, t_pose):
    crops, batches = (narrow.metric(f"pose_batch_crops_{kind}", model="lpn50/1") for kind in ("sum", "count"))

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=narrow.client.base_url, timeout=60) as client:
            asking = [client.post("/v1/pose", params={"boxes": BOX}, content=t_pose, headers=JPEG) for _ in range(24)]
            return await asyncio.gather(*asking)

    answers = asyncio.run(ask_all())
    assert [answer.status_code for answer in answers] == [200] * 24
    people = [answer.json()["annotations"][0]["keypoints"] for answer in answers]
    assert max(abs(a - b) for person in people for a, b in zip(person, people[0], strict=True)) < 0.02
    assert narrow.metric("pose_batch_crops_sum", model="lpn50/1") == crops + 24
    assert narrow.metric("pose_batch_crops_count", model="lpn50/1") < batches + 24


# Deadlines and clients that leave


def test_past_its_deadline_a_request_is_answered_so(client, t_pose):
    answer = client.post("/v1/pose", params={"boxes": BOX, "timeout_ms": 1}, content=t_pose, headers=JPEG)
    assert (answer.status_code, answer.json()["type"]) == (504, "/problems/deadline_exceeded")
    assert answer.json()["detail"].startswith("The deadline (timeout_ms, 1 milliseconds) passed")


def test_the_services_own_deadline_is_named(start_service, t_pose):
    answer = start_service(timeout_ms=1).client.post("/v1/pose", params={"boxes": BOX}, content=t_pose, headers=JPEG)
    assert answer.json()["detail"].startswith("The deadline (the service's, 1 milliseconds) passed")


def test_a_deadline_counts_from_the_arrival_of_the_body_on(service, t_pose):
    with connection(service.port) as sock:
        head = HEAD.replace(b"?", b"?timeout_ms=2000&") + b"Content-Length: %d\r\n\r\n" % len(t_pose)
        sock.sendall(head + t_pose[:-1])
        time.sleep(2.5)
        sock.sendall(t_pose[-1:])
        assert b" 200 " in sock.recv(65_536)[:20]


def test_past_its_deadline_a_requests_waiting_crops_are_dropped(start_service, t_pose):
    service = start_service(lanes=1, queue_crops=300)
    others = [InBackground(service, t_pose), InBackground(service, t_pose)]
    answer = service.client.post("/v1/pose", params={"boxes": LARGE, "timeout_ms": 1500}, content=t_pose, headers=JPEG)
    assert answer.status_code == 504
    assert service.metric("pose_dropped_crops_total", reason="deadline") > 0
    for other in others:
        other.join()
        assert other.answer.status_code == 200
    assert service.metric("pose_queue_crops") == 0


def test_a_client_that_leaves_has_its_waiting_crops_dropped(narrow, t_pose):
    dropped = narrow.metric("pose_dropped_crops_total", reason="disconnect")
    head = f"POST /v1/pose?boxes={LARGE}&flip_test=true HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
    with connection(narrow.port) as sock:
        sock.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(t_pose) + t_pose)
        narrow.wait_until(lambda: narrow.metric("pose_queue_crops") > 0)
    narrow.wait_until(lambda: narrow.metric("pose_dropped_crops_total", reason="disconnect") > dropped, 2)
    narrow.wait_until(lambda: narrow.metric("pose_http_requests_in_flight") == 1, 2)
    narrow.wait_until(lambda: narrow.metric("pose_http_requests_total", route="/v1/pose", status="499") > 0, 2)
    answer = narrow.client.post("/v1/pose", params={"boxes": LARGE}, content=t_pose, headers=JPEG)
    assert answer.status_code == 200  # its room in the queue is free again
