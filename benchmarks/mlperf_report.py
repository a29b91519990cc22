"""The report of `crl bench --mlperf`, and the summary of LoadGen that it is made from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from crl_benchmarks.bench_report import Setting, Subject
from crl_benchmarks.report_head import ReportHead, find_head
from crl_sdk.errors import InvalidInputError

SCHEMA = 1

RULES_SECONDS = 600
"""Least duration of a scenario by MLPerf's rules."""

NO_CLAIM = (
    "This is no MLPerf result. MLPerf's rules also ask for its models, its data sets, an accuracy "
    f"run, at least {RULES_SECONDS} s for each scenario, and a review."
)


class ScenarioResult(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a scenario.

    Attributes:
        scenario: LoadGen's name of the scenario.
        verdict: LoadGen's verdict; `INVALID` too if the run ended without one.
        reasons: Why it is invalid, in LoadGen's words, or which call failed.
        ended: Whether LoadGen ended the run and gave the verdict.
        answered_images: Number of images that were answered.
        figures: LoadGen's figures by its own names, with their units; empty if the run did not end.
        client_cpu_share: Share of a core that the thread of the calls used; None if the run did not
            end.
        remarks: What else to know, such as the errors in LoadGen's log.
        logs: Directory of LoadGen's logs.
    """

    scenario: str
    verdict: Literal["VALID", "INVALID"]
    reasons: tuple[str, ...]
    ended: bool
    answered_images: int
    figures: dict[str, float]
    client_cpu_share: float | None
    remarks: tuple[str, ...]
    logs: str


class MlperfReport(ReportHead, frozen=True, kw_only=True):
    """All scenarios of a command, with what is needed to repeat it.

    Attributes:
        claim: What the figures are not.
        target: What was measured.
        settings: Settings of the measurement, with units in their names.
        scenarios: Results of the scenarios.
        ended_early: Why not all scenarios were run, else empty.
    """

    claim: str
    target: Subject
    settings: dict[str, Setting]
    scenarios: tuple[ScenarioResult, ...]
    ended_early: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """What LoadGen's summary says.

    Attributes:
        valid: Whether the verdict is VALID.
        reasons: Why it is not, in LoadGen's words.
        figures: Figures by LoadGen's names, those of the result first.
        remarks: Numbers of warnings and errors of the run, if there were any.
    """

    valid: bool
    reasons: tuple[str, ...]
    figures: dict[str, float]
    remarks: tuple[str, ...]


def mlperf_report(
    command: str,
    target: Subject,
    settings: dict[str, Setting],
    scenarios: Iterable[ScenarioResult],
    ended_early: str = "",
) -> MlperfReport:
    """Return a report of scenarios.

    Args:
        command: Command line.
        target: What was measured.
        settings: Settings of the measurement.
        scenarios: Results.
        ended_early: Why not all scenarios were run.
    """
    return MlperfReport(
        **find_head(SCHEMA, command, ("grpcio", "protobuf", "mlcommons-loadgen")),
        claim=NO_CLAIM,
        target=target,
        settings=settings,
        scenarios=tuple(scenarios),
        ended_early=ended_early,
    )


def read_summary(directory: Path) -> Summary:
    """Read the summary that LoadGen wrote into a directory.

    Raises:
        InvalidInputError: If it is not there, or has no verdict.
    """
    path = directory / "mlperf_log_summary.txt"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_summary(text, str(path))


def parse_summary(text: str, source: str) -> Summary:
    """Parse LoadGen's summary.

    Args:
        text: Content of `mlperf_log_summary.txt`.
        source: Where it comes from, for the message of an error.

    Raises:
        InvalidInputError: If there is no verdict.
    """
    verdict = re.search(r"^Result is\s*: (VALID|INVALID)$", text, re.MULTILINE)
    if verdict is None:
        raise InvalidInputError(f"{source}: expected LoadGen's line 'Result is', found none")
    head, rest = text[: verdict.start()], text[verdict.end() :]
    checks, _, statistics = rest.partition("\n===")
    statistics, _, tail = statistics.partition("Test Parameters Used")
    figures = {
        found[1]: float(found[2])
        for line in (head + statistics).splitlines()
        if (found := re.fullmatch(r"(\S.*?)\s*: ([\d.e+]+)", line))
    }
    valid = verdict[1] == "VALID"
    remarks = [
        line
        for line in tail.splitlines()
        if re.search(r"\b(warning|error)s? encountered", line, re.IGNORECASE)
        and not line.startswith("No ")
    ]
    return Summary(valid, () if valid else tuple(_reasons(checks)), figures, tuple(remarks))


def _reasons(checks: str) -> list[str]:
    """Return what was not satisfied, and LoadGen's advice, one sentence each."""
    reasons: list[str] = []
    advice = False
    for line in checks.splitlines():
        text = line.strip()
        if text.endswith(": NO"):
            reasons.append(text.removesuffix(": NO").strip() + ": no")
        elif text.startswith("* "):
            reasons.append(text.removeprefix("* "))
            advice = True
        elif text and advice and not text.endswith(":"):
            reasons[-1] += f" {text}"  # LoadGen breaks its sentences
        else:
            advice = False
    return reasons
