"""Traces: which calls are sent, and when."""

from __future__ import annotations

import json

import pytest

from crl_benchmarks.calls import Call, read_trace
from crl_sdk.errors import InvalidInputError


@pytest.fixture
def write(tmp_path):
    """Write lines to a file and return its path."""

    def written(*lines):
        path = tmp_path / "trace.jsonl"
        path.write_bytes(b"".join(
            (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n"
            for line in lines
        ))  # fmt: skip
        return path

    return written


def test_a_trace_needs_only_when_calls_are_due(write):
    trace = read_trace(write({"due_seconds": 3.5}, {"due_seconds": 1.5}))
    assert [(each.due, each.counts, each.call) for each in trace.calls] == [
        (0.0, True, Call(1)), (2.0, True, Call(1)),
    ]  # fmt: skip
    assert trace.warm_up == 0 and trace.seconds == 2 and trace.criteria == ()


def test_a_faster_trace_with_a_warm_up(write):
    path = write(
        {"schema": 1, "started": "", "command": "", "address": ""},
        {"due_seconds": 10, "phase": "warm_up", "images": 4, "criteria": ["color"], "load": 8},
        b"",
        {"due_seconds": 14, "phase": "measured", "images": 2, "criteria": ["shape", "color"]},
        {"due_seconds": 18, "phase": "late"},
    )
    trace = read_trace(path, speed=4.0)
    assert [(each.due, each.counts) for each in trace.calls] == [(0, False), (1, True), (2, True)]
    assert (trace.warm_up, trace.seconds, trace.most_images) == (1, 1, 4)
    assert trace.criteria == ("color", "shape")
    assert trace.calls[1].call == Call(2, ("shape", "color"))
    assert [each.call.name for each in trace.calls] == [
        "color, 4 images", "shape+color, 2 images", "no criteria, 1 image",
    ]  # fmt: skip
    assert read_trace(write({"due_seconds": 7})).seconds > 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"due", "malformed"),
        (b"[1]", "Expected `object`"),
        ({"due": 1}, "due_seconds"),
        ({"due_seconds": -1}, ">= 0"),
        ({"due_seconds": "1"}, "Expected `float`"),
        (b'{"due_seconds": 1e999}', "out of range"),
        (b'{"due_seconds": NaN}', "malformed"),
        ({"due_seconds": 1, "images": 0}, ">= 1"),
        ({"due_seconds": 1, "images": 1.5}, "Expected `int`"),
        ({"due_seconds": 1, "images": 10**9}, "<= 4096"),
        ({"due_seconds": 1, "criteria": "color"}, "criteria"),
        ({"due_seconds": 1, "phase": "later"}, "phase"),
        (b'{"due_seconds": 1, "criteria": ["\xff"]}', "UTF-8"),
        (b'{"due_seconds": 1', "truncated"),
    ],
)
def test_a_bad_line_names_its_number(write, line, words):
    path = write({"schema": 1}, {"due_seconds": 0}, line)
    with pytest.raises(InvalidInputError, match=rf"line 3: expected .*{words}"):
        read_trace(path)


def test_a_trace_of_another_schema_or_without_calls(write, tmp_path):
    with pytest.raises(InvalidInputError, match=r"line 1: .*schema 9, this SDK reads 1"):
        read_trace(write({"schema": 9}, {"due_seconds": 0}))
    with pytest.raises(InvalidInputError, match="got 0 calls, all of a warm-up"):
        read_trace(write({"schema": 1}))
    with pytest.raises(InvalidInputError, match="got 1 calls, all of a warm-up"):
        read_trace(write({"due_seconds": 0, "phase": "warm_up"}))
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_trace(tmp_path)
