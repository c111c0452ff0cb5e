"""Every query of the dashboards and alerts asks for what the service tells; and a real Prometheus answers them under load."""

import json
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client import Histogram
from websockets.sync.client import connect

from app.telemetry.metrics import Metrics

DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARDS = sorted((DOCKER / "grafana/dashboards").glob("*.json"))
RULES = yaml.safe_load((DOCKER / "prometheus/rules.yml").read_text())
METRICS = [metric for metric in vars(Metrics()).values() if hasattr(metric, "describe")]
SCALING = yaml.safe_load((DOCKER / "k8s/scaling.yaml").read_text())
BOX = "295,15,545,595"
JPEG = {"Content-Type": "image/jpeg"}


def panels() -> list[tuple[str, dict]]:
    every = [(file.stem, panel) for file in DASHBOARDS for panel in json.loads(file.read_text())["panels"]]
    return [(name, panel) for name, panel in every if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    """Where a query stands, and the query."""
    for name, panel in panels():
        for target in panel["targets"]:
            yield f"{name}: {panel['title']}", target["expr"]
    for group in RULES["groups"]:
        for rule in group["rules"]:
            yield rule.get("alert", rule.get("record")), rule["expr"]
    for trigger in SCALING["spec"]["triggers"]:
        yield "the autoscaler", trigger["metadata"]["query"]


def told() -> set[str]:
    """Every sample name that the service, Prometheus itself and the recording rules tell."""
    names = {"up"} | {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}
    kinds = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
    for metric in METRICS:
        for family in metric.describe():
            names |= {family.name + suffix for suffix in kinds[family.type]}
    return names | {
        "process_cpu_seconds_total",
        "process_resident_memory_bytes",
        "process_open_fds",
        "process_start_time_seconds",
    }


def test_dashboards_are_those_that_the_script_writes(tmp_path, monkeypatch):
    before = {file.name: file.read_text() for file in DASHBOARDS}
    scope: dict = {"__name__": "dashboards", "__file__": str(DOCKER / "grafana/dashboards.py")}
    exec(compile((DOCKER / "grafana/dashboards.py").read_text(), "dashboards.py", "exec"), scope)
    scope["FOLDER"] = tmp_path
    scope["main"]()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("dashboard", "panel"), panels())
def test_a_legend_is_words_and_labels(dashboard, panel):
    for target in panel.get("targets", []):
        assert re.fullmatch(r"([^{}]|\{\{\w+\}\})*", target.get("legendFormat", "")), dashboard


@pytest.mark.parametrize(("where", "expression"), list(queries()))
def test_a_query_asks_for_metrics_that_there_are(where, expression):
    without_labels = re.sub(r"\{[^}]*\}|\"[^\"]*\"", "", expression)
    names = set(re.findall(r"\b(?:pose[_:]|process_)\w[\w:]*|\bup\b", without_labels))
    assert names or expression == "vector(17)"
    assert names <= told(), where


@pytest.mark.parametrize(("where", "expression"), list(queries()))
def test_a_query_asks_for_labels_that_there_are(where, expression):
    labels = {"job", "instance", "le", "__name__", *(name for metric in METRICS for name in metric._labelnames)}
    named = re.findall(r"(\w+)[!=][=~]?\"", expression)
    grouped = re.findall(r"\b(?:by|without|on|group_left|group_right) ?\(([^)]*)\)", expression)
    assert {*named, *(name for names in grouped for name in re.findall(r"\w+", names))} <= labels, where
    edges = {str(edge) for metric in METRICS if isinstance(metric, Histogram) for edge in metric._upper_bounds}
    assert set(re.findall(r'\ble="([^"]*)"', expression)) <= edges, where


@pytest.mark.parametrize(("dashboard", "panel"), panels())
def test_a_panel_names_its_metric_and_says_what_it_means(dashboard, panel):
    assert re.search(r"\b(pose|process)_\w+|\bup\b", panel["description"]), panel["title"]
    assert panel["fieldConfig"]["defaults"]["noValue"] in ("no traffic", "no data")
    assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


def test_single_figures_are_of_this_moment():
    targets = [target for _, panel in panels() if panel["type"] == "stat" for target in panel["targets"]]
    assert targets
    assert all(target["instant"] and not target["range"] for target in targets)


def test_dashboards_link_to_each_other_and_choose_instances_and_models():
    for file in DASHBOARDS:
        board = json.loads(file.read_text())
        assert board["links"][0]["tags"] == board["tags"] == ["pose"]
        variables = {variable["name"] for variable in board["templating"]["list"]}
        assert variables >= {"datasource", "instance", "model"}
        assert set(re.findall(r"\$([a-z]+)", json.dumps(board["panels"]))) <= variables


def test_alerts_say_what_to_do():
    for group in RULES["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                assert rule["labels"]["severity"] in ("page", "ticket")
                assert len(rule["annotations"]["summary"]) > 20
                assert len(rule["annotations"]["action"]) > 20


promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on the PATH")


@promtool
def test_promtool_accepts_the_configuration():
    subprocess.run(["promtool", "check", "config", DOCKER / "prometheus/prometheus.yml"], check=True, capture_output=True)


@promtool
@pytest.mark.parametrize("file", ["rules_test.yml", "rules_days_test.yml"])
def test_alerts_fire_when_they_should_and_only_then(file):
    ran = subprocess.run(["promtool", "test", "rules", DOCKER / "prometheus" / file], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def prometheus(start_service, t_pose, tmp_path_factory) -> Iterator[httpx.Client]:
    """A real Prometheus with our rules that has scraped a service under load, of every kind of request, for half a minute."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not on the PATH")
    service = start_service(queue_crops=40)
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copy(DOCKER / "prometheus/rules.yml", folder)
    config = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    targets = [{"targets": [f"127.0.0.1:{service.port}"]}]
    nginx = {
        "job_name": "pose-nginx",
        "metrics_path": "/up",
        "static_configs": targets,
    }  # which is not there, and so told as down
    config["scrape_configs"] = [{"job_name": "pose", "static_configs": targets}, nginx]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    arguments = [f"--web.listen-address=127.0.0.1:{port}", f"--storage.tsdb.path={folder}/data"]
    running = subprocess.Popen(
        ["prometheus", f"--config.file={folder}/prometheus.yml", *arguments], stderr=subprocess.DEVNULL
    )
    done = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=service.client.base_url, timeout=60) as client:
            while not done.is_set():
                client.post("/v1/pose", params={"boxes": ";".join([BOX] * 4)}, content=t_pose, headers=JPEG)
                client.post("/v1/pose", content=t_pose, headers=JPEG)
                client.post("/v1/pose", params={"boxes": BOX}, content=b"no picture", headers=JPEG)
                many = {"boxes": ";".join([BOX] * 30), "timeout_ms": random.choice((100, 60_000))}
                client.post("/v1/pose", params=many, content=t_pose, headers=JPEG)

    def follow() -> None:
        with connect(f"ws://127.0.0.1:{service.port}/v1/stream?timeout_ms=60000", max_size=None) as stream:
            while not done.is_set():
                stream.send(t_pose)
                stream.recv(timeout=60)

    clients = [threading.Thread(target=each) for each in (load, load, load, follow)]
    for client in clients:
        client.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            for code in ("queue_full", "deadline_exceeded"):
                service.wait_until(lambda code=code: service.metric("pose_rejected_total", code=code) > 0, 180)
            service.wait_until(lambda: service.metric("pose_dropped_crops_total") > 0, 180)
            time.sleep(25)  # so many seconds of scrapes have rates
            yield client
    finally:
        done.set()
        for thread in clients:
            thread.join()
        running.terminate()
        running.wait(20)


def answer(prometheus: httpx.Client, expression: str) -> list:
    for variable, value in (("$__rate_interval", "10s"), ("$instance", ".*"), ("$model", ".*"), ("$stage", ".*")):
        expression = expression.replace(variable, value)
    return prometheus.get("/api/v1/query", params={"query": expression}).raise_for_status().json()["data"]["result"]


def test_every_panel_shows_something_under_load(prometheus):
    empty = [
        f"{name}: {panel['title']}: {target['expr']}"
        for name, panel in panels()
        for target in panel["targets"]
        if not answer(prometheus, target["expr"])
    ]
    assert empty == []


def test_no_panel_shows_a_number_that_is_none(prometheus):
    for _, panel in panels():
        for target in panel["targets"]:
            for sample in answer(prometheus, target["expr"]):
                assert sample["value"][1] != "NaN", panel["title"]


def test_the_autoscaler_gets_one_number_of_each_trigger(prometheus):
    for trigger in SCALING["spec"]["triggers"]:
        assert len(answer(prometheus, trigger["metadata"]["query"])) == 1, trigger


def test_every_record_and_alert_asks_for_series_that_there_are(prometheus):
    selectors = {
        found
        for group in RULES["groups"]
        for rule in group["rules"]
        for found in re.findall(r"\b(?:up|process_\w+|pose[_:][\w:]+)\b(?:\{[^}]*\})?", rule["expr"])
    }
    assert [selector for selector in selectors if not answer(prometheus, selector)] == []


def test_every_alert_can_be_asked(prometheus):
    groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {r.get("alert", r.get("record")) for g in RULES["groups"] for r in g["rules"]}
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] not in ("ok", "unknown")] == []
