"""LPN → a model of the store: `python -m training.export WEIGHTS.pth --name lpn50 --version 1`.

One ONNX graph takes crops as uint8 pixels, normalises them and gives heatmaps; it is compared with PyTorch first, and with
`--int8 PEOPLE.json` brought to int8 then.
"""

import argparse
import hashlib
import json
import logging
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from onnx import numpy_helper
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from app.inference.model_store import ModelDescription, ModelError, Name, Version
from app.inference.pose import PoseModel
from app.inference.session import open_session
from app.vision import box, crop
from training.command import one_line_faults
from training.data import Picture
from training.decoders import OURS, Decoder
from training.evaluate import labelled_boxes
from training.files import make_folder, write_together
from training.int8 import in_int8, samples_of
from training.keypoints import MIRROR, NAMES, SKELETON
from training.lpn import HEATMAP_STRIDE, LPN
from training.pixels import MEAN, STD, normalised
from training.served import ServedLPN
from training.weights import check_weights, read_lpn, write_content

log = logging.getLogger("export")

HEIGHT = 256  # of crops, whose width is ¾ of it
KEYPOINT_THRESHOLD = 0.2  # the reference's IN_VIS_THRE
_GOLDEN = Path(__file__).parent / "golden.png"  # a crop of tests/data/photos/t_pose_cc0.jpg
_TOLERANCE = 1e-4
_INT8_CELLS, _INT8_SCORES = 0.5, 0.1
_OPSET = 18


def export(
    weights: dict[str, Tensor],
    store: Path,
    name: str,
    version: str,
    decoder: Decoder,
    people: Path | None = None,
    height: int = HEIGHT,
) -> Path:
    """Write <store>/<name>/<version>/model.onnx and model.toml, and give the folder. Denormal weights become 0.

    The model takes crops `height` pixels high, a multiple of 64. With `people`, a COCO file whose people's crops tell the
    ranges of its values, the graph is in int8. Raises ValueError for weights that are no LPN's or a name that the store does
    not take, DataError where there are no such people, and ModelError for weights that are not finite, where the float32
    graph differs from PyTorch by more than 1e-4, or where int8 moves joints. Nothing is written then: a model already there
    stays whole.
    """
    depth = check_weights(weights)
    model = LPN(depth).eval()
    model.load_state_dict({key: without_denormals(value) for key, value in weights.items()})
    check_finite(model)
    samples = None if people is None else samples_of(people, lambda picture: _first_person(picture, height))
    crops = torch.zeros((2, height, height * 3 // 4, 3), dtype=torch.uint8)
    golden = _golden_crop(height)
    graph, precision = graph_of(ServedLPN(model, for_int8=samples is not None), crops, "crops", ["heatmaps"]), "float32"
    _check(graph, model, height)
    sure = decoder(_heatmaps(graph, golden))[0][:, 2].mean()
    if sure < KEYPOINT_THRESHOLD:
        log.warning("%s: its joints score %.2f in the mean; is it trained, for crops %d high?", _GOLDEN.name, sure, height)
    if samples is not None:
        plain, graph, precision = graph, in_int8(graph, "crops", samples), "int8"
        _check_int8(graph, plain, decoder, golden)
    description = _toml(name, version, depth, precision, graph, decoder, height) + _golden(graph, decoder, golden)
    ModelDescription.model_validate(tomllib.loads(description))
    folder = store / name / version
    write_model(folder, graph, cv2.imencode(".png", golden)[1].tobytes(), description)
    PoseModel.load(folder)
    log.info("%s/%s: LPN-%d, %s, %.1f MB", name, version, depth, precision, len(graph) / 1e6)
    return folder


def _first_person(picture: Picture, height: int) -> npt.NDArray[np.uint8] | None:
    """The crop [height, w, 3] of a picture's first person with keypoints."""
    width = height * 3 // 4
    boxes = labelled_boxes(picture).places[:1]
    if not len(boxes):
        return None
    pixels = np.empty((1, height, width, 3), np.uint8)
    crop.cut_crops(picture.pixels(), box.crop_affines(*box.centres_and_sizes(boxes, width / height), width, height), pixels)
    return np.asarray(pixels[0])


def write_model(folder: Path, graph: bytes, golden: bytes, description: str) -> None:
    """Write the files of a model that the service reads, over those of another one if all can be. Raises DataError."""
    make_folder(folder)
    write_together({folder / "model.onnx": graph, folder / "golden.png": golden, folder / "model.toml": description})


def without_denormals(values: Tensor) -> Tensor:
    """Floats as float32 without denormals, with which some CPUs compute many times slower; integers as they are."""
    if not values.is_floating_point():
        return values
    values = values.float()
    return torch.where(values.abs() < torch.finfo(torch.float32).tiny, 0.0, values)


def check_finite(model: nn.Module) -> None:
    """Raise ModelError where a model's weights or statistics are not finite."""
    spoilt = [name for name, values in model.state_dict().items() if not values.isfinite().all()]
    if spoilt:
        raise ModelError(f"{spoilt[0]} is not finite" + (f", nor are {len(spoilt) - 1} more" if spoilt[1:] else ""))


def graph_of(module: nn.Module, pictures: Tensor, name: str, outputs: list[str], stride: int | None = None) -> bytes:
    """The ONNX graph of a module that takes `pictures` [N, h, w, 3], in any number, as its input `name`; with a stride also
    those whose h and w are other multiples of it. Raises ModelError."""
    for chatty in ("onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    shape: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=1024)}
    if stride is not None:
        shape |= {
            1: stride * torch.export.Dim("rows", min=1, max=128),
            2: stride * torch.export.Dim("columns", min=1, max=128),
        }
    program = torch.onnx.export(
        module.eval(),
        (pictures,),
        dynamo=True,
        input_names=[name],
        output_names=outputs,
        dynamic_shapes=(shape,),
        opset_version=_OPSET,
        verbose=False,
    )
    if program is None:
        raise ModelError("PyTorch gave no graph")
    graph = program.model_proto
    inner = graph.graph
    for part in (inner, *inner.node, *inner.value_info, *inner.input, *inner.output, *inner.initializer):
        part.ClearField("metadata_props")  # PyTorch's traces, with the paths of this machine: a tenth of the file
    for constant in graph.graph.initializer:
        values = numpy_helper.to_array(constant)
        if values.dtype == np.float32:  # again: a dead channel's weights times its normalisation may be denormal
            values = np.where(np.abs(values) < np.finfo(np.float32).tiny, np.float32(0), values)
            constant.CopyFrom(numpy_helper.from_array(values, constant.name))
    return bytes(graph.SerializeToString())


def _check(graph: bytes, model: LPN, height: int) -> None:
    """Compare the graph with PyTorch on pictures, at several batch sizes."""
    session = open_session(graph)
    for batch in (1, 3):
        crops = patterns(batch, height, height * 3 // 4)
        with torch.inference_mode():
            expected = model(normalised(torch.from_numpy(crops))).numpy()
        found = session.run(None, {"crops": crops})[0]
        difference = float(np.abs(found - expected).max())
        if found.shape != expected.shape or not difference <= _TOLERANCE:
            raise ModelError(f"the exported graph differs from PyTorch by {difference:g} at batch {batch}")


def _check_int8(graph: bytes, plain: bytes, decoder: Decoder, golden: npt.NDArray[np.uint8]) -> None:
    """Raise ModelError where joints of the golden crop are found elsewhere in int8: its samples tell too little of people."""
    found, expected = (decoder(_heatmaps(each, golden))[0] for each in (graph, plain))
    cells = float(np.median(np.linalg.norm((found - expected)[:, :2], axis=1)))
    scores = float(np.abs(found - expected)[:, 2].mean())
    if cells > _INT8_CELLS or scores > _INT8_SCORES:
        raise ModelError(
            f"in int8 the joints of {_GOLDEN.name} move by {cells:.2f} cells in the median, their scores by {scores:.2f}; "
            f"{_INT8_CELLS} and {_INT8_SCORES} are taken: give --int8 a file of more people, lit and posed as those to come"
        )


def _golden_crop(height: int) -> npt.NDArray[np.uint8]:
    """golden.png, enlarged or reduced to that height where it has another."""
    golden = np.asarray(cv2.imread(str(_GOLDEN)), np.uint8)
    return golden if height == HEIGHT else np.asarray(cv2.resize(golden, (height * 3 // 4, height)), np.uint8)


def _heatmaps(graph: bytes, golden: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return np.asarray(open_session(graph).run(None, {"crops": golden[None]})[0])


def patterns(count: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Pictures [count, height, width, 3] with edges, gradients and noise at all scales."""
    rng = np.random.default_rng(0)
    pictures = np.zeros((count, height, width, 3), np.float32)
    for size in (4, 16, 64, 256):
        for picture in range(count):
            noise = rng.random((size, max(1, size * width // height), 3), np.float32)
            pictures[picture] += cv2.resize(noise, (width, height))
    return np.asarray(pictures / 4 * 255, np.uint8)


def _toml(name: str, version: str, depth: int, precision: str, graph: bytes, decoder: Decoder, height: int) -> str:
    """The text of model.toml, checked against the service's schema by load_model."""
    return f"""# All that the service needs to know of model.onnx. CARD.md tells people the rest.
name = "{name}"
version = "{version}"
network = "LPN-{depth}"
precision = "{precision}"
sha256 = "{hashlib.sha256(graph).hexdigest()}"

# The graph takes crops as uint8 [N, height, width, 3] and normalises them: (value / 255 - mean) / std, in channel order.
[input]
width = {height * 3 // 4}
height = {height}
channel_order = "BGR"
mean = {list(MEAN)}
std = {list(STD)}

[heatmap]
width = {height * 3 // 4 // HEATMAP_STRIDE}
height = {height // HEATMAP_STRIDE}
{_decoding(decoder)}

[keypoints]
names = {json.dumps(NAMES)}
skeleton = {json.dumps(SKELETON)}
mirror = {MIRROR.tolist()}
threshold = {KEYPOINT_THRESHOLD}
"""


def _decoding(decoder: Decoder) -> str:
    """The lines of model.toml that say how the heatmaps are decoded."""
    window = [] if decoder.window is None else [f"window = {decoder.window}"]
    shifts = [f"quarter_shift = {str(decoder.quarter_shift).lower()}", f"mirror_shift = {decoder.mirror_shift}"]
    return "\n".join([f"beta = {decoder.beta}", *window, *shifts])


def _golden(graph: bytes, decoder: Decoder, golden: npt.NDArray[np.uint8]) -> str:
    """The table of what the network makes of golden.png, one line a joint."""
    (joints,) = decoder(_heatmaps(graph, golden))
    rows = "".join(f"    [{x:.2f}, {y:.2f}, {score:.3f}],\n" for x, y, score in joints.tolist())
    return f"""
# What the network makes of golden.png: x, y in heatmap cells, score. The service compares at every start.
[golden]
rows = [
{rows}]
"""


def halved_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floats in float16: half the bytes in the store, and the graph holds exactly the values that a training starts from."""
    return {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    """--name, --version and --store: the model's place in the store; --int8: the people for it."""
    parser.add_argument("--name", type=_checked(Name), required=True, help="of the model: lower-case letters, digits, . _ -")
    parser.add_argument("--version", type=_checked(Version), required=True, help="a whole number")
    parser.add_argument("--store", type=Path, default=Path("model_store"))
    parser.add_argument(
        "--int8",
        type=Path,
        metavar="PEOPLE.json",
        help="make the graph int8; a COCO keypoint file, its pictures beside it, for the ranges",
    )


def _height(text: str) -> int:
    """A height that networks take, as a type for argparse."""
    if not text.isdecimal() or int(text) not in range(64, 1025, 64):
        raise argparse.ArgumentTypeError(f"{text!r}: a multiple of 64 up to 1024")
    return int(text)


def _checked(kind: Any) -> Callable[[str], str]:
    """What the store's schema takes for a name or version, as a type for argparse."""

    def check(text: str) -> str:
        try:
            return str(TypeAdapter(kind).validate_python(text))
        except ValidationError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error.errors()[0]['msg']}") from error

    return check


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.export", description="Make a model of the store from weights.")
    parser.add_argument("weights", type=Path, help="weights.pth of a training run")
    add_store_arguments(parser)
    parser.add_argument("--height", type=_height, default=HEIGHT, help="of crops, as the last stage of the training had it")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with one_line_faults():
        halved = halved_weights(read_lpn(arguments.weights).state_dict())
        place = arguments.store, arguments.name, arguments.version
        folder = export(halved, *place, OURS, arguments.int8, arguments.height)
        write_content(folder / "weights.pth", halved)


if __name__ == "__main__":
    main()
