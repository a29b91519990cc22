"""One of several processes that serve at the same address, and what it tells its supervisor.

The supervisor (`_supervisor.py`) writes lines to the worker's stdin, and the worker answers each
with a line of JSON on stdout. If stdin ends, the supervisor is gone, and the worker stops.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest

_log = logging.getLogger(__name__)

HEALTH = "health"
METRICS = "metrics"
"""Lines of the supervisor. The answers are `{"event": "health", "serving": true}` and
`{"event": "metrics", "page": "…"}`."""


@dataclass(frozen=True, slots=True)
class Worker:
    """This process among the workers of a server.

    Attributes:
        number: Its number, from 0.
        count: Number of workers.
    """

    number: int
    count: int


async def answer_supervisor(
    is_serving: Callable[[], bool], registry: CollectorRegistry, stop: Callable[[], None]
) -> None:
    """Answer the supervisor until it is gone, and then stop the server.

    Args:
        is_serving: Function that returns whether this worker serves.
        registry: Metrics of this worker.
        stop: Function that stops the server.
    """
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        asked = line.decode().strip()
        answer: dict[str, object] = {"event": asked}
        if asked == HEALTH:
            answer["serving"] = is_serving()
        elif asked == METRICS:
            answer["page"] = generate_latest(registry).decode()
        try:
            print(json.dumps(answer), flush=True)
        except OSError:
            break
    _log.warning("the supervisor is gone: stopping")
    stop()
