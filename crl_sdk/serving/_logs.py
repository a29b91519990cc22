"""Log lines for people or, as one JSON object each, for machines; with the id of their request."""

from __future__ import annotations

import json
import logging
import os
import time
from typing import TYPE_CHECKING, Literal, TextIO, TypeAlias

from crl_sdk.serving._calls import request_id

LogFormat = Literal["text", "json"]
_EXTRAS = ("method", "code", "peer", "seconds")


class _Text(logging.Formatter):
    """A line that begins with the time and ends with the request's id, if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        name = request_id.get()
        return f"{line} [{name}]" if name else line


class _Json(logging.Formatter):
    """One JSON object: time (UTC, ISO 8601), level, logger, message, what is known of the call."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id.get():
            line["request_id"] = request_id.get()
        line |= {name: getattr(record, name) for name in _EXTRAS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


if TYPE_CHECKING:
    _Stream: TypeAlias = logging.StreamHandler[TextIO]
else:
    _Stream = logging.StreamHandler  # Python 3.10 takes no type here


class _OwnStderr(_Stream):
    """Writes to stderr through a file descriptor of its own.

    llama-cpp-python sends the process's to nowhere while it loads a model, and what the server logs
    meanwhile would be lost.
    """

    def __init__(self) -> None:
        super().__init__(os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace"))

    def close(self) -> None:
        self.stream.close()
        super().close()


def handler_of(form: LogFormat) -> logging.Handler:
    """Give a handler that writes to stderr. Close it when it is no longer used."""
    handler = _OwnStderr()
    handler.setFormatter(
        _Json() if form == "json" else _Text("%(asctime)s %(levelname)s %(message)s")
    )
    return handler
