"""A short run of each benchmark, so that they keep working; no timed assertions."""

from __future__ import annotations

from crl_benchmarks.embed_latency import CRITERIA, measure
from crl_sdk import ModelBundle, demo_bundle


def test_embed_latency():
    records = measure(ModelBundle.open(demo_bundle()), (1, 3), repeats=2)
    assert [record["batch"] for record in records] == [1, 3]
    for record in records:
        assert all(record[f"criteria_{count}"]["p50_ms"] > 0 for count in CRITERIA)
