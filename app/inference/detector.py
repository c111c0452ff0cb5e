"""The person detector: letterboxed pictures in, people's boxes out."""

import time
from functools import partial

import numpy as np
import numpy.typing as npt
import onnxruntime

from app.inference.model_store import DetectorDescription, ModelError, StoredModel
from app.inference.scheduler import BatchResult, Network
from app.inference.session import open_graph, open_session
from app.vision import detection

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

_GOLDEN_PIXELS = 2.0  # that a side of a golden box may be off


class Detector:
    """A person detector of the store with its session; `network` is what lanes run of it."""

    def __init__(
        self,
        description: DetectorDescription,
        session: onnxruntime.InferenceSession,
        wide: onnxruntime.InferenceSession | None,
        max_people: int,
    ) -> None:
        self.description = description
        self.network = Network(
            description.id, partial(self._run, session), partial(self._run, wide) if wide else None, counts="pictures"
        )
        self._max_people = max_people

    @classmethod
    def opened(cls, stored: StoredModel, max_people: int, threads: int = 1) -> "Detector":
        """The detector, once it is sure that it takes letterboxes and gives boxes and scores as model.toml says.

        `max_people`: the most that are found in a picture; `threads` run a picture that is alone. Raises ModelError.
        """
        description = stored.description
        if not isinstance(description, DetectorDescription):
            raise ModelError(f"model {description.id} is a pose model, not a person detector")
        session = open_graph(stored, ["height", "width", 3], ["A", 4], ["A"])
        detector = cls(description, session, open_session(stored.onnx, threads) if threads > 1 else None, max_people)
        smallest = (1, description.detection.stride, description.input.width, 3)
        try:
            detector.network.run(np.zeros(smallest, np.uint8))
        except Exception as error:  # onnxruntime's errors share no class of their own
            raise ModelError(f"model {description.id}: model.onnx cannot search a letterbox of {list(smallest)}") from error
        stored.check_golden(lambda letterbox: detector.network.run(letterbox[None]).values[0], _GOLDEN_PIXELS)
        return detector

    @property
    def side(self) -> int:
        """The longer side of the largest letterbox, in pixels."""
        return max(self.description.input.width, self.description.input.height)

    def letterbox(self, picture: UInt8, reduction: int) -> tuple[UInt8, float]:
        """The letterbox [h, w, 3] of picture [H, W, 3] (BGR), which was decoded `reduction` times smaller: no larger than
        need be; and its pixels per pixel of the whole picture."""
        most, table = self.description.input, self.description.detection
        height, width = detection.letterbox_shape(picture.shape[:2], (most.height, most.width), table.stride)
        pixels = np.empty((height, width, 3), np.uint8)
        gain = detection.letterbox(picture, pixels, table.pad)
        return pixels, gain / reduction

    def found(self, rows: Float32, threshold: float | None, limit: int) -> Float32:
        """The people [N, 5] (x1, y1, x2, y2, score) of a picture's rows that reach the threshold (the model's for None)."""
        least = self.description.detection.threshold if threshold is None else threshold
        scores = rows[:limit, 4]
        return rows[:limit][(scores >= least) & (scores > 0)]

    def _run(self, session: onnxruntime.InferenceSession, letterboxes: UInt8) -> BatchResult:
        """Letterboxes [N, h, w, 3] → people [N, max_people, 5] (x1, y1, x2, y2 in letterbox pixels, score), best first."""
        started = time.perf_counter()
        boxes, scores = session.run(None, {session.get_inputs()[0].name: letterboxes})
        inferred = time.perf_counter()
        iou = self.description.detection.nms_iou
        values = np.stack([detection.people(*picture, iou, self._max_people) for picture in zip(boxes, scores, strict=True)])
        return BatchResult(values, inferred - started, time.perf_counter() - inferred)
