"""Weights → a model of the store → the same heatmaps and keypoints, through the service's own code."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from app.inference.pose import PoseModel
from training.export import export
from training.import_reference import main as import_reference
from training.lpn import LPN

REFERENCE = Path(__file__).parents[1] / "data/reference"
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
    assert model.description.heatmap.quarter_shift
    network, name = (model.with_flip_test, "flip") if flip_test else (model.plain, "single")
    found = np.concatenate([network.run(batch).values for batch in np.array_split(parity["crop_bgr_u8"], 3)])
    np.testing.assert_allclose(found[..., :2], parity[f"{name}_bsa_shift_hm"], rtol=0, atol=0.002)
    np.testing.assert_allclose(found[..., 2], parity[f"{name}_bsa_score"], rtol=0, atol=1e-4)


def test_the_imported_model_gives_the_authors_places_in_the_picture(imported, parity):
    model = PoseModel.load(imported)
    crops = model.cut(np.zeros((4, 4, 3), np.uint8), parity["box_xywh"])
    places = model.to_picture(model.with_flip_test.run(parity["crop_bgr_u8"]).values, crops)
    np.testing.assert_allclose(places[..., :2], parity["all_preds"][..., :2], rtol=0, atol=0.01)


def test_the_graph_has_a_free_batch_size_and_no_shape_arithmetic(imported):
    graph = onnx.load(imported / "model.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert not kinds & {"Shape", "Gather", "Concat", "BatchNormalization"}
    model = PoseModel.load(imported)
    for count in (1, 2, 5):
        assert model.plain.run(np.zeros((count, 256, 192, 3), np.uint8)).values.shape == (count, 17, 3)


def test_denormal_weights_are_flushed(tmp_path):
    weights = LPN(50).state_dict()
    weights["layer1.0.conv1.weight"] = torch.full_like(weights["layer1.0.conv1.weight"], 1e-41)
    folder = export(weights, tmp_path, "tiny", "1", quarter_shift=False)
    for constant in onnx.load(folder / "model.onnx").graph.initializer:
        values = np.abs(numpy_helper.to_array(constant).astype(np.float64))
        assert not ((values > 0) & (values < np.finfo(np.float32).tiny)).any()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, capsys, monkeypatch, content):
    file = tmp_path / "strange.pth"
    if content is None:
        torch.save({"weight": torch.zeros(3)}, file)
    else:
        file.write_bytes(content)
    monkeypatch.setattr(
        sys, "argv", ["import_reference", str(file), "--name", "x", "--version", "1", "--store", str(tmp_path)]
    )
    assert import_reference() == 1
    said = capsys.readouterr().err
    assert said.startswith("strange.pth is not a checkpoint of the authors")
    assert len(said.splitlines()) == 1


def test_the_shipped_model_is_what_its_weights_give():
    folder = Path(__file__).parents[2] / "model_store/lpn50/1"
    weights = torch.load(folder / "weights.pth", weights_only=True)
    model = LPN(50).eval()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    with np.load(REFERENCE / "parity.npz") as content:
        crops = content["crop_bgr_u8"][:2]
    from training.train import normalised

    with torch.inference_mode():
        expected = model(normalised(torch.from_numpy(crops))).numpy()
    found = PoseModel.load(folder).heatmaps(crops)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
