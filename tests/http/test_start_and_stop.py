"""Starting with wrong settings or damaged models, and stopping without losing a request."""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest

from app.api.connections import LAST_REQUESTS_SECONDS

ROOT = Path(__file__).parents[2]
JPEG = {"Content-Type": "image/jpeg"}


def refusal(*arguments: str, **settings: object) -> str:
    """What a service that does not start says; it must end by itself, with a code other than 0."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("POSE_")}
    environment |= {"POSE_PORT": "0"} | {f"POSE_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "app", *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    return ended.stderr


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "high"),
        ("host", ""),
        ("port", "65536"),
        ("max_images", "0"),
        ("body_timeout_s", "-1"),
        ("log_level", "LOUD"),
        ("log_level", "INFO,app.requests"),
        ("max_connections", "0"),
        ("detector", "nobody"),
        ("default_model", "nobody"),
        ("drain_s", ""),
        ("api_keys", ", ,"),
        ("cors_origins", "https://a.example,https://b.example/"),
        ("cors_origins", "c.example"),
        ("max_image_pixels", "99999999999999999999"),
        ("lanes", "5000"),
        ("max_timeout_ms", "9999"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(name, value):
    said = refusal(**{name: value})
    assert said.startswith(f"POSE_{name.upper()}: ")
    assert value in said
    assert said.count("\n") == 1


def test_more_connections_than_the_system_gives_open_files_are_told_in_one_line():
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = refusal(max_connections=hard)
    assert said == (
        f"POSE_MAX_CONNECTIONS: {hard} connections need {hard + 200} open files, and the system gives this process fewer "
        "(ulimit -Hn)\n"
    )


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="other processes' limits are told on Linux alone")
def test_a_low_limit_of_open_files_is_raised_to_suit_the_connections(start_service):
    """A shell's or systemd's soft limit; the hard one is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        service = start_service(lanes=1, detector="", max_connections=300)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE) == (500, hard)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="other processes' limits are told on Linux alone")
def test_a_crash_would_write_no_memory_to_a_disk(service):
    core = 0 if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0 else 1  # byte: no file is that small
    assert resource.prlimit(service.process.pid, resource.RLIMIT_CORE) == (core, core)


def test_every_wrong_setting_is_told():
    said = refusal(port="x", lanes="y").splitlines()
    assert {line.split(":")[0] for line in said} == {"POSE_PORT", "POSE_LANES"}


def test_a_setting_that_there_is_not_is_told_for_a_misspelt_key_would_open_the_service():
    assert refusal(api_key="secret") == "POSE_API_KEY: there is no such setting\n"


def test_variables_of_kubernetes_are_told_as_such():
    assert refusal(api_service_host="10.0.0.1").startswith(
        "POSE_API_SERVICE_HOST: there is no such setting (of a Service in K"
    )


def test_arguments_are_told_to_mean_nothing():
    assert refusal("--port", "9999").startswith("--port: this command takes no arguments; settings are POSE_…")
    assert refusal(api_key="secret", lane="2").count("\n") == 2


def test_a_port_that_is_taken_is_told_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal(port=port)
    assert said.count("\n") == 1, said
    assert f"POSE_PORT: cannot listen on 127.0.0.1:{port} (Address already in use)\n" in said


def test_a_host_that_is_not_this_machines_is_told_in_one_line():
    said = refusal(host="192.0.2.1")
    assert said.count("\n") == 1, said
    assert "POSE_HOST" in said


def test_a_limit_below_the_models_own_pictures_is_no_matter_to_them(start_service):
    service = start_service(max_image_pixels=1_000, lanes=1)
    for height, status in ((30, 200), (60, 413)):
        picture = cv2.imencode(".png", np.zeros((height, 20, 3), np.uint8))[1].tobytes()
        assert service.client.post("/v1/pose", content=picture, headers={"Content-Type": "image/png"}).status_code == status


# Disks


def test_nothing_is_written_so_a_full_or_unwritable_disk_is_no_matter(start_service, t_pose, tmp_path, monkeypatch):
    """Not even for a form of many megabytes, while it arrives."""
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    service = start_service(lanes=1)
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + t_pose + bytes(20 * 2**20)
    end = b"\r\n--x--\r\n"
    head = "POST /v1/pose?boxes=295,15,545,595 HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    before = service.metric("process_resident_memory_bytes")
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as sock:
        sock.sendall(f"{head}Content-Length: {len(part) + len(end)}\r\n\r\n".encode() + part)
        service.wait_until(lambda: service.metric("process_resident_memory_bytes") > before + 15e6)
        opened = [entry.readlink() for entry in Path(f"/proc/{service.process.pid}/fd").iterdir() if int(entry.name) > 2]
        assert [path for path in opened if path.is_absolute() and path.parts[1] != "dev"] == []
        sock.sendall(end)
        assert b" 200 " in sock.recv(65_536)[:20]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_service_that_cannot_tell_where_it_listens_does_not_start():
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "app"], cwd=ROOT, env=os.environ | {"POSE_PORT": "0"}, stderr=full, timeout=60
        )
    assert ended.returncode != 0


# Models


def test_an_empty_store_is_told_in_one_line(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        said = refusal(model_store=folder)
        assert said.count("\n") == 1
        assert f"{folder} holds no pose model; POSE_MODEL_STORE" in said


def test_a_truncated_model_is_told_in_one_line_even_where_its_sha256_is_right(tmp_path):
    folder = shutil.copytree(ROOT / "model_store/lpn50/1", tmp_path / "lpn50/1")
    file, description = folder / "model.onnx", folder / "model.toml"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(file.read_bytes()[:-1000])
    description.write_text(description.read_text().replace(before, hashlib.sha256(file.read_bytes()).hexdigest()))
    said = refusal(model_store=tmp_path)
    assert said.count("\n") == 1, said
    assert "lpn50/1: model.onnx" in said


# Stopping


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_service_that_has_just_started_stops(start_service, stop):
    """Between the line that tells where it listens and the first request no signal is lost."""
    service = start_service(wait=False, lanes=1)
    service.process.send_signal(stop)
    assert service.process.wait(30) == 0


def has_ipv6() -> bool:
    """Whether there is an address to listen on; socket.has_dualstack_ipv6() looks at the kind of socket alone."""
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")
def test_an_ipv6_address_is_told_as_urls_have_it(start_service):
    assert start_service(host="::1", lanes=1).client.get("/livez").status_code == 200


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopping_service_answers_the_requests_that_it_has_accepted(start_service, t_pose, stop):
    service = start_service(lanes=2)
    answers: list[httpx.Response] = []

    def ask() -> None:
        boxes = ";".join(["295,15,545,595"] * 40)
        answers.append(
            httpx.post(
                service.client.base_url.join("/v1/pose"), params={"boxes": boxes}, content=t_pose, headers=JPEG, timeout=60
            )
        )

    asking = threading.Thread(target=ask)
    asking.start()
    service.wait_until(lambda: service.metric("pose_queue_crops") > 0)
    service.process.send_signal(stop)
    assert service.process.wait(30) == 0
    asking.join()
    assert answers[0].status_code == 200
    assert len(answers[0].json()["annotations"]) == 40
    with pytest.raises(httpx.ConnectError):
        httpx.get(service.client.base_url.join("/livez"))


def refused(port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return False
    return True


def ask_for_seconds(service, picture: bytes, times: int) -> httpx.Response:
    """The answer to a request of `times` pictures of 100 people, each run twice: more than a second a picture of one lane."""
    return httpx.post(
        service.client.base_url.join("/v1/pose"),
        params={"flip_test": True, "timeout_ms": 60_000},
        data={"boxes": json.dumps([[[295, 15, 545, 595]] * 100] * times)},
        files=[("image", ("x.jpg", picture, "image/jpeg"))] * times,
        timeout=90,
    )


def test_a_stopping_service_takes_no_new_connections(start_service, t_pose):
    service = start_service(lanes=1)
    asking = threading.Thread(target=lambda: ask_for_seconds(service, t_pose, 2))
    asking.start()
    service.wait_until(lambda: service.metric("pose_queue_crops") > 0)
    service.process.terminate()
    service.wait_until(lambda: refused(service.port), LAST_REQUESTS_SECONDS + 3)
    assert service.process.poll() is None
    assert asking.is_alive()
    asking.join()
    assert service.process.wait(30) == 0


@pytest.mark.parametrize(
    ("level", "told"), [("INFO", {"/v1/models"}), ("DEBUG", {"/livez", "/readyz", "/metrics", "/v1/models"})]
)
def test_probes_are_logged_where_debug_is_asked_for_alone(start_service, level, told):
    service = start_service(log_level=f"INFO,app.requests={level}", lanes=1)
    for path in ("/livez", "/metrics", "/v1/models"):
        service.client.get(path)
    service.wait_until(lambda: "/v1/models" in service.log)  # the line comes after the answer
    lines = [json.loads(line) for line in service.log.splitlines() if line.startswith("{")]
    assert {line["route"] for line in lines if line["message"] == "request"} == told


def test_an_idle_service_stops_at_once(start_service):
    service = start_service()
    started = time.monotonic()
    service.process.terminate()
    assert service.process.wait(30) == 0
    assert time.monotonic() - started < 5
    assert "Traceback" not in service.log
    lines = [json.loads(line)["message"] for line in service.log.splitlines() if line.startswith("{")]
    assert lines[-2:] == ["the service stops", "the service has stopped"]


def test_a_body_that_stalls_is_not_waited_for_twice(start_service):
    service = start_service(drain_s=5, body_timeout_s=3.5)
    with socket.create_connection(("127.0.0.1", service.port)) as sock:
        sock.sendall(b"POST /v1/pose HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 9\r\n\r\n1234")
        service.wait_until(lambda: service.metric("pose_http_requests_in_flight") > 1)
        service.process.terminate()
        assert b" 408 " in sock.recv(65_536)[:20]
        assert service.process.wait(30) == 0
    assert '"level":"error"' not in service.log


def test_work_that_outlasts_the_drain_is_cut_off(start_service, t_pose):
    service = start_service(drain_s=1, lanes=1)
    answers: list[object] = []

    def ask() -> None:
        try:
            answers.append(ask_for_seconds(service, t_pose, 4))
        except httpx.TransportError as error:
            answers.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    service.wait_until(lambda: service.metric("pose_queue_crops") > 0)
    service.process.terminate()
    assert service.process.wait(15) == 0
    asking.join()
    (answer,) = answers
    assert isinstance(answer, httpx.Response), answer
    assert (answer.status_code, answer.json()["type"]) == (503, "/problems/shutting_down")
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
    assert answer.headers["retry-after"] == "1"
    assert "Traceback" not in service.log
