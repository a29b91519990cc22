"""A few seconds of `make soak`: load, and faults that come and go."""

from __future__ import annotations

from soak import soak


def test_no_fault_gives_a_wrong_status(capsys):
    assert soak(seconds=6, fault_seconds=1.5, generate=False) == []
    said = capsys.readouterr().out
    assert "wrong statuses: 0" in said and "busy processors 1" in said
