"""The load tests run, on little: what they measure is not judged here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(script: str, *arguments: object) -> str:
    modules = {"graphs.py": "loadtests.graphs", "peers": "loadtests.peers"}
    command = ["-m", modules[script]] if script in modules else [str(ROOT / "loadtests" / script)]
    ran = subprocess.run(
        [sys.executable, *command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.stdout + ran.stderr


def test_load(service):
    told = run("load.py", "--url", service.client.base_url, "--clients", 2, "--boxes", 1, "--requests", 6)
    (row,) = [line for line in told.splitlines() if line.startswith("| 2 |")]
    assert "| 6 |" in row


def test_overload(start_service):
    url = start_service(queue_crops=8).client.base_url
    told = run("overload.py", "--url", url, "--seconds", 6)
    assert "while 3 times as many are asked for" in told
    assert "| 200 |" in told
    assert "| 429 |" in told


def test_graphs():
    graphs = [ROOT / "model_store" / model / "model.onnx" for model in ("lpn50/1", "person-det/1")]
    told = run("graphs.py", *graphs, "--rounds", 1).splitlines()
    assert [line.split("|")[1].strip() for line in told[2:]] == [str(graph) for graph in graphs]
    assert "| 1.00 [1.00, 1.00] |" in told[2]


def test_peers():
    told = run("peers", "--peers", "service", "plain-1", "--clients", 2, "--requests", 4, "--rounds", 1).splitlines()
    peers = [line.split("|")[2].strip() for line in told if line.startswith("| 1 |")]
    assert peers == ["this service", "FastAPI, one thread a call"]
    assert told[-1].startswith("2 clients: this service answers ")


def test_full_queue(start_service):
    service = start_service(queue_crops=100, lanes=1)
    told = run("full_queue.py", "--url", service.client.base_url, "--refusals", 10, "--fillers", 2)
    assert [line.split("|")[1].strip() for line in told.splitlines()[2:]] == ["429", "/livez", "/readyz", "/metrics"]
    assert all(int(line.split("|")[2]) >= 10 for line in told.splitlines()[2:])


def test_full_queue_ends_where_its_requests_are_refused_for_something_else(start_service):
    service = start_service(api_keys="key", lanes=1)
    assert run("full_queue.py", "--url", service.client.base_url).startswith("/v1/pose: 401 ")


@pytest.mark.parametrize("way", [[], ["--post"]])
def test_stream(service, way):
    told = run("stream.py", "--url", service.client.base_url, "--clients", 2, "--seconds", 1, *way)
    (row,) = [line for line in told.splitlines() if line.startswith("| 2 |")]
    assert float(row.split("|")[2]) > 0


def test_stream_ends_where_no_service_is():
    assert run("stream.py", "--url", "http://127.0.0.1:9").splitlines()[-1].startswith("http://127.0.0.1:9 gives no answer: ")


@pytest.mark.parametrize("script", ["load.py", "full_queue.py"])
def test_no_service(script):
    assert run(script, "--url", "http://127.0.0.1:9").splitlines()[-1] == (
        "http://127.0.0.1:9 gives no answer: All connection attempts failed"
    )


def test_soak():
    """Every answer of the mixture has a status that it may have, and no descriptor stays open."""
    told = run("soak.py", "--pictures", 200, "--measured", 3)
    assert "200 answered" in told
    assert re.search(r"planned [\d.]+ a second, sent [\d.]+", told)
    start, end = re.search(r"descriptors: (\d+) at the start, .* (\d+) at the end", told).groups()
    assert int(end) <= int(start) + 4
