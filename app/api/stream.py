"""WS /v1/stream: picture files in, one JSON message out for each that is answered; the newest frame wins."""

import asyncio
import logging
import time

import orjson
from fastapi import APIRouter, WebSocket
from starlette.websockets import WebSocketDisconnect

from app.api.bodies import PictureIn, read_stream_options
from app.api.formats import coco_frame
from app.api.health import check_ready
from app.api.middleware import SUBPROTOCOL, let_go
from app.api.pose import deadline_named, task_of, threshold_of
from app.api.problems import Problem, content_of, problem_of
from app.api.schemas import Options
from app.inference.follower import Follower
from app.inference.pipeline import Pipeline, PoseTask
from app.settings import Settings
from app.telemetry.metrics import Metrics

log = logging.getLogger("app.requests")

router = APIRouter(include_in_schema=False)  # OpenAPI knows no WebSockets; app/README.md describes it

_Frame = tuple[bytes, int, float]

_OUTCOMES = {429: "late", 504: "late", 500: "failed", 503: "failed"}  # of a frame, by its problem's status; others: refused
_DEFAULT_PORTS = {"http": ":80", "ws": ":80", "https": ":443", "wss": ":443"}
_POLICY_VIOLATION, _INTERNAL_ERROR = 1008, 1011  # RFC 6455, 7.4.1


@router.get("/v1/stream")
async def no_handshake() -> None:
    """Tell who does not open a stream why nothing is here."""
    raise Problem(
        "not_found",
        "This page speaks WebSocket alone (RFC 6455, version 13), and the request is no handshake of it; a proxy may have "
        "taken its Upgrade away. A handshake may have 100 lines of 8,000 bytes.",
    )


@router.websocket("/v1/stream")
async def stream(socket: WebSocket) -> None:
    """Follow the people of a video until its client leaves. Raises Problem, or the pipeline's, before it accepts."""
    settings: Settings = socket.app.state.settings
    pipeline: Pipeline = socket.app.state.pipeline
    metrics: Metrics = socket.app.state.metrics
    streams: set[WebSocket] = socket.app.state.streams
    _check_origin(socket, settings)
    if settings.max_streams == 0:
        raise Problem("not_found", "The service follows no streams: POSE_MAX_STREAMS is 0.")
    if pipeline.models.detector is None:
        raise Problem("not_found", "The service follows no streams: it has no detector (POSE_DETECTOR).")
    options = read_stream_options(socket.query_params, settings)
    pipeline.models.find(options.model)
    check_ready(pipeline)
    if len(streams) >= settings.max_streams:
        limit = f"The service follows at most {settings.max_streams} streams at once, and no more fit in."
        raise Problem("queue_full", limit, retry_after=5)
    streams.add(socket)
    metrics.streams.set(len(streams))
    try:
        await socket.accept(SUBPROTOCOL if SUBPROTOCOL in socket.scope["subprotocols"] else None)
        await _follow(socket, options)
    except WebSocketDisconnect:
        pass  # while it was answered
    except Exception:
        metrics.stream_frames.labels("failed").inc()
        await socket.close(_INTERNAL_ERROR, "The service failed; its log tells why.")
        raise
    finally:
        streams.discard(socket)
        metrics.streams.set(len(streams))


def _check_origin(socket: WebSocket, settings: Settings) -> None:
    """Raise Problem for pages of other origins: browsers let any page open a WebSocket and leave it to the server."""
    origin = socket.headers.get("origin")
    if origin is None:
        return
    scheme, _, host = origin.partition("://")
    if socket.headers.get("host") in (host, host + _DEFAULT_PORTS.get(scheme, "")):  # some proxies and clients write it out
        return
    if not {origin, "*"} & set(settings.cors_origins):
        told = f"The page's origin is {origin[:200]!r}, neither the service's own nor one that POSE_CORS_ORIGINS names."
        raise Problem("origin_not_allowed", told)


async def _follow(socket: WebSocket, options: Options) -> None:
    """Read and answer frames side by side, and close as soon as one of them ends."""
    settings: Settings = socket.app.state.settings
    newest = _Newest()
    reading = asyncio.ensure_future(_read(socket, newest, settings.body_timeout_s))
    answering = asyncio.ensure_future(_answer(socket, newest, options))
    try:
        await asyncio.wait({reading, answering}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            answering.result()  # which raises
    finally:
        for task in (reading, answering):
            task.cancel()
        await asyncio.gather(reading, answering, return_exceptions=True)
    code, reason = reading.result()
    if code:
        await socket.close(code, reason)


class _Newest:
    """The newest frame that nobody has taken, its number and the time when it came."""

    def __init__(self) -> None:
        self._frame: _Frame | None = None
        self._wanted: asyncio.Future[_Frame] | None = None  # by who waits for one …
        self._since = time.perf_counter()  # … since then
        self._count = 0

    def put(self, data: bytes) -> bool:
        """Whether an older frame has to go for it."""
        frame = data, self._count, time.perf_counter()
        self._count += 1
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(frame)
            return False
        replaces = self._frame is not None
        self._frame = frame
        return replaces

    async def take(self) -> _Frame:
        """The frame, once there is one."""
        frame, self._frame = self._frame, None
        if frame is None:
            self._wanted, self._since = asyncio.get_running_loop().create_future(), time.perf_counter()
            frame = await self._wanted
            self._wanted = None
        return frame

    @property
    def idle_seconds(self) -> float:
        """How long somebody has waited for a frame; 0 while one is worked on."""
        return 0.0 if self._wanted is None else time.perf_counter() - self._since


async def _read(socket: WebSocket, newest: _Newest, seconds: float) -> tuple[int, str]:
    """Read frames until the stream is to be closed: why, as WebSocket has it; code 0 where the client has left."""
    metrics: Metrics = socket.app.state.metrics
    wait = seconds
    while True:
        try:
            async with asyncio.timeout(wait):
                message = await socket.receive()
        except TimeoutError:
            wait = seconds - newest.idle_seconds  # it may be the service that was slow
            if wait > 0.01:
                continue
            return _POLICY_VIOLATION, f"No frame came within {seconds:g} seconds."
        if message["type"] == "websocket.disconnect":
            return 0, ""
        if newest.put(message["bytes"]):
            metrics.stream_frames.labels("skipped").inc()
        wait = seconds
        await asyncio.sleep(0)  # receive() gives what has come without a turn for anybody else


async def _answer(socket: WebSocket, newest: _Newest, options: Options) -> None:
    """Answer the newest frame, again and again."""
    settings: Settings = socket.app.state.settings
    pipeline: Pipeline = socket.app.state.pipeline
    metrics: Metrics = socket.app.state.metrics
    follower = Follower(pipeline)
    model = pipeline.models.find(options.model).description
    unready = False  # so that a service that is so for long fills no log
    before = -1  # the number of the last frame that was answered
    while True:
        data, number, came = await newest.take()
        try:
            with deadline_named(options, settings):
                followed = await follower.follow(frame_task(data, options, settings), came)
        except Exception as error:  # whatever it is, it is one frame's, and the stream goes on
            problem = problem_of(error)
            if problem.code == "internal_error":
                log.exception("a frame failed", extra={"request_id": socket.state.request_id})
            elif problem.status == 503 and not unready:
                log.warning("frames fail: %s", problem.detail, extra={"request_id": socket.state.request_id})
            unready = problem.status == 503
            let_go(error)
            content = orjson.dumps(
                content_of(problem, socket.state.request_id) | {"image_id": number, "skipped": number - before - 1}
            )
            metrics.stream_frames.labels(_OUTCOMES.get(problem.status, "refused")).inc()
        else:
            unready, total = False, time.perf_counter() - came
            content = coco_frame(number, number - before - 1, followed, model, threshold_of(options, model), total)
            metrics.stream_frames.labels("answered").inc()
            metrics.count_pictures([len(followed.ids)])
            metrics.stream_frame_seconds.observe(total)
        await socket.send_text(content.decode())
        before = number


def frame_task(frame: bytes, options: Options, settings: Settings) -> PoseTask:
    """What to do with a frame, a picture file, from now on."""
    return task_of([PictureIn(0, None, frame, None)], options, settings)
