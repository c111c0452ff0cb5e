"""WS /v1/stream over a real socket: frames, handshakes, limits, and clients that are slow, silent or gone."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import time

import cv2
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from app.api.stream import _Newest

KEY = base64.b64encode(bytes(16)).decode()
HANDSHAKE = {
    "Host": "x",
    "Connection": "keep-alive, Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": KEY,
}


@contextlib.contextmanager
def stream(service, query="", **options):
    with connect(f"ws://127.0.0.1:{service.port}/v1/stream{query}", max_size=None, **options) as socket_:
        yield socket_


def ask(socket_: ClientConnection, frame: bytes) -> dict:
    socket_.send(frame)
    return json.loads(socket_.recv(timeout=30))


def refusal(service, query="", **options) -> dict:
    """The problem with which a handshake is refused."""
    with pytest.raises(InvalidStatus) as refused, stream(service, query, **options):
        pass
    response = refused.value.response
    problem = json.loads(response.body)
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers["X-Request-ID"] == problem["request_id"]
    assert response.status_code == problem["status"]
    return problem


def jpeg(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def pixels_of(photo: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR)


def head_of(path="/v1/stream", method="GET", **changed: str | None) -> bytes:
    headers = HANDSHAKE | {name.replace("_", "-"): value for name, value in changed.items()}
    lines = [f"{name}: {value}\r\n" for name, value in headers.items() if value is not None]
    return f"{method} {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode()


def exchanged(service, *parts: bytes, until: bytes = b"nothing but the end") -> bytes:
    """What comes back for raw bytes until that is read, or the other side closes."""
    answer = b""
    with (
        socket.create_connection(("127.0.0.1", service.port), timeout=20) as sock,
        contextlib.suppress(ConnectionResetError, BrokenPipeError),
    ):
        for part in parts:
            sock.sendall(part)
            time.sleep(0.05)
        while until not in answer and (data := sock.recv(65_536)):
            answer += data
    return answer


@pytest.fixture(scope="module")
def alone(t_pose) -> bytes:
    """The part of the photo in which one person is found, and nothing that is taken for another; 900 × 720."""
    return jpeg(pixels_of(t_pose)[:, :900])


@pytest.fixture(scope="module")
def strict(start_service):
    """Two streams at once, and two seconds for a frame."""
    return start_service(max_streams=2, body_timeout_s=2, queue_bytes=3 * 2**20, max_body_bytes=2**20)


# Frames


def test_the_first_frame_is_answered_as_a_request_is_and_people_have_numbers(service, two_women):
    posted = service.client.post("/v1/pose", content=two_women, headers={"Content-Type": "image/jpeg"}).json()
    with stream(service) as socket_:
        answer = ask(socket_, two_women)
    assert [person.pop("track_id") for person in answer["annotations"]] == [1, 2]
    assert answer.pop("skipped") == 0
    assert answer.pop("timing").keys() >= {"decode", "detect", "infer", "total"}
    assert answer == posted


def test_somebody_who_moves_through_the_picture_keeps_their_number(service, t_pose):
    photo = pixels_of(t_pose)
    ways = []
    with stream(service) as socket_:
        for number in range(20):
            left = 8 * number
            answer = ask(socket_, jpeg(photo[:, left : left + 900]))
            assert answer["images"][0]["id"] == number
            (person,) = answer["annotations"]
            assert person["track_id"] == 1
            ways.append(np.array(person["keypoints"]).reshape(-1, 3)[:, :2] + [left, 0])
    sure = np.array(person["keypoint_scores"]) > 0.5
    assert sure.sum() > 10
    assert np.abs(ways - ways[0])[:, sure].max() < 25


def test_between_two_searches_people_are_looked_for_where_their_joints_were(service, t_pose):
    with stream(service) as socket_:
        timings = [ask(socket_, t_pose)["timing"] for _ in range(3)]
    assert "detect" in timings[0]
    assert not all("detect" in timing for timing in timings[1:])


def test_who_has_left_is_not_told_any_more_and_somebody_else_has_another_number(service, alone, two_women):
    nobody = jpeg(np.full((720, 900, 3), 128, np.uint8))
    counted = [service.metric(f"pose_people_per_image_{what}") for what in ("count", "sum")]
    with stream(service) as socket_:
        assert [person["track_id"] for person in ask(socket_, alone)["annotations"]] == [1]
        assert ask(socket_, nobody)["annotations"] == []
        assert [person["track_id"] for person in ask(socket_, two_women)["annotations"]] == [2, 3]
    assert service.metric("pose_people_per_image_count") == counted[0] + 3
    assert service.metric("pose_people_per_image_sum") == counted[1] + 3  # who is told, not who was looked for


def test_frames_may_change_their_size(service, alone):
    small = jpeg(cv2.resize(pixels_of(alone), (225, 180), interpolation=cv2.INTER_AREA))
    with stream(service) as socket_:
        for frame, width in ((alone, 900), (small, 225), (alone, 900)):
            answer = ask(socket_, frame)
            assert answer["images"][0]["width"] == width
            (person,) = answer["annotations"]
            assert person["bbox"][2] < width / 2


def test_the_newest_frame_wins(service, t_pose):
    before = service.metric("pose_stream_frames_total", outcome="skipped")
    with stream(service) as socket_:
        for _ in range(30):
            socket_.send(t_pose)
        answers = [json.loads(socket_.recv(timeout=30))]
        while answers[-1]["images"][0]["id"] < 29:
            answers.append(json.loads(socket_.recv(timeout=30)))
    assert len(answers) < 30
    skipped = sum(answer["skipped"] for answer in answers)
    assert len(answers) + skipped == 30
    assert service.metric("pose_stream_frames_total", outcome="skipped") == before + skipped


def test_a_stream_is_idle_only_while_a_frame_is_waited_for():
    async def take_and_work() -> list[bool]:
        newest = _Newest()
        waiting = asyncio.create_task(newest.take())
        await asyncio.sleep(0.02)
        idle = [newest.idle_seconds > 0.01]
        assert not newest.put(b"one")
        assert not newest.put(b"two")
        assert newest.put(b"three")
        await waiting
        await asyncio.sleep(0.02)
        idle.append(newest.idle_seconds > 0)  # it is worked on
        assert (await newest.take())[:2] == (b"three", 2)
        return idle

    assert asyncio.run(take_and_work()) == [True, False]


def test_options_are_those_of_a_request(service, two_women):
    with stream(service, "?max_people=1&keypoint_threshold=1&flip_test=true&model=lpn50/1") as socket_:
        (person,) = ask(socket_, two_women)["annotations"]
    assert person["num_keypoints"] == 0


def test_a_broken_frame_is_told_and_the_stream_goes_on(service, alone):
    with stream(service) as socket_:
        assert ask(socket_, alone)["images"][0]["id"] == 0
        problem = ask(socket_, alone[:5000])
        assert (problem["type"], problem["status"], problem["image_id"]) == ("/problems/invalid_image", 422, 1)
        assert problem["request_id"] == socket_.response.headers["X-Request-ID"]
        assert [person["track_id"] for person in ask(socket_, alone)["annotations"]] == [1]


def test_a_deadline_is_of_each_frame(service, t_pose):
    with stream(service, "?timeout_ms=1") as socket_:
        assert ask(socket_, t_pose)["type"] == "/problems/deadline_exceeded"
        assert ask(socket_, t_pose)["type"] == "/problems/deadline_exceeded"


def test_streams_are_counted(start_service, t_pose):
    service = start_service(lanes=1)
    with stream(service) as socket_:
        assert service.metric("pose_streams") == 1
        ask(socket_, t_pose)
        ask(socket_, b"nothing")
        with stream(service, "?timeout_ms=1") as hasty:
            ask(hasty, t_pose)
        assert service.metric("pose_stream_frames_total", outcome="late") == 1
        service.wait_until(lambda: service.metric("pose_streams") == 1)
        assert service.metric("pose_http_requests_in_flight") == 1  # the one for the metrics
    service.wait_until(lambda: service.metric("pose_streams") == 0)
    assert service.metric("pose_stream_frames_total", outcome="answered") == 1
    assert service.metric("pose_stream_frames_total", outcome="refused") == 1
    assert service.metric("pose_stream_frame_duration_seconds_count") == 1
    service.wait_until(lambda: service.metric("pose_http_requests_total", route="/v1/stream", status="101") == 2)
    assert service.metric("pose_http_request_duration_seconds_count", route="/v1/stream") == 0


# Handshakes


@pytest.mark.parametrize(
    ("query", "code", "named"),
    [
        (
            "?colour=red",
            "invalid_option",
            "query.colour is not known; known are model, keypoint_threshold, detection_threshold",
        ),
        ("?max_people=0", "invalid_option", "max_people"),
        ("?boxes=1,1,9,9", "invalid_option", "boxes"),
        ("?format=results", "invalid_option", "format"),
        ("?model=none", "model_not_found", "none"),
        ("?timeout_ms=99999999", "invalid_option", "timeout_ms"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_at_once(service, query, code, named):
    problem = refusal(service, query)
    assert problem["type"] == f"/problems/{code}"
    assert named in problem["detail"]


def test_without_a_detector_there_are_no_streams(start_service):
    problem = refusal(start_service(detector="", lanes=1))
    assert problem["type"] == "/problems/not_found"
    assert "no detector (POSE_DETECTOR)" in problem["detail"]


@pytest.fixture(scope="module")
def guarded(start_service):
    return start_service(lanes=1, api_keys="sesame+/ü", cors_origins="https://app.example")


def test_keys_are_asked_for(guarded):
    assert refusal(guarded)["type"] == "/problems/unauthorized"
    assert refusal(guarded, subprotocols=["pose", "key.AAAA", "key.A"])["type"] == "/problems/unauthorized"
    answer = exchanged(guarded, head_of(Sec_WebSocket_Protocol="key.é"), until=b"/problems/")
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert "Traceback" not in guarded.log
    for headers in (
        {"X-API-Key": "sesame+/ü".encode().decode("latin-1")},
        {"Authorization": b"Bearer sesame+/\xc3\xbc".decode("latin-1")},
    ):
        with stream(guarded, additional_headers=headers) as socket_:
            assert socket_.response.status_code == 101


def test_a_page_sends_its_key_as_a_subprotocol(guarded):
    written = base64.urlsafe_b64encode("sesame+/ü".encode()).decode().rstrip("=")
    with stream(guarded, subprotocols=["pose", f"key.{written}"]) as socket_:
        assert socket_.subprotocol == "pose"


def test_pages_of_other_origins_are_refused(service, guarded):
    for origin in ("https://evil.example", "http://[", "null", "http://127.0.0.1"):
        problem = refusal(service, origin=origin)
        assert problem["type"] == "/problems/origin_not_allowed"
        assert "POSE_CORS_ORIGINS" in problem["detail"]
    with stream(service, origin=f"http://127.0.0.1:{service.port}"):
        pass
    for host, origin in (
        ("a.example:443", "https://a.example"),
        ("a.example:443", "wss://a.example"),
        ("a.example:80", "http://a.example"),
    ):
        assert exchanged(service, head_of(Host=host, Origin=origin), until=b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
    assert exchanged(service, head_of(Host="a.example:80", Origin="https://a.example"), until=b"\r\n\r\n").startswith(
        b"HTTP/1.1 403 "
    )
    key = {"X-API-Key": "sesame+/ü".encode().decode("latin-1")}
    with stream(guarded, origin="https://app.example", additional_headers=key):
        pass


@pytest.mark.parametrize(
    "changed",
    [
        {"Upgrade": None},
        {"Upgrade": "h2c"},
        {"Connection": "keep-alive"},
        {"Sec_WebSocket_Version": "8"},
        {"Sec_WebSocket_Key": None},
        {"Sec_WebSocket_Key": "short"},
        {"Content_Length": "5"},
        {"Cookie": "a" * 9_000},
        {"Upgrade": "," * 9_000 + "websocket"},
        {f"X_{number}": "a" for number in range(130)},
        {"Sec_WebSocket_Protocol": 'pose, "'},
        {"Origin": "http://a\r\nOrigin: http://b"},
    ],
)
def test_what_is_no_handshake_is_told_so(service, changed):
    answer = exchanged(service, head_of(**changed), b"12345", until=b"no handshake")
    assert answer.startswith(b"HTTP/1.1 404 ")


def test_a_handshake_may_tell_that_it_has_no_body(service):
    """As the client of Java 17 does."""
    answer = exchanged(service, head_of(Content_Length="0"), until=b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 101 ")


def test_a_handshake_of_http_1_0_is_none(service):
    assert b" 101 " not in exchanged(service, head_of().replace(b"HTTP/1.1", b"HTTP/1.0"))


@pytest.mark.parametrize("path", ["/v1/pose", "/livez", "/v1/stream/"])
def test_elsewhere_an_upgrade_is_not_taken_up(service, path):
    assert b" 101 " not in exchanged(service, head_of(path), until=b"\r\n\r\n")


def test_a_stream_begins_on_a_connection_that_has_had_requests(service):
    probe = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = exchanged(service, probe, head_of(), until=b"HTTP/1.1 101 ")
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path", ["/v1/stream", "/v1/pose"])
def test_a_handshake_sent_ahead_of_an_answer_is_not_taken_up(service, path):
    answer = exchanged(service, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" + head_of(path), until=b"/problems/")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b" 101 " not in answer


def test_a_head_may_arrive_in_pieces(service):
    head = head_of()
    assert exchanged(service, head[:30], head[30:90], head[90:], until=b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")


def test_bytes_behind_a_handshake_do_no_harm(service, alone):
    exchanged(service, head_of() + b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
    exchanged(service, head_of(), b"GET /livez HTTP/1.1\r\n\r\n")
    exchanged(service, head_of(), os.urandom(4096))
    with stream(service) as socket_:
        assert len(ask(socket_, alone)["annotations"]) == 1
    assert "Traceback" not in service.log


# Limits


def test_there_are_so_many_streams_at_once_and_no_more(strict, alone):
    with stream(strict), stream(strict):
        problem = refusal(strict)
        assert (problem["type"], problem["status"]) == ("/problems/queue_full", 429)
        assert "2 streams" in problem["detail"]
    strict.wait_until(lambda: strict.metric("pose_streams") == 0)
    with stream(strict) as socket_:
        assert len(ask(socket_, alone)["annotations"]) == 1


def test_a_stream_without_frames_is_closed(strict):
    with stream(strict) as socket_:
        with pytest.raises(ConnectionClosed) as closed:
            socket_.recv(timeout=10)
        assert closed.value.rcvd.code == 1008
        assert "2 seconds" in closed.value.rcvd.reason


def test_a_frame_that_does_not_end_is_given_up(strict):
    with socket.create_connection(("127.0.0.1", strict.port), timeout=10) as sock:
        sock.sendall(head_of())
        assert sock.recv(4096).startswith(b"HTTP/1.1 101 ")
        sock.sendall(b"\x02\x80" + bytes(4))  # the first part of a message
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(300):
                sock.sendall(b"\x00\x80" + bytes(4))  # another one, and never the last
                time.sleep(0.02)
        assert sock.recv(4096)[:1] == b"\x88"  # closing


@pytest.mark.parametrize("size", [2**19 + 1, 20 * 2**20])
def test_a_frame_over_the_limit_closes_the_stream(strict, two_women, size):
    """POSE_QUEUE_BYTES / (3 × POSE_MAX_STREAMS), which is half of what a body may have here."""
    with stream(strict) as socket_:
        assert "annotations" in ask(socket_, two_women + bytes(2**19 - len(two_women)))
        with contextlib.suppress(ConnectionClosed):  # before all is sent
            socket_.send(bytes(size))
        with pytest.raises(ConnectionClosed) as closed:
            socket_.recv(timeout=10)
        assert closed.value.rcvd.code == 1009


TEXTS = [b"\x81\x86" + bytes(4) + b"frame?", b"\x81\x81" + bytes(4) + b"\xff", b"\x01\x81" + bytes(4) + b"a"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_closes_the_stream(service, text):
    answer = exchanged(service, head_of(), text, until=b"picture file")
    assert b"\x03\xebA frame is a binary message" in answer  # 1003
    assert "Traceback" not in service.log


def test_text_behind_many_frames_is_told_as_well(service):
    for count in (50, 200, 400):
        answer = exchanged(service, head_of(), (b"\x82\x80" + bytes(4)) * count + TEXTS[0], until=b"picture file.")
        assert b"\x03\xebA frame is a binary message" in answer
    assert "Traceback" not in service.log


@pytest.mark.parametrize("text", TEXTS)
def test_text_with_a_close_behind_it_is_closed(service, text):
    assert b"\r\n\r\n\x88" in exchanged(service, head_of(), text + b"\x88\x80" + bytes(4))
    assert "Traceback" not in service.log


@pytest.mark.parametrize("tiny", [b"\x82\x80", b"\x89\x80", b"\x02\x80", b"\x00\x80"])
def test_a_flood_of_tiny_frames_closes_the_stream_and_delays_nobody(service, tiny):
    flood = (tiny + bytes(4)) * 10_000
    first = b"\x02\x80" + bytes(4) if tiny == b"\x00\x80" else b""
    if tiny == b"\x02\x80":
        flood = tiny + bytes(4) + flood.replace(b"\x02", b"\x00")
    longest = 0.0
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as sock:
        sock.sendall(head_of())
        assert sock.recv(4096).startswith(b"HTTP/1.1 101 ")
        with contextlib.suppress(ConnectionError):
            sock.sendall(first + flood)
        answer = b""
        while b"frames came" not in answer:
            answer += sock.recv(65_536)
        started = time.monotonic()
        assert service.client.get("/livez").status_code == 200
        longest = time.monotonic() - started
    assert longest < 1


def test_who_vanishes_leaves_nothing_behind(strict, t_pose):
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", strict.port), timeout=10) as sock:
            sock.sendall(head_of())
            assert sock.recv(4096).startswith(b"HTTP/1.1 101 ")
            frame = np.frombuffer(t_pose, np.uint8)
            sock.sendall(b"\x82\xff" + len(frame).to_bytes(8, "big") + bytes(4) + frame.tobytes())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
        strict.wait_until(lambda: strict.metric("pose_streams") == 0)
    strict.wait_until(lambda: strict.metric("pose_http_connections") == 1)
    assert strict.metric("pose_admitted_crops") == 0
    assert "Traceback" not in strict.log


def test_a_stopping_service_refuses_handshakes_as_its_probe_tells(start_service):
    service = start_service(lanes=1)
    probe = service.client.get("/readyz")  # its connection stays open
    service.process.send_signal(signal.SIGTERM)

    def ready() -> bool:
        nonlocal probe
        probe = service.client.get("/readyz")
        return probe.status_code == 200

    service.wait_until(lambda: not ready())
    refused = refusal(service)
    assert (refused["type"], refused["detail"]) == (probe.json()["type"], probe.json()["detail"])
    assert service.process.wait(10) == 0


def test_streams_end_as_the_service_stops(start_service, t_pose):
    service = start_service(lanes=1)
    with stream(service) as socket_:
        ask(socket_, t_pose)
        service.process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed) as closed:
            socket_.recv(timeout=10)
        assert closed.value.rcvd.code == 1012
    assert service.process.wait(10) == 0
    assert "Traceback" not in service.log
