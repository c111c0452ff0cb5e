"""Pure ASGI middleware: ids, metrics and logs; problems; keys; body limits. (BaseHTTPMiddleware would hide disconnects.)"""

import asyncio
import base64
import hmac
import logging
import re
import time
import traceback
import uuid
from collections.abc import Sequence

from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api import pages
from app.api.problems import Problem, problem_of, render
from app.inference.pipeline import Pipeline
from app.settings import Settings
from app.telemetry.metrics import STAGES, Metrics

log = logging.getLogger("app.requests")

SUBPROTOCOL = "pose"  # of a stream, for clients that offer it beside their key
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
# Late by so much, a time-out tells that the process stood still (docker pause, a suspended machine): what came meanwhile, and
# in so much more, is read first.
STOOD_STILL_SECONDS = 1.0
PROBES = frozenset(("/livez", "/readyz", "/metrics"))
OPEN_PATHS = PROBES | pages.PATHS


def request_id_of(scope: Scope) -> str:
    """The id that a request brings, if it has the form of one, or a new one, which is noted in its state."""
    state: dict[str, str] = scope.setdefault("state", {})
    if "request_id" not in state:
        given = Headers(scope=scope).get("x-request-id", "")
        state["request_id"] = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    return state["request_id"]


def cors(app: ASGIApp, settings: Settings) -> ASGIApp:
    """The app as pages of other origins may ask it, those that the settings name."""
    if not settings.cors_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "HEAD", "POST"],
        allow_headers=["*"],
        expose_headers=["X-Request-ID", "Server-Timing", "Retry-After"],
        allow_private_network=True,  # some browsers ask before a page of the Internet reaches a service on this network
    )


class RequestContext:
    """An id for each request, one log line, its metrics and Server-Timing. Outermost: CORS answers some requests by itself.

    HEAD is answered wherever GET is. While the pipeline drains, answers close their connections.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, pipeline: Pipeline) -> None:
        self._app = app
        self._metrics = metrics
        self._pipeline = pipeline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        method = scope.get("method", "GET")  # as a stream begins
        if method == "HEAD":  # as GET; uvicorn leaves the body out
            scope = {**scope, "method": "GET"}
        request_id = request_id_of(scope)
        state = scope["state"]
        seconds: dict[str, float] = {}
        state.update(seconds=seconds, status=0)  # of the answer, once it is begun

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "websocket.accept":
                state["status"] = 101
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            elif message["type"] in ("http.response.start", "websocket.http.response.start"):
                state["status"] = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                if self._pipeline.draining:
                    headers["Connection"] = "close"
                answered = seconds and state["status"] == 200  # every stage is told, one that had nothing to do with 0
                stages = dict.fromkeys(STAGES, 0.0) | seconds if answered else seconds
                headers["Server-Timing"] = _server_timing({**stages, "total": time.perf_counter() - started})
            await send(message)

        in_flight = scope["type"] == "http"  # a stream stays open
        self._metrics.in_flight.inc(in_flight)
        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            self._metrics.in_flight.dec(in_flight)
            self._record(scope, method, time.perf_counter() - started)

    def _record(self, scope: Scope, method: str, total: float) -> None:
        state = scope["state"]
        status, seconds = state["status"], state["seconds"]
        route = getattr(scope.get("route"), "path", "unmatched")
        method = method if method in _METHODS else "other"
        self._metrics.requests.labels(route, method, status).inc()
        if status != 101:
            self._metrics.request_seconds.labels(route).observe(total)
        if seconds and status == 200:  # others have been through some of the stages only, and would spoil the means
            for stage, value in {**seconds, "total": total}.items():
                self._metrics.stage_seconds.labels(stage).observe(value)
        problem = state.get("problem")
        if problem is not None and route not in PROBES:
            self._metrics.rejected.labels(problem).inc()
        fields = {"request_id": state["request_id"], "method": method, "route": route, "status": status}
        fields |= {"ms": round(total * 1000, 1)} | ({"problem": problem} if problem else {})
        log.log(logging.DEBUG if route in OPEN_PATHS else logging.INFO, "request", extra=fields)


class Problems:
    """An answer to every exception. Inside CORS, so that the pages of other origins can read it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except (Exception, asyncio.CancelledError) as error:  # cancelled where the drain is over
            problem, request_id = problem_of(error), scope["state"]["request_id"]
            if problem.code == "internal_error":
                log.exception("a request failed", extra={"request_id": request_id})
            if scope["state"]["status"] == 0:  # or its answer is begun, and only breaks off
                scope["state"]["problem"] = problem.code  # for the log line and the metric
                await render(problem, request_id)(scope, receive, send)
            let_go(error)


class ApiKeys:
    """Lets only requests with one of the keys pass, except to probes, metrics and the pages. No keys: everybody passes."""

    def __init__(self, app: ASGIApp, keys: Sequence[SecretStr]) -> None:
        self._app = app
        self._keys = [key.get_secret_value().encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self._keys or scope["path"] in OPEN_PATHS or self._known(scope):
            await self._app(scope, receive, send)
            return
        raise Problem("unauthorized", "Send one of the service's keys as Authorization: Bearer … or X-API-Key.")

    def _known(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        sent = [headers.get("x-api-key", "")]
        if scheme.lower() == "bearer":  # which may be another server's, of one before this
            sent.append(token.strip())
        sent += [key for key in map(_key_of_browser, scope.get("subprotocols", ())) if key]
        # Every key is compared, so that the time tells nothing of which.
        return sum(hmac.compare_digest(each.encode("latin-1"), key) for each in sent for key in self._keys) > 0


class BodyLimits:
    """Bounds the bytes of a body, declared or counted on the wire, and of all together, and the time that one may take."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._most = settings.max_body_bytes
        self._most_held = max(settings.queue_bytes, settings.max_body_bytes)
        self._held = 0  # bytes of all bodies whose requests are not answered yet
        self._seconds = settings.body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self._most:
            raise self._too_large(f"{int(declared):,} bytes")
        loop = asyncio.get_running_loop()
        until = loop.time() + self._seconds
        counted = 0
        complete = False

        async def limited_receive() -> Message:
            nonlocal counted, complete, until
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError as error:
                if loop.time() - until > STOOD_STILL_SECONDS:
                    until = loop.time() + STOOD_STILL_SECONDS
                    return await limited_receive()
                raise Problem(
                    "request_timeout",
                    f"The body did not arrive within {self._seconds:g} seconds; {counted:,} bytes came.",
                ) from error
            size = len(message.get("body", b""))
            counted += size
            self._held += size
            complete = not message.get("more_body", False)
            if counted > self._most:
                raise self._too_large(f"more than {self._most:,} bytes")
            if self._held > self._most_held:
                limit = f"The service holds at most {self._most_held:,} bytes of bodies and has no room for this request's."
                raise Problem("queue_full", limit)
            return message

        try:
            await self._app(scope, limited_receive, send)
        finally:
            self._held -= counted

    def _too_large(self, size: str) -> Problem:
        return Problem("body_too_large", f"The body has {size}; at most {self._most:,} bytes are taken.")


def let_go(error: BaseException | None) -> None:
    """Empty the frames that an exception holds, which hold bodies and pictures, until the next collection of cycles."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _key_of_browser(subprotocol: str) -> str:
    """The key in a subprotocol key.<base64url>, the one header of a WebSocket that a browser's page can write; or nothing."""
    prefix, _, written = subprotocol.partition(".")
    if prefix != "key":
        return ""
    try:
        return base64.urlsafe_b64decode(written + "=" * (-len(written) % 4)).decode("latin-1")
    except ValueError:  # of no base64, or no ASCII
        return ""


def _server_timing(seconds: dict[str, float]) -> str:
    return ", ".join(f"{stage};dur={seconds[stage] * 1000:.2f}" for stage in STAGES if stage in seconds)
