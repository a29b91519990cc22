"""How `crl` talks: results on stdout as tables or JSON, everything else on stderr."""

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
    """Print one JSON document on stdout, and nothing else there."""
    out.print_json(json.dumps(document), indent=2)


def print_facts(title: str, facts: dict[str, object]) -> None:
    """Print names and values, one a line, on stdout."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(f"[bold]{escape(name)}", escape(str(value)))
    out.print(table)


def note(message: str) -> None:
    """Tell something on stderr that is not the result."""
    err.print(escape(message), style="dim", soft_wrap=True)


def warn(message: str) -> None:
    """Tell on stderr what the user should look at."""
    err.print(f"[yellow]warning:[/] {escape(message)}", soft_wrap=True)


def print_error(error: Exception, *, as_json: bool) -> None:
    """Print an error: on stdout as JSON, or on stderr for people."""
    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": str(error)}})
    else:
        err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show progress on stderr while something long runs; it is gone when done."""
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
    """Show on stderr what is going on; `.update(message)` changes it."""
    with err.status(message) as status:
        yield status
