"""The model store: `<store>/<name>/<version>/` with model.onnx, and model.toml, which says all that a server needs of it."""

import hashlib
import logging
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from app.vision import image

log = logging.getLogger(__name__)

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Version = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]

_GOLDEN_SCORE = 0.05


class ModelError(Exception):
    """A model file is missing, damaged or not what model.toml says; the message names the file and what is wrong."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InputTable(_Table):
    """The pictures that the graph takes, a detector at most: uint8 [N, height, width, 3]. It normalises them so."""

    width: Annotated[int, Field(ge=16, le=2048)]
    height: Annotated[int, Field(ge=16, le=2048)]
    channel_order: Literal["BGR"]
    mean: tuple[float, float, float]  # of value / 255, in channel order
    std: tuple[float, float, float]


class HeatmapTable(_Table):
    """The maps that the graph gives, floats [N, K, height, width], and how they are decoded."""

    width: Annotated[int, Field(ge=4)]
    height: Annotated[int, Field(ge=4)]
    beta: Annotated[float, Field(gt=0, le=1e6)]
    window: Annotated[int, Field(ge=3)] | None = None  # cells about the highest; None: the whole map
    quarter_shift: bool
    mirror_shift: Annotated[float, Field(ge=0, le=1)] = 1.0  # cells, in the flip test (heatmap.average_with_mirrored)

    @model_validator(mode="after")
    def _consistent(self) -> "HeatmapTable":
        if self.window is not None and (self.window % 2 == 0 or self.window > 2 * max(self.width, self.height)):
            raise ValueError("window must be odd, and twice the longer side at most")
        return self


class KeypointTable(_Table):
    """The joints, their COCO skeleton (pairs counted from 1), their mirror images and the default threshold."""

    names: tuple[str, ...]
    skeleton: tuple[tuple[int, int], ...]
    mirror: tuple[int, ...]
    threshold: Annotated[float, Field(ge=0, le=1)]

    @model_validator(mode="after")
    def _consistent(self) -> "KeypointTable":
        if sorted(self.mirror) != list(range(len(self.names))) or any(
            self.mirror[it] != n for n, it in enumerate(self.mirror)
        ):
            raise ValueError("mirror must name each joint once, and for two that change places each the other")
        if any(not 1 <= joint <= len(self.names) for pair in self.skeleton for joint in pair):
            raise ValueError("skeleton names a joint that there is not")
        return self


class CalibrationTable(_Table):
    """How far off joints are to be expected: exp(intercept of the joint + score · ln(score) + spread · ln(spread)) in cells,
    where a score counts as 0.01 at least, and a spread as 0.5 cells (heatmap.error_signs).

    Fitted by training.calibrate on one half of held-out people, and checked on the other.
    """

    intercepts: tuple[FiniteFloat, ...]
    score: FiniteFloat
    spread: FiniteFloat


class DetectionTable(_Table):
    """What becomes of the boxes [N, A, 4] and scores [N, A] that the graph of a detector gives."""

    stride: Annotated[int, Field(ge=1)]  # of which the sides of letterboxes are multiples; those of [input] are the longest
    pad: Annotated[int, Field(ge=0, le=255)]  # the grey of the letterbox
    threshold: Annotated[float, Field(ge=0, le=1)]  # least score, where a request names none
    nms_iou: Annotated[float, Field(gt=0, le=1)]


class GoldenTable(_Table):
    """What the network once made of golden.png: joints (x, y in cells, score) or people (x1, y1, x2, y2, score).

    It is run again at every start, since another processor or runtime may compute something else.
    """

    rows: tuple[tuple[float, ...], ...]


class _Model(_Table):
    """What model.toml says of any network."""

    name: Name
    version: Version
    network: str
    precision: Literal["float32", "int8", "bfloat16", "float16"]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # of model.onnx
    input: InputTable
    golden: GoldenTable | None = None
    accuracy: dict[str, dict[str, FiniteFloat]] = {}  # data set → measure → value, as the card has them

    @property
    def id(self) -> str:
        """name/version."""
        return f"{self.name}/{self.version}"


class DetectorDescription(_Model):
    """The content of a person detector's model.toml: one with a table [detection]."""

    detection: DetectionTable

    @model_validator(mode="after")
    def _whole_strides(self) -> "DetectorDescription":
        if self.input.width % self.detection.stride or self.input.height % self.detection.stride:
            raise ValueError("width and height of [input] must be multiples of stride in [detection]")
        return self


class ModelDescription(_Model):
    """The content of a pose model's model.toml."""

    heatmap: HeatmapTable
    keypoints: KeypointTable
    calibration: CalibrationTable | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ModelDescription":
        if self.input.width * self.heatmap.height != self.input.height * self.heatmap.width:
            raise ValueError("[heatmap] must have the shape of [input], with cells as wide as high")
        if self.calibration is not None and len(self.calibration.intercepts) != len(self.keypoints.names):
            raise ValueError("calibration must have an intercept for each joint")
        return self

    @property
    def mirror(self) -> npt.NDArray[np.intp]:
        """For each joint [K] the joint that it becomes in a mirror."""
        return np.asarray(self.keypoints.mirror, np.intp)


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A verified model: what model.toml says, the bytes of model.onnx that match its sha256, and golden.png."""

    description: ModelDescription | DetectorDescription
    onnx: bytes
    golden: bytes | None

    def check_golden(self, rows_of: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]], places: float) -> None:
        """Compare what the network makes of golden.png, [h, w, 3] → rows, with model.toml: places (all but the last column)
        within `places`, scores (the last) within 0.05. Raises ModelError."""
        if self.golden is None or self.description.golden is None:
            return
        shape = self.description.input
        try:
            picture = image.decode(self.golden, shape.width * shape.height)
        except (image.InvalidImage, image.ImageTooLarge) as error:
            raise ModelError(f"model {self.description.id}: golden.png {error}") from error
        if picture.shape[:2] != (shape.height, shape.width):
            raise ModelError(f"model {self.description.id}: golden.png is not of the size of the input")
        try:
            expected = np.array(self.description.golden.rows, np.float32)
            found = rows_of(picture)[: len(expected)]
        except Exception as error:  # rows of several lengths, what ONNX Runtime raises, places in a map of no numbers
            raise ModelError(f"model {self.description.id} cannot run golden.png") from error
        if found.shape != expected.shape:
            raise ModelError(
                f"model {self.description.id}: [golden] in model.toml has rows of another shape than the network"
            )
        off = np.abs(found - expected).max(axis=0, initial=0)
        if not ((off[:-1] <= places).all() and off[-1] <= _GOLDEN_SCORE):  # also where it is not a number
            raise ModelError(
                f"model {self.description.id} does not compute on this machine what it should: on golden.png its places are "
                f"off by {off[:-1].max():.3g} (at most {places:g}) and its scores by {off[-1]:.3g} (at most {_GOLDEN_SCORE})"
            )


def stored_models(store: Path) -> list[Path]:
    """The folder of every model in the store, <name>/<version>, by name and ascending version; the log tells of others."""
    folders = [path.parent for path in store.glob("*/*/model.toml") if re.fullmatch(r"[0-9]{1,9}", path.parent.name)]
    for path in {*store.glob("*/model.toml"), *store.glob("*/*/model.toml")}:
        if path.parent not in folders:
            log.warning("%s is passed over: a model's folder is <name>/<version>, and its version a number", path.parent)
    return sorted(folders, key=lambda path: (path.parent.name, int(path.name)))


def load_model(folder: Path) -> StoredModel:
    """Read and verify one model. Raises ModelError that names the file and the fault."""
    where = f"{folder.parent.name}/{folder.name}"
    try:
        toml = (folder / "model.toml").read_bytes()
        onnx = (folder / "model.onnx").read_bytes()
        golden = (folder / "golden.png").read_bytes() if (folder / "golden.png").exists() else None
    except OSError as error:
        raise ModelError(f"model {where}: {Path(error.filename or '').name} cannot be read ({error.strerror})") from error
    try:
        content = tomllib.loads(toml.decode())
        kind = DetectorDescription if "detection" in content else ModelDescription
        description = kind.model_validate(content)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"model {where}: model.toml is not valid: {error}") from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ModelError(f"model {where}: model.toml is not valid: {faults}") from error
    if description.id != where:
        raise ModelError(f"model {where}: model.toml calls itself {description.id}")
    found = hashlib.sha256(onnx).hexdigest()
    if found != description.sha256:
        raise ModelError(f"model {where}: model.onnx has sha256 {found[:12]}…, model.toml says {description.sha256[:12]}…")
    if description.golden is not None and golden is None:
        raise ModelError(f"model {where}: golden.png is missing, though model.toml tells what becomes of it")
    return StoredModel(description, onnx, golden)
