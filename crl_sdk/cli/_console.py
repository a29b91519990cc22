"""Output of `crl`: results go to stdout as tables or JSON, everything else to stderr."""

from __future__ import annotations

import json
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
    TextColumn,
    TimeElapsedColumn,
)
from rich.status import Status
from rich.table import Table

out = Console()
err = Console(stderr=True)

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of a table.")
]


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document on stdout."""
    out.print_json(json.dumps(document), indent=2)


def print_facts(title: str, facts: dict[str, object]) -> None:
    """Print names and values on stdout, one pair per line."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(f"[bold]{escape(name)}", escape(str(value)))
    out.print(table)


def note(message: str) -> None:
    """Print a note on stderr."""
    err.print(escape(message), style="dim", soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning on stderr."""
    err.print(f"[yellow]warning:[/] {escape(message)}", soft_wrap=True)


def print_error(error: Exception, *, as_json: bool) -> None:
    """Print an error, either as JSON on stdout or as text on stderr."""
    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": str(error)}})
    else:
        err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show a progress bar on stderr, and remove it at the end."""
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
def spinner(message: str) -> Iterator[Status]:
    """Show a message on stderr while something runs. `.update(message)` changes it."""
    with err.status(message) as status:
        yield status
