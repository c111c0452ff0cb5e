"""Weights → a detector of the store → the same boxes, through the service's own code."""

import sys

import numpy as np
import pytest
import torch

from app.inference.detector import Detector
from app.inference.model_store import load_model
from app.inference.session import open_session
from training.detector.export import PixelsToBoxes, detector_of, export
from training.detector.export import main as export_main
from training.detector.network import PersonDetector
from training.export import halved_weights

pytestmark = pytest.mark.filterwarnings("default")  # PyTorch's exporter warns of its own future


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(1)
    return halved_weights(PersonDetector(16).state_dict())


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    return export(weights, tmp_path_factory.mktemp("store"), "person-det", "1")


def test_the_graph_gives_pytorchs_boxes_and_scores(weights, folder):
    letterboxes = np.random.default_rng(0).integers(0, 255, (2, 416, 416, 3), np.uint8)
    with torch.inference_mode():
        expected = PixelsToBoxes(detector_of(weights))(torch.from_numpy(letterboxes))
    found = open_session((folder / "model.onnx").read_bytes()).run(["boxes", "scores"], {"letterboxes": letterboxes})
    assert found[0].shape == (2, 3549, 4)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-3, atol=0.01)


def test_the_service_takes_the_detector(folder):
    detector = Detector.opened(load_model(folder), 5)
    assert detector.description.detection.pad == 114
    letterbox = detector.letterbox(np.zeros((300, 200, 3), np.uint8), 1)
    assert letterbox.pixels.shape == (416, 416, 3)
    assert (letterbox.pixels[:, 278:] == 114).all()
    assert detector.network.run(letterbox.pixels[None]).values.shape == (1, 5, 5)


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
