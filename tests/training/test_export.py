"""Weights → a model of the store → the same heatmaps and keypoints, through the service's own code."""

import hashlib
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from app.inference.model_store import ModelError
from app.inference.pose import PoseModel
from app.vision import heatmap
from training import evaluate
from training.decoders import AUTHORS, OURS
from training.estimators import decoder_of, local_estimator
from training.export import _check, export, graph_of
from training.export import main as export_main
from training.import_reference import main as import_reference
from training.import_reference import weights_in
from training.keypoints import MIRROR
from training.lpn import LPN
from training.pixels import normalised
from training.served import ServedLPN
from training.weights import read_lpn

REFERENCE = Path(__file__).parents[1] / "data/reference"
STORED = Path(__file__).parents[2] / "model_store/lpn50/1"
CHECKPOINT = REFERENCE / "lpn_50_256x192_fixture_fp16.pth"
pytestmark = pytest.mark.filterwarnings("default")  # PyTorch's exporter warns of its own future


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The authors' checkpoint, imported by the command of the README."""
    store = tmp_path_factory.mktemp("store")
    command = [
        sys.executable,
        "-m",
        "training.import_reference",
        str(CHECKPOINT),
        "--name",
        "lpn50-authors",
        "--version",
        "1",
    ]
    done = subprocess.run([*command, "--store", str(store)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return store / "lpn50-authors/1"


@pytest.fixture(scope="module")
def parity():
    with np.load(REFERENCE / "parity.npz") as content:
        return dict(content)


@pytest.mark.parametrize("flip_test", [True, False])
def test_the_imported_model_gives_the_authors_keypoints(imported, parity, flip_test):
    model = PoseModel.load(imported)
    assert decoder_of(model) == AUTHORS
    network, name = (model.with_flip_test, "flip") if flip_test else (model.plain, "single")
    found = np.concatenate([network.run(batch).values for batch in np.array_split(parity["crop_bgr_u8"], 3)])
    np.testing.assert_allclose(found[..., :2], parity[f"{name}_bsa_shift_hm"], rtol=0, atol=0.002)
    np.testing.assert_allclose(found[..., 2], parity[f"{name}_bsa_score"], rtol=0, atol=1e-4)


def test_the_imported_model_gives_the_authors_places_in_the_picture(imported, parity):
    model = PoseModel.load(imported)
    crops = model.cut(np.zeros((4, 4, 3), np.uint8), parity["box_xywh"])
    places = model.to_picture(model.with_flip_test.run(parity["crop_bgr_u8"]).values, crops)
    np.testing.assert_allclose(places[..., :2], parity["all_preds"][..., :2], rtol=0, atol=0.01)


def test_the_imported_graph_gives_the_authors_heatmaps(imported, parity):
    model = PoseModel.load(imported)
    crops = parity["crop_bgr_u8"][parity["heatmap_boxes"]]
    plain, mirrored = model.heatmaps(crops), model.heatmaps(np.ascontiguousarray(crops[:, :, ::-1]))
    np.testing.assert_allclose(plain, parity["heatmaps"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(mirrored, parity["heatmaps_of_flipped_input"], rtol=0, atol=1e-4)
    expected = heatmap.average_with_mirrored(parity["heatmaps"], parity["heatmaps_of_flipped_input"], MIRROR, 1.0)
    np.testing.assert_allclose(heatmap.average_with_mirrored(plain, mirrored, MIRROR, 1.0), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("flip_test", [True, False])
def test_the_imported_model_gets_the_authors_ap_from_their_boxes(imported, tmp_path, flip_test):
    photos = ("astronaut_384.png", "camera_400.png", "drawing_560x360.png")
    for number, photo in enumerate(photos, 1):
        (tmp_path / f"{number:012d}.jpg").write_bytes((REFERENCE / photo).read_bytes())
    boxes_of = evaluate.detected_boxes(REFERENCE / "boxes.json")
    model = PoseModel.load(imported)
    estimate = local_estimator(model, [decoder_of(model)], [flip_test])
    ((_, accuracy),) = evaluate.evaluate_set(REFERENCE / "annotations_mini.json", tmp_path, boxes_of, estimate).items()
    assert accuracy.people == 4  # in eight boxes
    assert accuracy.measures["ap"] == pytest.approx(0.8308580858, abs=1e-6)
    assert accuracy.measures["ar"] == pytest.approx(0.925, abs=1e-6)


def test_the_graph_has_a_free_batch_size_and_no_shape_arithmetic(imported):
    graph = onnx.load(imported / "model.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert not kinds & {"Shape", "Gather", "BatchNormalization"}
    model = PoseModel.load(imported)
    for count in (1, 2, 5):
        assert model.plain.run(np.zeros((count, 256, 192, 3), np.uint8)).values.shape == (count, 17, 3)


def test_a_graph_that_computes_something_else_is_refused(exported):
    model, graph = read_lpn(STORED / "weights.pth").eval(), (exported / "model.onnx").read_bytes()
    _check(graph, model, 256)
    with torch.no_grad():
        model.final_layer.bias += 0.01
    with pytest.raises(ModelError, match=r"differs from PyTorch by 0\.01"):
        _check(graph, model, 256)


def test_the_command_makes_a_model_that_decodes_in_our_way(exported):
    assert decoder_of(PoseModel.load(exported)) == OURS
    given, kept = (read_lpn(file).state_dict() for file in (STORED / "weights.pth", exported / "weights.pth"))
    torch.testing.assert_close(kept, given, rtol=0, atol=0)


def test_a_model_may_take_larger_crops(exported, tmp_path, monkeypatch):
    command = ["export", str(STORED / "weights.pth"), "--name", "large", "--version", "1", "--store", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--height", "320"])
    export_main()
    large, usual = PoseModel.load(tmp_path / "large/1"), PoseModel.load(exported)
    assert cv2.imread(str(tmp_path / "large/1/golden.png")).shape == (320, 240, 3)
    assert large.plain.run(np.zeros((3, 320, 240, 3), np.uint8)).values.shape == (3, 17, 3)
    found, expected = (np.array(model.description.golden.rows)[:, :2] for model in (large, usual))
    assert np.median(np.linalg.norm(found / 1.25 - expected, axis=1)) < 0.5


@pytest.mark.parametrize("height", ["100", "0", "-64", "2048", "high"])
def test_a_height_that_no_network_takes_is_refused(height, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export", "x.pth", "--name", "x", "--version", "1", "--height", height])
    with pytest.raises(SystemExit):
        export_main()
    assert "a multiple of 64 up to 1024" in capsys.readouterr().err


class Hands(torch.nn.Module):
    """Crops [N, 256, 256, 3] → heatmaps [N, 4, 64, 64], as high as each block of a channel, or of all, is bright."""

    def forward(self, crops):
        blocks = torch.nn.functional.avg_pool2d(crops.permute(0, 3, 1, 2).float() / 255, 4)
        return torch.cat([blocks, blocks.mean(1, keepdim=True)], dim=1)


def test_a_network_of_ones_own_is_served_by_the_references_description(tmp_path):
    reference = (Path(__file__).parents[2] / "app/README.md").read_text()
    (block,) = re.findall(r'```toml\n(  name = "hands".*?)```', reference, re.DOTALL)
    graph = graph_of(Hands(), torch.zeros((2, 256, 256, 3), dtype=torch.uint8), "crops", ["heatmaps"])
    folder = tmp_path / "hands/1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(graph)
    (folder / "model.toml").write_text(textwrap.dedent(block).replace("…", hashlib.sha256(graph).hexdigest()))
    crop = np.zeros((1, 256, 256, 3), np.uint8)
    crop[0, 96:100, 200:204] = 255
    joints = PoseModel.load(folder).plain.run(crop).values
    assert joints.shape == (1, 4, 3)
    np.testing.assert_allclose(joints[0], [[50, 24, 1]] * 4, atol=0.1)


def test_denormal_weights_are_flushed(tmp_path):
    weights = LPN(50).state_dict()
    weights["layer1.0.conv1.weight"] = torch.full_like(weights["layer1.0.conv1.weight"], 1e-41)
    # A dead channel of the authors' float32: no denormal itself, but the folded product with its normalisation is one.
    weights["layer1.1.conv1.weight"][0] = 1e-30
    weights["layer1.1.bn1.weight"][0] = 1e-10
    folder = export(weights, tmp_path, "tiny", "1", OURS)
    for constant in onnx.load(folder / "model.onnx").graph.initializer:
        values = np.abs(numpy_helper.to_array(constant).astype(np.float64))
        assert not ((values > 0) & (values < np.finfo(np.float32).tiny)).any()


def _without_bias():
    weights = LPN(50).state_dict()
    del weights["final_layer.bias"]
    return weights


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lambda: b"", "finds no weights"),
        (lambda: b"not a checkpoint", "finds no weights"),
        (lambda: CHECKPOINT.read_bytes()[:1_000_000], "finds no weights"),
        (lambda: 5, "no table of named tensors"),
        (lambda: [torch.zeros(2)], "no table of named tensors"),
        (lambda: {"weight": torch.zeros(3)}, "not the weights of an LPN"),
        (_without_bias, "1 tensors are missing and 0 are strange: final_layer.bias"),
        (lambda: LPN(50, keypoints=16).state_dict(), "has the shape [16"),
        (lambda: LPN(50, attention=False).state_dict(), "tensors are missing"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, capsys, monkeypatch, content, why):
    file = tmp_path / "strange.pth"
    made = content()
    if isinstance(made, bytes):
        file.write_bytes(made)
    else:
        torch.save(made, file)
    said = _refusal(import_reference, file, tmp_path, capsys, monkeypatch)
    assert said.startswith("strange.pth is no checkpoint of COCO's 17 joints by the authors: ")
    assert why in said


@pytest.mark.parametrize("key", ["state_dict", "best_state_dict"])
def test_the_weights_of_a_training_with_the_authors_code_are_found(key):
    weights = LPN(50).state_dict()
    counted = {f"module.{name}": values for name, values in weights.items()} | {"module.total_ops": torch.zeros(1)}
    found = weights_in({"epoch": 3, "optimizer": {}, key: counted})
    assert found.keys() == weights.keys()
    assert found["final_layer.bias"] is weights["final_layer.bias"]


def test_a_network_that_finds_nothing_is_exported_with_a_word(tmp_path, caplog):
    torch.manual_seed(0)
    export(LPN(50).state_dict(), tmp_path, "x", "1", OURS, height=128)
    assert [told for told in caplog.messages if "is it trained, for crops 128 high?" in told]


def test_a_checkpoint_that_is_not_there_is_said_to_be_unreadable(tmp_path, capsys, monkeypatch):
    said = _refusal(import_reference, tmp_path / "absent.pth", tmp_path, capsys, monkeypatch)
    assert (
        said
        == "absent.pth is no checkpoint of COCO's 17 joints by the authors: it cannot be read (No such file or directory)\n"
    )


def _refusal(command, file, store, capsys, monkeypatch):
    """The one line that the command says about the file."""
    monkeypatch.setattr(sys, "argv", ["x", str(file), "--name", "x", "--version", "1", "--store", str(store)])
    assert command() == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    return said


def test_weights_that_give_no_numbers_make_no_model_and_leave_the_present_one(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "x/1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"the present model")
    weights = LPN(50).state_dict()
    weights["final_layer.bias"] += float("nan")
    torch.save(weights, tmp_path / "broken.pth")
    said = _refusal(import_reference, tmp_path / "broken.pth", tmp_path, capsys, monkeypatch)
    assert said == "broken.pth makes no model: final_layer.bias is not finite\n"
    assert [file.name for file in folder.iterdir()] == ["model.onnx"]
    assert (folder / "model.onnx").read_bytes() == b"the present model"


@pytest.mark.parametrize(("option", "value"), [("--name", "LPN 50"), ("--name", "../x"), ("--version", "1.0")])
@pytest.mark.parametrize("command", [export_main, import_reference])
def test_a_name_that_the_store_does_not_take_is_refused_at_once(tmp_path, capsys, monkeypatch, command, option, value):
    options = {"--name": "x", "--version": "1", "--store": str(tmp_path / "store")} | {option: value}
    monkeypatch.setattr(sys, "argv", ["x", str(CHECKPOINT), *(word for pair in options.items() for word in pair)])
    with pytest.raises(SystemExit):
        command()
    assert f"argument {option}: {value!r}: String should match" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_weights_of_another_kind_end_the_export_with_one_line(tmp_path, monkeypatch):
    torch.save(LPN(50, keypoints=16).state_dict(), tmp_path / "sixteen.pth")
    options = ["--name", "x", "--version", "1", "--store", str(tmp_path / "store")]
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "sixteen.pth"), *options])
    with pytest.raises(
        SystemExit, match=r"sixteen\.pth holds no weights that fit: final_layer\.\w+ has the shape \[16[^\n]*$"
    ):
        export_main()
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("for_int8", [False, True])
@pytest.mark.parametrize("depth", [50, 101])
def test_the_served_form_gives_the_networks_heatmaps(depth, for_int8):
    torch.manual_seed(0)
    model = LPN(depth).eval()
    for module in model.modules():  # nothing stays at 0 or 1, as it is before training
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight, module.running_var):
                torch.nn.init.uniform_(values, 0.5, 1.5)
            for values in (module.bias, module.running_mean):
                torch.nn.init.normal_(values, std=0.1)
        elif isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.bias)
    for block in (*model.layer1, *model.layer3):
        torch.nn.init.normal_(block.att.channel_add_conv[3].weight, std=0.1)
    torch.nn.init.normal_(model.final_layer.weight, std=0.1)
    crops = torch.randint(0, 256, (2, 64, 48, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected, found = model(normalised(crops)), ServedLPN(model, for_int8)(crops)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def heatmaps(parity):
    """PyTorch's heatmaps of the reference crops, by the shipped weights."""
    with torch.inference_mode():
        maps = read_lpn(STORED / "weights.pth").eval()(normalised(torch.from_numpy(parity["crop_bgr_u8"])))
    return maps.numpy()


@pytest.fixture(scope="module")
def int8(tmp_path_factory, reference_people):
    """A model in int8 of the shipped weights, by the command; its ranges are those of the three reference photos."""
    folder = tmp_path_factory.mktemp("int8")
    command = [sys.executable, "-m", "training.export", STORED / "weights.pth", "--name", "x", "--version", "1"]
    done = subprocess.run([*command, "--store", folder, "--int8", reference_people], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith("x/1: LPN-50, int8, ")
    return folder / "x/1"


def test_ranges_of_a_picture_that_shows_nobody_make_no_model(tmp_path):
    dark = np.random.default_rng(0).integers(0, 30, (300, 300, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "dark.png"), dark)
    person = {"id": 1, "image_id": 1, "bbox": [50, 20, 200, 250], "area": 30_000, "keypoints": [100.0, 100.0, 2] * 17}
    image = {"id": 1, "file_name": "dark.png", "width": 300, "height": 300}
    (tmp_path / "people.json").write_text(json.dumps({"images": [image], "annotations": [person]}))
    weights = read_lpn(STORED / "weights.pth").state_dict()
    with pytest.raises(ModelError, match="give --int8 a file of more people"):
        export(weights, tmp_path / "store", "x", "1", OURS, tmp_path / "people.json")
    assert not (tmp_path / "store").exists()


def test_in_int8_the_model_finds_nearly_the_same_places(int8, parity, heatmaps):
    stored = PoseModel.load(int8)
    assert stored.description.precision == "int8"
    assert (int8 / "model.onnx").stat().st_size < 4_500_000
    _assert_near(stored.heatmaps(parity["crop_bgr_u8"]), heatmaps)


def _assert_near(found, expected):
    """Heatmaps that differ by what int8 costs."""
    assert np.abs(found - expected).mean() < 0.003
    places, right = (heatmap.decode(maps, 160.0, False) for maps in (found, expected))
    distances = np.linalg.norm((places - right)[..., :2], axis=2)[right[..., 2] > 0.2]
    assert len(distances) > 50
    assert np.median(distances) < 0.25
    assert np.quantile(distances, 0.8) < 1


def test_int8_weights_leave_a_bit_free(int8):
    """8-bit products would overflow on processors without VNNI."""
    graph = onnx.load(int8 / "model.onnx").graph
    weights = [
        values for each in graph.initializer if (values := numpy_helper.to_array(each)).dtype == np.int8 and values.ndim == 4
    ]
    assert len(weights) > 50
    assert max(int(np.abs(values.astype(int)).max()) for values in weights) <= 64


def test_in_int8_each_map_is_dequantised_once_for_attention(int8, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(int8 / "model.onnx", options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    makers = {output: node for node in nodes for output in node.output}

    def dequantised(value):
        maker = makers.get(value)
        while maker is not None and maker.op_type in ("Flatten", "Reshape", "Transpose"):
            maker = makers.get(maker.input[0])
        return maker.name if maker is not None and maker.op_type == "DequantizeLinear" else None

    maps = [source for node in nodes if node.op_type == "MatMul" for value in node.input if (source := dequantised(value))]
    assert len(maps) == 2 * 16
    assert len(set(maps)) == 16


def test_without_people_there_is_no_int8_model(tmp_path, monkeypatch):
    people = tmp_path / "people.json"
    people.write_text('{"images": [], "annotations": []}')
    command = ["x", str(STORED / "weights.pth"), "--name", "x", "--version", "1", "--store", str(tmp_path / "store")]
    monkeypatch.setattr(sys, "argv", [*command, "--int8", str(people)])
    with pytest.raises(SystemExit, match=r"people\.json holds nobody with keypoints$"):
        export_main()
    assert not (tmp_path / "store").exists()


def test_graphs_tell_nothing_of_the_machine_that_made_them(imported):
    for path in (imported / "model.onnx", *STORED.parents[1].rglob("*.onnx")):
        assert b'.py"' not in path.read_bytes(), path  # as PyTorch's traces have: File "/home/…/lpn.py", line 60


def test_the_shipped_model_is_what_its_weights_give(parity, heatmaps):
    _assert_near(PoseModel.load(STORED).heatmaps(parity["crop_bgr_u8"]), heatmaps)
