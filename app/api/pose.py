"""POST /v1/pose: parse → pipeline → render."""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.bodies import PictureIn, PoseRequest, read_pose_request
from app.api.formats import coco_data_set, coco_results
from app.api.problems import Problem
from app.api.schemas import DataSetOut, ResultOut
from app.inference.pipeline import Outcome, Pipeline, PoseTask
from app.settings import Settings
from app.vision.drawing import draw_people, encode

router = APIRouter()

_JSON = "application/json"
_MAX_PEOPLE = 50  # found in a picture, where the request names no number
_DRAWN = {"image/jpeg": ".jpg", "image/png": ".png"}
_BINARY = {"type": "string", "format": "binary"}


@router.post(
    "/v1/pose",
    summary="Pictures in, people out",
    responses={200: {"model": DataSetOut | list[ResultOut], "content": {kind: {"schema": _BINARY} for kind in _DRAWN}}},
    response_class=Response,
)
async def pose(request: Request) -> Response:
    """Find the COCO keypoints of the people in one or more pictures."""
    settings: Settings = request.app.state.settings
    pipeline: Pipeline = request.app.state.pipeline
    seconds: dict[str, float] = request.state.seconds
    started = time.perf_counter()
    answer_type = accepted_type(request.headers.get("accept", "*/*"))
    asked = await read_pose_request(request, settings)
    seconds["read"] = time.perf_counter() - started
    # The deadline counts from here: the body had its own time-out.
    task = _task(asked, answer_type, asyncio.get_running_loop().time(), settings)
    outcome = await _unless_client_leaves(request, pipeline.estimate(task))
    if outcome is None:
        return Response(status_code=499)  # nobody is there to read it
    seconds.update(outcome.seconds)
    started = time.perf_counter()
    body = await _rendered(asked, outcome, answer_type, pipeline)
    seconds["encode"] = time.perf_counter() - started
    return Response(body, media_type=answer_type)


def accepted_type(accept: str) -> str:
    """The form of answer that an Accept header likes best: JSON, or a picture where that is asked for. Raises Problem."""
    wishes: dict[str, float] = {}
    for part in accept.split(","):
        kind, *parameters = (field.strip().lower() for field in part.split(";"))
        written = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        try:
            wishes[kind] = float(written)
        except ValueError:
            wishes[kind] = 0.0
    best, best_quality = "", 0.0
    for offered in (_JSON, *_DRAWN):
        quality = next((wishes[k] for k in (offered, f"{offered.split('/')[0]}/*", "*/*") if k in wishes), 0.0)
        if quality > best_quality:
            best, best_quality = offered, quality
    if not best:
        raise Problem("not_acceptable", f"Accept is {accept[:200]!r}; the answer is {_JSON} or {' or '.join(_DRAWN)}.")
    return best


def _task(asked: PoseRequest, answer_type: str, received: float, settings: Settings) -> PoseTask:
    if answer_type in _DRAWN and len(asked.pictures) > 1:
        raise Problem("not_acceptable", f"Accept asks for a picture, but the request holds {len(asked.pictures)}; send one.")
    return PoseTask(
        pictures=[picture.data for picture in asked.pictures],
        boxes=[picture.boxes for picture in asked.pictures],
        model=asked.options.model,
        flip_test=asked.options.flip_test,
        detection_threshold=asked.options.detection_threshold,
        max_people=asked.options.max_people or min(_MAX_PEOPLE, settings.max_boxes),
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


async def _rendered(asked: PoseRequest, outcome: Outcome, answer_type: str, pipeline: Pipeline) -> bytes:
    model = outcome.model.description
    given = asked.options.keypoint_threshold
    threshold = model.keypoints.threshold if given is None else given
    pictures: Sequence[PictureIn] = asked.pictures
    if answer_type in _DRAWN:
        joints, keypoints = model.keypoints, outcome.people[0].keypoints

        def drawn(pixels: npt.NDArray[np.uint8]) -> bytes:
            people = draw_people(pixels, keypoints, joints.skeleton, joints.names, threshold)
            return encode(people, _DRAWN[answer_type])

        return await pipeline.on_picture(pictures[0].data, drawn)
    if asked.options.format == "results":
        return coco_results(pictures, outcome.people)
    return coco_data_set(pictures, outcome.people, model, threshold)
