"""The boxes of a request's people, written in a query, a form or JSON → arrays [N, 4] of x, y, width, height."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from app.api.problems import Location, Problem, at
from app.settings import Settings

_FIELD_TOKENS = 50_000  # of boxes in a form's field or a query; 1,600 are 8,000
_TOLD_CHARACTERS = 80  # of what a client made up: an answer stays small


def boxes_of_one(text: str | None, loc: Location, settings: Settings) -> npt.NDArray[np.float64] | None:
    """Boxes written as x,y,w,h;x,y,w,h or as a JSON list."""
    if text is None:
        return None
    _check_length(text, loc, settings)
    if text.lstrip().startswith("["):
        return checked_boxes(_parsed_json(text, loc), loc, settings)
    boxes = [part for part in text.split(";") if part.strip()]
    _check_box_count(len(boxes), loc, settings)
    return checked_boxes([_numbers(part, (*loc, i)) for i, part in enumerate(boxes)], loc, settings)


def boxes_of_several(
    text: str | None, loc: Location, count: int, settings: Settings
) -> Sequence[npt.NDArray[np.float64] | None]:
    """Boxes beside a form: for one picture as in a query; for several a JSON list with a list (or null) for each."""
    if text is None:
        return [None] * count
    if not text.lstrip().startswith("["):
        if count > 1:
            raise _no_list_a_picture(count, loc)
        return [boxes_of_one(text, loc, settings)]
    _check_length(text, loc, settings)
    content = _parsed_json(text, loc)
    if count == 1 and not _is_list_a_picture(content):
        return [checked_boxes(content, loc, settings)]
    if not isinstance(content, list) or len(content) != count:
        raise _no_list_a_picture(count, loc)
    return [None if boxes is None else checked_boxes(boxes, (*loc, number), settings) for number, boxes in enumerate(content)]


def _no_list_a_picture(count: int, loc: Location) -> Problem:
    return at("invalid_box", loc, f"must be a JSON list of {count} lists of boxes, one for each picture")


def _is_list_a_picture(content: Any) -> bool:
    """Whether JSON for one picture is [[[x, y, w, h], …]], [[]] or [null] rather than [[x, y, w, h], …]."""
    if not isinstance(content, list) or len(content) != 1:
        return False
    boxes = content[0]
    return boxes is None or (isinstance(boxes, list) and all(isinstance(box, list) for box in boxes))


def checked_boxes(content: Any, loc: Location, settings: Settings) -> npt.NDArray[np.float64]:
    """A list of [x, y, width, height] → [N, 4]. Whether they show anybody is judged when the picture's size is known."""
    if not isinstance(content, list):
        raise at("invalid_box", loc, "must be a list of [x, y, width, height]")
    _check_box_count(len(content), loc, settings)
    for i, box in enumerate(content):
        numbers = isinstance(box, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in box)
        if not numbers or len(box) != 4 or not all(math.isfinite(v) for v in box):
            raise at("invalid_box", (*loc, i), f"must be [x, y, width, height], four finite numbers; it is {_begin_of(box)}")
    return np.array(content, np.float64).reshape(-1, 4)


def _begin_of(value: Any) -> str:
    """The begin of a value as JSON, of which orjson writes fewer levels than it reads."""
    try:
        return orjson.dumps(value[:_TOLD_CHARACTERS] if isinstance(value, list | str) else value).decode()[:_TOLD_CHARACTERS]
    except TypeError:
        return "nested deeply"


def _numbers(text: str, loc: Location) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise at("invalid_box", loc, f"is {text[:80]!r}; a box is x,y,width,height") from error


def _parsed_json(text: str, loc: Location) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise at("invalid_box", loc, "is not one valid JSON list, or holds a number out of range") from error


def _check_length(text: str, loc: Location, settings: Settings) -> None:
    """Refuse a text of more numbers than boxes can have before it is made into objects, in the event loop."""
    most = max(_FIELD_TOKENS, 6 * settings.max_images * settings.max_boxes)  # five and one to spare for each
    if text.count(",") + text.count(";") + text.count("[") > most:
        raise at("too_many_boxes", loc, f"holds over {most:,} commas, semicolons and brackets")


def _check_box_count(count: int, loc: Location, settings: Settings) -> None:
    if count > settings.max_boxes:
        raise at("too_many_boxes", loc, f"holds {count} boxes; at most {settings.max_boxes} a picture are taken")
