"""Weights → a detector of the store → the same boxes, through the service's own code."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from app.inference.detector import Detector
from app.inference.model_store import ModelError, load_model
from app.inference.session import open_session
from app.vision import detection
from training.detector import export as exporter
from training.detector.export import PixelsToBoxes, detector_of, export
from training.detector.export import main as export_main
from training.detector.network import PersonDetector
from training.export import halved_weights
from training.weights import read_content

STORED = Path(__file__).parents[3] / "model_store/person-det/1"

pytestmark = pytest.mark.filterwarnings("default")  # PyTorch's exporter warns of its own future


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(1)
    return halved_weights(PersonDetector(16).state_dict())


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    return export(weights, tmp_path_factory.mktemp("store"), "person-det", "1")


@pytest.mark.parametrize(("moved", "told"), [((0.2, 0), "boxes"), ((0, 0.001), "scores")])
def test_a_graph_that_computes_something_else_is_refused(weights, folder, monkeypatch, moved, told):
    class Moved(PixelsToBoxes):
        def forward(self, letterboxes):
            return tuple(values + by for values, by in zip(super().forward(letterboxes), moved, strict=True))

    model, graph = detector_of(weights), (folder / "model.onnx").read_bytes()
    exporter._check(graph, model)
    monkeypatch.setattr(exporter, "PixelsToBoxes", Moved)
    with pytest.raises(ModelError, match=f"the exported graph's {told} differ from PyTorch's"):
        exporter._check(graph, model)


@pytest.mark.parametrize(("shape", "candidates"), [((416, 416), 3549), ((96, 416), 819), ((32, 32), 21)])
def test_the_graph_gives_pytorchs_boxes_and_scores(weights, folder, shape, candidates):
    letterboxes = np.random.default_rng(0).integers(0, 255, (2, *shape, 3), np.uint8)
    with torch.inference_mode():
        expected = PixelsToBoxes(detector_of(weights))(torch.from_numpy(letterboxes))
    found = open_session((folder / "model.onnx").read_bytes()).run(["boxes", "scores"], {"letterboxes": letterboxes})
    assert found[0].shape == (2, candidates, 4)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-3, atol=0.01)


def test_the_service_takes_the_detector(folder):
    detector = Detector.opened(load_model(folder), 5)
    assert detector.description.detection.pad == 114
    noise = np.random.default_rng(0)
    pictures = [noise.integers(0, 100, (height, width, 3), np.uint8) for height, width in ((300, 190), (100, 100), (10, 900))]
    letterboxes = [detector.letterbox(picture, 1)[0] for picture in pictures]
    assert [letterbox.shape for letterbox in letterboxes] == [(416, 288, 3), (416, 416, 3), (32, 416, 3)]
    assert (letterboxes[0][:, 263:] == 114).all()
    assert not (letterboxes[0][:, :263] == 114).any()
    for letterbox in letterboxes:
        assert detector.network.run(letterbox[None]).values.shape == (1, 5, 5)


def test_in_int8_the_detector_finds_nearly_the_same_boxes(reference_people, tmp_path, monkeypatch, t_pose):
    command = ["x", str(STORED / "weights.pth"), "--name", "x", "--version", "1", "--store", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--int8", str(reference_people)])
    export_main()
    int8 = Detector.opened(load_model(tmp_path / "x/1"), 1)
    assert int8.description.precision == "int8"
    assert (tmp_path / "x/1/model.onnx").stat().st_size < 4e6
    letterbox = int8.letterbox(cv2.imdecode(np.frombuffer(t_pose, np.uint8), cv2.IMREAD_COLOR), 1)[0]
    with torch.inference_mode():
        network = PixelsToBoxes(detector_of(read_content(STORED / "weights.pth")))
        boxes, scores = (values.numpy()[0] for values in network(torch.from_numpy(letterbox[None])))
    (expected,) = detection.people(boxes, scores, 0.55, 1)
    found = int8.network.run(letterbox[None]).values[0, 0]
    assert np.abs(found[:4] - expected[:4]).max() < 8
    assert found[4] == pytest.approx(expected[4], abs=0.1)


def test_ranges_of_a_dark_picture_make_no_detector(tmp_path):
    cv2.imwrite(str(tmp_path / "dark.png"), np.random.default_rng(0).integers(0, 30, (300, 300, 3), np.uint8))
    person = {"id": 1, "image_id": 1, "bbox": [50, 20, 200, 250], "area": 30_000, "keypoints": [100.0, 100.0, 2] * 17}
    image = {"id": 1, "file_name": "dark.png", "width": 300, "height": 300}
    (tmp_path / "people.json").write_text(json.dumps({"images": [image], "annotations": [person]}))
    stored = read_content(STORED / "weights.pth")
    with pytest.raises(ModelError, match="give --int8 a file of more pictures"):
        export(stored, tmp_path / "store", "x", "1", tmp_path / "people.json")
    assert not (tmp_path / "store").exists()


def test_other_weights_are_refused_and_nothing_is_written(weights, tmp_path):
    with pytest.raises(ValueError, match="no weights of a person detector"):
        export({"conv1.weight": torch.zeros(1)}, tmp_path, "person-det", "1")
    with pytest.raises(ValueError, match=r"pyramid\.lateral\.0\.0\.weight"):
        export({k: v for k, v in weights.items() if k != "pyramid.lateral.0.0.weight"}, tmp_path, "person-det", "1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (5, "it is no table of named tensors"),
        ({"outputs.0.weight": torch.zeros(1)}, "these are no weights of a person detector"),
        ({"conv1.weight": torch.zeros(1)}, "these are no weights of a person detector"),
    ],
)
def test_a_file_of_another_kind_ends_the_command_with_one_line(tmp_path, monkeypatch, content, why):
    torch.save(content, tmp_path / "w.pth")
    monkeypatch.setattr(
        sys, "argv", ["x", str(tmp_path / "w.pth"), "--name", "x", "--version", "1", "--store", str(tmp_path / "store")]
    )
    with pytest.raises(SystemExit, match=rf"w\.pth makes no model: {why}[^\n]*$"):
        export_main()
    assert not (tmp_path / "store").exists()
