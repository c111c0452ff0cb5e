"""Probes and metrics: they answer whatever the load, and need no key."""

from fastapi import APIRouter, Request
from prometheus_client.exposition import choose_encoder
from starlette.responses import Response

from app.api.problems import Problem
from app.api.schemas import StatusOut
from app.inference.pipeline import Pipeline
from app.telemetry.metrics import Metrics

router = APIRouter()


@router.get("/livez", summary="Whether the process can answer")
async def livez() -> StatusOut:
    """200 while the process can answer."""
    return StatusOut(status="live")


@router.get("/readyz", summary="Whether work is taken")
async def readyz(request: Request) -> StatusOut:
    """200 while work is taken: all models have answered a warm-up, lanes and decoding threads run. Else 503 with why."""
    check_ready(request.app.state.pipeline)
    return StatusOut(status="ready")


def check_ready(pipeline: Pipeline) -> None:
    """Raise Problem while nothing new is to be sent here."""
    if pipeline.draining:
        raise Problem("shutting_down", "The service is about to stop.")
    if why := pipeline.why_not_ready:  # which picture threads change meanwhile
        raise Problem("not_ready", why)


_FORMS = {kind: {"schema": {"type": "string"}} for kind in ("text/plain", "application/openmetrics-text")}


@router.get("/metrics", summary="Prometheus metrics", response_class=Response, responses={200: {"content": _FORMS}})
async def metrics(request: Request) -> Response:
    """The metrics as Prometheus text or OpenMetrics, as the Accept header asks."""
    table: Metrics = request.app.state.metrics
    pipeline: Pipeline = request.app.state.pipeline
    pipeline.tell_throttling()
    table.ready.set(pipeline.why_not_ready is None and not pipeline.draining)
    try:
        encoder, content_type = choose_encoder(request.headers.get("accept", ""))
    except TypeError:  # a version that is no number
        encoder, content_type = choose_encoder("")
    return Response(encoder(table.registry), headers={"Content-Type": content_type})
