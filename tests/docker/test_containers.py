"""The containers as they run: with a Docker engine and some minutes, where DOCKER_TESTS=1 asks for them."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.skipif(os.environ.get("DOCKER_TESTS") != "1", reason="DOCKER_TESTS=1 asks for the tests with Docker")

ROOT = Path(__file__).parents[2]
JPEG = {"Content-Type": "image/jpeg"}
QUERY = {"boxes": "295,15,545,595", "timeout_ms": 60000}
DETECTOR = "person-det" if (ROOT / "model_store/person-det").exists() else ""


def docker(*arguments: str, **environment: str) -> str:
    ran = subprocess.run(["docker", *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return str(taken.getsockname()[1])


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, "not within two minutes"
        time.sleep(0.1)


class Stack:
    """Services of docker-compose.yml under a project name and on ports of their own."""

    def __init__(self, *services: str, **environment: str) -> None:
        self.ports = {name: free_port() for name in ("POSE_PORT", "NGINX_PORT", "PROMETHEUS_PORT")}
        self.environment = self.ports | {"POSE_ADDRESS": "127.0.0.1", "POSE_DETECTOR": DETECTOR} | environment
        self.compose("up", "--build", "--detach", "--wait", *services)

    def compose(self, *arguments: str) -> str:
        return docker("compose", "--project-name", "pose-test", "--profile", "scale", *arguments, **self.environment)

    def client(self, port: str) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.ports[port]}", timeout=90)

    def inspect(self, container: str) -> dict:
        return json.loads(docker("inspect", container))[0]

    def down(self) -> None:
        self.compose("down", "--volumes", "--timeout", "5")


@pytest.fixture(scope="module")
def one() -> Iterator[Stack]:
    """The service with one CPU, and Prometheus."""
    stack = Stack("pose", "prometheus", POSE_CPUS="1", POSE_MEMORY="1g")
    yield stack
    stack.down()


@pytest.fixture(scope="module")
def replicas() -> Iterator[Stack]:
    """Two replicas behind nginx."""
    stack = Stack("nginx", POSE_REPLICAS="2", POSE_CPUS="1")
    yield stack
    stack.down()


def test_prometheus_holds_the_latency_of_a_photo(one, t_pose):
    with one.client("POSE_PORT") as pose, one.client("PROMETHEUS_PORT") as prometheus:
        for _ in range(3):
            assert len(pose.post("/v1/pose", params=QUERY, content=t_pose, headers=JPEG).json()["annotations"]) == 1
        query = {"query": 'pose_http_request_duration_seconds_count{route="/v1/pose"}'}

        def told() -> bool:
            result = prometheus.get("/api/v1/query", params=query).json()["data"]["result"]
            return bool(result) and float(result[0]["value"][1]) >= 3

        wait_until(told)


def test_limits_of_the_container_are_the_services(one):
    with one.client("POSE_PORT") as pose:
        told = dict(line.rsplit(" ", 1) for line in pose.get("/metrics").text.splitlines() if line[0] != "#")
    assert float(told["pose_lanes"]) == 1
    assert float(told["pose_memory_limit_bytes"]) == 2**30


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="one core tells no set of cores from another",
)
def test_a_set_of_cores_counts_without_a_quota(one):
    count = "from app.inference.session import usable_cores; print(usable_cores())"
    for cores, lanes in (("0", "1"), ("0,1", "2")):
        assert docker("run", "--rm", "--cpuset-cpus", cores, "--entrypoint", "python", "lpn-pose", "-c", count) == lanes


def test_the_container_can_do_no_more_than_it_needs(one):
    container = one.inspect("pose-test-pose-1")
    assert container["HostConfig"]["ReadonlyRootfs"]
    assert container["HostConfig"]["CapDrop"] == ["ALL"]
    said = one.compose("exec", "pose", "python", "-c", "print(open('/proc/self/status').read())").splitlines()
    assert {"Uid:\t10001\t10001\t10001\t10001", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"} <= set(said)


def test_the_image_holds_no_tools_and_stays_small(one):
    assert json.loads(docker("image", "inspect", "lpn-pose"))[0]["Size"] < 450e6
    look = "import importlib.util as u; print([n for n in ('torch', 'pytest', 'uv', 'pip') if u.find_spec(n)])"
    assert one.compose("exec", "pose", "python", "-c", look) == "[]"
    assert one.compose("exec", "pose", "python", "-c", "import shutil; print(shutil.which('gcc'))") == "None"


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_no_request_fails_when_a_replica_ends_under_load(replicas, t_pose, end):
    with replicas.client("NGINX_PORT") as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
    answers: list[tuple[float, int]] = []
    done = threading.Event()

    def ask() -> None:
        with replicas.client("NGINX_PORT") as client:
            while not done.is_set():
                status = client.post("/v1/pose", params=QUERY, content=t_pose, headers=JPEG).status_code
                answers.append((time.monotonic(), status))

    clients = [threading.Thread(target=ask) for _ in range(6)]
    for client in clients:
        client.start()
    wait_until(lambda: len(answers) > 20)
    container = replicas.inspect("pose-test-replica-1")
    ended = time.monotonic()
    if end == "killed":  # by its process: what docker kills is not started again
        os.kill(container["State"]["Pid"], signal.SIGKILL)
    else:
        docker("stop", "pose-test-replica-1")
    wait_until(lambda: sum(at > ended for at, _ in answers) > 100)
    done.set()
    for client in clients:
        client.join()
    assert [status for _, status in answers if status != 200] == []
    if end == "killed":
        wait_until(lambda: replicas.inspect("pose-test-replica-1")["State"]["Health"]["Status"] == "healthy")
        assert replicas.inspect("pose-test-replica-1")["RestartCount"] == 1


def test_nginx_refuses_in_the_services_words(replicas):
    with replicas.client("NGINX_PORT") as client:
        refused = client.post("/v1/pose", content=b"0" * (2**25 + 1), headers={"X-Request-ID": "mine"})
        assert (refused.status_code, refused.headers["X-Request-ID"]) == (413, "mine")
        assert refused.headers["Content-Type"] == "application/problem+json"
        assert refused.json()["type"] == "/problems/body_too_large"
        assert client.get("/metrics").json()["type"] == "/problems/not_found"
        replicas.compose("stop", "replica")
        wait_until(lambda: client.get("/readyz").status_code != 504)  # while their names are still known
        gone = client.get("/readyz")
        assert (gone.status_code, gone.headers["Retry-After"]) == (503, "1")
        assert gone.json()["type"] == "/problems/not_ready"
