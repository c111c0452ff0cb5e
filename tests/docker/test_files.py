"""What Docker, nginx, Compose and Kubernetes are told fits the service's settings, and keeps containers within bounds."""

import contextlib
import http.client
import importlib.metadata
import importlib.util
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from app.api.connections import LAST_REQUESTS_SECONDS
from app.settings import Settings

ROOT = Path(__file__).parents[2]
K8S = ROOT / "docker/k8s"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
NGINX = (ROOT / "docker/nginx/nginx.conf").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
MANIFESTS = {file.stem: yaml.safe_load(file.read_text()) for file in K8S.glob("*.yaml")}


def default(name: str) -> int:
    return Settings.model_fields[name].default


def seconds(duration: str) -> int:
    return int(duration.removesuffix("s"))


# The image


def test_the_image_runs_as_a_fixed_user_without_a_shell():
    last = DOCKERFILE.split("\nFROM ")[-1]
    assert re.search(r"^USER \d+:\d+$", last, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["', last, re.MULTILINE)
    assert re.search(r'^ +CMD \["python"', last, re.MULTILINE)
    assert not re.search(r"apt-get|pip install|curl", last)


def test_dependencies_of_the_image_are_locked():
    assert "--require-hashes" in DOCKERFILE
    assert "--only-binary=:all:" in DOCKERFILE
    pins = [line for line in (ROOT / "requirements/service.txt").read_text().splitlines() if re.match(r"\w", line)]
    assert pins
    assert all("==" in pin for pin in pins)


def test_the_image_gets_only_what_it_needs():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == {"app", "model_store", "LICENSE", "requirements/service.txt"}
    copied = re.findall(r"^COPY (?!--from)(\S+)", DOCKERFILE, re.MULTILINE)
    assert set(copied) == kept


def test_the_page_tells_the_licence_of_every_dependency():
    rows = re.findall(r"^\| ([a-z\d, -]+) \| ([A-Z][\w.-]+)", (ROOT / "docker/README.md").read_text(), re.MULTILINE)
    told = {name: licence for names, licence in rows for name in names.split(", ")}
    assert told.keys() == set(re.findall(r"^([\w-]+)==", (ROOT / "requirements/service.txt").read_text(), re.MULTILINE))
    for name, licence in told.items():
        metadata = importlib.metadata.metadata(name)
        said = str(metadata["License-Expression"] or metadata["License"])
        assert licence.split("-")[0] in said, name
        assert ("PL" in said) == ("PL" in licence), name  # GPL, LGPL, MPL


# Compose


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_kept_within_bounds(name):
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"memory", "pids"} <= service["deploy"]["resources"]["limits"].keys()
    assert service.get("read_only") or name == "grafana"
    assert {"max-size", "max-file"} <= service["logging"]["options"].keys()
    assert "healthcheck" in service or ("build" in service and "HEALTHCHECK" in DOCKERFILE)
    assert name in ("pose", "replica") or re.search(r":v?\d[\d.]*$", service["image"])


def test_nothing_is_published_beyond_this_machine_unless_it_is_asked_for():
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:") or (
                name in ("pose", "nginx") and port.startswith("${POSE_ADDRESS:-127.0.0.1}:")
            )


def test_the_drain_fits_into_the_time_to_stop():
    assert seconds(SERVICES["pose"]["stop_grace_period"]) > default("drain_s") + LAST_REQUESTS_SECONDS


def test_compose_hands_on_every_setting_that_is_not_the_containers_own():
    own = {"host", "port", "model_store", "drain_s"}
    assert set(SERVICES["pose"]["environment"]) == {f"POSE_{name.upper()}" for name in Settings.model_fields.keys() - own}


def test_prometheus_looks_for_every_service_of_the_image():
    jobs = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())["scrape_configs"]
    pose, nginx = (set(job["dns_sd_configs"][0]["names"]) for job in jobs)
    assert pose == {name for name, service in SERVICES.items() if "build" in service}
    assert nginx == {"nginx"} < SERVICES.keys()


def test_grafana_finds_what_the_dashboards_name():
    (source,) = yaml.safe_load((ROOT / "docker/grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert (source["isDefault"], source["url"]) == (True, "http://prometheus:9090")
    (provider,) = yaml.safe_load((ROOT / "docker/grafana/provisioning/dashboards/pose.yml").read_text())["providers"]
    folders = [volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"]]
    assert ["./docker/grafana/dashboards", provider["options"]["path"]] in folders
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "docker/grafana/dashboards" / Path(home).name).exists()


# nginx


def directive(name: str) -> str:
    (value,) = re.findall(rf"^\s*{name} ([^;]+);", NGINX, re.MULTILINE)
    return value


def test_nginx_has_the_limits_of_the_service():
    assert directive("client_max_body_size") == f"{default('max_body_bytes') // 2**20}m"
    assert seconds(directive("client_body_timeout")) == default("body_timeout_s")
    assert seconds(directive("proxy_read_timeout")) * 1000 > default("max_timeout_ms")


def test_nginx_asks_another_replica_though_it_is_a_post():
    assert {"error", "timeout", "http_503", "http_429", "non_idempotent"} <= set(directive("proxy_next_upstream").split())


@pytest.fixture(scope="module")
def nginx_log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("nginx_log") / "requests"


@pytest.fixture(scope="module")
def nginx(tmp_path_factory, nginx_log) -> Iterator[int]:
    """The port of an nginx with our configuration and no replica."""
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not on the PATH")
    folder = tmp_path_factory.mktemp("nginx")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    ours = (
        NGINX.replace("listen 8080", f"listen 127.0.0.1:{port}")
        .replace("/tmp/", f"{folder}/")
        .replace("/dev/stdout", str(nginx_log))
    )
    (folder / "nginx.conf").write_text(ours.replace("$replica replica;", "$replica 127.0.0.2;"))  # where nobody listens
    running = subprocess.Popen(["nginx", "-p", folder, "-c", folder / "nginx.conf", "-g", "daemon off;"])
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.1)
    yield port
    running.terminate()
    running.wait(10)


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not_found"),
        (b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", 503, "not_ready"),
        (b"POST /v1/pose HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", 413, "body_too_large"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400, "malformed_body"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 70_000 + b"\r\n\r\n", 400, "malformed_body"),
        (b"rubbish\r\n\r\n", 400, "malformed_body"),
    ],
)
def test_what_nginx_refuses_is_a_problem(nginx, head, status, code):
    with socket.create_connection(("127.0.0.1", nginx), timeout=10) as connection:
        connection.sendall(head)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        problem = json.loads(answer.read())
    assert (answer.status, answer.headers["Content-Type"]) == (status, "application/problem+json")
    assert (problem["status"], problem["type"]) == (status, f"/problems/{code}")
    assert problem["request_id"] == answer.headers["X-Request-ID"]
    assert (answer.headers["Retry-After"] is None) == (status != 503)


def test_nginx_logs_what_no_replica_answered_by_its_id(nginx, nginx_log):
    for path, name in (("/up", "up-1"), ("/v1/models?x=1", "refused-1")):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", nginx, timeout=10)) as connection:
            connection.request("GET", path, headers={"X-Request-ID": name})
            answer = connection.getresponse()
            assert answer.read() == b"pose_proxy_up 1\n" or answer.status == 503
    until = time.monotonic() + 10  # the line is written after the answer
    while '"refused-1"' not in nginx_log.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    lines = {line["request_id"]: line for line in map(json.loads, nginx_log.read_text().splitlines())}
    assert "up-1" not in lines
    refused = lines["refused-1"]
    assert (refused["method"], refused["path"], refused["status"]) == ("GET", "/v1/models", 503)
    assert refused["replica"] == "127.0.0.2:8000"


# Kubernetes


def test_the_manifests_choose_the_same_pods():
    (pairs,) = (each["pairs"] for each in MANIFESTS["kustomization"]["labels"])
    pod = MANIFESTS["deployment"]["spec"]["template"]
    assert pod["metadata"]["labels"] == MANIFESTS["deployment"]["spec"]["selector"]["matchLabels"] == pairs
    assert MANIFESTS["service"]["spec"]["selector"] == MANIFESTS["service"]["metadata"]["labels"] == pairs
    assert MANIFESTS["disruption"]["spec"]["selector"]["matchLabels"] == pairs
    assert MANIFESTS["network"]["spec"] == {"podSelector": {"matchLabels": pairs}, "policyTypes": ["Egress"]}
    assert MANIFESTS["monitor"]["spec"]["selector"]["matchLabels"] == pairs
    assert MANIFESTS["scaling"]["spec"]["scaleTargetRef"]["name"] == MANIFESTS["deployment"]["metadata"]["name"]
    assert set(MANIFESTS["kustomization"]["resources"]) == {f"{name}.yaml" for name in MANIFESTS} - {"kustomization.yaml"}
    (port,) = pod["spec"]["containers"][0]["ports"]
    assert MANIFESTS["service"]["spec"]["ports"][0]["targetPort"] == MANIFESTS["monitor"]["spec"]["endpoints"][0]["port"]
    assert port["containerPort"] == default("port")


def test_a_pod_has_whole_cores_of_its_own_and_may_do_nothing_else():
    pod = MANIFESTS["deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    assert float(resources["limits"]["cpu"]).is_integer()
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["securityContext"]["runAsNonRoot"]
    assert re.search(r"^USER [1-9]\d+:[1-9]\d+$", DOCKERFILE, re.MULTILINE)  # numbers: names are not known to be no root's


def test_a_pod_has_time_to_drain():
    pod = MANIFESTS["deployment"]["spec"]["template"]["spec"]
    before = int(re.search(r"sleep\((\d+)\)", pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1])[1])
    assert pod["terminationGracePeriodSeconds"] > before + LAST_REQUESTS_SECONDS + default("drain_s")


@pytest.mark.parametrize("name", ["deployment", "service", "disruption"])
@pytest.mark.parametrize("version", ["1.32", "1.34", "1.37"])
def test_kubernetes_takes_the_manifest(name, version):
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip("kubernetes-validate is not installed (pip install kubernetes-validate)")
    import kubernetes_validate

    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on the PATH")
def test_kustomize_puts_the_manifests_together():
    made = subprocess.run(["kubectl", "kustomize", K8S], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    kinds = [each["kind"] for each in yaml.safe_load_all(made.stdout)]
    assert sorted(kinds) == [
        "Deployment",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "ScaledObject",
        "Service",
        "ServiceMonitor",
    ]


# What the page on Kubernetes says


OVERLAYS = re.findall(r"```yaml\n(.*?)```", (K8S / "README.md").read_text(), re.DOTALL)


def kustomized(overlay: str, folder: Path) -> str:
    shutil.copytree(K8S, folder / "docker/k8s")
    (folder / "overlay").mkdir()
    (folder / "overlay/kustomization.yaml").write_text(overlay)
    made = subprocess.run(["kubectl", "kustomize", folder / "overlay"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on the PATH")
def test_the_overlay_on_the_page_sets_the_image_and_prometheus_address(tmp_path):
    overlay, _ = OVERLAYS
    made = kustomized(overlay, tmp_path)
    assert made.count("serverAddress: http://PROMETHEUS:9090") == made.count("serverAddress:") == 3
    assert "image: REGISTRY/lpn-pose:1\n" in made


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on the PATH")
def test_the_overlay_on_the_page_leaves_out_what_needs_operators(tmp_path):
    overlay, without_operators = OVERLAYS
    before, _ = overlay.split("  - target: { kind: ScaledObject }\n")
    made = list(yaml.safe_load_all(kustomized(before + without_operators, tmp_path)))
    assert sorted(each["kind"] for each in made) == ["Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service"]
    (replicas,) = [each["spec"]["replicas"] for each in made if each["kind"] == "Deployment"]
    assert replicas == 2


def test_the_simulated_day_is_the_one_on_the_page():
    page = (K8S / "README.md").read_text()
    (command,) = re.findall(r"`python3 (docker/k8s/simulate\.py[^`]*)`", page)
    said = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout in page


def test_the_simulation_scales_as_the_cluster_would():
    scope: dict = {"__name__": "simulate"}
    exec(compile((K8S / "simulate.py").read_text(), "simulate.py", "exec"), scope)
    scaling = MANIFESTS["scaling"]["spec"]
    assert (scope["LEAST"], scope["MOST"]) == (scaling["minReplicaCount"], scaling["maxReplicaCount"])
    busy, waiting, _ = scaling["triggers"]
    assert scope["BUSY_GOAL"] * 10 == float(busy["metadata"]["threshold"])
    assert scope["WAIT_GOAL"] * 10 == float(waiting["metadata"]["threshold"])
    behavior = scaling["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert scope["CALM"] == behavior["scaleDown"]["stabilizationWindowSeconds"]
    assert behavior["scaleUp"]["policies"] == [
        {"type": "Percent", "value": 100, "periodSeconds": scope["UP_EVERY"]},
        {"type": "Pods", "value": scope["UP_PODS"], "periodSeconds": scope["UP_EVERY"]},
    ]
    assert behavior["scaleDown"]["policies"] == [
        {"type": "Percent", "value": scope["DOWN_PERCENT"], "periodSeconds": scope["DOWN_EVERY"]}
    ]
    assert scope["QUEUE"] == default("queue_crops")
