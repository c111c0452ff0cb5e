"""POST /v1/pose: parse → pipeline → render."""

import asyncio
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app.api.bodies import PictureIn, read_pose_request
from app.api.formats import coco_data_set, coco_results
from app.api.problems import Problem
from app.api.schemas import DataSetOut, Options, ResultOut
from app.inference.model_store import ModelDescription
from app.inference.pipeline import Drawing, Outcome, Pipeline, PoseTask
from app.settings import Settings
from app.telemetry.metrics import Metrics

router = APIRouter()

_JSON = "application/json"
_MAX_PEOPLE = 50  # found in a picture, where the request names no number
_DRAWN = {"image/jpeg": ".jpg", "image/png": ".png"}
_BINARY = {"type": "string", "format": "binary"}


@router.post(
    "/v1/pose",
    summary="Pictures in, people out",
    responses={
        200: {
            "description": "The people in JSON, or, of one picture whose Accept asks for it, the picture with them drawn.",
            "model": DataSetOut | list[ResultOut],
            "content": {_JSON: {}} | {kind: {"schema": _BINARY} for kind in _DRAWN},
        }
    },
    response_class=Response,
)
async def pose(request: Request) -> Response:
    """Find the COCO keypoints of the people in one or more pictures."""
    settings: Settings = request.app.state.settings
    pipeline: Pipeline = request.app.state.pipeline
    metrics: Metrics = request.app.state.metrics
    seconds: dict[str, float] = request.state.seconds
    started = time.perf_counter()
    accept = ",".join(request.headers.getlist("accept")).strip() or "*/*"
    accepted_type(accept)  # or the body is not worth reading
    asked = await read_pose_request(request, settings)
    answer_type = accepted_type(accept, len(asked.pictures))
    seconds["read"] = time.perf_counter() - started
    model = pipeline.models.find(asked.options.model).description
    threshold = threshold_of(asked.options, model)
    drawing = Drawing(_DRAWN[answer_type], threshold) if answer_type in _DRAWN else None
    # The deadline counts from here: the body had its own time-out.
    task = task_of(asked.pictures, asked.options, settings, drawing)
    with deadline_named(asked.options, settings):
        outcome = await _unless_client_leaves(request, pipeline.estimate(task))
    if outcome is None:
        return Response(status_code=499)  # nobody is there to read it
    metrics.count_pictures([len(picture.scores) for picture in outcome.people])
    seconds.update(outcome.seconds)
    if outcome.drawn is not None:
        return _DrawnResponse(outcome.drawn, pipeline, answer_type)
    started = time.perf_counter()
    if asked.options.format == "results":
        body = coco_results(asked.pictures, outcome.people)
    else:
        body = coco_data_set(asked.pictures, outcome.people, model, threshold)
    seconds["encode"] = time.perf_counter() - started
    return Response(body, media_type=answer_type)


class _DrawnResponse(Response):
    """A drawn picture, which counts as unread until it has left for the client."""

    def __init__(self, drawn: bytes, pipeline: Pipeline, media_type: str) -> None:
        super().__init__(drawn, media_type=media_type)
        self._pipeline = pipeline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_whole(message: Message) -> None:
            if message["type"] == "http.response.body":
                await send({**message, "more_body": True})
                message = {"type": "http.response.body"}  # is sent once those before it have left
            await send(message)

        with self._pipeline.unread(len(self.body)):
            await super().__call__(scope, receive, send_whole)


def accepted_type(accept: str, pictures: int = 1) -> str:
    """The form of answer that an Accept header likes best: JSON, or a picture where one alone was sent. Raises Problem."""
    wishes: dict[str, float] = {}
    for part in accept.split(","):
        kind, *parameters = (field.strip().lower() for field in part.split(";"))
        written = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        try:
            wishes[kind] = float(written)
        except ValueError:
            wishes[kind] = 0.0
    best, best_quality = "", 0.0
    for offered in (_JSON, *_DRAWN) if pictures == 1 else (_JSON,):
        quality = next((wishes[k] for k in (offered, f"{offered.split('/')[0]}/*", "*/*") if k in wishes), 0.0)
        if quality > best_quality:
            best, best_quality = offered, quality
    if not best and pictures > 1:
        raise Problem("not_acceptable", f"Accept asks for a picture, but the request holds {pictures}; send one.")
    if not best:
        raise Problem("not_acceptable", f"Accept is {accept[:200]!r}; the answer is {_JSON} or {' or '.join(_DRAWN)}.")
    return best


def task_of(pictures: Sequence[PictureIn], options: Options, settings: Settings, drawing: Drawing | None = None) -> PoseTask:
    """What to do with pictures, from now on."""
    return PoseTask(
        pictures=[picture.data for picture in pictures],
        boxes=[picture.boxes for picture in pictures],
        model=options.model,
        flip_test=options.flip_test,
        detection_threshold=options.detection_threshold,
        max_people=options.max_people or min(_MAX_PEOPLE, settings.max_boxes),
        drawing=drawing,
        deadline=asyncio.get_running_loop().time() + (options.timeout_ms or settings.timeout_ms) / 1000,
    )


@contextmanager
def deadline_named(options: Options, settings: Settings) -> Iterator[None]:
    """Raise a deadline that has passed, a TimeoutError, as the Problem that names it."""
    try:
        yield
    except TimeoutError as error:
        named = f"timeout_ms, {options.timeout_ms:,}" if options.timeout_ms else f"the service's, {settings.timeout_ms:,}"
        told = f"The deadline ({named} milliseconds) passed; the request's work was dropped."
        raise Problem("deadline_exceeded", told) from error


async def _unless_client_leaves(request: Request, work: Coroutine[Any, Any, Outcome]) -> Outcome | None:
    """The outcome of the work, or None as soon as the client has closed the connection; the work is cancelled then."""

    async def client_leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    job, watch = asyncio.ensure_future(work), asyncio.ensure_future(client_leaves())
    try:
        await asyncio.wait({job, watch}, return_when=asyncio.FIRST_COMPLETED)
        return job.result() if job.done() else None
    finally:
        for task in (job, watch):
            task.cancel()
        await asyncio.gather(job, watch, return_exceptions=True)


def threshold_of(options: Options, model: ModelDescription) -> float:
    """The score from which a keypoint is called visible."""
    return model.keypoints.threshold if options.keypoint_threshold is None else options.keypoint_threshold
