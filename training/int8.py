"""A float32 graph → the same in int8, which CPUs compute twice as fast (training/MEASURED.md).

Values are held in 8 bits, over the range that they have on pictures, and the weights of each channel in 7: products of 8-bit
weights overflow on processors without VNNI. Attention stays in float32.
"""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from training.data import Picture, read_annotations, read_pictures
from training.files import DataError

UInt8 = npt.NDArray[np.uint8]

_SAMPLES = 128
_BATCH = 8


def in_int8(
    graph: bytes, name: str, samples: UInt8, kept: Callable[[onnx.GraphProto], Iterable[str]] = lambda _: ()
) -> bytes:
    """The graph in int8. `samples` [M, h, w, 3], as its input `name` takes them, tell the ranges of its values.

    `kept` gives the names of nodes that stay in float32.
    """
    with tempfile.TemporaryDirectory() as folder, _silence():
        given, folded, quantised = (Path(folder) / file for file in ("given.onnx", "folded.onnx", "quantised.onnx"))
        given.write_bytes(_read_once(graph))
        quant_pre_process(given, folded, skip_symbolic_shape=True)
        quantize_static(
            folded,
            quantised,
            _Batches(name, samples),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Relu", "Clip", "Add"],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(kept(onnx.load(folded).graph)),
        )
        return quantised.read_bytes()


def _read_once(graph: bytes) -> bytes:
    """The graph with a Flatten, which changes nothing, before each Reshape that several matrix products read.

    Without it ONNX Runtime brings what they read to float32 behind the Reshape, for each of them anew.
    """
    model = onnx.load_from_string(graph)
    nodes = []
    for node in model.graph.node:
        readers = [reader for reader in model.graph.node if node.output[0] in reader.input]
        if node.op_type == "Reshape" and len(readers) > 1 and all(reader.op_type == "MatMul" for reader in readers):
            flattened = f"{node.name}_flattened"
            nodes.append(onnx.helper.make_node("Flatten", [node.input[0]], [flattened], name=flattened, axis=-1))
            node.input[0] = flattened
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString())


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The quantiser tells the root logger of its steps; faults are raised."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


class _Batches(CalibrationDataReader):  # type: ignore[misc]  # of a package without types
    """Samples in batches, as ONNX Runtime's quantiser asks for them."""

    def __init__(self, name: str, samples: UInt8) -> None:
        self._batches = iter([{name: samples[start : start + _BATCH]} for start in range(0, len(samples), _BATCH)])

    def get_next(self) -> dict[str, UInt8] | None:
        return next(self._batches, None)


def samples_of(annotation_file: Path, sample: Callable[[Picture], UInt8 | None]) -> UInt8:
    """What `sample` makes of pictures spread over a COCO file, [M, h, w, 3], 128 at most; None is passed over.

    Raises DataError where there is nothing.
    """
    content = read_annotations(annotation_file)
    labelled = {each["image_id"] for each in content["annotations"] if each["num_keypoints"] > 0}
    labelled = labelled or {each["image_id"] for each in content["annotations"]}
    places = {int(place) for place in np.linspace(0, len(labelled) - 1, min(len(labelled), _SAMPLES))}
    pictures = (picture for picture in read_pictures(annotation_file) if picture.image["id"] in labelled)
    chosen = (picture for number, picture in enumerate(pictures) if number in places)
    made = (each for picture in chosen if (each := sample(picture)) is not None)
    samples = list(made)
    if not samples:
        raise DataError(f"{annotation_file} holds nobody with keypoints")
    return np.stack(samples)
