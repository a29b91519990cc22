"""The simulation of workers: bounded by cores and by event loops, and by nothing else."""

from __future__ import annotations

import pytest

from crl_benchmarks.workers import EVENT_LOOP_SECONDS, Measured, markdown, simulate


@pytest.mark.parametrize(
    ("cores", "core_ms", "workers"), [(2, 16.9, 1), (2, 16.9, 2), (64, 4.0, 1), (64, 4.0, 4)]
)
def test_a_server_reaches_the_lower_of_its_two_bounds(cores, core_ms, workers):
    bound = min(cores / core_ms * 1e3, workers / EVENT_LOOP_SECONDS)
    assert simulate(cores, core_ms, workers, 16 * cores) == pytest.approx(bound, rel=0.04)


def test_few_connections_leave_cores_idle():
    alone = simulate(16, 4.0, 1, 1)
    assert alone == pytest.approx(1000 / 4.0, rel=0.02)  # one image at a time
    assert simulate(16, 4.0, 4, 2) <= 2 * alone


def test_the_ratio_is_that_of_each_round():
    def measured(rate):
        return Measured(per_second=rate, p50_ms=1.0, p99_ms=2.0, cpu_ms=3.0, pss_mb=4.0)

    rounds = [
        (measured(10), measured(11)),
        (measured(100), measured(100)),
        (measured(1), measured(2)),
    ]
    assert "serve 1.100 of the images" in markdown(2, "onnx/cpu/int8", rounds)
