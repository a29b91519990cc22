"""The load generator: what it counts, when latency begins, and which figures are not quotable."""

from __future__ import annotations

import asyncio
import io
import math
import time

import msgspec
import numpy as np
import pytest
from PIL import Image

from crl_benchmarks import bench, targets
from crl_benchmarks.bench import (
    BenchSettings,
    Figure,
    LoadResult,
    Objective,
    report,
    search,
    server_settings,
)
from crl_benchmarks.bench_compare import (
    compare_latency,
    compare_throughput,
    differences,
    pairs,
    read_report,
)
from crl_benchmarks.images import read_images, synthetic_jpegs
from crl_benchmarks.load import Reply, Run, closed_loop, merge, open_loop
from crl_benchmarks.plot import write_plot
from crl_benchmarks.quantiles import percentile, values_needed
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


def row(mode, load, *, p99, served=1000, offered=1000, quotable=True, known=True):
    return LoadResult(
        mode=mode, load=load, seconds=10, offered=offered, served=served, rejected=0, errors={},
        calls_per_second=load if mode == "open" else 100.0, images_per_second=load,
        latency=tuple(
            Figure(percent=each, ms=p99, low=p99 * 0.9, high=p99 * 1.1 if known else None)
            for each in (50.0, 99.0)
        ), stages_ms={}, steady=True,
        generator_cpu=0.1, generator_lag_ms=0.1, cached=None, quotable=quotable,
        why="" if quotable else "a generator woke late",
    )  # fmt: skip


def test_the_search_finds_the_highest_rate_that_holds():
    def measure(mode, load):
        return row(mode, load, p99=10 / max(1 - load / 100, 0.001))  # a queue, at capacity 100

    shown = []
    best = search(Objective.parse("p99<50ms"), measure, shown.append)
    assert 75 < best.load <= 80 and best in shown  # 10 / (1 - 0.8) = 50
    assert search(Objective.parse("p99<5ms"), measure, shown.append) is None


def test_a_search_that_could_not_judge_or_had_few_calls_says_so():
    objective = Objective.parse("p99<50ms")
    late = [row("closed", 8, p99=1.0), row("open", 50, p99=1.0, quotable=False)]
    told, judged = objective.verdict(late, None)
    assert not judged and told == "could not be judged: a generator woke late"
    assert objective.verdict([row("open", 50, p99=90.0)], None) == ("met at no rate", True)
    best = row("open", 20, p99=9.0)
    assert objective.verdict([best], best) == ("met at 20 calls/s (20 images/s)", True)
    few = row("open", 20, p99=9.0, served=28, known=False)
    told, judged = objective.verdict([few], few)
    assert judged and "in 28 calls, which are too few to show it: p99 needs 563" in told
    assert "--seconds 31" in told


def test_a_short_lateness_is_no_bottleneck_of_fast_calls():
    """The cache answers in half a millisecond, and an event loop wakes a millisecond late."""
    run = Run(seconds=1, latencies={"ok": [0.0005] * 30}, lags=[0.001] * 20)
    run.done = [i / 30 for i in range(30)]
    assert bench._row("open", 30, run, 1).quotable
    run.lags = [0.003] * 20
    assert not bench._row("open", 30, run, 1).quotable


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0, 99.9])
def test_intervals_hold_their_estimate_and_say_when_they_are_closed(percent):
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 5, 10, 50, 400, 1000):
        found = percentile(np.sort(rng.exponential(size=n)).tolist(), percent)
        assert found.low is None or found.low <= found.value
        assert found.high is None or found.value <= found.high
    needed = values_needed(percent)
    assert percentile(range(needed), percent).high is not None
    assert percentile(range(needed - 1), percent).high is None


def test_distinct_images_have_the_same_pixels():
    jpegs = synthetic_jpegs(2, (64, 48))
    target = Target("h:1", jpegs, batch=2, distinct=True)
    sent = [data for number in range(4) for data in targets._images(target, number)]
    assert len(set(sent)) == 8
    again = targets._images(Target("h:1", jpegs, batch=2, distinct=True), 0)
    assert not set(again) & set(sent)  # another run sends other images
    for i, data in enumerate(sent):
        pixels, original = (Image.open(io.BytesIO(each)) for each in (data, jpegs[i % 2]))
        np.testing.assert_array_equal(np.asarray(pixels), np.asarray(original))
    with pytest.raises(InvalidInputError, match="works with JPEGs"):
        Target("h:1", [b"\x89PNG"], distinct=True)


def test_two_reports_are_compared(tmp_path):
    def written(name, p99, engine, cached=None, **changes):
        runs = [
            msgspec.structs.replace(row("closed", 2, p99=p99), cached=cached, **changes),
            row("closed", 4, p99=1.0, quotable=False),
        ]
        about = {"model": "clip", "engine": engine, "fingerprint": "ab"}
        settings = server_settings(Target("h:1", [b"xx"]), BenchSettings())
        (tmp_path / name).write_bytes(
            msgspec.json.encode(report("crl bench", about, settings, runs))
        )
        return read_report(tmp_path / name)

    one, other = written("a", 10.0, "onnx"), written("b", 20.0, "openvino", images_per_second=8.0)
    ((first, second),) = pairs(one, other)
    ratio = compare_latency(first, second, 99.0)
    assert ratio.value == 2 and ratio.low == pytest.approx(18 / 11) and ratio.high > 2
    assert compare_throughput(first, second).value == 4
    assert differences(one, other) == ["the engine: onnx and openvino"]
    assert differences(one, written("c", 1.0, "onnx", cached=0.5)) == [
        "answers from the cache: 0% and 50%"
    ]
    open_ended = written("d", 1.0, "onnx", latency=row("closed", 2, p99=1.0, known=False).latency)
    assert compare_latency(first, pairs(one, open_ended)[0][1], 99.0).high is None
    with pytest.raises(InvalidInputError, match="no quotable run at the same load"):
        pairs(one, msgspec.structs.replace(other, rows=(row("open", 2, p99=1.0),)))
    (tmp_path / "old").write_text('{"schema": 1}')
    (tmp_path / "odd").write_text("[]")
    for name, words in [("old", "expected schema 2 .* got 1"), ("odd", "not a report"),
                        ("none", "cannot be read")]:  # fmt: skip
        with pytest.raises(InvalidInputError, match=words):
            read_report(tmp_path / name)


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
    about = {"model": "clip", "engine": "onnx/cpu/int8"}
    told = report("crl bench <h:1>", about, server_settings(target, BenchSettings()), runs)
    assert told.command == "crl bench <h:1>" and told.settings["images_per_call"] == 3
    assert told.settings["measured_seconds"] == 10 and told.settings["median_image_bytes"] == 3
    assert told.target["engine"] == "onnx/cpu/int8" and told.machine["processor"]
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
            write_plot(report("", {}, {}, runs[1:] if "none" in words else runs), wrong)
