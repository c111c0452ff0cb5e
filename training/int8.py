"""A float32 graph → the same in int8, which CPUs compute twice as fast (training/README.md).

Values are held in 8 bits, over the range that they have on pictures, and the weights of each channel in 7: products of 8-bit
weights overflow on processors without VNNI. Attention stays in float32.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from app.vision import box, crop
from training.data import read_annotations, read_pictures
from training.evaluate import labelled_boxes
from training.files import DataError

UInt8 = npt.NDArray[np.uint8]

_CROPS = 128
_BATCH = 8


def in_int8(graph: bytes, name: str, crops: UInt8) -> bytes:
    """The graph in int8. `crops` [M, h, w, 3], as its input `name` takes them, tell the ranges of its values."""
    with tempfile.TemporaryDirectory() as folder, _silence():
        given, folded, quantised = (Path(folder) / file for file in ("given.onnx", "folded.onnx", "quantised.onnx"))
        given.write_bytes(graph)
        quant_pre_process(given, folded, skip_symbolic_shape=True)
        quantize_static(
            folded,
            quantised,
            _Batches(name, crops),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Relu", "Add"],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return quantised.read_bytes()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The quantiser tells the root logger of its steps; faults are raised."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


class _Batches(CalibrationDataReader):  # type: ignore[misc]  # of a package without types
    """Crops in batches, as ONNX Runtime's quantiser asks for them."""

    def __init__(self, name: str, crops: UInt8) -> None:
        self._batches = iter([{name: crops[start : start + _BATCH]} for start in range(0, len(crops), _BATCH)])

    def get_next(self) -> dict[str, UInt8] | None:
        return next(self._batches, None)


def crops_of(annotation_file: Path, width: int, height: int) -> UInt8:
    """Crops [M, height, width, 3] of the first person of pictures spread over a COCO file, 128 at most. Raises DataError."""
    step = max(1, len(read_annotations(annotation_file)["images"]) // _CROPS)
    crops: list[UInt8] = []
    for number, picture in enumerate(read_pictures(annotation_file)):
        boxes = labelled_boxes(picture).places[:1]
        if number % step == 0 and len(boxes) and len(crops) < _CROPS:
            affines = box.crop_affines(*box.centres_and_sizes(boxes, width / height), width, height)
            crops.append(np.empty((height, width, 3), np.uint8))
            crop.cut_crops(picture.pixels(), affines, crops[-1][None])
    if not crops:
        raise DataError(f"{annotation_file} holds nobody with keypoints")
    return np.stack(crops)
