"""POST /v1/pose: parse → pipeline → render."""

import asyncio
import time
from collections.abc import Coroutine
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.bodies import PoseRequest, read_pose_request
from app.api.formats import coco_data_set, coco_results
from app.api.problems import Problem
from app.api.schemas import DataSetOut, Options, ResultOut
from app.inference.model_store import ModelDescription
from app.inference.pipeline import Outcome, People, Pipeline, PoseTask
from app.settings import Settings
from app.vision.drawing import draw_people, encode

UInt8 = npt.NDArray[np.uint8]

router = APIRouter()

_JSON = "application/json"
MAX_PEOPLE = 50  # found in a picture, where the request names no number
_DRAWN = {"image/jpeg": ".jpg", "image/png": ".png"}
_BINARY = {"type": "string", "format": "binary"}


@router.post(
    "/v1/pose",
    summary="Pictures in, people out",
    responses={
        200: {"model": DataSetOut | list[ResultOut], "content": {_JSON: {}} | {kind: {"schema": _BINARY} for kind in _DRAWN}}
    },
    response_class=Response,
)
async def pose(request: Request) -> Response:
    """Find the COCO keypoints of the people in one or more pictures."""
    settings: Settings = request.app.state.settings
    pipeline: Pipeline = request.app.state.pipeline
    seconds: dict[str, float] = request.state.seconds
    started = time.perf_counter()
    accept = ",".join(request.headers.getlist("accept")).strip() or "*/*"
    accepted_type(accept)  # or the body is not worth reading
    asked = await read_pose_request(request, settings)
    answer_type = accepted_type(accept, len(asked.pictures))
    seconds["read"] = time.perf_counter() - started
    # The deadline counts from here: the body had its own time-out.
    task = _task(asked, answer_type, asyncio.get_running_loop().time(), settings)
    outcome = await _unless_client_leaves(request, pipeline.estimate(task))
    if outcome is None:
        return Response(status_code=499)  # nobody is there to read it
    seconds.update(outcome.seconds)
    if outcome.drawn is not None:
        return Response(outcome.drawn, media_type=answer_type)
    started = time.perf_counter()
    body = _json_of(asked, outcome)
    seconds["encode"] = time.perf_counter() - started
    return Response(body, media_type=answer_type)


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


def _task(asked: PoseRequest, answer_type: str, received: float, settings: Settings) -> PoseTask:
    return PoseTask(
        pictures=[picture.data for picture in asked.pictures],
        boxes=[picture.boxes for picture in asked.pictures],
        model=asked.options.model,
        flip_test=asked.options.flip_test,
        detection_threshold=asked.options.detection_threshold,
        max_people=asked.options.max_people or min(MAX_PEOPLE, settings.max_boxes),
        draw=partial(_drawn, asked.options, _DRAWN[answer_type]) if answer_type in _DRAWN else None,
        deadline=received + (asked.options.timeout_ms or settings.timeout_ms) / 1000,
    )


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


def _drawn(options: Options, extension: str, pixels: UInt8, model: ModelDescription, people: People) -> bytes:
    joints = model.keypoints
    draw_people(pixels, people.keypoints, joints.skeleton, joints.names, threshold_of(options, model))
    return encode(pixels, extension)


def _json_of(asked: PoseRequest, outcome: Outcome) -> bytes:
    model = outcome.model.description
    if asked.options.format == "results":
        return coco_results(asked.pictures, outcome.people)
    return coco_data_set(asked.pictures, outcome.people, model, threshold_of(asked.options, model))
