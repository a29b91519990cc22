"""The load generator: what it counts, when latency begins, and which figures are not quotable."""

from __future__ import annotations

import asyncio
import io
import math
import time
from itertools import takewhile

import msgspec
import numpy as np
import pytest
from PIL import Image

from crl_benchmarks import bench, targets
from crl_benchmarks.arrivals import Burst, arrivals
from crl_benchmarks.bench import BenchSettings, report, server_settings
from crl_benchmarks.bench_compare import compare, find_differences
from crl_benchmarks.bench_objective import Objective, search
from crl_benchmarks.bench_report import (
    LOAD_UNITS,
    Figure,
    LoadResult,
    Subject,
    find_figure,
    read_report,
    show_latency,
)
from crl_benchmarks.images import read_images, synthetic_jpegs
from crl_benchmarks.load import Reply, Run, closed_loop, merge, open_loop
from crl_benchmarks.plot import check_plot, write_plot
from crl_benchmarks.quantiles import percentile, values_needed
from crl_benchmarks.targets import Target
from crl_sdk.cli._bench_tables import print_report
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


@pytest.mark.parametrize("text", ["", "4", "4:2", "4:2:10:1", "x:2:10", "0:2:10", "4:0:10",
                                  "4:10:10", "4:2:inf", "nan:2:10", "-4:2:10"])  # fmt: skip
def test_bursts_of_another_form(text):
    with pytest.raises(InvalidInputError, match="such as 4:2:10"):
        Burst.parse(text)


def test_bursts_have_their_rates_and_are_random():
    burst = Burst.parse("5:2:10")
    assert str(burst) == "5:2:10"
    dues = np.array(
        list(takewhile(lambda due: due < 1003, arrivals(10, seed=1, warm_up=3, burst=burst)))
    )
    inside = (dues - 3) % 10 < 2  # the first burst begins with the measured time
    assert inside.sum() == pytest.approx(200 * 50, rel=0.05)
    assert (~inside).sum() == pytest.approx(803 * 10, rel=0.05)
    counts = np.histogram(dues[inside], bins=np.arange(3, 1003, 10))[0]
    assert 0.7 < counts.var() / counts.mean() < 1.3  # Poisson: 1
    gaps = np.diff(dues[~inside])
    gaps = gaps[gaps < 2]  # without those over a burst
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.1)  # exponential: 1


def test_without_bursts_arrivals_are_those_of_one_rate():
    even = Burst(1.0, 2.0, 10.0)
    for due, same in zip(arrivals(7, seed=3), arrivals(7, seed=3, burst=even), strict=False):
        assert due == pytest.approx(same)
        if due > 100:
            break


def test_a_burst_counts_from_when_its_calls_were_due():
    """A server that answers one call at a time makes a burst wait, and the loop sees it."""
    door = asyncio.Lock()

    async def send(number):
        async with door:
            await asyncio.sleep(0.01)
        return Reply("ok")

    burst = Burst.parse("8:0.5:1")
    run = asyncio.run(open_loop(send, rate=25, warm_up=0, seconds=1, seed=5, burst=burst))
    assert 70 < run.offered < 160  # 112 are expected
    assert len(run.due) == len(run.latencies["ok"]) == run.offered
    late = [latency for due, latency in zip(run.due, run.latencies["ok"], strict=True)
            if 0.3 < due < 0.5]  # fmt: skip
    assert late and min(late) > 0.02  # the burst asks for twice what is served


def test_an_uneven_run_is_steady_if_it_serves_calls_when_they_are_due():
    due = [*np.linspace(0, 0.3, 90), *np.linspace(0.4, 0.99, 20)]
    run = Run(seconds=1, offered=110, latencies={"ok": [0.001] * 110}, lags=[0.0])
    run.due, run.done = due, [each + 0.001 for each in due]
    assert bench._row("open", 20, run, 1, uneven=True).steady
    assert not bench._row("open", 20, run, 1).steady
    run.done = [each + 0.5 for each in due]
    assert not bench._row("open", 20, run, 1, uneven=True).steady


def test_callers_wait_for_their_answers_and_failures_are_apart():
    busy, most = 0, 0

    async def send(number):
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0.01)
        busy -= 1
        if number % 4 == 1:
            return Reply("rejected", "RESOURCE_EXHAUSTED", "full")
        if number % 4 == 3:
            return Reply("error", "UNAVAILABLE", f"gone {number}")
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
    row = bench._row("closed", 3, whole, 1)
    assert row.messages == {"RESOURCE_EXHAUSTED": "full", "UNAVAILABLE": "gone 3"}
    assert row.rejected_calls and row.failed_calls.keys() == {"UNAVAILABLE"}


def test_calls_that_began_in_the_warm_up_count_for_the_rate_and_not_for_latency():
    """Otherwise 32 callers of a server with 8 calls/s would lose 32 of 120 calls in 15 seconds."""

    async def send(number):
        await asyncio.sleep(0.3)
        return Reply("ok")

    run = asyncio.run(closed_loop(send, callers=8, warm_up=0.4, seconds=1.2))
    assert len(run.done) > len(run.latencies["ok"]) == run.offered
    assert run.calls_per_second == pytest.approx(len(run.done) / 1.2)


def test_a_generator_that_cannot_keep_up_is_told():
    async def send(number):
        time.sleep(0.004)  # work of the generator itself
        await asyncio.sleep(0)
        return Reply("ok")

    run = asyncio.run(closed_loop(send, callers=2, warm_up=0, seconds=0.5))
    row = bench._row("closed", 2, run, 1)
    assert not row.quotable and "woke" in row.why and "--processes" in row.why
    run = Run(seconds=1, offered=1, latencies={"ok": [0.1]}, lags=[0.0], cpu=0.97)
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


def row(mode, load, *, p99=1.0, calls=1000, failed=0, quotable=True, known=True, late=0.1, **more):
    """A run whose percentiles are all `p99` milliseconds."""
    high = p99 * 1.1 if known else None
    figures = tuple(
        Figure(percent=each, latency_ms=p99, low_ms=p99 * 0.9, high_ms=high)
        for each in (50.0, 99.0)
    )
    values = {
        "mode": mode, "load": load, "load_unit": LOAD_UNITS[mode],
        "measured_seconds": max(calls - failed, 1) / (load if mode == "open" else 100.0),
        "offered_calls": calls, "served_calls": calls - failed, "rejected_calls": failed,
        "failed_calls": {}, "messages": {}, "images_per_second": load,
        "calls_per_second": load if mode == "open" else 100.0, "latency": figures,
        "latency_of_all_calls": figures, "server_p50_ms": {}, "steady": True,
        "generator_cpu_share": 0.1, "generator_late_ms": late, "cached_share": None,
        "quotable": quotable, "why": "" if quotable else "a generator woke late",
    }  # fmt: skip
    return LoadResult(**{**values, **more})


def searched(text, latency, *, capacity=100.0, **more):
    """Search with a server that has a latency at each rate; return all runs and the result."""
    rows, objective = [], Objective.parse(text)

    def measure(mode, load):
        rows.append(
            row(mode, load, p99=latency(load), **more)
            if mode == "open"
            else row(mode, load, calls_per_second=capacity)
        )
        return rows[-1]

    search(objective, measure)
    return rows, objective.conclude(rows)


def queue(load):
    """Latency in milliseconds of a queue with a capacity of 100 calls per second."""
    return 10 / max(1 - load / 100, 0.001)


def test_the_search_finds_the_highest_rate_that_holds():
    rows, result = searched("p99<50ms", queue)
    assert 75 < result.best.load <= 80 and result.best in rows  # 10 / (1 - 0.8) = 50
    assert result.outcome == "met" and result.higher_rates_judged
    assert "95 % interval" in result.text
    _, result = searched("p99<5ms", queue)
    assert (result.outcome, result.best, result.text) == ("met_at_no_rate", None, "met at no rate")


def test_the_search_goes_beyond_what_a_few_callers_reach():
    """Eight callers may not fill the batches of a server, which serves more to an open loop."""
    _, result = searched("p99<50ms", queue, capacity=10.0)
    assert 75 < result.best.load <= 80 and result.higher_rates_judged


def test_a_rate_at_which_the_server_falls_behind_is_missed():
    """In a short run, calls that pile up may still be answered within a long bound."""
    behind = row("open", 200, p99=400.0, calls_per_second=100.0)
    assert Objective.parse("p99<5000ms").judge(behind) == "missed"
    rows = []

    def measure(mode, load):
        rows.append(row(mode, load, p99=400.0, calls_per_second=min(load, 100.0)))
        return rows[-1]

    search(Objective.parse("p99<5000ms"), measure)
    result = Objective.parse("p99<5000ms").conclude(rows)
    assert 100 < result.best.load < 130 and result.higher_rates_judged and len(rows) < 30


def test_a_search_that_could_not_judge_says_so():
    objective = Objective.parse("p99<50ms")
    result = objective.conclude([row("closed", 8), row("open", 50, quotable=False)])
    assert result.outcome == "not_judged"
    assert result.text == "could not be judged: a generator woke late"
    # rates above the best one were not judged: it is a lower bound
    result = objective.conclude([row("open", 20), row("open", 30, quotable=False)])
    assert result.best.load == 20 and not result.higher_rates_judged
    assert (
        "a lower bound, as higher rates could not be judged: a generator woke late" in result.text
    )
    # a rate that was missed is an answer, whatever happened at rates above it
    late = [row("open", 50, quotable=False), row("open", 25, p99=90.0)]
    assert objective.conclude(late).outcome == "met_at_no_rate"
    none = [row("closed", 8, quotable=False, calls=9, failed=9, why="no call succeeded: X")]
    assert objective.conclude(none).text == "could not be judged: no call succeeded: X"


def test_a_miss_that_is_the_generators_own_is_none():
    objective = Objective.parse("p99<2ms")
    assert objective.judge(row("open", 10, p99=2.5, late=1.0)) == "not_judged"
    assert objective.judge(row("open", 10, p99=4.0, late=1.0)) == "missed"
    assert objective.judge(row("open", 10, p99=1.5, late=1.0)) == "met"
    assert Objective.parse("p99<50ms").judge(row("open", 10, p99=50.5, late=1.0)) == "missed"
    result = objective.conclude([row("open", 10, p99=2.5, late=1.0)])
    assert result.text == "could not be judged: a generator woke 1.0 ms late, which decides"


def test_a_claim_from_few_calls_says_how_many_it_needs():
    objective = Objective.parse("p99<50ms")
    result = objective.conclude([row("open", 9.33, p99=9.0, calls=28, known=False)])
    assert result.outcome == "met_in_too_few_calls" and result.needed_calls == 563
    assert "in 28 calls, which are too few to show it: p99 needs 563" in result.text
    assert "--seconds 67" in result.text
    # enough calls, but the interval reaches over the bound
    result = objective.conclude([row("open", 20, p99=49.0), row("open", 21, p99=60.0)])
    assert result.outcome == "met" and "which reaches beyond the objective" in result.text
    cached = objective.conclude([row("open", 20, cached_share=1.0)])
    assert "The cache answered 100% of the images" in cached.text


def test_figures_of_few_calls_are_marked():
    few = bench._row("open", 9, Run(seconds=1, offered=28, latencies={"ok": [0.0123] * 28}), 1)
    shown = {each.percent: show_latency(each) for each in few.latency}
    assert shown == {50.0: "12.3", 90.0: "12.3?", 99.0: "12.3?", 99.9: "12.3?"}


def sliced(seconds, latency):
    """A run with ten calls per second whose latency depends on when they are due."""
    due = [i / 10 for i in range(int(seconds * 10))]
    run = Run(seconds=seconds, offered=len(due), lags=[0.0], due=due, done=due)
    run.latencies = {"ok": [latency(each) for each in due]}
    return bench._row("open", 10, run, 1)


def test_slices_show_when_a_run_was_slow():
    told = sliced(12, lambda due: 0.5 if 3 <= due < 5 else 0.01)
    assert [each.begin_seconds for each in told.slices] == list(range(12))
    assert all(each.length_seconds == 1 and each.served_calls == 10 for each in told.slices)
    assert [each.p50_ms for each in told.slices] == [*[10] * 3, *[500] * 2, *[10] * 7]
    assert told.slices[3].p99_ms == 500
    short = sliced(2, lambda due: due).slices
    assert [each.begin_seconds for each in short] == pytest.approx([i / 5 for i in range(10)])
    assert sum(each.served_calls for each in short) == 20
    long = sliced(900, lambda due: 0.01).slices
    assert len(long) == 600 and {each.length_seconds for each in long} == {1.5}
    uneven = sliced(10.5, lambda due: 0.01).slices
    assert len(uneven) == 11 and uneven[-1].length_seconds == pytest.approx(0.5)
    empty = bench._row("closed", 1, Run(seconds=1, lags=[0.0]), 1).slices
    assert len(empty) == 10 and all(each.p50_ms is None for each in empty)


def test_a_slow_part_of_a_run_is_drawn(capsys):
    rows = [sliced(12, lambda due: 0.5 if 3 <= due < 5 else 0.01), sliced(12, lambda due: 0.01),
            sliced(120, lambda due: 0.5 if due < 2 else 0.01)]  # fmt: skip
    about = Subject(model="clip")
    print_report(report("crl bench", about, {}, rows))
    lines = [line for line in capsys.readouterr().out.splitlines() if "p50 each" in line]
    assert lines == [
        "10 calls/s: p50 each 1 s: ▁▁▁██▁▁▁▁▁▁▁, at most 500 ms",
        f"10 calls/s: p50 each 2 s: █{'▁' * 59}, at most 500 ms",
    ]


def test_a_failed_call_never_ends_in_the_percentiles_of_all_calls():
    served = [0.001 * (i + 1) for i in range(995)]
    run = Run(seconds=1, offered=1000, latencies={"ok": served, "rejected": [0.001] * 5})
    run.done = served
    run.failures, run.lags = {"RESOURCE_EXHAUSTED": 5}, [0.0]
    told = bench._row("open", 1000, run, 1)
    p99, all_calls = (find_figure(each, 99.0) for each in (told.latency, told.latency_of_all_calls))
    assert p99.latency_ms == pytest.approx(985, abs=1)
    assert all_calls.latency_ms == pytest.approx(990, abs=1)
    assert find_figure(told.latency_of_all_calls, 99.9).latency_ms is None
    assert Objective.parse("p99<988ms").judge(told) == "missed"
    assert Objective.parse("p99<992ms").judge(told) == "met"
    run.latencies["ok"] = served[:980]
    assert Objective.parse("p99<9999ms").judge(bench._row("open", 1000, run, 1)) == "missed"


def test_a_run_without_an_answer_says_why():
    told = bench._row("closed", 1, Run(seconds=1, lags=[0.0]), 1)
    assert not told.shown and "use more --seconds" in told.why
    run = Run(seconds=1, offered=3, latencies={"error": [0.1] * 3}, lags=[0.0])
    run.failures, run.messages = {"NOT_FOUND": 3}, {"NOT_FOUND": "no basis 'colr'"}
    told = bench._row("closed", 1, run, 1)
    assert told.why == "no call succeeded: 3 of 3 ended with NOT_FOUND (no basis 'colr')"
    full = Run(seconds=1, offered=3, latencies={"rejected": [0.1] * 3}, lags=[0.0])
    full.failures = {"RESOURCE_EXHAUSTED": 3}
    assert bench._row("open", 1, full, 1).quotable  # refusing is what such a server does


def test_slow_rates_are_not_rounded_to_nothing():
    run = Run(seconds=900, offered=1, latencies={"ok": [400.0]}, done=[400.0], lags=[0.0])
    assert bench._row("closed", 1, run, 1).images_per_second == pytest.approx(1 / 900, rel=1e-3)


def test_a_short_lateness_is_no_bottleneck_of_fast_calls():
    """The cache answers in half a millisecond, and an event loop wakes a millisecond late."""
    run = Run(seconds=1, offered=30, latencies={"ok": [0.0005] * 30}, lags=[0.001] * 20)
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


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_distinct_images_have_the_same_pixels():
    drawn = np.arange(64 * 48 * 3, dtype=np.uint8).reshape(48, 64, 3)
    files = [*synthetic_jpegs(2, (64, 48)), png(drawn), png(drawn[..., 0])]
    target = Target("h:1", files, batch=2, distinct=True)
    sent = [data for number in range(8) for data in targets._images(target, number, 2)]
    assert len(set(sent)) == 16
    again = targets._images(Target("h:1", files, batch=2, distinct=True), 0, 2)
    assert not set(again) & set(sent)  # another run sends other images
    for i, data in enumerate(sent):
        pixels, original = (Image.open(io.BytesIO(each)) for each in (data, files[i % 4]))
        np.testing.assert_array_equal(np.asarray(pixels), np.asarray(original))
    with pytest.raises(InvalidInputError, match="JPEGs and PNGs; 1 of 2 images are neither"):
        Target("h:1", [files[0], b"GIF89a"], distinct=True)


def write_report(path, runs, engine="onnx", objective=None, **settings):
    about = Subject(model="clip", engine=engine, fingerprint="ab")
    described = {**server_settings(Target("h:1", [b"xx"]), BenchSettings()), **settings}
    document = report("crl bench", about, described, runs, objective=objective)
    path.write_bytes(msgspec.json.encode(document))
    return read_report(path)


def test_two_reports_are_compared(tmp_path):
    one = write_report(
        tmp_path / "a",
        [row("closed", 2, p99=10.0, cached_share=0.0), row("closed", 4, quotable=False)],
    )
    other = write_report(
        tmp_path / "b",
        [row("closed", 2, p99=20.0, images_per_second=8.0, cached_share=0.0), row("closed", 4)],
        engine="openvino",
    )
    ratios = compare(one, other)
    assert ratios.keys() == {"2 callers"}  # the other run is not quotable
    ratio = ratios["2 callers"]["p99"]
    assert ratio.value == 2 and ratio.low == pytest.approx(18 / 11) and ratio.high > 2
    ratio = ratios["2 callers"]["images_per_second"]
    assert ratio.value == 4 and ratio.low < 4 < ratio.high
    assert find_differences(one, other) == ["the engine: onnx and openvino"]
    open_ended = write_report(tmp_path / "c", [row("closed", 2, known=False)])
    assert compare(one, open_ended)["2 callers"]["p99"].high is None
    with pytest.raises(InvalidInputError, match="no quotable run at the same load"):
        compare(one, msgspec.structs.replace(other, rows=(row("open", 2),)))


def test_what_makes_two_reports_hard_to_compare_is_told(tmp_path):
    first = [row("closed", 2, cached_share=0.0)]
    one = write_report(tmp_path / "a", first)
    cached = write_report(tmp_path / "b", [row("closed", 2, cached_share=0.5)], distinct=True)
    assert find_differences(one, cached) == [
        "distinct: no and yes", "answers from the cache: 0% and 50%"
    ]  # fmt: skip
    silent = write_report(tmp_path / "c", [row("closed", 2)], engine=None)
    assert find_differences(silent, silent) == [
        "the engine: not known in either, it may differ", "answers from the cache: not known"
    ]  # fmt: skip
    machine = msgspec.structs.replace(one.machine, processor="Z80", cores=one.machine.cores + 1)
    moved = msgspec.structs.replace(one, machine=machine)
    assert [each.partition(":")[0] for each in find_differences(one, moved)] == [
        "the processor", "the number of cores"
    ]  # fmt: skip
    far = write_report(tmp_path / "d", first, address="h:2", measured_seconds=1.0)
    assert find_differences(one, far) == []


def test_rates_that_met_the_same_objective_are_compared(tmp_path):
    reports = []
    for name, rate in (("a", 20), ("b", 30)):
        runs = [row("open", rate), row("open", rate + 1, p99=90.0)]
        result = Objective.parse("p99<50ms").conclude(runs)
        reports.append(write_report(tmp_path / name, runs, objective=result))
    ratio = compare(*reports)["p99<50ms"]["images_per_second"]
    assert ratio.value == 1.5 and ratio.low == pytest.approx(1.425) and ratio.high > 1.5
    bound = Objective.parse("p99<50ms").conclude([row("open", 20)])  # no higher rate was missed
    unsure = msgspec.structs.replace(reports[1], objective=bound)
    assert compare(reports[0], unsure)["p99<50ms"]["images_per_second"].high is None
    stricter = Objective.parse("p99<9ms").conclude([row("open", 20)])
    with pytest.raises(InvalidInputError, match="no quotable run"):
        compare(reports[0], msgspec.structs.replace(reports[1], objective=stricter))


def test_only_reports_of_this_schema_are_read(tmp_path):
    (tmp_path / "old").write_text('{"schema": 2}')
    (tmp_path / "odd").write_text("[]")
    (tmp_path / "text").write_text("p99")
    for name, words in [("old", "schema 2, this SDK reads 3; measure again"),
                        ("odd", "not a readable record"), ("text", "not a readable record"),
                        ("none", "cannot be read")]:  # fmt: skip
        with pytest.raises(InvalidInputError, match=words):
            read_report(tmp_path / name)


def test_the_names_of_numbers_in_a_report_have_units(tmp_path):
    document = msgspec.to_builtins(write_report(tmp_path / "a", [row("open", 5)]))
    run = document["rows"][0]
    units = ("_ms", "_calls", "_per_second", "_seconds", "_share")
    named = {"load": "load_unit", "percent": "percent"}
    for part in (run, *run["latency"], *run["latency_of_all_calls"]):
        for key, value in part.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                assert key.endswith(units) or key in named, key
    assert run["load_unit"] == "calls/s" and isinstance(document["machine"]["cores"], int)
    assert isinstance(document["settings"]["distinct"], bool)


def test_an_objective_is_parsed_and_counts_failed_calls():
    objective = Objective.parse(" p99 < 50ms ")
    assert str(objective) == "p99<50ms"
    assert objective.judge(row("open", 10, p99=49.0)) == "met"
    assert objective.judge(row("open", 10, p99=50.0)) == "missed"
    assert objective.judge(row("open", 10, quotable=False)) == "not_judged"
    assert objective.judge(row("open", 10, latency_of_all_calls=())) == "missed"
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
    runs = [row("open", 5, cached_share=0.5), row("open", 6, known=False),
            row("closed", 1, p99=9.0, quotable=False)]  # fmt: skip
    about = Subject(model="clip", engine="onnx/cpu/int8")
    told = report("crl bench <h:1>", about, server_settings(target, BenchSettings()), runs)
    assert told.command == "crl bench <h:1>" and told.settings["images_per_call"] == 3
    assert told.settings["measured_seconds"] == 10 and told.settings["median_image_bytes"] == 3
    assert told.target.engine == "onnx/cpu/int8" and told.machine.processor
    assert told.versions.keys() >= {"crl", "grpcio"} and told.rows[0].load == 5
    assert told.cached_share == 0.5
    write_plot(told, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    write_plot(told, tmp_path / "plot.html")
    page = (tmp_path / "plot.html").read_text()
    assert (
        "<svg" in page and "crl bench &lt;h:1&gt;" in page and "http" not in page.split("svg>")[1]
    )
    assert "cache answered up to 50%" in page and "1.00?" in page
    with pytest.raises(InvalidInputError, match=r"png or \.html"):
        check_plot(tmp_path / "plot.gif")
    with pytest.raises(InvalidInputError, match="got none"):
        write_plot(report("", about, {}, runs[2:]), tmp_path / "x.png")
