"""Person detector → a model of the store: `python -m training.detector.export WEIGHTS.pth --name person-det --version 1`.

One ONNX graph takes letterboxed pictures as uint8 pixels, normalises them, and gives decoded boxes and scores; choosing among
them (NMS) is the service's (app/vision/detection.py). The graph is compared with PyTorch first, and with
`--int8 PEOPLE.json` brought to int8 then.
"""

import argparse
import hashlib
import logging
import tomllib
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from app.inference.detector import Detector
from app.inference.model_store import DetectorDescription, ModelError, load_model
from app.inference.session import open_session
from app.vision import detection
from training.command import one_line_faults
from training.data import Picture
from training.detector.augment import PAD
from training.detector.network import MEAN, STD, STRIDES, PersonDetector, normalised
from training.export import (
    add_store_arguments,
    check_finite,
    graph_of,
    halved_weights,
    patterns,
    without_denormals,
    write_model,
)
from training.files import DataError
from training.int8 import in_int8, samples_of
from training.weights import check_table, check_tensors, read_content, write_content

log = logging.getLogger("export")

SIDE = 416  # the longest of a photo as served
THRESHOLD = 0.3  # until training.detector.evaluate --write has measured a better one
NMS_IOU = 0.55
_GOLDEN = Path(__file__).parent / "golden.png"  # a square letterbox of tests/data/photos/t_pose_cc0.jpg
_BOX_TOLERANCE = 0.05  # pixels
_SCORE_TOLERANCE = 1e-4
_INT8_PIXELS, _INT8_SCORE = 8, 0.1
_FIRST = ("model.backbone.stem.", "model.backbone.blocks.0.")


class PixelsToBoxes(nn.Module):
    """The detector behind its normalisation: letterboxes [N, H, W, 3] (uint8 BGR) → boxes [N, A, 4] and scores [N, A] (0…1).

    Boxes are x1, y1, x2, y2 in letterbox pixels, 0 being the outer edge of the first; they may reach beyond the picture.
    """

    def __init__(self, model: PersonDetector) -> None:
        super().__init__()
        self.model = model

    def forward(self, letterboxes: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes = self.model(normalised(letterboxes))
        return boxes, logits.sigmoid()


def export(weights: dict[str, Tensor], store: Path, name: str, version: str, people: Path | None = None) -> Path:
    """Write <store>/<name>/<version>/model.onnx and model.toml, and give the folder. Denormal weights become 0.

    With `people`, a COCO file whose pictures tell the ranges of its values, the graph is in int8. Raises ValueError for
    weights that are no detector's or a name that the store does not take, DataError where there are no such pictures, and
    ModelError for weights that are not finite, where the float32 graph differs from PyTorch, or where int8 finds another
    person. Nothing is written then: a model already there stays whole.
    """
    model = detector_of(weights)
    check_finite(model)
    samples = None if people is None else samples_of(people, _letterbox)
    graph = graph_of(
        PixelsToBoxes(model),
        torch.zeros((2, SIDE, SIDE, 3), dtype=torch.uint8),
        "letterboxes",
        ["boxes", "scores"],
        STRIDES[-1],
    )
    _check(graph, model)
    precision = "float32"
    if samples is not None:
        plain, graph, precision = graph, in_int8(graph, "letterboxes", samples, _kept), "int8"
        _check_int8(graph, plain)
    description = _toml(name, version, precision, graph) + _golden(graph)
    DetectorDescription.model_validate(tomllib.loads(description))
    folder = store / name / version
    write_model(folder, graph, _GOLDEN.read_bytes(), description)
    Detector.opened(load_model(folder), 1)
    log.info("%s/%s: %s, %.1f MB", name, version, precision, len(graph) / 1e6)
    return folder


def _letterbox(picture: Picture) -> npt.NDArray[np.uint8]:
    pixels = np.empty((SIDE, SIDE, 3), np.uint8)
    detection.letterbox(picture.pixels(), pixels, PAD)
    return pixels


def _kept(graph: onnx.GraphProto) -> list[str]:
    """The nodes that stay in float32: the first convolutions, which cost AP in int8, the last and what follows them."""
    maker = {output: node for node in graph.node for output in node.output}
    kept = [node.name for node in graph.node if node.op_type == "Conv" and node.input[1].startswith(_FIRST)]
    waiting = [output.name for output in graph.output]
    while waiting:
        node = maker.get(waiting.pop())
        if node is not None:
            kept.append(node.name)
            waiting.extend(node.input if node.op_type != "Conv" else ())
    return kept


def detector_of(weights: dict[str, Tensor]) -> PersonDetector:
    """The network with these weights, in evaluation mode. Raises ValueError for weights that are no detector's."""
    output = weights.get("outputs.0.weight")
    if output is None or output.ndim != 4:
        raise ValueError("these are no weights of a person detector: there is no convolution outputs.0.weight")
    channels = output.shape[1]
    model = PersonDetector(channels).eval()
    check_tensors(weights, model, f"a detector of {channels} channels")
    model.load_state_dict({key: without_denormals(value) for key, value in weights.items()})
    return model


def _check(graph: bytes, model: PersonDetector) -> None:
    """Compare the graph with PyTorch on pictures, of several shapes."""
    session = open_session(graph)
    network = PixelsToBoxes(model)
    for batch, height, width in ((1, SIDE, SIDE), (3, SIDE, STRIDES[-1]), (1, 3 * STRIDES[-1], SIDE)):
        letterboxes = patterns(batch, height, width)
        with torch.inference_mode():
            expected = [values.numpy() for values in network(torch.from_numpy(letterboxes))]
        found = session.run(None, {"letterboxes": letterboxes})
        for what, ours, theirs, tolerance in zip(
            ("boxes", "scores"), found, expected, (_BOX_TOLERANCE, _SCORE_TOLERANCE), strict=True
        ):
            if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=1e-3, atol=tolerance):
                raise ModelError(f"the exported graph's {what} differ from PyTorch's at {batch} of {height}×{width}")


def _toml(name: str, version: str, precision: str, graph: bytes) -> str:
    """The text of model.toml, checked against the service's schema by load_model."""
    return f"""# All that the service needs to know of model.onnx. CARD.md tells people the rest.
name = "{name}"
version = "{version}"
network = "person detector on EfficientNet-Lite0"
precision = "{precision}"
sha256 = "{hashlib.sha256(graph).hexdigest()}"

# The graph takes letterboxes as uint8 [N, h, w, 3], no larger than this, and normalises them: (value / 255 - mean) / std.
[input]
width = {SIDE}
height = {SIDE}
channel_order = "BGR"
mean = {[round(MEAN / 255, 6)] * 3}
std = {[round(STD / 255, 6)] * 3}

# It gives boxes [N, A, 4] (x1, y1, x2, y2 in letterbox pixels) and scores [N, A]. h and w are multiples of the stride.
[detection]
stride = {STRIDES[-1]}
pad = {PAD}
threshold = {THRESHOLD}
nms_iou = {NMS_IOU}
"""


def _check_int8(graph: bytes, plain: bytes) -> None:
    """Raise ModelError where the best person of golden.png is another in int8: its samples tell too little of pictures."""
    differences = np.abs(_golden_person(graph) - _golden_person(plain))
    pixels, score = float(differences[:4].max()), float(differences[4])
    if pixels > _INT8_PIXELS or score > _INT8_SCORE:
        raise ModelError(
            f"in int8 the person in {_GOLDEN.name} moves by {pixels:.1f} pixels, the score by {score:.2f}; "
            f"{_INT8_PIXELS} and {_INT8_SCORE} are taken: give --int8 a file of more pictures, lit as those to come"
        )


def _golden_person(graph: bytes) -> npt.NDArray[np.float32]:
    """The best person that the network finds in golden.png: x1, y1, x2, y2, score."""
    letterbox = np.asarray(cv2.imread(str(_GOLDEN)), np.uint8)
    boxes, scores = open_session(graph).run(None, {"letterboxes": letterbox[None]})
    (person,) = detection.people(boxes[0], scores[0], NMS_IOU, 1)
    return np.asarray(person, np.float32)


def _golden(graph: bytes) -> str:
    """The table of the best person that the network finds in golden.png."""
    person = _golden_person(graph).tolist()
    return f"""
# The best person that the network finds in golden.png: x1, y1, x2, y2, score. The service compares at every start.
[golden]
rows = [{[round(value, 3) for value in person]}]
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.detector.export", description="Make a detector of the store from weights."
    )
    parser.add_argument("weights", type=Path, help="weights.pth of a training run, or its checkpoint.pth")
    add_store_arguments(parser)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with one_line_faults():
        try:
            content = read_content(arguments.weights)
            weights = content.get("averaged", content) if isinstance(content, dict) else content  # of a checkpoint too
            check_table(weights)
            halved = halved_weights(weights)
            folder = export(halved, arguments.store, arguments.name, arguments.version, arguments.int8)
        except ValueError as error:
            raise DataError(f"{arguments.weights} makes no model: {error}") from error
        write_content(folder / "weights.pth", halved)


if __name__ == "__main__":
    main()
