"""The load generator: what it counts, when latency begins, and which figures are not quotable."""

from __future__ import annotations

import asyncio
import math
import time

import numpy as np
import pytest

from crl_benchmarks import bench
from crl_benchmarks.bench import (
    BenchSettings,
    Figure,
    LoadResult,
    Objective,
    report,
    search,
    server_settings,
)
from crl_benchmarks.images import read_images, synthetic_jpegs
from crl_benchmarks.load import Reply, Run, closed_loop, merge, open_loop
from crl_benchmarks.plot import write_plot
from crl_benchmarks.quantiles import percentile
from crl_benchmarks.targets import Target
from crl_sdk.errors import InvalidInputError


def test_a_server_that_stalls_cannot_hide_what_callers_waited():
    """One call holds up all others for 0.4 s: the open loop sees them wait."""
    door = asyncio.Lock()

    async def send(number):
        async with door:
            await asyncio.sleep(0.4 if number == 20 else 0)
        return Reply("ok")

    opened = asyncio.run(open_loop(send, rate=100, warm_up=0, seconds=1))
    slow = [each for each in opened.latencies["ok"] if each > 0.1]
    assert 15 < len(slow) < 60 and max(slow) >= 0.4
    closed = asyncio.run(closed_loop(send, callers=1, warm_up=0, seconds=1))
    assert sum(each > 0.1 for each in closed.latencies["ok"]) == 1


def test_calls_come_at_the_rate_and_at_random():
    sent = []

    async def send(number):
        sent.append(time.perf_counter())
        return Reply("ok")

    run = asyncio.run(open_loop(send, rate=400, warm_up=0.25, seconds=1, seed=3))
    assert 300 < run.offered < 500 and len(run.latencies["ok"]) == run.offered
    assert run.offered < len(sent)  # those of the warm-up are not counted
    gaps = np.diff(sent)
    assert 0.5 < gaps.std() / gaps.mean() < 1.6  # exponential: 1


def test_callers_wait_for_their_answers_and_failures_are_apart():
    busy, most = 0, 0

    async def send(number):
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0.01)
        busy -= 1
        if number % 4 == 1:
            return Reply("rejected", "RESOURCE_EXHAUSTED")
        if number % 4 == 3:
            return Reply("error", "UNAVAILABLE")
        return Reply("ok", stages={"infer": 0.005})

    run = asyncio.run(closed_loop(send, callers=3, warm_up=0, seconds=0.5))
    assert most == 3
    assert run.failures.keys() == {"RESOURCE_EXHAUSTED", "UNAVAILABLE"}
    assert run.offered == sum(map(len, run.latencies.values()))
    assert set(run.stages["infer"]) == {0.005} and len(run.done) == len(run.latencies["ok"])
    whole = merge([run, run])
    assert (
        whole.offered == 2 * run.offered
        and whole.failures["UNAVAILABLE"] == 2 * (run.failures["UNAVAILABLE"])
    )


def test_a_generator_that_cannot_keep_up_is_told():
    async def send(number):
        time.sleep(0.004)  # work of the generator itself
        await asyncio.sleep(0)
        return Reply("ok")

    run = asyncio.run(closed_loop(send, callers=2, warm_up=0, seconds=0.5))
    row = bench._row("closed", 2, run, 1)
    assert not row.quotable and "woke" in row.why and "--processes" in row.why
    run = Run(seconds=1, latencies={"ok": [0.1]}, done=[0.5], lags=[0.0], cpu=0.97)
    assert "97% of its core" in bench._row("closed", 1, run, 1).why


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth = -math.log(1 - 0.9)  # of the exponential distribution
    held = 0
    for _ in range(400):
        found = percentile(np.sort(rng.exponential(size=500)).tolist(), 90)
        held += found.low <= truth <= found.high
    assert 0.92 < held / 400 < 0.99
    few = percentile([1.0, 2.0, 3.0], 99)
    assert few.low is not None and few.high is None


def row(mode, load, *, p99, served=1000, offered=1000, quotable=True):
    return LoadResult(
        mode=mode, load=load, seconds=10, offered=offered, served=served, rejected=0, errors={},
        calls_per_second=load if mode == "open" else 100.0, images_per_second=load,
        latency=(Figure(percent=99.0, ms=p99, low=p99, high=p99),), stages_ms={}, steady=True,
        generator_cpu=0.1, generator_lag_ms=0.1, quotable=quotable,
    )  # fmt: skip


def test_the_search_finds_the_highest_rate_that_holds():
    def measure(mode, load):
        return row(mode, load, p99=10 / max(1 - load / 100, 0.001))  # a queue, at capacity 100

    shown = []
    best = search(Objective.parse("p99<50ms"), measure, shown.append)
    assert 75 < best.load <= 80 and best in shown  # 10 / (1 - 0.8) = 50
    assert search(Objective.parse("p99<5ms"), measure, shown.append) is None


def test_an_objective_counts_failed_calls():
    objective = Objective.parse(" p99 < 50ms ")
    assert objective.is_met(row("open", 10, p99=49.0))
    assert not objective.is_met(row("open", 10, p99=50.0))
    assert not objective.is_met(row("open", 10, p99=1.0, served=980))  # 2 % took forever
    assert objective.is_met(row("open", 10, p99=1.0, served=995))
    assert not objective.is_met(row("open", 10, p99=1.0, quotable=False))
    for wrong in ("p98<50ms", "p99<0ms", "50ms", "p99<50", "p99>50ms"):
        with pytest.raises(InvalidInputError, match="p99<50ms"):
            Objective.parse(wrong)


def test_pictures_are_all_different_and_the_same_again(tmp_path):
    made = synthetic_jpegs(20, (64, 48))
    assert len(set(made)) == 20 and made == synthetic_jpegs(20, (64, 48))
    with pytest.raises(InvalidInputError, match="no image files"):
        read_images(tmp_path)
    (tmp_path / "a.jpg").write_bytes(made[0])
    assert read_images(tmp_path) == made[:1]


def test_the_report_has_what_is_needed_to_repeat_it(tmp_path):
    target = Target("h:1", [b"xx", b"yyyy"], criteria=("color",), batch=3)
    runs = [row("open", 5, p99=1.0), row("closed", 1, p99=9.0, quotable=False)]
    told = report("crl bench <h:1>", server_settings(target, BenchSettings()), runs)
    assert told.command == "crl bench <h:1>" and told.settings["images of a call"] == "3"
    assert told.versions.keys() >= {"crl", "grpcio"} and told.rows[0].load == 5
    write_plot(told, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    write_plot(told, tmp_path / "plot.html")
    page = (tmp_path / "plot.html").read_text()
    assert (
        "<svg" in page and "crl bench &lt;h:1&gt;" in page and "http" not in page.split("svg>")[1]
    )
    for wrong, words in [(tmp_path / "plot.gif", "png or .html"), (tmp_path / "x.png", "none")]:
        with pytest.raises(InvalidInputError, match=words):
            write_plot(report("", {}, runs[1:] if "none" in words else runs), wrong)
