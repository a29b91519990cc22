"""Log lines for people, or one JSON object per line for machines, with the id of the request."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TextIO, TypeAlias

from crl_sdk.serving._call_interceptor import request_id

LogFormat = Literal["text", "json"]
_stderr_log = logging.getLogger("stderr")
_CALL_FIELDS = ("method", "code", "peer", "seconds")


class _TextFormatter(logging.Formatter):
    """Writes a line that begins with the time and ends with the request id, if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        current_id = request_id.get()
        return f"{line} [{current_id}]" if current_id else line


class _JsonFormatter(logging.Formatter):
    """Writes one JSON object: time (UTC, ISO 8601), level, logger, message, facts of the call."""

    def __init__(self, worker: int | None) -> None:
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self._worker is not None:
            line["worker"] = self._worker
        if request_id.get():
            line["request_id"] = request_id.get()
        line |= {name: getattr(record, name) for name in _CALL_FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


if TYPE_CHECKING:
    _StreamHandler: TypeAlias = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler  # not generic at run time in Python 3.10


class _StderrHandler(_StreamHandler):
    """Writes to stderr through a duplicate of its file descriptor.

    llama-cpp-python redirects the process's stderr to /dev/null while it loads a model. Without the
    duplicate, log lines of that time would be lost.
    """

    def __init__(self) -> None:
        super().__init__(os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace"))

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop a record that cannot be written: a message about it would end here as well."""

    def close(self) -> None:
        self.stream.close()
        super().close()


def make_log_handler(log_format: LogFormat, worker: int | None = None) -> logging.Handler:
    """Return a handler that writes to stderr. Close it when it is no longer used.

    Args:
        log_format: Whether lines are for people or for machines.
        worker: Number of this process among the workers of a server, which each line then names.
    """
    handler = _StderrHandler()
    who = "" if worker is None else f"worker {worker}: "
    handler.setFormatter(
        _JsonFormatter(worker)
        if log_format == "json"
        else _TextFormatter(f"%(asctime)s %(levelname)s {who}%(message)s")
    )
    return handler


@contextmanager
def stderr_in_the_log() -> Iterator[None]:
    """Log each line that anything but the log writes to stderr, such as a C library.

    While the context is open, the process's stderr is a pipe. Handlers of `make_log_handler` that
    were made before write to the real one. Lines that come faster than they can be read are lost.
    """
    real = os.dup(2)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # a library that holds Python's lock would wait forever
    os.dup2(writing, 2)
    os.close(writing)

    def read() -> None:
        with os.fdopen(reading, encoding="utf-8", errors="backslashreplace") as lines:
            for line in lines:
                if line.strip():
                    _stderr_log.warning("%s", line.rstrip())

    reader = threading.Thread(target=read, name="crl-stderr", daemon=True)
    reader.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(real, 2)  # closes the pipe, so that the reader ends
        os.close(real)
        reader.join(1.0)  # a child process may still hold the pipe
