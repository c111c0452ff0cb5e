"""Models, probes, metrics, the OpenAPI document, pages for browsers, keys, CORS, and the headers of every answer."""

import asyncio
import json
import re
import tomllib
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from app import __version__
from app.api.application import create_app
from app.api.problems import PROBLEMS
from app.api.schemas import Options
from app.inference.session import usable_cores, usable_memory
from app.settings import Settings

STORE = Path(__file__).parents[2] / "model_store"
BOX = "295,15,545,595"
JPEG = {"Content-Type": "image/jpeg"}


def ask(client: httpx.Client, picture: bytes, **headers: str) -> httpx.Response:
    return client.post("/v1/pose", params={"boxes": BOX}, content=picture, headers=JPEG | headers)


# Models


def test_models_tells_what_the_service_can_run(client):
    (model,) = [each for each in client.get("/v1/models").json()["models"] if each["kind"] == "pose" and each["default"]]
    assert (model["name"], model["version"]) == ("lpn50", "1")
    assert (model["network"], model["precision"]) == ("LPN-50", "int8")
    assert (model["input_width"], model["input_height"]) == (192, 256)
    assert len(model["keypoints"]) == 17
    assert len(model["skeleton"]) == 19
    assert 0 < model["keypoint_threshold"] < 1
    with (STORE / "lpn50/1/model.toml").open("rb") as file:
        described = tomllib.load(file)
    assert model["sha256"] == described["sha256"]
    assert model["accuracy"] == described["accuracy"]
    assert model["accuracy"]["coco"]["ap"] > 0


def test_a_model_has_a_page_of_its_own_by_name_and_by_version(client):
    (model,) = [each for each in client.get("/v1/models").json()["models"] if each["name"] == "lpn50"]
    for name in ("lpn50", "lpn50/1", "lpn50%2F1"):
        assert client.get(f"/v1/models/{name}").json() == model


# Probes


def test_probes_answer(client):
    assert client.get("/livez").json() == {"status": "live"}
    assert client.get("/readyz").json() == {"status": "ready"}


@pytest.mark.parametrize("page", ["/livez", "/readyz", "/metrics", "/v1/models", "/v1/models/lpn50", "/openapi.json", "/"])
def test_head_is_get_without_the_body(client, page):
    whole, head = client.get(page), client.head(page)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Type"] == whole.headers["Content-Type"]
    assert "X-Request-ID" in head.headers


def test_head_of_a_page_that_takes_only_posts_is_refused(client):
    answer = client.head("/v1/pose")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")


# Metrics

SAMPLES = {
    "pose_http_requests_total",
    "pose_http_request_duration_seconds_bucket",
    "pose_http_requests_in_flight",
    "pose_stage_duration_seconds_bucket",
    "pose_images_total",
    "pose_crops_total",
    "pose_batch_crops_bucket",
    "pose_queue_crops",
    "pose_queue_wait_seconds_bucket",
    "pose_rejected_total",
    "pose_dropped_crops_total",
    "pose_people_per_image_bucket",
    "pose_inference_workers_busy",
    "pose_crops_per_second_capacity",
    "pose_model_info",
    "process_resident_memory_bytes",
    "process_cpu_seconds_total",
    "process_open_fds",
}


def test_every_metric_of_the_contract_is_told_in_both_forms(client, t_pose):
    ask(client, t_pose)
    ask(client, b"nothing")
    client.post("/v1/pose", params={"boxes": BOX, "timeout_ms": 1}, content=t_pose, headers=JPEG)
    text = client.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    families = list(parser.text_string_to_metric_families(text.text))
    told = {sample.name for family in families for sample in family.samples}
    assert told >= SAMPLES
    open_text = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert open_text.headers["content-type"].startswith("application/openmetrics-text")
    assert open_text.text.endswith("# EOF\n")
    told = {family.name for family in openmetrics.text_string_to_metric_families(open_text.text)}
    assert {re.sub("_(total|bucket)$", "", name) for name in SAMPLES} - {"pose_model_info"} <= told


@pytest.mark.parametrize("kind", ["application/openmetrics-text", "text/plain"])
def test_metrics_of_a_version_that_is_no_number_are_told_as_plain_text(client, kind):
    answer = client.get("/metrics", headers={"Accept": f"{kind};version=abc"})
    assert (answer.status_code, answer.headers["content-type"][:10]) == (200, "text/plain")
    assert "\npose_ready 1.0\n" in answer.text


def test_an_answered_request_moves_its_metrics(client, service, two_women):
    names = (
        ("pose_crops_total", {"model": "lpn50/1"}, 2),
        ("pose_batch_crops_sum", {"model": "lpn50/1"}, 2),
        ("pose_images_total", {}, 1),
        ("pose_people_per_image_sum", {}, 2),
        ("pose_people_per_image_count", {}, 1),
        ("pose_queue_wait_seconds_count", {}, 2),
        ("pose_http_requests_total", {"route": "/v1/pose", "method": "POST", "status": "200"}, 1),
        ("pose_http_request_duration_seconds_count", {"route": "/v1/pose"}, 1),
        *(
            ("pose_stage_duration_seconds_count", {"stage": stage}, 1)
            for stage in ("read", "decode", "crop", "queue", "infer", "keypoints", "encode", "total")
        ),
    )
    before = [service.metric(name, **labels) for name, labels, _ in names]
    seconds = service.metric("pose_inference_seconds_total", model="lpn50/1")
    boxes = "140,200,225,640;620,20,655,825"
    assert client.post("/v1/pose", params={"boxes": boxes}, content=two_women, headers=JPEG).status_code == 200
    after = [service.metric(name, **labels) for name, labels, _ in names]
    for (name, labels, moved), was, is_ in zip(names, before, after, strict=True):
        assert is_ == was + moved, (name, labels)
    assert service.metric("pose_inference_seconds_total", model="lpn50/1") > seconds
    assert service.metric("pose_crops_per_second_capacity", model="lpn50/1") > 0
    assert service.metric("pose_ready") == 1
    assert service.metric("pose_admitted_crops") == 0
    assert service.metric("pose_queue_limit_crops") == 400
    assert service.metric("pose_lanes") == usable_cores()
    assert service.metric("pose_memory_limit_bytes") == usable_memory()
    assert service.metric("pose_model_info", model="lpn50", version="1", precision="int8") == 1


def test_a_refused_request_moves_its_metrics(client, service):
    labels = {"route": "/v1/pose", "method": "POST", "status": "422"}
    before = service.metric("pose_http_requests_total", **labels), service.metric("pose_rejected_total", code="invalid_image")
    stages = service.metric("pose_stage_duration_seconds_count")
    ask(client, b"nothing")
    assert service.metric("pose_http_requests_total", **labels) == before[0] + 1
    assert service.metric("pose_rejected_total", code="invalid_image") == before[1] + 1
    assert service.metric("pose_stage_duration_seconds_count") == stages  # which are means over answered requests


def test_what_clients_make_up_makes_no_labels(client):
    for path in ("/made/up", "/v1/models/made-up"):
        client.get(path)
    client.request("PROPFIND", "/livez")
    client.get("/openapi.json")
    metrics = client.get("/metrics").text
    assert "made" not in metrics
    assert "PROPFIND" not in metrics
    assert 'route="unmatched"' in metrics
    assert 'route="/openapi.json"' in metrics


# The document


def test_the_openapi_document_tells_of_every_page_and_option(client):
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    assert document["info"]["version"] == __version__
    assert {"/v1/pose", "/v1/models", "/v1/models/{name}", "/livez", "/readyz", "/metrics"} <= document["paths"].keys()
    pose = document["paths"]["/v1/pose"]["post"]
    assert {parameter["name"] for parameter in pose["parameters"]} == {"boxes", *Options.model_fields}
    assert all(parameter["in"] == "query" and parameter["schema"] for parameter in pose["parameters"])
    bodies = pose["requestBody"]["content"]
    assert {"image/jpeg", "image/png", "multipart/form-data", "application/json", "application/octet-stream"} <= bodies.keys()
    # By its name generated clients call its type.
    assert bodies["application/json"]["schema"] == {"$ref": "#/components/schemas/JsonBody"}
    of_json = document["components"]["schemas"]["JsonBody"]
    assert Options.model_fields.keys() <= of_json["properties"].keys()
    assert of_json["examples"] == [{"images": [{"data": "the picture file in base64"}]}]
    # A generated client would send it, to be refused where the query names the option.
    assert not [name for name, option in of_json["properties"].items() if "default" in option]


def test_the_openapi_document_tells_that_ids_have_more_than_32_bits(client):
    document = client.get("/openapi.json").json()
    assert document["components"]["schemas"]["JsonImage"]["properties"]["id"]["anyOf"][0]["format"] == "int64"
    places = [("ImageOut", "id"), ("AnnotationOut", "id"), ("AnnotationOut", "image_id"), ("ResultOut", "image_id")]
    for schema, name in places:
        assert document["components"]["schemas"][schema]["properties"][name]["format"] == "int64"


@pytest.fixture(scope="module")
def limited(start_service):
    """A service whose limits are not the defaults."""
    return start_service(
        max_images=3,
        max_boxes=5,
        max_timeout_ms=20_000,
        timeout_ms=1,
        max_image_pixels=400_000,
        detector="",
        lanes=1,
        max_streams=0,
    )


def test_limits_are_those_of_the_settings(limited, t_pose):
    small = cv2.imencode(".png", np.zeros((500, 700, 3), np.uint8))[1].tobytes()

    def told(picture: bytes, **options: object) -> tuple[int, str]:
        params = {
            name: value for name, value in ({"boxes": BOX, "timeout_ms": 20_000} | options).items() if value is not None
        }
        answer = limited.client.post("/v1/pose", params=params, content=picture, headers=JPEG)
        return answer.status_code, answer.json().get("type", "").removeprefix("/problems/")

    assert told(small) == (200, "")
    assert told(small, timeout_ms=None) == (504, "deadline_exceeded")
    assert told(small, timeout_ms=20_001) == (422, "invalid_option")
    assert told(small, boxes=";".join([BOX] * 6)) == (413, "too_many_boxes")
    assert told(small, max_people=6) == (422, "invalid_option")
    assert told(t_pose) == (413, "image_too_large")
    several = limited.client.post("/v1/pose", files=[("image", small)] * 4, params={"timeout_ms": 20_000})
    assert (several.status_code, several.json()["type"]) == (413, "/problems/too_many_images")


def test_where_no_streams_are_followed_a_client_is_not_asked_to_wait(limited):
    with pytest.raises(InvalidStatus) as refused, connect(f"ws://127.0.0.1:{limited.port}/v1/stream"):
        pass
    problem = json.loads(refused.value.response.body)
    assert (problem["status"], problem["detail"]) == (404, "The service follows no streams: POSE_MAX_STREAMS is 0.")


def test_the_openapi_document_tells_the_limits_of_the_settings(limited):
    document = limited.client.get("/openapi.json").json()
    pose, schemas = document["paths"]["/v1/pose"]["post"], document["components"]["schemas"]
    of_query = {parameter["name"]: parameter["schema"] for parameter in pose["parameters"]}
    assert (of_query["timeout_ms"]["maximum"], of_query["max_people"]["maximum"]) == (20_000, 5)
    assert of_query["timeout_ms"]["minimum"] == of_query["max_people"]["minimum"] == 1
    assert pose["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]["image"]["maxItems"] == 3
    assert schemas["JsonBody"]["properties"]["images"]["maxItems"] == 3
    of_image = schemas["JsonImage"]["properties"]
    assert of_image["boxes"]["anyOf"][0]["maxItems"] == 5
    assert (of_image["id"]["anyOf"][0]["minimum"], of_image["id"]["anyOf"][0]["exclusiveMaximum"]) == (0, 2**53)


def test_the_openapi_document_tells_the_problems_of_each_page(client):
    pages = client.get("/openapi.json").json()["paths"]
    told = {
        code: status
        for page in pages.values()
        for operation in page.values()
        for status, answer in operation["responses"].items()
        for code in re.findall(r"(\w+):", answer["description"])
        if status != "200" and set(answer["content"]) == {"application/problem+json"}
    }
    # Of pages that there are, by the methods that they take, from a service without keys.
    elsewhere = {"not_found", "method_not_allowed", "unauthorized", "origin_not_allowed"}
    assert told == {code: str(status) for code, (status, _) in PROBLEMS.items() if code not in elsewhere}
    responses = pages["/v1/pose"]["post"]["responses"]
    assert all({"X-Request-ID", "Server-Timing"} <= answer["headers"].keys() for answer in responses.values())
    assert [status for status, answer in responses.items() if "Retry-After" in answer["headers"]] == ["429", "503"]


def test_every_reference_of_the_openapi_document_leads_somewhere(client):
    document = client.get("/openapi.json")
    for reference in re.findall(r'"\$ref":"#/([^"]+)"', document.text):
        place = document.json()
        for step in reference.split("/"):
            place = place[step]


def test_no_page_names_another_host(client):
    for path in ("/openapi.json", "/v1/models", "/metrics"):
        assert "//" not in client.get(path).text
    for path in ("/", "/docs", "/static/demo.js", "/static/docs.js", "/static/demo.css"):
        assert "://" not in client.get(path).text


# Pages for browsers


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_for_browsers_needs_no_key_and_has_all_that_it_names(guarded, path):
    page = guarded.client.get(path)
    assert (page.status_code, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    named = re.findall(r'(?:src|href)="(static/[^"]+)"', page.text)
    assert named
    for name in named:
        assert guarded.client.get(f"/{name}").status_code == 200, name
    assert guarded.client.get("/static/example.jpg").headers["Content-Type"] == "image/jpeg"


def test_a_page_for_browsers_may_load_and_ask_nothing_of_others(client):
    policy = dict(rule.split(" ", 1) for rule in client.get("/").headers["Content-Security-Policy"].split("; "))
    assert (policy["default-src"], policy["script-src"], policy["connect-src"]) == ("'none'", "'self'", "'self'")


def test_a_browser_is_not_sent_what_it_has(client):
    page = client.get("/static/demo.js")
    tag = page.headers["ETag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = client.get("/static/demo.js", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", tag), known
    assert client.get("/static/demo.js", headers={"If-None-Match": '"other"'}).content == page.content


@pytest.mark.parametrize("path", ["/static/", "/static/nothing.js", "/static/../pages.py", "/static/%2e%2e/pages.py"])
def test_no_other_file_is_served(client, path):
    answer = client.get(path)
    assert (answer.status_code, answer.json()["type"]) == (404, "/problems/not_found")


# Headers


def test_every_answer_has_a_request_id_and_tells_its_times(client, t_pose):
    for answer in (
        client.get("/livez"),
        client.get("/metrics"),
        client.get("/nothing"),
        client.get("/openapi.json"),
        client.get("/v1/pose"),
        ask(client, t_pose),
        ask(client, t_pose, Accept="image/jpeg"),
        ask(client, b"nothing"),
    ):
        assert answer.headers["x-request-id"]
        assert re.search(r"(^|, )total;dur=\d+\.\d\d$", answer.headers["server-timing"])


def test_an_answer_tells_the_seconds_of_every_stage(client, t_pose):
    answer = ask(client, t_pose)
    times = dict(re.fullmatch(r"(\w+);dur=([\d.]+)", part).groups() for part in answer.headers["server-timing"].split(", "))
    assert list(times) == ["read", "decode", "detect", "crop", "queue", "infer", "keypoints", "encode", "total"]
    assert float(times["infer"]) > 1
    assert float(times["detect"]) == 0, "the boxes were given"
    assert float(times["total"]) < answer.elapsed.total_seconds() * 1000


def test_the_log_has_a_line_with_the_request_id(client, service, t_pose):
    ask(client, t_pose, **{"X-Request-ID": "find-me.1"})
    service.wait_until(lambda: "find-me.1" in service.log)
    (line,) = [line for line in service.log.splitlines() if "find-me.1" in line]
    assert '"route":"/v1/pose"' in line
    assert '"status":200' in line


def test_every_line_about_a_request_has_its_id_and_none_of_what_was_sent(client, service, t_pose):
    secret = "what-only-this-client-sends"
    answers = (
        ask(client, t_pose),
        ask(client, secret.encode() * 20),
        client.get(f"/{secret}"),
        client.get(f"/v1/models/{secret}", params={"a": secret}),
        client.post("/v1/pose", files={"image": (secret, t_pose)}, data={"boxes": BOX}, headers={"User-Agent": secret}),
        ask(client, t_pose, **{"X-Request-ID": f"{secret} with spaces"}),
    )
    ids = [answer.headers["x-request-id"] for answer in answers]
    service.wait_until(lambda: ids[-1] in service.log)
    # The first line is for a person; libjpeg's words on broken files of other tests are not ours.
    lines = [json.loads(line) for line in service.log.splitlines() if line.startswith("{")]
    assert all(line.keys() >= {"time", "level", "logger", "message"} for line in lines)
    assert all(line["request_id"] for line in lines if line["logger"].startswith("app.") and "model" not in line["message"])
    assert set(ids) <= {line.get("request_id") for line in lines}
    assert secret not in service.log
    assert "127.0.0.1" not in "".join(service.log.splitlines()[1:])


def test_the_log_has_only_what_its_level_asks_for(start_service):
    service = start_service(log_level="WARNING", lanes=1)
    service.client.get("/v1/models")
    assert service.log.count("\n") == 1  # where it listens


def test_throttled_seconds_are_told_since_the_start(monkeypatch):
    told = iter([5.0, 7.0, 7.5])
    monkeypatch.setattr("app.inference.pipeline.throttled_seconds", lambda: next(told))

    async def ask() -> list[str]:
        transport = httpx.ASGITransport(create_app(Settings(lanes=1)))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return [(await client.get("/metrics")).text for _ in range(2)]

    for text, seconds in zip(asyncio.run(ask()), (2.0, 2.5), strict=True):
        assert f"\npose_cpu_throttled_seconds_total {seconds}\n" in text


# Keys and other origins


@pytest.fixture(scope="module")
def guarded(start_service):
    """A service with three keys and one origin."""
    return start_service(
        api_keys="first-key, second-key, schlüssel", cors_origins="https://pages.example", lanes=1, max_batch_crops=1
    )


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": "wrong"},
        {"X-API-Key": ""},
        {"X-API-Key": "first-key, second-key"},
        {"X-API-Key": "ä".encode()},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic first-key"},
        {"Authorization": "first-key"},
    ],
)
def test_without_one_of_the_keys_a_request_is_unauthorized(guarded, t_pose, headers):
    for answer in (
        guarded.client.post("/v1/pose", params={"boxes": BOX}, content=t_pose, headers=JPEG | headers),
        guarded.client.get("/v1/models", headers=headers),
        guarded.client.get("/nothing", headers=headers),
    ):
        assert (answer.status_code, answer.json()["type"]) == (401, "/problems/unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": "first-key"},
        {"X-API-Key": "second-key"},
        {"Authorization": "Bearer first-key"},
        {"Authorization": "bearer second-key"},
        {"X-API-Key": "schlüssel".encode()},  # as the pages send it
        {"Authorization": "Bearer of another server", "X-API-Key": "first-key"},
        {"Authorization": "Bearer first-key", "X-API-Key": "of another server"},
    ],
)
def test_with_one_of_the_keys_a_request_is_answered(guarded, headers):
    assert guarded.client.get("/v1/models", headers=headers).status_code == 200


def test_the_openapi_document_tells_which_pages_need_a_key(guarded, client):
    document = guarded.client.get("/openapi.json", headers={"X-API-Key": "first-key"}).json()
    assert document["components"]["securitySchemes"].keys() == {"bearer", "key"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            open_to_all = path in ("/livez", "/readyz", "/metrics")
            assert ("security" in operation, "401" in operation["responses"]) == (not open_to_all, not open_to_all)
    assert "security" not in client.get("/openapi.json").text


def test_probes_and_metrics_need_no_key(guarded):
    for path in ("/livez", "/readyz", "/metrics"):
        assert guarded.client.get(path).status_code == 200


def test_keys_are_not_written_to_the_log(guarded):
    guarded.client.get("/v1/models", headers={"X-API-Key": "first-key"})
    assert "first-key" not in guarded.log
    assert "first-key" not in guarded.client.get("/metrics").text


def test_a_page_of_the_named_origin_may_ask_and_read_problems(guarded):
    origin = {"Origin": "https://pages.example"}
    wish = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,x-api-key"}
    for method, path in (("POST", "/v1/pose"), ("HEAD", "/v1/models")):
        asked = guarded.client.options(path, headers=origin | wish | {"Access-Control-Request-Method": method})
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://pages.example"
    near = guarded.client.options("/v1/pose", headers=origin | wish | {"Access-Control-Request-Private-Network": "true"})
    assert (near.status_code, near.headers["access-control-allow-private-network"]) == (200, "true")
    without_key = guarded.client.get("/v1/models", headers=origin)
    key = {"X-API-Key": "first-key"}
    too_large = guarded.client.post("/v1/pose", content=bytes(33 * 2**20), headers=origin | key | JPEG)
    not_there = guarded.client.get("/nothing", headers=origin | key)
    for problem, status in ((without_key, 401), (too_large, 413), (not_there, 404)):
        assert problem.status_code == status
        assert problem.headers["access-control-allow-origin"] == "https://pages.example"
        assert problem.headers["access-control-expose-headers"] == "X-Request-ID, Server-Timing, Retry-After"
        assert problem.headers["x-request-id"] == problem.json()["request_id"]
    other = guarded.client.get("/livez", headers={"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_browsers_question_before_a_request_is_told_of_as_any_request(guarded):
    labels = {"method": "OPTIONS", "status": "200"}
    before = guarded.metric("pose_http_requests_total", **labels)
    wish = {"Origin": "https://pages.example", "Access-Control-Request-Method": "POST", "X-Request-ID": "a-question"}
    asked = guarded.client.options("/v1/pose", headers=wish)
    assert asked.headers["x-request-id"] == "a-question"
    assert re.fullmatch(r"total;dur=\d+\.\d\d", asked.headers["server-timing"])
    assert guarded.metric("pose_http_requests_total", **labels) == before + 1
    guarded.wait_until(lambda: "a-question" in guarded.log)


def test_no_other_origin_may_ask_by_default(client):
    origin = {"Origin": "https://pages.example"}
    assert "access-control-allow-origin" not in client.get("/livez", headers=origin).headers
    asked = client.options("/v1/pose", headers=origin | {"Access-Control-Request-Method": "POST"})
    assert (asked.status_code, asked.json()["status"]) == (405, PROBLEMS["method_not_allowed"][0])
