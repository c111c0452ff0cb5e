"""What goes in and comes out, as pydantic models: the options and JSON bodies are parsed by them, the answers described."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from app.api.problems import PROBLEMS

_BOXES_SCHEMA = {
    "type": "array",
    "items": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
    "description": "The people's boxes, [x, y, width, height] in pixels of the upright picture from its top left corner, at "
    "least one wide or high. Left out: the service finds the people. Empty: there is nobody.",
}
# Boxes are checked in boxes.py, which tells a bad box from a bad option and counts before it converts.
Boxes = Annotated[Any, WithJsonSchema(_BOXES_SCHEMA)]
# Lists of one length rather than tuples, which many readers of OpenAPI do not know.
BoxOut = Annotated[list[float], Field(min_length=4, max_length=4)]
Pair = Annotated[list[int], Field(min_length=2, max_length=2)]
# 1000.0 is an integer in JSON's eyes; 1e300 is so large that it is only a float's. Limits stand before it in an Annotated,
# else OpenAPI is not told of them.
_WHOLE = BeforeValidator(
    lambda value: int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value
)
Count = Annotated[int, Field(ge=1), _WHOLE]
_LONG: dict[str, Any] = {"format": "int64"}  # or generated clients take 32 bits
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Options(BaseModel):
    """The options of POST /v1/pose, the same in a query, a form and JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        None, description="A pose model from /v1/models, name or name/version. Default: the service's.", max_length=128
    )
    format: Literal["coco", "results"] = Field(
        "coco",
        description="Of JSON answers. coco, the default: a COCO keypoint data set. results: a list that COCO.loadRes takes.",
    )
    keypoint_threshold: Share | None = Field(
        None, description="Score from which a keypoint is called visible (v = 2), and drawn. Default: the model's."
    )
    detection_threshold: Share | None = Field(None, description="Least score of a found person. Default: the detector's.")
    max_people: Count | None = Field(
        None,
        description="The most people to find in a picture: those of whom the detector is surest. Default: 50 or the maximum.",
    )
    flip_test: bool = Field(
        False, description="Average with the mirrored crop: twice the work, a little better. Default: false."
    )
    timeout_ms: Count | None = Field(
        None, description="Milliseconds after which this request is answered with 504. Default: the service's."
    )


class JsonImage(BaseModel):
    """A picture of a JSON body."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(description="The picture file in base64, with or without a data:image/…;base64, prefix.")
    id: Annotated[int, Field(ge=0, lt=2**53, json_schema_extra=_LONG), _WHOLE] | None = Field(
        None, description="The picture's id in the answer. Default: its place."
    )
    file_name: str | None = Field(None, max_length=1024, description="Given back in the answer.")
    boxes: Boxes | None = None


class JsonBody(Options):
    """A JSON body of POST /v1/pose."""

    images: list[JsonImage] = Field(min_length=1, description="The pictures.")


class ImageOut(BaseModel):
    """A picture of the answer: the size of the upright picture."""

    id: int = Field(json_schema_extra=_LONG)
    width: int
    height: int
    file_name: str | None


class CategoryOut(BaseModel):
    """The one category: person, its joints, and the pairs (counted from 1) that a skeleton joins."""

    id: Literal[1]
    name: Literal["person"]
    supercategory: Literal["person"]
    keypoints: list[str]
    skeleton: list[Pair]


class AnnotationOut(BaseModel):
    """One person of the coco format."""

    id: int = Field(json_schema_extra=_LONG)
    image_id: int = Field(json_schema_extra=_LONG)
    category_id: Literal[1]
    bbox: BoxOut = Field(description="x, y, width, height: the given box, or the detector's.")
    area: float = Field(description="Of the box, in square pixels.")
    iscrowd: Literal[0]
    segmentation: list[list[float]] = Field(max_length=0, description="None; some tools want it to be there.")
    num_keypoints: int
    keypoints: list[float] = Field(description="x, y, v of each joint; v is 2 at or over the threshold, else 0.")
    keypoint_scores: list[float] = Field(description="Height of each joint's heatmap, about 0 to 1; ranks joints.")
    keypoint_errors: list[float] | None = Field(description="Expected error in pixels; null without calibration.")
    score: float = Field(description="Of the person: the mean of the joints' scores over 0.2, times bbox_score.")
    bbox_score: float = Field(description="The detector's; 1 for a given box.")


class InfoOut(BaseModel):
    """Which model and service answered."""

    description: str
    model: str
    model_version: str
    service_version: str


class DataSetOut(BaseModel):
    """The coco format: a COCO keypoint data set."""

    info: InfoOut
    images: list[ImageOut]
    categories: list[CategoryOut]
    annotations: list[AnnotationOut]


class ResultOut(BaseModel):
    """One person of the results format."""

    image_id: int = Field(json_schema_extra=_LONG)
    category_id: Literal[1]
    keypoints: list[float] = Field(description="x, y, score of each joint.")
    score: float
    bbox: BoxOut


class ModelOut(BaseModel):
    """A model of the store: a pose model, or the detector, which knows no keypoints."""

    kind: Literal["pose", "detector"]
    name: str
    version: str
    network: str
    precision: str
    sha256: str
    default: bool
    input_width: int = Field(description="Pixels of a crop; of a detector's picture at most.")
    input_height: int
    keypoints: list[str]
    skeleton: list[Pair]
    keypoint_threshold: float | None
    detection_threshold: float | None
    accuracy: dict[str, dict[str, float]] = Field(
        description="Of each data set, as measured: of a pose model from labelled boxes; found ones give less."
    )


class ModelsOut(BaseModel):
    """The pose models of the store, and the detector that is used."""

    models: list[ModelOut]


class StatusOut(BaseModel):
    """The answer of a probe."""

    status: Literal["live", "ready"]


class FieldErrorOut(BaseModel):
    """What is wrong with one field, and where it is."""

    loc: list[str | int]
    msg: str


class ProblemOut(BaseModel):
    """A problem (RFC 9457)."""

    type: str = Field(json_schema_extra={"enum": [f"/problems/{code}" for code in PROBLEMS]})
    title: str
    status: int
    detail: str = Field(description="What is wrong: the field, the limit and the value, where there are any.")
    request_id: str
    errors: list[FieldErrorOut] = Field([], description="The fields at fault; absent where there is none.")
