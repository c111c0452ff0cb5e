"""Every problem that a client can meet, in one table, and exceptions → application/problem+json (RFC 9457)."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from app.inference import admission, models, pipeline, scheduler
from app.vision import box, image

_TOLD_CHARACTERS = 500  # of a text, which may hold what a client sent: tens of kilobytes in a URL or a header

# code → status, title
PROBLEMS: dict[str, tuple[int, str]] = {
    "malformed_body": (400, "The body cannot be read"),
    "unauthorized": (401, "A valid API key is needed"),
    "origin_not_allowed": (403, "Pages of this origin may not open streams"),
    "not_found": (404, "There is no such page"),
    "model_not_found": (404, "There is no such model"),
    "method_not_allowed": (405, "The page does not take this method"),
    "not_acceptable": (406, "The answer cannot be given in an accepted form"),
    "request_timeout": (408, "The request did not arrive in time"),
    "body_too_large": (413, "The body is too large"),
    "image_too_large": (413, "A picture has too many pixels"),
    "too_many_images": (413, "The request holds too many pictures"),
    "too_many_boxes": (413, "The request is for too many people"),
    "unsupported_media_type": (415, "The body's type or encoding is not accepted"),
    "invalid_image": (422, "A picture cannot be read"),
    "invalid_box": (422, "A box is not valid"),
    "invalid_option": (422, "An option is unknown or out of range"),
    "queue_full": (429, "The queue is full"),
    "internal_error": (500, "The service failed"),
    "not_ready": (503, "The service is not ready"),
    "shutting_down": (503, "The service is shutting down"),
    "deadline_exceeded": (504, "The deadline passed before the answer"),
}

Location = Sequence[str | int]


@dataclass(frozen=True, slots=True)
class FieldError:
    """What is wrong with one field, and where it is."""

    loc: Location
    msg: str


class Problem(Exception):
    """A problem of the table. `detail` names the field, the limit and the value; `retry_after` are the seconds after which it
    is worth asking again: one where it is and nothing else is said; `allow` are the methods that a page takes."""

    def __init__(
        self,
        code: str,
        detail: str,
        errors: Sequence[FieldError] = (),
        retry_after: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.errors = errors
        self.allow = allow
        self.retry_after = retry_after or (1 if self.status in (429, 503) else None)

    @property
    def status(self) -> int:
        return PROBLEMS[self.code][0]


def at(code: str, loc: Location, message: str) -> Problem:
    """The problem of one field: its place and the message make the detail."""
    return Problem(code, f"{'.'.join(map(str, loc))} {message}.", (FieldError(loc, message),))


# Exceptions whose own words are the detail.
_CODES: dict[type[BaseException], str] = {
    admission.QueueFull: "queue_full",
    admission.TooManyCrops: "too_many_boxes",
    models.ModelNotFound: "model_not_found",
    pipeline.NotReady: "not_ready",
    pipeline.Unread: "queue_full",
    scheduler.LaneLost: "not_ready",
}


def problem_of(error: BaseException) -> Problem:
    """The problem that an exception of any layer means to the client; internal_error for what nobody foresaw."""
    if code := _CODES.get(type(error)):
        return Problem(code, str(error), retry_after=getattr(error, "retry_after", None))
    match error:
        case Problem():
            return error
        case pipeline.PictureError():
            return _picture_problem(error)
        case pipeline.NoDetector():
            return at(
                "invalid_option", ("boxes",), "is missing: this service has no detector; send the people's boxes (x,y,w,h)"
            )
        case scheduler.ShuttingDown() | asyncio.CancelledError():
            return Problem("shutting_down", "The service stopped before the request was done.")
        case ClientDisconnect():
            return Problem("malformed_body", "The connection closed before the body was complete.")
        case HTTPException(status_code=404):
            return Problem("not_found", "There is no page at this path; /docs tells which there are.")
        case HTTPException(status_code=405):
            allow = (error.headers or {}).get("Allow", "").replace("GET", "GET, HEAD")  # which is answered wherever GET is
            told = "This page does not take this method; the header Allow names those that it takes."
            return Problem("method_not_allowed", told, allow=allow)
        case _:
            return Problem("internal_error", "A defect of the service; its log holds the cause under the request id.")


def _picture_problem(error: pipeline.PictureError) -> Problem:
    cause = error.__cause__
    match cause:
        case box.InvalidBox():
            return at("invalid_box", ("images", error.picture, "boxes", cause.index), str(cause))
        case image.ImageTooLarge():
            return at("image_too_large", ("images", error.picture), str(cause))
        case _:
            return at("invalid_image", ("images", error.picture), str(cause))


def content_of(problem: Problem, request_id: str) -> dict[str, Any]:
    """What a client is told of a problem."""
    status, title = PROBLEMS[problem.code]
    content: dict[str, Any] = {
        "type": f"/problems/{problem.code}",
        "title": title,
        "status": status,
        "detail": _short(problem.detail),
        "request_id": request_id,
    }
    if problem.errors:
        content["errors"] = [
            {"loc": [part if isinstance(part, int) else _short(part) for part in error.loc], "msg": _short(error.msg)}
            for error in problem.errors
        ]
    return content


def _short(text: str) -> str:
    return text if len(text) <= _TOLD_CHARACTERS else text[: _TOLD_CHARACTERS - 1] + "…"


def render(problem: Problem, request_id: str) -> Response:
    """The answer that tells a client of a problem."""
    headers = {}
    if problem.retry_after is not None:
        headers["Retry-After"] = str(problem.retry_after)
    if problem.allow is not None:
        headers["Allow"] = problem.allow
    if problem.code == "request_timeout":
        headers["Connection"] = "close"  # what still comes of the body is forgotten
    if problem.code in ("queue_full", "not_ready"):
        headers["Connection"] = "close"  # asked again on a new one, another replica behind the same address may answer
    if problem.code == "unauthorized":
        headers["WWW-Authenticate"] = "Bearer"
    content = orjson.dumps(content_of(problem, request_id))
    return Response(content, problem.status, headers, "application/problem+json")
