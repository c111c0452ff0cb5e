"""Connections of hostile, slow and many clients, and what becomes of them when the service stops."""

import asyncio
import base64
import contextlib
import http.client
import itertools
import re
import select
import signal
import socket
import threading
import time
from functools import partial

import cv2
import httpx
import numpy as np
import orjson
import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from app.api.connections import Connection
from app.api.stream_connection import StreamConnection
from app.settings import Settings
from app.telemetry.metrics import Metrics

BOX = "295,15,545,595"
JPEG = {"Content-Type": "image/jpeg"}
HANDSHAKE = (
    b"GET /v1/stream?50000 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
HEAD = b"POST /v1/pose HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 1000\r\n\r\n"


@pytest.fixture(scope="module")
def strict(start_service):
    """A service with little patience and few connections."""
    return start_service(body_timeout_s=0.5, max_connections=5)


@pytest.fixture(scope="module")
def patient(start_service):
    """A service that leaves a busy machine the time for what is to succeed."""
    return start_service(body_timeout_s=3, lanes=1)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def read_to_end(sock: socket.socket) -> bytes:
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65_536):
            answer += data
    return answer


def ask_and_read(sock: socket.socket) -> None:
    """A request and its whole answer, after which the connection is idle."""
    sock.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        answer += sock.recv(65_536)
    assert b"200 OK" in answer


def problem(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head.lower()
    assert f"x-request-id: {orjson.loads(body)['request_id']}".encode() in head.lower()
    return int(head.split()[1]), orjson.loads(body)["type"].removeprefix("/problems/")


def test_a_head_that_does_not_arrive_in_time_is_refused(strict):
    with connect(strict.port) as sock:
        sock.sendall(b"POST /v1/pose HTTP/1.1\r\nHost: localhost\r\n")
        assert problem(read_to_end(sock)) == (408, "request_timeout")


def test_a_head_that_trickles_in_is_refused(strict):
    with connect(strict.port) as sock:
        sock.sendall(b"GET /livez HTTP/1.1\r\n")
        until = time.monotonic() + 10
        while not select.select([sock], [], [], 0.05)[0]:
            assert time.monotonic() < until, "no answer comes while lines do"
            sock.sendall(b"X-A: b\r\n")
        assert b" 408 " in sock.recv(65_536)[:20]


def test_a_connection_without_a_request_is_closed(strict):
    with connect(strict.port) as sock:
        started = time.monotonic()
        assert read_to_end(sock) == b""
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("ending", [b"", b"\r\n\r\n"], ids=["endless", "complete"])
def test_a_long_head_is_refused(strict, ending):
    with connect(strict.port) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(b"GET /livez HTTP/1.1\r\nX-Long: " + b"a" * 70_000 + ending)
        assert problem(read_to_end(sock)) == (400, "malformed_body")


@pytest.mark.parametrize(
    "said", [b"\x16\x03\x01\x02\x00\x01", b"hello\r\n\r\n", b"GET / HTTP/9.9.9\r\n\r\n", b"GET \xff HTTP/1.1\r\n\r\n"]
)
def test_what_is_not_http_is_told_in_the_form_of_all_problems(strict, said):
    with connect(strict.port) as sock:
        sock.sendall(said)
        assert problem(read_to_end(sock)) == (400, "malformed_body")


@pytest.mark.parametrize(
    "said", [b"POST /v1/pose HTTP/1.1\r\nHost: x", HEAD, HEAD + b"abc"], ids=["head", "no body", "half a body"]
)
def test_a_request_that_ends_early_is_told_so(strict, said):
    with connect(strict.port) as sock:
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)
        assert problem(read_to_end(sock)) == (400, "malformed_body")


def test_half_a_head_behind_another_request_is_refused_after_that_ones_answer(strict, t_pose):
    with connect(strict.port) as sock:
        path = f"/v1/pose?boxes={';'.join([BOX] * 100)}&flip_test=true"  # which take longer than a head may
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: {len(t_pose)}\r\n\r\n"
        sock.sendall(head.encode() + t_pose)
        time.sleep(0.1)
        sock.sendall(b"GET /livez HT")
        first, _, second = read_to_end(sock).partition(b"HTTP/1.1 408 ")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert b"/problems/request_timeout" in second


def test_a_url_that_is_none_is_told_so_behind_another_request_too(patient):
    with connect(patient.port) as sock:
        ask_and_read(sock)
        sock.sendall(b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n")
        assert problem(read_to_end(sock)) == (400, "malformed_body")


def test_a_connection_that_ends_between_requests_is_closed_without_a_word(patient):
    with connect(patient.port) as sock:
        ask_and_read(sock)
        sock.shutdown(socket.SHUT_WR)
        assert read_to_end(sock) == b""


@pytest.mark.parametrize("piece", [b"X-Trailer: y\r\n" * 2000, b"X" * 20_000], ids=["many", "one"])
def test_endless_trailers_are_refused_and_not_kept(start_service, piece):
    service = start_service(lanes=1)
    before = service.metric("process_resident_memory_bytes")
    with connect(service.port) as sock:
        sock.sendall(
            b"POST /v1/pose HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
        )
        with contextlib.suppress(ConnectionError):
            for _ in range(2000):
                sock.sendall(piece)
            pytest.fail("tens of megabytes of trailers were read")
    assert service.metric("process_resident_memory_bytes") < before + 20e6


def test_what_goes_on_after_its_answer_is_answered_once_and_closed(strict):
    with connect(strict.port) as sock:
        sock.sendall(
            b"POST /v1/pose HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
        )
        answer = sock.recv(65_536)
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                sock.sendall(b"X-Trailer: y\r\n" * 2000)
        answer += read_to_end(sock)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b" 415 " in answer[:20]


def test_a_body_in_very_many_chunks_is_refused(patient, t_pose):
    head = f"POST /v1/pose?boxes={BOX} HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nConnection: close\r\n"
    head += "Transfer-Encoding: chunked\r\n\r\n"
    pieces = [t_pose[start : start + 64] for start in range(0, len(t_pose), 64)]
    with connect(patient.port) as sock:
        sock.sendall(head.encode() + b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in pieces) + b"0\r\n\r\n")
        assert b" 200 " in read_to_end(sock)[:20]
    with connect(patient.port) as sock:
        sock.sendall(head.encode() + 4200 * b"1\r\nx\r\n")
        assert b"under 64 bytes on average" in read_to_end(sock)


def test_a_chunked_body_with_short_trailers_is_read(patient, t_pose):
    head = f"POST /v1/pose?boxes={BOX} HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nConnection: close\r\n"
    chunk = b"%x\r\n%s\r\n" % (len(t_pose), t_pose)
    with connect(patient.port) as sock:
        sock.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk + b"0\r\nX-Sum: 1\r\n\r\n")
        assert b" 200 " in read_to_end(sock)[:20]


@pytest.mark.parametrize("offer", ["h2c", "websocket", "H2C, TLS/1.2"])
def test_a_client_that_offers_another_protocol_has_its_body_read(patient, t_pose, offer):
    """As Java's client and curl --http2 do with every request."""
    head = f"POST /v1/pose?boxes={BOX} HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: {len(t_pose)}\r\n"
    offers = f"Connection: Upgrade, HTTP2-Settings\r\nupgrade: {offer}\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n"
    with connect(patient.port) as sock:
        sock.sendall(f"{head}{offers}".encode() + t_pose)
        assert b" 200 " in sock.recv(65_536)[:20]
    with connect(patient.port) as sock:
        sock.sendall(f"{head}{offers}".encode())
        time.sleep(0.1)
        sock.sendall(t_pose)
        assert b" 200 " in sock.recv(65_536)[:20]


def test_a_request_that_breaks_off_in_its_body_keeps_its_id(service):
    head = b"POST /v1/pose HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
    cut_off, no_chunk = b"Content-Length: 100\r\n\r\n1234", b"Transfer-Encoding: chunked\r\n\r\nx\r\n"
    for name, rest in (("cut-off", cut_off), ("no-chunk", no_chunk), ("", cut_off), ("", no_chunk)):
        with connect(service.port) as sock:
            sock.sendall(head + (f"X-Request-ID: {name}\r\n".encode() if name else b"") + rest)
            sock.shutdown(socket.SHUT_WR)
            refusal = read_to_end(sock)
        assert problem(refusal) == (400, "malformed_body")
        request_id = orjson.loads(refusal.partition(b"\r\n\r\n")[2])["request_id"]
        assert name in ("", request_id)
        service.wait_until(lambda own=request_id: service.log.count(f'"request_id":"{own}"') == 2)  # refused, and its end


def send_in_pieces(sock: socket.socket, data: bytes, *cuts: int) -> None:
    """Send data so that the service reads it in pieces that begin at the cuts."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for start, end in itertools.pairwise((0, *cuts, len(data))):
        sock.sendall(data[start:end])
        time.sleep(0.05)


def test_an_offer_and_the_end_of_a_head_may_arrive_in_pieces(patient, t_pose):
    # The body has a line like that of an offer too, and would not end with its boundary if that were changed.
    part = b'--x\r\nUpgrade: h2c\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    body = part + t_pose + b"\r\n--x--\r\n"
    head = f"POST /v1/pose?boxes={BOX} HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    offers = "Connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n{offers}".encode() + body
    offer, end = request.index(b"\r\nupgrade:"), request.index(b"\r\n\r\n")
    cuts = [(offer + n,) for n in (0, 1, 2, 3, 6, 9, 10)] + [(end + n,) for n in (1, 2, 3, 4)]
    for where in (*cuts, tuple(range(offer - 1, offer + 12)), tuple(range(end - 1, end + 6))):
        with connect(patient.port) as sock:
            send_in_pieces(sock, request, *where)
            assert b" 200 " in sock.recv(65_536)[:20], where


def test_an_offer_with_a_body_behind_another_request_closes_the_connection(patient, t_pose):
    """Its body would be taken for another request."""
    hidden = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    head = (
        f"POST /v1/pose HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: {len(hidden)}\r\n\r\n"
    )
    with connect(patient.port) as sock:
        sock.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" + head.encode() + hidden)
        assert b'"models"' not in read_to_end(sock)


def test_what_is_sent_behind_an_offer_in_one_read_is_known_to_be_lost(patient):
    """Without a body, and behind another request."""
    request = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    offer = request[:-2] + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    with connect(patient.port) as sock:
        sock.sendall(request + offer + request)
        first, _, second = read_to_end(sock).rpartition(b"HTTP/1.1 200 OK")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in second


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_refusal_is_read_by_a_client_whose_connection_closes(patient, version):
    head = f"POST /v1/pose HTTP/{version}\r\nHost: x\r\nContent-Type: text/plain\r\nConnection: close\r\n"
    body = bytes(3_000_000)
    for _ in range(10):
        with connect(patient.port) as sock:
            sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert problem(read_to_end(sock)) == (415, "unsupported_media_type")


def test_a_client_that_waits_before_its_body_is_refused_and_told_of_the_close(patient):
    head = "POST /v1/pose HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nConnection: close\r\nExpect: 100-continue\r\n"
    with connect(patient.port) as sock:
        sock.sendall(f"{head}Content-Length: 3000000\r\n\r\n".encode())
        answer = read_to_end(sock)
    assert problem(answer) == (415, "unsupported_media_type")
    assert b"connection: close" in answer.lower()


def test_a_head_that_begins_behind_another_request_may_arrive_in_pieces(patient, t_pose):
    """Cut in the end of the head, and behind a line's end of the body, which is no part of it."""
    body = b'{\r\n"images": [{"data": "%s", "boxes": []}]}' % base64.b64encode(t_pose)
    first = "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    head = f"{first}POST /v1/pose HTTP/1.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with connect(patient.port) as sock:
        send_in_pieces(sock, request, request.index(body) - 2, request.index(body) + 3)
        assert read_to_end(sock).count(b"HTTP/1.1 200 ") == 2


def test_requests_sent_ahead_are_answered_in_order(patient):
    with connect(patient.port) as sock:
        sock.sendall(b"".join(b"GET /v1/%d HTTP/1.1\r\nHost: x\r\nX-Request-ID: r%d\r\n\r\n" % (i, i) for i in range(50)))
        answers = b""
        while answers.count(b'"request_id":"r49"') == 0:
            part = sock.recv(65_536)
            assert part, answers
            answers += part
    assert [int(each) for each in re.findall(rb'"request_id":"r(\d+)"', answers)] == list(range(50))


def test_who_leaves_with_requests_sent_ahead_has_the_first_ones_work_dropped(start_service, t_pose):
    service = start_service(lanes=1)
    boxes = ";".join([BOX] * 100) + "&flip_test=true"
    head = f"POST /v1/pose?boxes={boxes} HTTP/1.1\r\nContent-Type: image/jpeg\r\nContent-Length: {len(t_pose)}\r\n\r\n"
    with connect(service.port) as sock:
        sock.sendall(head.encode() + t_pose + b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        service.wait_until(lambda: service.metric("pose_queue_crops") > 50)
    service.wait_until(lambda: service.metric("pose_dropped_crops_total", reason="disconnect") > 50, 3)
    assert service.metric("pose_admitted_crops") == 0
    assert "Traceback" not in service.log


def test_thousands_of_requests_sent_ahead_are_not_kept(start_service):
    service = start_service(lanes=1)
    before = service.metric("process_resident_memory_bytes")
    with contextlib.ExitStack() as held:
        for _ in range(20):
            sock = held.enter_context(connect(service.port))
            sock.sendall(b"POST /v1/pose HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 1\r\n\r\n?")
            with contextlib.suppress(ConnectionError):
                sock.sendall(b"GET / HTTP/1.1\r\n\r\n" * 14_000)
        assert service.metric("process_resident_memory_bytes") < before + 100e6  # 33 MB each, were they kept
    service.wait_until(lambda: service.metric("pose_http_connections") <= 1)
    assert "Traceback" not in service.log


def test_refusals_of_connections_are_counted_and_logged(strict):
    before = counted(strict)
    with connect(strict.port) as sock:
        sock.sendall(b"hello\r\n\r\n")
        answer = read_to_end(sock)
    assert counted(strict) == [count + 1 for count in before]
    request_id = orjson.loads(answer.partition(b"\r\n\r\n")[2])["request_id"]
    (line,) = [orjson.loads(line) for line in strict.log.splitlines() if request_id in line]
    assert (line["status"], line["problem"]) == (400, "malformed_body")


def counted(service) -> list[float]:
    """Requests that were refused as malformed, by their problem and by their status."""
    return [
        service.metric("pose_rejected_total", code="malformed_body"),
        service.metric("pose_http_requests_total", status="400"),
    ]


def test_a_request_that_is_refused_while_it_is_read_is_counted_once(strict):
    before = counted(strict)
    with connect(strict.port) as sock:
        sock.sendall(b"POST /v1/pose HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n")
        time.sleep(0.1)
        sock.sendall(b"no length\r\n")
        assert problem(read_to_end(sock)) == (400, "malformed_body")
    strict.wait_until(lambda: strict.metric("pose_http_requests_in_flight") == 1)  # the one that asks
    assert counted(strict) == [count + 1 for count in before]


def test_a_connection_outlives_the_pause_that_clients_make_between_requests(service):
    with connect(service.port) as sock:
        for pause in (6, 0):  # httpx lets go after 5 s: a request that crosses the service's closing is lost
            sock.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b'"live"}'):
                part = sock.recv(4096)
                assert part, answer
                answer += part
            time.sleep(pause)


def test_what_came_while_the_process_stood_still_is_read(start_service, t_pose):
    service = start_service(body_timeout_s=1.5, lanes=1)
    request = HEAD.replace(b"/v1/pose", b"/v1/pose?boxes=1,1,9,9").replace(b"1000", b"%d" % len(t_pose)) + t_pose
    with connect(service.port) as half, connect(service.port) as none:
        half.sendall(request[: -len(t_pose)] + t_pose[:9])
        service.wait_until(lambda: service.metric("pose_http_requests_in_flight") > 1)
        service.process.send_signal(signal.SIGSTOP)
        half.sendall(t_pose[9:])
        none.sendall(request)
        time.sleep(3)
        service.process.send_signal(signal.SIGCONT)
        for sock in (half, none):
            assert b" 200 " in sock.recv(65_536)[:20]


def test_a_flood_of_idle_connections_shuts_nobody_out(start_service, t_pose):
    service = start_service(max_connections=8, body_timeout_s=30)
    with contextlib.ExitStack() as held:
        for _ in range(100):
            held.enter_context(connect(service.port))
        answer = httpx.post(
            service.client.base_url.join("/v1/pose"), params={"boxes": BOX}, content=t_pose, headers=JPEG, timeout=60
        )
        assert answer.status_code == 200
        assert service.metric("pose_http_connections") <= 9
    assert service.client.get("/readyz").status_code == 200


def test_over_the_limit_the_connection_that_is_idle_for_longest_is_closed(start_service):
    service = start_service(max_connections=20, body_timeout_s=30)
    service.client.close()
    with contextlib.ExitStack() as held:
        socks = [held.enter_context(connect(service.port)) for _ in range(20)]  # many of one millisecond
        for sock in socks:
            ask_and_read(sock)
        ask_and_read(socks[0])  # a proxy's, which is the oldest
        newest = held.enter_context(connect(service.port))
        ask_and_read(newest)
        assert socks[1].recv(1) == b""
        assert select.select([socks[0], *socks[2:], newest], [], [], 0.2)[0] == []


def test_over_the_limit_all_but_probes_are_refused_while_all_are_at_work(start_service):
    service = start_service(max_connections=3, body_timeout_s=30, cors_origins="https://pages.example")
    service.client.close()
    with contextlib.ExitStack() as held:
        for _ in range(3):
            sock = held.enter_context(connect(service.port))
            sock.sendall(
                b"POST /v1/pose HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 9\r\n"
                b"Expect: 100-continue\r\n\r\n"
            )
            assert b" 100 " in sock.recv(65_536)[:20]  # it is at work
        names = b"Host: x\r\nX-Request-ID: mine\r\nOrigin: https://pages.example"
        named = [head.replace(b"Host: x", names) for head in (HEAD, HANDSHAKE)]
        for refused in (named[0] + bytes(1000), named[1]):
            with connect(service.port) as another:
                another.sendall(refused)
                refusal = read_to_end(another)
            assert problem(refusal) == (503, "not_ready")
            assert b"retry-after: 1\r\n" in refusal.lower()
            assert b"x-request-id: mine\r\n" in refusal.lower()
            assert b"access-control-allow-origin: https://pages.example\r\n" in refusal.lower()
        for _ in range(20):  # silent ones make way
            held.enter_context(connect(service.port))
        for path in ("/livez", "/readyz", "/metrics?x"):  # or a busy service would be taken for a dead one
            answer = httpx.get(service.client.base_url.join(path))
            assert answer.status_code == 200
        assert int(re.search(r"^pose_http_connections (\d+)", answer.text, re.MULTILINE)[1]) <= 3 + 8 + 1
        sock.sendall(b"123456789GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        # With the labels by which rules.yml takes it for a fault of the service.
        assert b'pose_http_requests_total{method="other",route="connection",status="503"} 2.0\n' in read_to_end(sock)


def test_a_client_that_does_not_read_its_answer_is_dropped(patient):
    noise = np.random.default_rng(7).integers(0, 256, (2000, 2000, 3), dtype=np.uint8)
    photo = cv2.imencode(".jpg", noise)[1].tobytes()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", patient.port))
        head = f"POST /v1/pose?boxes={BOX} HTTP/1.1\r\nHost: x\r\nAccept: image/png\r\nContent-Type: image/jpeg\r\n"
        request = f"{head}Content-Length: {len(photo)}\r\n\r\n".encode() + photo
        answered = patient.metric("pose_images_total")
        sock.sendall(request)
        patient.wait_until(lambda: patient.metric("pose_images_total") > answered)
        # The drawn picture of 12 MB is larger than what the kernel holds for both.
        patient.wait_until(lambda: patient.metric("pose_http_connections") == 1)  # the one that asks
        got = read_to_end(sock)
        assert b"200" in got[:20]
        assert len(got) < int(got.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        patient.wait_until(lambda: patient.metric("pose_http_requests_total", route="/v1/pose", status="499") == 1)


def test_drawn_pictures_that_lie_unread_are_bounded(start_service, t_pose):
    service = start_service(queue_bytes=1_000_000, body_timeout_s=4)
    noise = np.random.default_rng(7).integers(0, 256, (3000, 3000, 3), dtype=np.uint8)
    photo = cv2.imencode(".jpg", noise, [cv2.IMWRITE_JPEG_QUALITY, 20])[1].tobytes()
    asked = {"url": service.client.base_url.join("/v1/pose"), "params": {"boxes": BOX}, "timeout": 30}
    drawn = {"headers": {**JPEG, "Accept": "image/png"}}
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", service.port))
        head = f"POST /v1/pose?boxes={BOX} HTTP/1.1\r\nHost: x\r\nAccept: image/png\r\nContent-Type: image/jpeg\r\n"
        sock.sendall(f"{head}Content-Length: {len(photo)}\r\n\r\n".encode() + photo)
        service.wait_until(lambda: service.metric("pose_images_total") > 0)
        refused = httpx.post(content=t_pose, **asked, **drawn)  # 27 MB lie there
        assert (refused.status_code, refused.json()["type"]) == (429, "/problems/queue_full")
        assert "1,000,000 bytes of drawn pictures" in refused.json()["detail"]
        assert httpx.post(content=t_pose, **asked, headers=JPEG).status_code == 200  # others go on
        service.wait_until(lambda: httpx.post(content=t_pose, **asked, **drawn).status_code == 200)  # once it is dropped


def test_a_client_that_reads_its_answer_keeps_its_connection(patient):
    noise = np.random.default_rng(7).integers(0, 256, (2000, 2000, 3), dtype=np.uint8)
    photo = cv2.imencode(".jpg", noise)[1].tobytes()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", patient.port, timeout=20)) as connection:
        headers = {"Content-Type": "image/jpeg", "Accept": "image/png"}
        connection.request("POST", f"/v1/pose?boxes={BOX}", photo, headers)
        assert len(connection.getresponse().read()) > 5_000_000
        time.sleep(3.5)  # longer than an answer may lie unread
        connection.request("GET", "/livez")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b'{"status":"live"}')


# Connections alone, in a loop of their own, with buffers as small as they go


async def answer(scope, receive, send) -> None:
    """An application that answers before it reads a body, or opens a stream, with as many bytes as the query says."""
    body = bytes(int(scope["query_string"] or b"2"))
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "bytes": body})
        while (await receive())["type"] != "websocket.disconnect":
            pass
        return
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def connected(**settings: float):
    """A connection of the service, and a client's end of it to read and to write."""
    streams = partial(StreamConnection, Settings(**settings), Metrics())
    config = uvicorn.Config(answer, timeout_keep_alive=1, log_config=None, ws=streams)
    config.load()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(listening.getsockname())
        accepted, _ = listening.accept()
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    for end in (accepted, sock):
        end.setblocking(False)
    made = partial(Connection, Settings(**settings), Metrics(), config=config, server_state=ServerState(), app_state={})
    _, connection = await asyncio.get_running_loop().connect_accepted_socket(made, accepted)
    reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    try:
        yield connection, reader, writer
    finally:
        writer.transport.abort()
        connection.transport.abort()
        await asyncio.sleep(0)


async def is_gone(connection: Connection, seconds: float) -> bool:
    """Whether the service has let go of a connection after so long."""
    await asyncio.sleep(seconds)
    return connection not in connection.connections


@pytest.mark.parametrize("ending", [b"", b"Connection: close\r\n"])
def test_a_few_bytes_of_an_answer_that_lie_unread_hold_no_connection(ending):
    async def leave_it() -> tuple[bool, bool]:
        async with connected(body_timeout_s=1) as (connection, _, writer):
            writer.write(b"GET /?50000 HTTP/1.1\r\nHost: x\r\n" + ending + b"\r\n")
            return await is_gone(connection, 0.5), await is_gone(connection, 1.5)

    assert uvloop.run(leave_it()) == (False, True)


def test_an_answer_of_a_stream_that_lies_unread_holds_no_connection():
    async def leave_it() -> tuple[bool, bool]:
        async with connected(body_timeout_s=1) as (connection, reader, writer):
            writer.write(HANDSHAKE)
            await reader.readuntil(b" 101 ")
            streams = connection.connections
            await asyncio.sleep(0.5)
            before = len(streams)
            await asyncio.sleep(1.5)
            return before == 1, len(streams) == 0

    assert uvloop.run(leave_it()) == (True, True)


def test_a_stream_that_its_client_has_closed_does_not_disturb_the_stop():
    async def stop() -> bool:
        async with connected(body_timeout_s=30) as (connection, reader, writer):
            writer.write(HANDSHAKE)
            await reader.readuntil(b" 101 ")
            writer.write(b"\x88\x80" + bytes(4))  # a close, while the answer lies unread
            await asyncio.sleep(0.5)
            (stream,) = connection.connections
            stream.shutdown()
            stream.transport.abort()
            return await is_gone(stream, 0.1)

    assert uvloop.run(stop())


def test_a_handshake_behind_an_answer_that_lies_unread_is_none():
    async def ask() -> bytes:
        async with connected(body_timeout_s=30) as (_, reader, writer):
            writer.write(b"GET /?50000 HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.sleep(0.2)
            writer.write(HANDSHAKE)
            await asyncio.sleep(0.2)
            return await reader.readexactly(50_000) + await reader.readuntil(b"\r\n\r\n")

    assert b" 101 " not in uvloop.run(ask())


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("stray", [b"", b"\r\n", b"\r\n\r\n"])
def test_empty_lines_between_requests_keep_no_connection_open(stray, stops):
    async def rest() -> bool:
        async with connected(body_timeout_s=30) as (connection, reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b"\0\0")
            writer.write(stray)
            await asyncio.sleep(0.2)
            if stops:
                connection.shutdown()
            return await is_gone(connection, 0.3 if stops else 1.5)

    assert uvloop.run(rest())


@pytest.mark.parametrize("asks_again", [False, True])
def test_who_sends_a_body_after_its_answer_is_waited_for_no_longer_than_others(asks_again):
    async def send_late() -> bool:
        async with connected(body_timeout_s=30) as (connection, reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
            await reader.readuntil(b"\0\0")
            writer.write(b"hello")
            assert not await is_gone(connection, 0.5)
            if asks_again:
                writer.write(b"\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await reader.readuntil(b"\0\0")).startswith(b"HTTP/1.1 200 ")
                assert not await is_gone(connection, 0.7)
            return await is_gone(connection, 1)

    assert uvloop.run(send_late())


# Stopping


def test_readiness_goes_off_before_the_service_stops(start_service):
    service = start_service()
    answers = [service.client.get("/readyz")]  # its connection stays open

    def ready() -> bool:
        answers.append(service.client.get("/readyz"))
        return answers[-1].status_code == 200

    with connect(service.port) as begun:
        begun.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")  # and this one too, however late the rest comes
        service.process.terminate()
        service.wait_until(lambda: not ready())
        begun.sendall(b"\r\n")
        told = read_to_end(begun)
    assert b"\npose_ready 0.0\n" in told
    assert answers[0].status_code == 200
    assert (answers[-1].status_code, answers[-1].json()["type"]) == (503, "/problems/shutting_down")
    assert answers[-1].headers["retry-after"] == "1"
    assert b'\npose_rejected_total{code="shutting_down"} 0.0\n' in told  # by probes no client is refused
    assert service.process.wait(30) == 0


def test_an_early_refusal_is_read_by_clients_of_a_service_that_stops(start_service):
    """Whose bodies are on their way still: closing before they have come would reset the connection."""
    service = start_service(lanes=1)
    head = b"POST /v1/pose HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 3000000\r\n\r\n"
    with connect(service.port) as refused, connect(service.port) as stopping, connect(service.port) as stopped:
        refused.sendall(head)
        time.sleep(0.1)
        service.process.terminate()
        service.wait_until(lambda: service.client.get("/readyz").status_code == 503)
        stopping.sendall(head)
        time.sleep(1.2)
        stopped.sendall(head)
        time.sleep(0.1)
        for sock in (refused, stopping, stopped):
            sock.sendall(bytes(3_000_000))
            answer = read_to_end(sock)
            assert problem(answer) == (415, "unsupported_media_type")
            assert sock is refused or b"connection: close" in answer.lower()
        assert service.process.wait(3) == 0


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_stopping_under_load_resets_no_connection(start_service, t_pose, stop):
    service = start_service()
    faults: list[Exception] = []
    answers: list[int] = []

    def ask_again_and_again() -> None:
        with httpx.Client(base_url=service.client.base_url, timeout=60) as client:
            while True:
                try:
                    answers.append(client.post("/v1/pose", params={"boxes": BOX}, content=t_pose, headers=JPEG).status_code)
                except httpx.ConnectError:  # the service is gone: refused, nothing lost
                    return
                except httpx.TransportError as error:
                    faults.append(error)
                    return

    clients = [threading.Thread(target=ask_again_and_again) for _ in range(8)]
    for client in clients:
        client.start()
    service.wait_until(lambda: len(answers) > 20, 60)
    service.process.send_signal(stop)
    assert service.process.wait(30) == 0
    for client in clients:
        client.join()
    assert faults == []
    assert set(answers) == {200}
