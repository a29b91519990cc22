"""Work on the texts of calls: limits, admission, turns, deadlines and callers that go away."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from crl_sdk.errors import DeadlineError, InvalidInputError
from crl_sdk.serving._admission import Admission, ServerLimits

Result = TypeVar("Result")
Check = Callable[[], None]

_THREADS = 32
"""Number of calls whose texts are worked on at once. They take turns after each batch of texts, so
that a call with few texts does not wait for one with many."""


class TextWork:
    """Runs the work of calls that embed texts. `close` ends its threads."""

    def __init__(self, limits: ServerLimits) -> None:
        """Store the limits.

        Args:
            limits: Bounds on the accepted work.
        """
        self._limits = limits
        self._admission = Admission(
            limits.max_text_rows, limits.max_text_queue, queued=lambda: 0, unit="texts"
        )
        self._pool = ThreadPoolExecutor(_THREADS, "crl-text")

    def close(self) -> None:
        """End the threads when the calls in them are done."""
        self._pool.shutdown(wait=False)

    def check(self, texts: Sequence[str], prompts: Sequence[str] = ()) -> int:
        """Check the texts of a call, and return the number of texts to embed.

        Args:
            texts: The texts.
            prompts: Prompts, each of which is filled with every text.

        Raises:
            InvalidInputError: If there are too many of them, or one is too long.
        """
        limits = self._limits
        for name, given, most in (
            ("texts", texts, limits.max_texts), ("prompts", prompts, limits.max_prompts),
        ):  # fmt: skip
            if len(given) > most:
                raise InvalidInputError(
                    f"expected at most {most:,} {name} in one call, got {len(given):,}"
                )
            for position, text in enumerate(given):
                if len(text) > limits.max_text_length:
                    raise InvalidInputError(
                        f"{name}: expected at most {limits.max_text_length:,} characters, item "
                        f"{position} has {len(text):,}"
                    )
        rows = len(texts) * max(len(prompts), 1)
        if rows > limits.max_text_rows:
            raise InvalidInputError(
                f"expected at most {limits.max_text_rows:,} texts times prompts, got "
                f"{len(texts):,} × {len(prompts):,} = {rows:,}: send fewer prompts"
            )
        return rows

    async def run(
        self, rows: int, deadline: float | None, work: Callable[[Check], Result]
    ) -> Result:
        """Run work on texts in a thread.

        Args:
            rows: Number of texts to embed.
            deadline: `time.monotonic()` after which nobody waits for the result, or None.
            work: The work. It takes a function to call between batches, which raises an error when
                the work is to end because nobody waits for it.

        Raises:
            OverloadedError: If there is no room.
            DeadlineError: If the deadline has passed.
        """
        gone = threading.Event()

        def check() -> None:
            if gone.is_set():
                raise DeadlineError("the client went away")
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlineError(
                    "the deadline passed before all texts were embedded: allow the call more time, "
                    "or send fewer texts at once"
                )

        check()
        # A call waits for one batch of each other call, not for all of their texts: only the room
        # decides.
        with self._admission.admit(rows, None):
            running = asyncio.get_running_loop().run_in_executor(self._pool, work, check)
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                gone.set()  # the work ends after its batch
                running.add_done_callback(lambda done: done.cancelled() or done.exception())
                raise
