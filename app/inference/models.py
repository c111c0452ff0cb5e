"""The models of the store, opened, chosen and warmed up."""

import time
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from app.inference.detector import Detector
from app.inference.model_store import DetectorDescription, ModelDescription, ModelError, load_model, stored_models
from app.inference.pose import PoseModel
from app.settings import Settings

M = TypeVar("M")


class ModelNotFound(Exception):
    """A request names a model that the store does not hold."""


@dataclass(frozen=True, slots=True)
class Models:
    """What is served: the pose models by name/version, which of them is taken where none is named, and the detector."""

    pose: dict[str, PoseModel]
    default: str
    detector: Detector | None

    @property
    def descriptions(self) -> list[ModelDescription | DetectorDescription]:
        """The pose models' by name and version, then the detector's."""
        detectors = [self.detector.description] if self.detector else []
        return [*(model.description for model in self.pose.values()), *detectors]

    def find(self, name: str | None) -> PoseModel:
        """The pose model of that name/version, or the latest of that name; the default for None. Raises ModelNotFound."""
        model = _named(self.pose, self.default if name is None else name)
        if model is None:
            raise ModelNotFound(f"There is no pose model {name!r}; there are {', '.join(self.pose)}.")
        return model


def open_models(settings: Settings, threads: int) -> Models:
    """Load and verify every model of the store; `threads` run a crop or picture that is alone.

    Raises ModelError that names the file or the setting, and the fault.
    """
    pose: dict[str, PoseModel] = {}
    detectors: dict[str, Detector] = {}
    for folder in stored_models(settings.model_store):
        stored = load_model(folder)
        if isinstance(stored.description, DetectorDescription):
            # Streams ask for those who are followed besides those who may be told.
            detectors[stored.description.id] = Detector.opened(stored, 2 * settings.max_boxes, threads)
        else:
            pose[stored.description.id] = PoseModel.opened(stored, threads)
    if not pose:
        raise ModelError(f"{settings.model_store} holds no pose model; POSE_MODEL_STORE names the folder of the models")
    default, detector = _named(pose, settings.default_model), _named(detectors, settings.detector)
    if default is None:
        raise ModelError(f"POSE_DEFAULT_MODEL: there is no model {settings.default_model!r}; there are {', '.join(pose)}")
    if detector is None and settings.detector:
        there = f"there are {', '.join(detectors)}" if detectors else "the model store holds none"
        told = f"there is no detector {settings.detector!r}; {there}. Set it empty to serve given boxes alone"
        raise ModelError(f"POSE_DETECTOR: {told}")
    return Models(pose, default.description.id, detector)


def _named(models: dict[str, M], name: str) -> M | None:
    """The model of that name/version, or the latest of that name."""
    return next((model for id_, model in reversed(models.items()) if name in (id_, id_.split("/")[0])), None)


def warm_up(model: PoseModel | Detector, most: int) -> float:
    """Run every batch size up to `most`, a detector one picture; the seconds a crop, without flip test, at the quickest."""
    if isinstance(model, Detector):
        networks, most = [model.network], 1
    else:
        networks = [model.plain, model.with_flip_test]
    shape = model.description.input
    for network in networks:
        if network.alone:
            network.alone(np.zeros((1, shape.height, shape.width, 3), np.uint8))
    quickest = float("inf")
    for size in range(1, most + 1):
        crops = np.zeros((size, shape.height, shape.width, 3), np.uint8)
        for network in networks:
            network.run(crops)
        started = time.perf_counter()
        networks[0].run(crops)
        quickest = min(quickest, (time.perf_counter() - started) / size)
    return quickest
