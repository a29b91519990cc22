"""Output of `crl`: results go to stdout as tables or JSON, everything else to stderr."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.status import Status
from rich.table import Table

out = Console()
err = Console(stderr=True)

_SECONDS_BETWEEN_LINES = 10.0
"""Seconds between two lines of progress in a pipe."""

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of a table.")
]


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document on stdout."""
    out.print_json(json.dumps(document), indent=2)


def print_facts(title: str, facts: dict[str, object]) -> None:
    """Print names and values on stdout, one pair per line."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")  # a fingerprint is shown whole, on two lines
    for name, value in facts.items():
        table.add_row(f"[bold]{escape(name)}", escape(str(value)))
    out.print(table)


def note(message: str) -> None:
    """Print a note on stderr."""
    err.print(escape(message), style="dim", soft_wrap=True)


def leave_out(what: str) -> None:
    """Warn on stderr that something is left out, and why."""
    warn(f"left out: {what}")


def warn(message: str) -> None:
    """Print a warning on stderr."""
    err.print(f"[yellow]warning:[/] {escape(message)}", soft_wrap=True)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print the warnings of Python as `warn` does, without the line of code that gave them."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        warn(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


class LogHandler(logging.Handler):
    """Prints the log as notes and warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        (warn if record.levelno >= logging.WARNING else note)(self.format(record))


def print_error(error: Exception, *, as_json: bool) -> None:
    """Print an error, either as JSON on stdout or as text on stderr."""
    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": str(error)}})
    else:
        err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)


class PlainProgress:
    """Progress for a pipe or a file: a line now and then, in place of a bar that moves."""

    def __init__(self) -> None:
        """Start the clock."""
        self._next = time.monotonic() + _SECONDS_BETWEEN_LINES
        self._description = ""
        self._total: float | None = None

    def add_task(self, description: str, total: float | None = None) -> TaskID:
        """Start a task. There is one at a time."""
        self._description, self._total = description, total
        return TaskID(0)

    def update(
        self,
        task_id: TaskID,
        *,
        description: str | None = None,
        completed: float | None = None,
        total: float | None = None,
    ) -> None:
        """Print how far the task is, if the last line is some time ago."""
        self._description = description or self._description
        self._total = self._total if total is None else total
        done = "" if completed is None else f": {completed:,.0f}"
        of = "" if completed is None or self._total is None else f" of {self._total:,.0f}"
        self.say(f"{self._description}{done}{of}")

    def say(self, message: str) -> None:
        """Print a message, if the last line is some time ago."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _SECONDS_BETWEEN_LINES
            note(message)


class PlainStatus:
    """A spinner for a pipe or a file: a line now and then."""

    def __init__(self) -> None:
        """Start the clock."""
        self._progress = PlainProgress()

    def update(self, status: str) -> None:
        """Print what is being done, if the last line is some time ago."""
        self._progress.say(status)


@contextmanager
def progress_bar() -> Iterator[Progress | PlainProgress]:
    """Show a progress bar on stderr and remove it at the end; in a pipe, print lines."""
    if not err.is_terminal:
        yield PlainProgress()
        return
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
    ) as progress:
        yield progress


@contextmanager
def spinner(message: str) -> Iterator[Status | PlainStatus]:
    """Show a message on stderr while something runs. `.update(message)` changes it."""
    if not err.is_terminal:
        yield PlainStatus()
        return
    with err.status(message) as status:
        yield status
