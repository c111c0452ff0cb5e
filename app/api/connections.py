"""The HTTP connection, where uvicorn's own leaves a hostile client room: how many connections, how slow, how long a head.

Everything here happens before or after a request is the application's, so its answers are written out by hand.
"""

import asyncio
import itertools
import logging
import re
import select
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.api.middleware import PROBES, STOOD_STILL_SECONDS, cors, request_id_of
from app.api.problems import Problem, render
from app.api.stream_connection import StreamConnection, is_handshake
from app.settings import Settings
from app.telemetry.metrics import Metrics

log = logging.getLogger("app.requests")

_FOR_PROBES = 8  # connections over the limit while all are at work, or a busy service would be taken for a dead one
_HEAD_BYTES = 65_536
_CHUNKS, _CHUNK_BYTES = 4096, 64  # of a body, after which chunks have so many bytes on average: each is a call of its own
_numbers = itertools.count()  # of connections, by when they came or were last answered; clocks give many one millisecond
_SENT_AHEAD = 64  # requests on a connection that wait for the answers before them: one read may hold thousands
# Clients that would rather speak HTTP/2 (Java's, curl --http2) offer it with every request. httptools takes what follows such
# a head, the body, for bytes of that protocol and then for another request.
# Only a whole handshake of a stream is taken up, once its head is read.
_OFFER = re.compile(rb"(?i)\r\nUpgrade:")
_CUT = re.compile(rb"(?i)\r(\n(\r|U|Up|Upg|Upgr|Upgra|Upgrad|Upgrade)?)?\Z")  # of an offer, or of a head's end, by a read
LAST_REQUESTS_SECONDS = 1.0  # for requests that are on their way when the service is told to stop


class Connection(HttpToolsProtocol):
    """A connection within the limits of the settings: bind those and the metrics, and give it to uvicorn as `http`."""

    _waits_for: asyncio.TimerHandle | None = None  # the client's next step
    _answering: RequestResponseCycle | None = None
    _unread: asyncio.TimerHandle | None = None  # the client's reading of its answer
    _head_bytes = 0  # of the request that is being read; 0 between requests
    _held_back = b""  # the end of what came of a head, until more tells whether it begins an offer
    _head_complete = False
    _body_complete = True
    _handed_over = False  # to a StreamConnection
    _closes = False  # after the answer to the request that is being read
    _framing_bytes = 0  # of a chunked body since its last content: lines that tell sizes, and trailers
    _chunks, _content_bytes = 0, 0  # of a body, those that came in one read with others

    def __init__(self, settings: Settings, metrics: Metrics, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self.settings = settings
        self.metrics = metrics
        self.number = next(_numbers)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Any unread byte of an answer counts, or the last ones could hold a closing connection for ever.
        transport.set_write_buffer_limits(high=0)
        self.metrics.connections.set(len(self.connections))
        most = self.settings.max_connections + _FOR_PROBES * self._all_at_work
        if len(self.connections) > most and not self._close_an_idle_one():
            self._refuse(self._too_many())
            return
        self._expect(self._give_up_head)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.pipeline.clear()
        if self._answering is not None:  # uvicorn tells the request that was read last, which may wait behind this one
            if self._answering.response_started and not self._answering.response_complete:
                self._answering.scope["state"]["status"] = 499  # the client has a part of it
            self._answering.disconnected = True
            self._answering.message_event.set()
        self._expect(None)
        if self._unread is not None:
            self._unread.cancel()
        self.metrics.connections.set(len(self.connections))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            async def send_and_read(message: Any) -> None:
                waits = cycle.waiting_for_100_continue
                await send(message)
                read = waits or self._body_complete or cycle is not self.cycle
                if message["type"] == "http.response.start" and not (cycle.keep_alive or read):  # see on_headers_complete
                    self._closes = cycle.keep_alive = True

            await app(scope, receive, send_and_read)

        super()._start_asgi_task(cycle, answer)

    def data_received(self, data: bytes) -> None:
        if self._body_complete:  # empty lines between requests mean nothing, and must not end the wait for the next one
            data = data.lstrip(b"\r\n")
        if self.transport.is_closing() or not data:
            return
        self._chunks -= 1
        if self._head_complete:
            self._framing_bytes += len(data)
        else:
            head, end, rest = (self._held_back + data).partition(b"\r\n\r\n")
            self._held_back = b""
            if end and self._head_bytes + len(head) > _HEAD_BYTES:
                self._refuse_head()
                return
            if not end and (cut := _CUT.search(head)):
                head, self._held_back = head[: cut.start()], cut[0]
            self._head_bytes += len(head) + len(end) + len(rest)
            data = _OFFER.sub(b"\r\nRefused-Upgrade:", head) + end + rest
        super().data_received(data)
        if self._handed_over or self.transport.is_closing():
            return
        if self._head_complete and self._held_back:  # a head that was begun behind another request: this is of its body
            held_back, self._held_back = self._held_back, b""
            super().data_received(held_back)
        if not self._head_complete and self._head_bytes > _HEAD_BYTES:
            self._refuse_head()
        elif self._head_complete:
            self._check_body()

    def _check_body(self) -> None:
        """Refuse a body that is more framing than content."""
        if self._framing_bytes > _HEAD_BYTES:
            self._refuse(Problem("malformed_body", f"The body has over {_HEAD_BYTES:,} bytes without any content."))
        elif self._chunks > _CHUNKS and self._content_bytes < _CHUNK_BYTES * self._chunks:
            self._refuse(Problem("malformed_body", f"The chunks of the body have under {_CHUNK_BYTES} bytes on average."))

    def eof_received(self) -> None:
        """The client sends no more. Half a request is told so, since it may still read."""
        if self._head_bytes and self._first and not self.transport.is_closing():
            what = "body" if self._head_complete else "head"
            self._refuse(Problem("malformed_body", f"The connection ended before the request's {what} did."))

    def on_message_begin(self) -> None:
        if self._handed_over:
            raise ValueError("bytes behind a handshake")  # which come before its answer, against the standard
        if len(self.pipeline) >= _SENT_AHEAD:
            raise ValueError("too many requests sent ahead")  # the parser stops, and tells it as what is not HTTP
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._head_complete, self._body_complete = False, False
        self._expect(self._give_up_head)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_complete:  # trailers are forgotten
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._framing_bytes = 0
        self._chunks += 1
        self._content_bytes += len(body)
        super().on_body(body)

    def on_headers_complete(self) -> None:
        names = {name for name, _ in self.headers}
        if b"upgrade" in names and names & {b"content-length", b"transfer-encoding"}:  # see _OFFER
            raise ValueError("an offer of a protocol, with a body, in one read with another request")
        probes = self.url.partition(b"?")[0].decode("latin-1") in PROBES
        refused = not probes and self._all_at_work
        if not refused and self._is_handshake():
            self._hand_over()
            return
        self.app = self._refuse_one_too_many if refused else self.config.loaded_app
        super().on_headers_complete()  # raises for a URL that is none
        # A connection that closes with its answer does so once the body is read: before, it would be reset, the answer lost.
        # Where the client waits for a 100 to send it, nothing is on its way. What is read with an offer, behind it, is lost.
        self._closes = b"upgrade" in names or not (self.cycle.keep_alive or self.expect_100_continue)
        self.cycle.keep_alive |= self._closes
        self._head_complete, self._framing_bytes, self._chunks, self._content_bytes = True, 0, 0, 0
        self._expect(None)

    def on_message_complete(self) -> None:
        if self._handed_over:
            return
        super().on_message_complete()
        self._head_bytes, self._head_complete, self._body_complete = 0, False, True
        self._expect(None)
        if self._closes:
            self.cycle.keep_alive = False
        if self.cycle.response_complete:  # before the end of the body, which ended uvicorn's wait for a next request
            if self._closes:
                self.transport.close()
                return
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_response_complete(self) -> None:
        of_the_last = self._head_complete and self._answering is self.cycle
        self.number = next(_numbers)
        super().on_response_complete()
        if of_the_last and not self._body_complete and not self.transport.is_closing():
            # The rest of a refused body is taken first, so that the refusal is read; hardly of one that did not come in time.
            late = self.cycle.scope["state"].get("status") == HTTPStatus.REQUEST_TIMEOUT
            self._expect(self.transport.close, seconds=1 if late else None)

    def _should_upgrade(self) -> bool:
        """Never by uvicorn: it would take up any handshake, also one behind a request that waits for its answer."""
        return False

    def _is_handshake(self) -> bool:
        """Whether the request whose head is read opens a stream, on a connection where nothing waits to be answered or to be
        read by the client."""
        form = self.parser.get_method(), self.parser.get_http_version()
        if form != (b"GET", "1.1") or not self.idle or self.transport.get_write_buffer_size():
            return False
        others = [(name, value) for name, value in self.headers if name not in (b"upgrade", b"refused-upgrade")]
        offered = [*others, *((b"upgrade", value) for name, value in self.headers if name == b"refused-upgrade")]
        if not is_handshake(self.url, offered):
            return False
        self.headers[:] = offered
        return True

    def _hand_over(self) -> None:
        self._expect(None)
        self._unset_keepalive_if_required()
        self._handed_over = True
        self.scope["method"] = "GET"
        self.handle_websocket_upgrade()
        stream = self.transport.get_protocol()
        if isinstance(stream, StreamConnection) and not stream.handshake_initiated:
            self.transport.abort()  # websockets does not read what it took

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.settings.body_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def shutdown(self) -> None:
        """Close as the service stops; a request that is being read or answered, or lies unread, is answered first.

        A connection that has had no request yet gets a moment for it: closing under one that arrives would reset it.
        """
        if self.cycle is None and not self._head_bytes:
            self.loop.call_later(LAST_REQUESTS_SECONDS, self._close_unless_used)
        else:
            self._close_unless_used()

    def _close_unless_used(self) -> None:
        if self.idle and not self._head_bytes and not self._something_to_read:
            self.transport.close()
        elif self._head_complete:
            self._closes = True
        elif self.cycle is not None:
            self.cycle.keep_alive = False

    @property
    def _something_to_read(self) -> bool:
        """Whether the socket holds bytes that the event loop has not seen yet."""
        if self.transport.is_closing():
            return False
        unseen = select.poll()
        unseen.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(unseen.poll(0))

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's own words
        if self._handed_over or not self._first:
            self.transport.close()
            return
        self._refuse(Problem("malformed_body", "The bytes on this connection are not HTTP/1.1."))

    def _refuse_head(self) -> None:
        self._refuse(Problem("malformed_body", f"The request's head has over {_HEAD_BYTES:,} bytes."))

    def _expect(self, otherwise: Callable[[], object] | None, seconds: float | None = None) -> None:
        """Call `otherwise` unless the next step comes within `seconds` or the time-out; None: nothing is waited for."""
        if self._waits_for is not None:
            self._waits_for.cancel()
        if seconds is None:
            seconds = self.settings.body_timeout_s
        self._waits_for = None if otherwise is None else self.loop.call_later(seconds, otherwise)

    def _give_up_head(self) -> None:
        if self._waits_for and self.loop.time() - self._waits_for.when() > STOOD_STILL_SECONDS:
            self._expect(self._give_up_head, seconds=STOOD_STILL_SECONDS)
            return
        if self._head_bytes == 0:
            self.transport.close()
            return
        if self.cycle is not None and not self.cycle.response_complete:  # the answers before it come first
            self._expect(self._give_up_head)
            return
        seconds = f"{self.settings.body_timeout_s:g} seconds"
        self._refuse(Problem("request_timeout", f"The request's head did not arrive within {seconds}."))

    def _close_an_idle_one(self) -> bool:
        """Close the connection that has been without a request for longest; whether there was one."""
        others = (other for other in self.connections if isinstance(other, Connection) and other is not self)
        idle = [other for other in others if other.idle and not other.transport.is_closing()]
        if idle:
            min(idle, key=lambda other: other.number).transport.close()
        return bool(idle)

    @property
    def _all_at_work(self) -> bool:
        """Whether as many other connections as there may be are at work."""
        most = self.settings.max_connections
        if len(self.connections) <= most:
            return False
        others = (other for other in self.connections if other is not self and not other.transport.is_closing())
        return sum(not (isinstance(other, Connection) and other.idle) for other in others) >= most

    @property
    def idle(self) -> bool:
        """Whether no request waits for an answer, but for one whose head is being read."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def _first(self) -> bool:
        """Whether no other answer comes before that to the request being read."""
        return self.idle or (self._head_complete and not self.pipeline)

    def _refuse(self, problem: Problem) -> None:
        """Answer with a problem that the application never sees, and close; where an answer was begun, close alone."""
        if self.cycle is not None and self._head_complete and self.cycle.response_started:
            self.transport.close()
            return
        # A request that the application is reading already breaks off there, and is counted there, under the same id.
        read = self._head_complete and self.cycle is not None
        scope: Any = self.cycle.scope if read else {"headers": []}
        response = self._refusal(problem, request_id_of(scope), counted=not read or self._answering is not self.cycle)
        head = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
        self.transport.write(b"HTTP/1.1 %d \r\n%s\r\n%s" % (problem.status, head, response.body))
        self.transport.close()

    async def _refuse_one_too_many(self, scope: Any, receive: Any, send: Any) -> None:
        refusal = self._refusal(self._too_many(), request_id_of(scope))
        await cors(refusal, self.settings)(scope, receive, send)

    def _too_many(self) -> Problem:
        limit = f"The service holds {self.settings.max_connections} connections already, all at work."
        return Problem("not_ready", limit)

    def _refusal(self, problem: Problem, request_id: str, counted: bool = True) -> Response:
        if counted:
            self.metrics.rejected.labels(problem.code).inc()
            self.metrics.requests.labels("connection", "other", problem.status).inc()
        fields = {"request_id": request_id, "status": problem.status, "problem": problem.code}
        log.info("a connection was refused", extra=fields)
        response = render(problem, request_id)
        response.headers["X-Request-ID"] = request_id
        response.headers["Connection"] = "close"
        return response
