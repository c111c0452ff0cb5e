"""Logs as JSON lines on standard error: time, level, logger, message, and whatever fields a line brings."""

import logging
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime
from select import PIPE_BUF, select
from typing import Any

import orjson

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
    """Lines of text into a file, a pipe or a terminal. Where nobody reads it and it is full, they are lost: nobody waits."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lost = 0
        self._end = b""  # of a line that was cut off

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record's line, if there is room."""
        try:
            line = self.format(record)
            if self._lost:
                told = {"name": __name__, "levelname": "WARNING", "lost": self._lost}
                told["msg"] = "log lines were lost: standard error was not read"
                if self._written(self.format(logging.makeLogRecord(told))):
                    self._lost = 0
        except Exception:  # noqa: BLE001 - as logging's own handlers do: no line is worth its request
            self.handleError(record)
        else:
            self._lost += not self._written(line)

    def _written(self, text: str) -> bool:
        line = self._end + text.encode() + b"\n"
        sent = 0
        try:
            while sent < len(line) and select([], [self._descriptor], [], 0)[1]:  # a pipe has room for PIPE_BUF bytes then
                sent += os.write(self._descriptor, line[sent : sent + PIPE_BUF])
        except BlockingIOError:  # a terminal has none
            pass
        except OSError:  # a full disk, a reader that is gone: there is nobody to tell
            sent = len(line)
        if 0 < sent < len(line):
            self._end = b"\n"
        elif sent:
            self._end = b""
        return sent == len(line)


def _standard_error() -> int:
    """Standard error. A terminal is opened once more, to be written without waiting: it may have room for half a line."""
    descriptor = sys.stderr.fileno()
    if os.isatty(descriptor):
        with suppress(OSError):
            return os.open(os.ttyname(descriptor), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return descriptor


def configure(levels: str) -> None:
    """Send log lines to standard error as JSON: `levels` is the least level of all, then of single loggers, as in
    INFO,app.requests=WARNING."""
    level, *single = levels.split(",")
    handler = UnhurriedHandler(_standard_error()) if sys.stderr else logging.NullHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Its warnings tell of requests that are refused, without their ids; those are told by app.requests.
    logging.getLogger("uvicorn.error").setLevel(max(logging.getLevelName(level), logging.ERROR))
    for pair in single:
        name, _, own = pair.partition("=")
        logging.getLogger(name).setLevel(own)
