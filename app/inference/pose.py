"""The pose network: a picture and boxes in, keypoints in the picture's pixels out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from app.inference.model_store import ModelDescription, ModelError, StoredModel, load_model
from app.inference.scheduler import BatchResult, Network
from app.inference.session import open_graph, open_session
from app.vision import box, crop, heatmap

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

_GOLDEN_CELLS = 0.5  # that a joint of the golden crop may be off


@dataclass(frozen=True, slots=True)
class Crops:
    """People cut out of a picture: pixels [N, h, w, 3] as the network takes them, and the areas they show [N, 2]."""

    pixels: UInt8
    centres: Float32
    sizes: Float32


class PoseModel:
    """One pose model of the store with its session; `plain` and `with_flip_test` are what lanes run of it."""

    def __init__(
        self,
        description: ModelDescription,
        session: onnxruntime.InferenceSession,
        wide: onnxruntime.InferenceSession | None,
    ) -> None:
        self.description = description
        runs = (self._run, self._run_with_flip_test)
        self.plain, self.with_flip_test = (
            Network(description.id, run, partial(run, session=wide) if wide else None) for run in runs
        )
        self._session = session

    @classmethod
    def load(cls, folder: Path) -> "PoseModel":
        """Open the pose model in `folder`. Raises ModelError that names the model and the fault."""
        return cls.opened(load_model(folder))

    @classmethod
    def opened(cls, stored: StoredModel, threads: int = 1) -> "PoseModel":
        """The model, once it is sure that it takes crops and gives heatmaps as model.toml says. `threads` run a crop that is
        alone. Raises ModelError."""
        description = stored.description
        if not isinstance(description, ModelDescription):
            raise ModelError(f"model {description.id} is a person detector, not a pose model")
        shape = description.heatmap
        size = [description.input.height, description.input.width, 3]
        session = open_graph(stored, size, [len(description.keypoints.names), shape.height, shape.width])
        model = cls(description, session, open_session(stored.onnx, threads) if threads > 1 else None)
        stored.check_golden(lambda crop: model.plain.run(crop[None]).values[0, :, :3], _GOLDEN_CELLS)
        return model

    def most_reductions(self, boxes: npt.NDArray[np.float64]) -> list[float]:
        """How many times smaller a picture may be, and the crop at each of boxes [N, 4] is not enlarged; of no use for faulty
        boxes."""
        shape = self.description.input
        with np.errstate(all="ignore"):
            _, sizes = box.centres_and_sizes(boxes, shape.width / shape.height)
            return [float(width) for width in sizes[:, 0] / shape.width]

    def cut(self, picture: UInt8, boxes: npt.NDArray[np.float64], reduction: int = 1) -> Crops:
        """Crops at boxes [N, 4] (x, y, width, height) of picture [H, W, 3] (BGR), which was decoded `reduction` times smaller
        than the boxes' pixels."""
        return self.cut_each(lambda _: picture, boxes, [reduction] * len(boxes))

    def cut_each(
        self, picture_at: Callable[[int], UInt8], boxes: npt.NDArray[np.float64], reductions: Sequence[int]
    ) -> Crops:
        """As `cut`, from several decodings of a picture: `reductions` [N] tells for each box how many times smaller."""
        shape = self.description.input
        centres, sizes = box.centres_and_sizes(boxes, shape.width / shape.height)
        affines = box.crop_affines(centres, sizes, shape.width, shape.height)
        pixels = np.empty((len(boxes), shape.height, shape.width, 3), np.uint8)
        for times in set(reductions):
            picture, reduced = picture_at(times), box.from_reduced(affines, times)
            for place in np.flatnonzero(np.array(reductions) == times):
                crop.cut_crops(picture, reduced[place : place + 1], pixels[place : place + 1])
        return Crops(pixels, centres, sizes)

    def to_picture(self, keypoints: Float32, crops: Crops) -> npt.NDArray[np.float64]:
        """Keypoints [N, K, 3 or 4] in heatmap cells → the same with x, y and the expected error in the picture's pixels."""
        shape = self.description.heatmap
        places = box.to_picture(keypoints[..., :2], crops.centres, crops.sizes, shape.width, shape.height)
        errors = keypoints[..., 3:] * (crops.sizes[:, 1] / shape.height)[:, None, None]
        return np.concatenate([places, keypoints[..., 2:3], errors], axis=2)

    def _run(self, crops: UInt8, session: onnxruntime.InferenceSession | None = None) -> BatchResult:
        """Crops [N, h, w, 3] → keypoints [N, K, 3]: x, y in heatmap cells, score; of a calibrated model [N, K, 4].

        The fourth column is the expected distance from the true place, in cells.
        """
        started = time.perf_counter()
        return self._decoded(self.heatmaps(crops, session), started)

    def _run_with_flip_test(self, crops: UInt8, session: onnxruntime.InferenceSession | None = None) -> BatchResult:
        """As `_run`, from the mean of the heatmaps of the crops and of the mirrored crops."""
        started = time.perf_counter()
        both = self.heatmaps(np.concatenate([crops, crops[:, :, ::-1]]), session)
        return self._decoded(self.averaged(both[: len(crops)], both[len(crops) :]), started)

    def averaged(self, heatmaps: Float32, mirrored: Float32) -> Float32:
        """The flip test's mean of heatmaps [N, K, H, W] of crops and of the mirrored crops."""
        shift = self.description.heatmap.mirror_shift
        return heatmap.average_with_mirrored(heatmaps, mirrored, self.description.mirror, shift)

    def heatmaps(self, crops: UInt8, session: onnxruntime.InferenceSession | None = None) -> Float32:
        """Crops [N, h, w, 3] → heatmaps [N, K, H, W], by another session of the graph if one is given."""
        name = self._session.get_inputs()[0].name
        heatmaps: Float32 = (session or self._session).run(None, {name: crops})[0]
        return heatmaps

    def _decoded(self, heatmaps: Float32, started: float) -> BatchResult:
        inferred = time.perf_counter()
        shape = self.description.heatmap
        keypoints = heatmap.decode(heatmaps, shape.beta, shape.quarter_shift, shape.window)
        calibration = self.description.calibration
        if calibration is not None:
            signs = heatmap.error_signs(heatmaps, keypoints[..., 2])
            weights = np.array([calibration.score, calibration.spread], np.float32)
            errors = heatmap.expected_errors(signs, np.array(calibration.intercepts, np.float32), weights)
            keypoints = np.concatenate([keypoints, errors[..., None]], axis=2)
        return BatchResult(keypoints, inferred - started, time.perf_counter() - inferred)
