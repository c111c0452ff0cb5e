"""Logs as JSON lines on standard error: time, level, logger, message, and whatever fields a line brings."""

import logging
import sys
import threading
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import Any, TextIO

import orjson

_WAITING_LINES = 1000  # a second or so of a busy service
_FLUSH_SECONDS = 2

_OWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "color_message"}


class JsonLines(logging.Formatter):
    """One JSON object a line; `extra` fields of the call become fields of the object."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in record.__dict__.items() if key not in _OWN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


class UnhurriedHandler(logging.Handler):
    """Lines of text, written by a thread of their own: where nobody reads the stream, lines are lost and nobody waits."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._lost = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record's line, unless too many wait."""
        if self._lines.qsize() >= _WAITING_LINES:
            self._lost += 1
            return
        if self._lost:
            lost = logging.makeLogRecord({"name": __name__, "levelname": "WARNING", "lost": self._lost})
            lost.msg, self._lost = "log lines were lost: standard error was not read", 0
            self._lines.put(self.format(lost))
        self._lines.put(self.format(record))

    def flush(self) -> None:
        """Wait until all lines so far are written, for two seconds at most."""
        written = threading.Event()
        self._lines.put(written)
        written.wait(_FLUSH_SECONDS)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # a full disk, a reader that is gone, a closed stream: there is nobody to tell
                pass


def configure(levels: str) -> None:
    """Send log lines to standard error as JSON: `levels` is the least level of all, then of single loggers, as in
    INFO,app.requests=WARNING."""
    level, *single = levels.split(",")
    handler = UnhurriedHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Its warnings tell of requests that are refused, without their ids; those are told by app.requests.
    logging.getLogger("uvicorn.error").setLevel(max(logging.getLevelName(level), logging.ERROR))
    for pair in single:
        name, _, own = pair.partition("=")
        logging.getLogger(name).setLevel(own)
