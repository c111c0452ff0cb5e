"""Logs as JSON lines on standard error: time, level, logger, message, and whatever fields a line brings."""

import logging
import sys
from datetime import UTC, datetime
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


def configure(levels: str) -> None:
    """Send log lines to standard error as JSON: `levels` is the least level of all, then of single loggers, as in
    INFO,app.requests=WARNING."""
    level, *single = levels.split(",")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Its warnings tell of requests that are refused, without their ids; those are told by app.requests.
    logging.getLogger("uvicorn.error").setLevel(max(logging.getLevelName(level), logging.ERROR))
    for pair in single:
        name, _, own = pair.partition("=")
        logging.getLogger(name).setLevel(own)
