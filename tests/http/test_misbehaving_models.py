"""A network that fails or stands still on command, as a real model of the store: everybody gets an answer all the same.

The graph looks at the brightest value of its crops. Pictures of one colour tell it what to do.
"""

import hashlib
import io
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import httpx
import orjson
import pytest
from onnx import TensorProto, helper
from PIL import Image
from websockets.sync.client import connect

STORE = Path(__file__).parents[2] / "model_store"
WORKS, FAILS, STANDS_STILL = 100, 200, 255
PNG = {"Content-Type": "image/png"}


def graph(fails: int = FAILS, stands_still: int = STANDS_STILL) -> bytes:
    """uint8 [N, 256, 192, 3] → zeros [N, 17, 64, 48], unless the brightest value is one of the two."""

    def constant(name: str, type_: int, values: list, shape: list[int] | None = None) -> object:
        return helper.make_tensor(name, type_, [len(values)] if shape is None else shape, values)

    turn = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["goes_on"]),
            helper.make_node("Cos", ["x"], ["y"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("turns", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, []),
        ],
    )
    nodes = [
        helper.make_node("Cast", ["crops"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["values"], ["brightest"], keepdims=0),
        # an index out of bounds is an error of the runtime
        helper.make_node("Equal", ["brightest", "fails_at"], ["fails"]),
        helper.make_node("Where", ["fails", "nine", "nought"], ["index"]),
        helper.make_node("Gather", ["list", "index"], ["gathered"]),
        # two to the fiftieth turns of a loop are for ever
        helper.make_node("Equal", ["brightest", "stands_at"], ["stands"]),
        helper.make_node("Where", ["stands", "ever", "nought"], ["trips"]),
        helper.make_node("Loop", ["trips", "", "gathered"], ["looped"], body=turn),
        helper.make_node("Mul", ["looped", "nothing"], ["zero"]),
        helper.make_node("Shape", ["crops"], ["count"], start=0, end=1),
        helper.make_node("Concat", ["count", "map"], ["shape"], axis=0),
        helper.make_node("Expand", ["zero", "shape"], ["heatmaps"]),
    ]
    made = helper.make_graph(
        nodes,
        "misbehaving",
        [helper.make_tensor_value_info("crops", TensorProto.UINT8, ["N", 256, 192, 3])],
        [helper.make_tensor_value_info("heatmaps", TensorProto.FLOAT, ["N", 17, 64, 48])],
        [
            constant("fails_at", TensorProto.FLOAT, [fails], []),
            constant("stands_at", TensorProto.FLOAT, [stands_still], []),
            constant("nine", TensorProto.INT64, [9], []),
            constant("nought", TensorProto.INT64, [0], []),
            constant("ever", TensorProto.INT64, [2**50], []),
            constant("list", TensorProto.FLOAT, [0.0]),
            constant("nothing", TensorProto.FLOAT, [0.0], []),
            constant("map", TensorProto.INT64, [17, 64, 48]),
        ],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def store_of(folder: Path, onnx: bytes) -> Path:
    """A store whose only model has that graph, and no golden crop that would tell."""
    model = folder / "lpn50/1"
    shutil.copytree(STORE / "lpn50/1", model)
    before = hashlib.sha256((model / "model.onnx").read_bytes()).hexdigest()
    (model / "model.onnx").write_bytes(onnx)
    text = (model / "model.toml").read_text().replace(before, hashlib.sha256(onnx).hexdigest())
    (model / "model.toml").write_text(text[: text.index("[golden]")])
    (model / "golden.png").unlink()
    return folder


def picture(colour: int) -> bytes:
    with io.BytesIO() as file:
        Image.new("L", (300, 300), colour).save(file, "PNG")
        return file.getvalue()


def ask(service, colour: int, **options: object) -> httpx.Response:
    return httpx.post(
        service.client.base_url.join("/v1/pose"),
        params={"boxes": "100,100,50,60"} | options,
        content=picture(colour),
        headers=PNG,
        timeout=60,
    )


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["type"].removeprefix("/problems/")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return store_of(tmp_path_factory.mktemp("misbehaving"), graph())


@pytest.fixture(scope="module")
def service(start_service, store):
    return start_service(model_store=store, detector="", lanes=2)


def test_a_batch_that_fails_is_a_defect_that_is_logged_and_not_told(service):
    assert ask(service, WORKS).status_code == 200
    answer = ask(service, FAILS)
    assert code(answer) == (500, "internal_error")
    assert not re.search(r"onnx|gather|\.py|Error\b|Traceback", answer.text)
    request_id = answer.json()["request_id"]
    service.wait_until(lambda: service.log.count(request_id) > 1)  # the request's own line comes after its answer
    lines = [orjson.loads(line) for line in service.log.splitlines()[1:]]  # after the one for a person all are JSON
    told = [line for line in lines if line.get("request_id") == request_id]
    (logged,) = [line["exception"] for line in told if "exception" in line]
    assert "BatchFailed: The network lpn50/1 failed on a batch of 1." in logged
    assert "running Gather node" in logged  # the cause, in the runtime's words
    assert {"status": 500, "problem": "internal_error"}.items() <= told[-1].items()
    assert ask(service, WORKS).status_code == 200


def test_a_frame_that_fails_is_told_counted_and_the_stream_goes_on(start_service, tmp_path, t_pose):
    shutil.copytree(STORE / "person-det", tmp_path / "person-det")
    service = start_service(model_store=store_of(tmp_path, graph()))
    photo = Image.open(io.BytesIO(t_pose))
    frames = []
    for brightest in (FAILS, WORKS):
        with io.BytesIO() as file:
            photo.point([min(value, brightest) for value in range(256)] * 3).save(file, "PNG")
            frames.append(file.getvalue())
    with connect(f"ws://127.0.0.1:{service.port}/v1/stream", max_size=None) as stream:
        stream.send(frames[0])
        failed = orjson.loads(stream.recv(timeout=60))
        assert (failed["type"], failed["image_id"]) == ("/problems/internal_error", 0)
        stream.send(frames[1])
        assert orjson.loads(stream.recv(timeout=60))["images"][0]["id"] == 1
    outcomes = ("answered", "failed", "refused", "late", "skipped")
    assert [service.metric("pose_stream_frames_total", outcome=outcome) for outcome in outcomes] == [1, 1, 0, 0, 0]
    assert failed["request_id"] in service.log


def test_one_requests_failure_is_not_that_of_other_batches(start_service, store):
    service = start_service(model_store=store, detector="", lanes=2, max_batch_crops=1)
    statuses: list[tuple[int, int]] = []
    asking = [
        threading.Thread(target=lambda colour=colour: statuses.append((colour, ask(service, colour).status_code)))
        for colour in [WORKS, FAILS] * 8
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert sorted(statuses) == sorted([(WORKS, 200), (FAILS, 500)] * 8)


def test_a_lane_that_stands_still_is_replaced_and_its_request_answered(start_service, store):
    service = start_service(model_store=store, detector="", lanes=2)
    started = time.monotonic()
    answer = ask(service, STANDS_STILL, timeout_ms=60_000)
    assert code(answer) == (503, "not_ready")
    assert int(answer.headers["retry-after"]) >= 1
    assert 4 < time.monotonic() - started < 30
    assert service.metric("pose_inference_workers_replaced_total") == 1
    assert service.metric("pose_queue_crops") == 0
    assert ask(service, WORKS).status_code == 200
    assert service.client.get("/readyz").status_code == 200
    # As many as there are cores: no more is started, or each such request would leave a thread for ever.
    assert code(ask(service, STANDS_STILL, timeout_ms=60_000)) == (503, "not_ready")
    assert code(service.client.get("/readyz")) == (503, "not_ready")
    refused = ask(service, WORKS)
    assert (code(refused), refused.headers["Connection"]) == ((503, "not_ready"), "close")  # another replica may answer
    assert service.client.get("/livez").status_code == 200
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(30) == 0


def test_a_request_that_stands_still_past_its_deadline_is_answered_then(start_service, store):
    service = start_service(model_store=store, detector="", lanes=1)
    started = time.monotonic()
    assert code(ask(service, STANDS_STILL, timeout_ms=500)) == (504, "deadline_exceeded")
    assert time.monotonic() - started < 4


def test_a_stream_whose_frame_takes_long_is_not_closed_for_want_of_frames(start_service, tmp_path, t_pose):
    shutil.copytree(STORE / "person-det", tmp_path / "person-det")
    service = start_service(model_store=store_of(tmp_path, graph()), body_timeout_s=1)
    with io.BytesIO() as file:
        Image.open(io.BytesIO(t_pose)).point([min(2 * value, STANDS_STILL) for value in range(256)] * 3).save(file, "PNG")
        frame = file.getvalue()
    query = "timeout_ms=3000&detection_threshold=0.1&max_people=1"
    with connect(f"ws://127.0.0.1:{service.port}/v1/stream?{query}", max_size=None) as stream:
        stream.send(frame)
        assert orjson.loads(stream.recv(timeout=60))["type"] == "/problems/deadline_exceeded"


def test_a_model_that_fails_in_its_warm_up_leaves_the_service_unready(start_service, tmp_path):
    service = start_service(wait=False, model_store=store_of(tmp_path, graph(fails=0)), detector="", lanes=1)
    service.wait_until(lambda: "the warm-up failed" in service.log, 60)
    told = orjson.loads(service.log.splitlines()[-1])
    assert told["level"] == "critical"
    assert "model lpn50/1 fails in its warm-up" in str(told)
    for answer in (service.client.get("/readyz"), ask(service, WORKS)):
        assert code(answer) == (503, "not_ready")
        assert int(answer.headers["retry-after"]) >= 1
    assert service.client.get("/livez").status_code == 200


def test_a_model_that_stands_still_in_its_warm_up_does_not_keep_the_service_from_stopping(start_service, tmp_path):
    service = start_service(wait=False, model_store=store_of(tmp_path, graph(stands_still=0)), detector="", lanes=1)
    assert code(service.client.get("/readyz")) == (503, "not_ready")
    assert "warmed up" in service.client.get("/readyz").json()["detail"]
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(30) == 0
