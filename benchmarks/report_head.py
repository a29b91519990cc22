"""What every report of a command says first: when, how and where it was measured."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import TypedDict

import msgspec

from crl_benchmarks.machine import Machine, find_machine
from crl_sdk._version import __version__
from crl_sdk.engines._machine import find_versions


class ReportHead(msgspec.Struct, frozen=True, kw_only=True):
    """The first attributes of a report.

    Attributes:
        schema: Version of the document's format.
        time: Time of writing in UTC, ISO 8601.
        command: Command line.
        machine: Machine that measured: that of the load generators, and of servers or engines
            which the command itself started.
        versions: Versions of the packages that matter, by name.
    """

    schema: int
    time: str
    command: str
    machine: Machine
    versions: dict[str, str]


class Head(TypedDict):
    """The attributes of `ReportHead`."""

    schema: int
    time: str
    command: str
    machine: Machine
    versions: dict[str, str]


def find_head(schema: int, command: str, packages: Iterable[str]) -> Head:
    """Return the attributes of `ReportHead`, as of now and of this machine.

    Args:
        schema: Version of the document's format.
        command: Command line.
        packages: Names of distributions; those that are installed are named with their versions.
    """
    return Head(
        schema=schema,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        machine=find_machine(),
        versions={
            "crl": __version__, "python": platform.python_version(), **find_versions(packages)
        },
    )  # fmt: skip
