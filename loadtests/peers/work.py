"""What every peer does with a photo and a box, by this repository's own functions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from app.inference.pose import PoseModel
from app.vision import heatmap, image

MODEL = Path(__file__).parent.parent.parent / "model_store/lpn50/1"
HOST = "127.0.0.1"

Work = Callable[[bytes, str], dict[str, Any]]


def work_of(heatmaps_of: Callable[[np.ndarray], np.ndarray]) -> Work:
    """From a photo's file and a box to the answer, with a network of one's own."""
    model = PoseModel.load(MODEL)
    shape = model.description.heatmap

    def work(file: bytes, written: str) -> dict[str, Any]:
        boxes = np.array([[float(value) for value in written.split(",")]])
        header = image.read_header(file)
        reduction = image.crop_reduction(header, model.most_reductions(boxes)[0])
        crops = model.cut(image.decode(file, 50_000_000, reduction, header), boxes, reduction)
        keypoints = heatmap.decode(heatmaps_of(crops.pixels), shape.beta, shape.quarter_shift, shape.window)
        return {"annotations": [{"keypoints": person.ravel().tolist()} for person in model.to_picture(keypoints, crops)]}

    return work


def onnx_work(threads: int) -> Work:
    """With the same graph in ONNX Runtime, as it comes (0) or with that many threads a call."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(MODEL / "model.onnx", options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return work_of(lambda crops: session.run(None, {name: crops})[0])
