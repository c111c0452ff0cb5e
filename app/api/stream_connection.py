"""The connection of a stream: WebSocket, where uvicorn's own leaves a hostile client room."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.datastructures import Headers
from websockets.frames import CloseCode, Frame
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol

from app.settings import Settings
from app.telemetry.metrics import Metrics

_PATH = b"/v1/stream"
_HEAD_LINES, _HEAD_LINE_BYTES = 100, 8_000  # a little less than websockets takes
_FRAMES_A_SECOND = 1000  # of WebSocket, which a stream may send: pings and parts too
_SLICE_BYTES = 16_384  # of what came, that are taken apart before it is looked at how many frames there were
_CLOSING_SECONDS = 2.0  # for a client to read why its stream is closed, and to close it too


def is_handshake(url: bytes, headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether a GET of HTTP/1.1 with these headers opens a stream: a whole handshake, which websockets takes as well."""
    if (
        url.partition(b"?")[0] != _PATH
        or any(name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in headers)
        or len(headers) > _HEAD_LINES
        or max(map(len, (url, *(name + value for name, value in headers)))) > _HEAD_LINE_BYTES
    ):
        return False
    told = Headers((name.decode("latin-1"), value.decode("latin-1")) for name, value in headers)
    request = Request(url.decode("latin-1"), told)
    return ServerProtocol(logger=logging.getLogger("uvicorn.error")).accept(request).status_code == 101


class StreamConnection(WebSocketsSansIOProtocol):
    """What a Connection becomes with a handshake: bind settings and metrics, and give it to uvicorn as `ws`.

    Its client has to read the answers, as one of HTTP has, and may not send more frames than anybody needs.
    """

    _unread: asyncio.TimerHandle | None = None
    _second = 0  # of the loop's clock, in which so many …
    _frames = 0  # … came

    def __init__(self, settings: Settings, metrics: Metrics, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self.close_timeout = _CLOSING_SECONDS
        self._seconds = settings.body_timeout_s
        self._metrics = metrics

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._unread is not None:
            self._unread.cancel()
        self._metrics.connections.set(len(self.connections))

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), _SLICE_BYTES):
            super().data_received(data[start : start + _SLICE_BYTES])

    def handle_events(self) -> None:
        second = int(self.loop.time())
        self._frames = len(self.conn.events) + (self._frames if second == self._second else 0)
        self._second = second
        if self._frames > _FRAMES_A_SECOND:
            self.conn.events.clear()
            self._fail(CloseCode.POLICY_VIOLATION, f"Over {_FRAMES_A_SECOND} frames came within a second.")
            return
        super().handle_events()

    def handle_text(self, event: Frame) -> None:  # noqa: ARG002 - no text is one
        self._fail(CloseCode.UNSUPPORTED_DATA, "A frame is a binary message that holds a picture file.")

    def handle_parser_exception(self) -> None:
        """Tell why the stream is closed, and let what still comes be read and forgotten, so that it is heard."""
        if self.close_sent:
            return
        self.close_sent = True
        self.queue.put_nowait({"type": "websocket.disconnect", "code": CloseCode.ABNORMAL_CLOSURE})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_timer = self.loop.call_later(self.close_timeout, self.transport.close)
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()

    def _fail(self, code: int, reason: str) -> None:
        self.conn.fail(code, reason)
        self.handle_parser_exception()

    async def send(self, message: Any) -> None:
        await self.writable.wait()
        if self.handshake_complete and self.close_sent:
            raise ClientDisconnected  # the application does not know yet, and uvicorn would call it a defect
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True  # by a refusal, which uvicorn would call a defect of the application

    def shutdown(self) -> None:
        closed = self.handshake_complete and not self.close_sent and self.conn.state is not State.OPEN  # by the client
        if closed or not self.handshake_initiated:
            self.transport.close()  # where uvicorn's would raise, and end the stop of all others
        else:
            super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self._seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
