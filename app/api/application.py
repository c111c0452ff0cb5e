"""The one place where things are wired: settings → metrics → pipeline → routes → middleware."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import NoReturn

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from app import __version__
from app.api import health, models, pages, pose, stream
from app.api.middleware import ApiKeys, BodyLimits, Problems, RequestContext, cors
from app.api.openapi import document_of
from app.inference.pipeline import Pipeline
from app.inference.session import usable_memory
from app.settings import Settings
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """The service as an ASGI application. Raises ModelError where a model of the store cannot be used."""
    metrics = Metrics()
    pipeline = Pipeline(settings, metrics)
    metrics.memory_limit.set(usable_memory())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Warm-up runs beside the server, so that /livez answers and /readyz tells of it.
        warming = asyncio.create_task(pipeline.start())
        warming.add_done_callback(_log_failure)
        yield
        warming.cancel()
        await asyncio.gather(warming, return_exceptions=True)
        await pipeline.stop()

    app = FastAPI(
        title="LPN pose service",
        version=__version__,
        summary="A picture in, the COCO keypoints of its people out.",
        lifespan=lifespan,
        openapi_url=None,  # it has a route below, as the metrics and the log know routes; FastAPI's own are not among them
        docs_url=None,  # FastAPI's page loads its scripts from another host; pages.py has one that does not
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
        redirect_slashes=False,  # another path is another page: 404, not an answer without a body
    )
    app.state.settings, app.state.metrics, app.state.pipeline = settings, metrics, pipeline
    app.state.streams = set()  # that are open
    for module in (pose, stream, models, health, pages):
        app.include_router(module.router)
    document = cache(lambda: document_of(app, settings))

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JSONResponse:
        return JSONResponse(document())

    app.add_exception_handler(HTTPException, _pass_on)
    # The last added is the outermost.
    app.add_middleware(BodyLimits, settings=settings)
    app.add_middleware(ApiKeys, keys=settings.api_keys)
    app.add_middleware(Problems)
    app.add_middleware(cors, settings=settings)
    app.add_middleware(RequestContext, metrics=metrics, pipeline=pipeline)
    return app


async def _pass_on(_: Request, error: Exception) -> NoReturn:
    """Leave it to Problems: FastAPI would answer in its own form."""
    raise error


def _log_failure(warming: asyncio.Task[None]) -> None:
    if not warming.cancelled() and warming.exception() is not None:
        log.critical("the warm-up failed; the service stays unready", exc_info=warming.exception())
