"""The model store: every fault of a model is told by a message that names the file."""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from app.inference.detector import Detector
from app.inference.model_store import DetectorDescription, ModelError, load_model, stored_models
from app.inference.pose import PoseModel
from app.vision import heatmap

STORE = Path(__file__).parents[2] / "model_store"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a model that may be damaged."""
    shutil.copytree(STORE / "lpn50/1", tmp_path / "lpn50/1")
    return tmp_path / "lpn50/1"


def edit(folder: Path, change: Callable[[str], str]) -> None:
    file = folder / "model.toml"
    before = file.read_text()
    file.write_text(change(before))
    assert file.read_text() != before


def set_graph(folder: Path, content: bytes) -> None:
    """Another model.onnx, with the sha256 to match."""
    before = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    (folder / "model.onnx").write_bytes(content)
    edit(folder, lambda text: text.replace(before, hashlib.sha256(content).hexdigest()))


def graph(
    inputs: list[object] = [1, 256, 192, 3],  # noqa: B006
    outputs: list[object] = [1, 17, 64, 48],  # noqa: B006
    type_: int = TensorProto.UINT8,
    more: int = 0,
    batch: object = "N",
    answers: int = TensorProto.FLOAT,
    ir_version: int = 8,
    opset: int = 17,
) -> bytes:
    """A small graph that answers zeros; the shapes are those of a batch of one, and `batch` is how many it says it takes."""
    content = helper.make_tensor("zeros", answers, [1], [0])
    names = [f"out{i}" for i in range(more + 1)]
    made = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["shape"], [name], value=content) for name in names],
        "g",
        [helper.make_tensor_value_info("crops", type_, [batch, *inputs[1:]])],
        [helper.make_tensor_value_info(name, answers, [batch, *outputs[1:]]) for name in names],
        [helper.make_tensor("shape", TensorProto.INT64, [len(outputs)], outputs)],
    )
    opsets = [helper.make_opsetid("", opset)]
    return onnx.helper.make_model(made, opset_imports=opsets, ir_version=ir_version).SerializeToString()


def test_every_model_of_the_store_is_whole():
    found = stored_models(STORE)
    assert found
    for folder in found:
        stored = load_model(folder)
        assert stored.description.id == f"{folder.parent.name}/{folder.name}"
        if isinstance(stored.description, DetectorDescription):
            assert Detector.opened(stored, 100).description == stored.description
        else:
            assert PoseModel.opened(stored).description == stored.description


@pytest.mark.parametrize(("written", "shift"), [("mirror_shift = 0.25", 0.25), ("", 1.0)])
def test_the_flip_test_moves_mirrored_maps_as_far_as_the_model_says(folder, written, shift):
    edit(folder, lambda text: re.sub("mirror_shift = .*", written, text))
    model = PoseModel.load(folder)
    crops = np.asarray(cv2.imread(str(folder / "golden.png")), np.uint8)[None]
    plain, mirrored = model.heatmaps(crops), model.heatmaps(np.ascontiguousarray(crops[:, :, ::-1]))
    averaged = heatmap.average_with_mirrored(plain, mirrored, model.description.mirror, shift)
    shape = model.description.heatmap
    expected = heatmap.decode(averaged, shape.beta, shape.quarter_shift, shape.window)
    np.testing.assert_allclose(model.with_flip_test.run(crops).values[..., :3], expected, atol=0.02)


def test_models_are_listed_by_name_and_ascending_version(tmp_path, caplog):
    for place in ("b/1", "a/10", "a/9", "a/latest", "a/.tmp"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "model.toml").touch()
    (tmp_path / "a/model.toml").touch()
    (tmp_path / "a/11").mkdir()
    with caplog.at_level("WARNING"):
        assert stored_models(tmp_path) == [tmp_path / "a/9", tmp_path / "a/10", tmp_path / "b/1"]
    passed_over = {re.sub("(.*/)?(.*) is passed over: .*", r"\2", told) for told in caplog.messages}
    assert passed_over == {"a", "latest", ".tmp"}


@pytest.mark.parametrize("name", ["model.onnx", "model.toml"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=rf"lpn50/1: {name} cannot be read"):
        load_model(folder)


def test_a_wrong_sha256_is_told(folder):
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelError, match=r"lpn50/1: model\.onnx has sha256 [0-9a-f]{12}…, model\.toml says [0-9a-f]{12}…"):
        load_model(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda _: "",
        lambda _: "no toml [",
        lambda text: text.replace("width=192", 'width="wide"'),
        lambda text: text.replace("width=192", "width=0"),
        lambda text: text.replace("beta=", "wide="),
        lambda text: text.replace("beta=", "gamma=1\nbeta="),
        lambda text: re.sub(r"beta=[\d.]+", "beta=inf", text),
        lambda text: re.sub(r"window=\d+", "window=8", text),
        lambda text: re.sub(r"window=\d+", "window=129", text),
        lambda text: text.replace("width=48", "width=64"),
        lambda text: re.sub(r"\nap=[\d.]+", r"\nap=nan", text),
        lambda text: text.replace("int8", "int9"),
        lambda text: text.replace('"BGR"', '"BRG"'),
        lambda text: text.replace("[0, 2, 1,", "[0, 2, 2,"),
        lambda text: text.replace("[0, 2, 1,", "[1, 2, 0,"),
        lambda text: text.replace("[16, 14]", "[18, 14]"),
        lambda text: text.replace("[16, 14]", "[0, 14]"),
        lambda text: text.replace("threshold=0.2", "threshold=2"),
        lambda text: text.replace('sha256="', 'sha256="x'),
    ],
)
def test_a_description_that_is_not_valid_is_told(folder, change):
    tidy = (folder / "model.toml").read_text().replace(" = ", "=")
    assert change(tidy) != tidy
    edit(folder, lambda _: change(tidy))
    with pytest.raises(ModelError, match=r"lpn50/1: model\.toml is not valid") as told:
        load_model(folder)
    assert "\n" not in str(told.value)


def test_a_description_that_is_no_text_is_told(folder):
    (folder / "model.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match=r"lpn50/1: model\.toml is not valid"):
        load_model(folder)


def test_a_model_under_another_name_is_told(folder):
    moved = folder.rename(folder.parent / "2")
    with pytest.raises(ModelError, match=r"lpn50/2: model\.toml calls itself lpn50/1"):
        load_model(moved)


@pytest.mark.parametrize("content", [b"", b"not a graph", (STORE / "lpn50/1/model.onnx").read_bytes()[:-1000]])
def test_a_file_that_is_no_graph_is_told(folder, content):
    set_graph(folder, content)
    with pytest.raises(ModelError, match=r"lpn50/1: model\.onnx is not a graph that ONNX Runtime opens: [A-Z]"):
        PoseModel.load(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (graph(ir_version=99), "Unsupported model IR version: 99"),
        (graph(opset=99), "Opset 99 is under development"),
        (graph().replace(b"ConstantOfShape", b"ConstantNoShape"), "No Op registered for ConstantNoShape"),
    ],
)
def test_a_graph_that_onnx_runtime_does_not_open_is_told_with_its_reason(folder, content, reason):
    set_graph(folder, content)
    with pytest.raises(ModelError, match=f"lpn50/1: model.onnx .*: .*{reason}") as told:
        PoseModel.load(folder)
    assert not re.search(r"\n|\.cc|\.h:", str(told.value))


def test_weights_beside_the_graph_are_not_read(folder, tmp_path, monkeypatch):
    """No sha256 covers them; ONNX Runtime would look for them in the working folder."""
    network = onnx.load_from_string((folder / "model.onnx").read_bytes())
    onnx.save_model(network, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    set_graph(folder, (tmp_path / "model.onnx").read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"lpn50/1: model\.onnx .*: it keeps weights in another file; export it with"):
        PoseModel.load(folder)


@pytest.mark.parametrize(
    "content",
    [
        graph(inputs=[1, 3, 256, 192]),
        graph(inputs=[1, 256, 256, 3]),
        graph(inputs=[1, 256, 192]),
        graph(outputs=[1, 18, 64, 48]),
        graph(outputs=[1, 17, 48, 64]),
        graph(type_=TensorProto.FLOAT),
        graph(more=1),
        graph(batch=1),
        graph(answers=TensorProto.UINT8),
    ],
    ids=["NCHW", "square", "no channels", "18 joints", "turned", "float", "two outputs", "one at a time", "bytes"],
)
def test_another_graph_is_told(folder, content):
    set_graph(folder, content)
    wanted = r"lpn50/1: model\.onnx must take uint8 \[N, 256, 192, 3\] and give floats \[N, 17, 64, 48\]"
    with pytest.raises(ModelError, match=wanted + r".*; it takes \w+ \[\w+, .*\] and gives \w+ \[\w+, .*\]"):
        PoseModel.load(folder)


def test_a_model_of_the_other_kind_is_told():
    pose, detector = (load_model(STORE / name) for name in ("lpn50/1", "person-det/1"))
    with pytest.raises(ModelError, match="person-det/1 is a person detector, not a pose model"):
        PoseModel.opened(detector)
    with pytest.raises(ModelError, match="lpn50/1 is a pose model, not a person detector"):
        Detector.opened(pose, 100)


def test_messages_name_no_path(folder):
    for damage in (lambda: edit(folder, lambda _: "no toml ["), (folder / "model.onnx").unlink):
        damage()
        with pytest.raises(ModelError) as told:
            load_model(folder)
        assert str(folder.parent.parent) not in str(told.value)


# The golden crop


def test_a_model_that_computes_something_else_is_refused(folder):
    (folder / "golden.png").write_bytes(cv2.imencode(".png", np.zeros((256, 192, 3), np.uint8))[1].tobytes())
    with pytest.raises(ModelError, match=r"lpn50/1 does not compute .* places are off by [0-9.]+ \(at most 0\.5\)"):
        PoseModel.load(folder)


@pytest.mark.parametrize("off", [(0.6, 0, 0), (0, 0.6, 0), (0, 0, 0.06)])
def test_a_model_of_which_one_place_or_score_is_off_is_refused(folder, off):
    rows = np.array(PoseModel.load(folder).description.golden.rows)
    rows[3] += off
    edit(folder, lambda text: re.sub(r"(?s)rows = \[.*?\],?\s*\]\n", f"rows = {rows.tolist()}\n", text, count=1))
    with pytest.raises(ModelError, match=r"lpn50/1 does not compute"):
        PoseModel.load(folder)


def test_a_detector_that_computes_something_else_is_refused(tmp_path):
    folder = shutil.copytree(STORE / "person-det/1", tmp_path / "person-det/1")
    black = np.zeros_like(cv2.imread(str(folder / "golden.png")))
    (folder / "golden.png").write_bytes(cv2.imencode(".png", black)[1].tobytes())
    with pytest.raises(ModelError, match=r"person-det/1 does not compute"):
        Detector.opened(load_model(folder), 9)


def test_a_detector_of_one_size_alone_is_refused(tmp_path):
    folder = shutil.copytree(STORE / "person-det/1", tmp_path / "person-det/1")
    network = onnx.load_from_string((folder / "model.onnx").read_bytes())
    for side in network.graph.input[0].type.tensor_type.shape.dim[1:3]:
        side.dim_value = 416
    set_graph(folder, network.SerializeToString())
    with pytest.raises(ModelError, match=r"must take uint8 \[N, height, width, 3\] and give floats \[N, A, 4\] and \[N, A\]"):
        Detector.opened(load_model(folder), 9)


def test_a_stride_that_the_graph_does_not_take_is_told(tmp_path):
    folder = shutil.copytree(STORE / "person-det/1", tmp_path / "person-det/1")
    edit(folder, lambda text: text.replace("stride = 32", "stride = 8"))
    with pytest.raises(ModelError, match=r"person-det/1: model\.onnx cannot search a letterbox of \[1, 8, 416, 3\]"):
        Detector.opened(load_model(folder), 9)


@pytest.mark.parametrize("side", ["width", "height"])
def test_a_letterbox_is_whole_strides(tmp_path, side):
    folder = shutil.copytree(STORE / "person-det/1", tmp_path / "person-det/1")
    edit(folder, lambda text: re.sub(rf"(?m)^{side} = .*$", f"{side} = 500", text, count=1))
    with pytest.raises(ModelError, match=r"person-det/1: model\.toml is not valid: .*must be multiples of stride"):
        load_model(folder)


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"nothing", "golden.png is not a"), (cv2.imencode(".png", np.zeros((99, 99, 3)))[1].tobytes(), "golden.png is not of")],
)
def test_a_broken_golden_crop_is_told(folder, content, fault):
    (folder / "golden.png").write_bytes(content)
    with pytest.raises(ModelError, match=fault):
        PoseModel.load(folder)


def test_a_missing_golden_crop_is_told(folder):
    (folder / "golden.png").unlink()
    with pytest.raises(ModelError, match=r"golden.png is missing"):
        load_model(folder)


def test_golden_rows_of_another_shape_are_told(folder):
    edit(folder, lambda text: re.sub(r"\[golden\].*", "[golden]\nrows = [[1.0, 2.0]]\n", text, flags=re.DOTALL))
    with pytest.raises(ModelError, match=r"\[golden\] in model.toml has rows of another shape"):
        PoseModel.load(folder)


def test_golden_rows_of_several_lengths_are_told(folder):
    edit(folder, lambda text: re.sub(r"\[golden\].*", "[golden]\nrows = [[1.0, 2.0, 3.0], [1.0]]\n", text, flags=re.DOTALL))
    with pytest.raises(ModelError, match=r"lpn50/1 cannot run golden.png"):
        PoseModel.load(folder)


def test_a_network_that_gives_no_numbers_is_refused(folder):
    network = onnx.load_from_string((folder / "model.onnx").read_bytes())
    weights = [i for i in network.graph.initializer if i.data_type == TensorProto.FLOAT]
    for each in weights:
        each.CopyFrom(onnx.numpy_helper.from_array(np.full(tuple(each.dims), np.nan, np.float32), each.name))
    set_graph(folder, network.SerializeToString())
    with pytest.raises(ModelError, match=r"lpn50/1 cannot run golden.png"):
        PoseModel.load(folder)


def test_a_calibration_must_know_every_joint(folder):
    table = "[calibration]\nintercepts = [0.1, 0.2]\nscore = -0.5\nspread = 1.0\n\n"
    text = re.sub(r"(?m)^\[calibration\]\n(.+\n)*", "", (folder / "model.toml").read_text())
    (folder / "model.toml").write_text(text.replace("[keypoints]", f"{table}[keypoints]"))
    with pytest.raises(ModelError, match="calibration must have an intercept for each joint"):
        load_model(folder)
