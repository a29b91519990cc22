"""`crl bench`: latency and throughput of a server or an engine."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer

from crl_sdk.cli._bench_mlperf import run_mlperf
from crl_sdk.cli._bench_tables import print_comparison, print_report, warn_of_cache
from crl_sdk.cli._console import JsonOption, note, print_error, print_json, spinner
from crl_sdk.cli._options import EngineOption, OverwriteOption, ThreadsOption, require_new
from crl_sdk.errors import CrlError, InvalidInputError, MissingDependencyError, ServiceError
from crl_sdk.storage._atomic_files import write_record

if TYPE_CHECKING:
    from crl_benchmarks.arrivals import Burst
    from crl_benchmarks.bench import BenchSettings
    from crl_benchmarks.bench_objective import Objective
    from crl_benchmarks.bench_report import LoadResult, Report, Setting, Subject
    from crl_benchmarks.call_records import CallRecords
    from crl_benchmarks.calls import Mix, Trace
    from crl_benchmarks.metrics_page import MetricsPage
    from crl_benchmarks.targets import Target

_DEFAULT_BATCHES = "1,8,16,32"
_WARM_UP = 2.0
_SECONDS = 10.0


def bench(
    address: Annotated[
        str | None, typer.Argument(help="Address of a running server, host:port or unix:PATH.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", "-b", help="Time an engine of this bundle instead.")
    ] = None,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
    batches: Annotated[
        str, typer.Option(help="With --bundle: batch sizes, comma-separated.")
    ] = _DEFAULT_BATCHES,
    api: Annotated[
        Literal["crl", "kserve"],
        typer.Option(help="API of the server; kserve is KServe v2, as in Triton."),
    ] = "crl",
    criteria: Annotated[str, typer.Option(help="For --api crl: criteria, comma-separated.")] = "",
    kserve_model: Annotated[
        str, typer.Option(help="For --api kserve: name of the model, such as crl.color.")
    ] = "",
    images: Annotated[
        Path | None, typer.Option(help="Directory of images. Default: synthetic JPEGs.")
    ] = None,
    size: Annotated[
        str, typer.Option(help="Size of the synthetic JPEGs, width x height.")
    ] = "640x480",
    count: Annotated[int, typer.Option(min=1, help="Number of different synthetic JPEGs.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Number of images per call.")] = 1,
    concurrency: Annotated[
        str, typer.Option(help="Closed loop: numbers of callers, such as 1,2,4,8.")
    ] = "",
    rate: Annotated[str, typer.Option(help="Open loop: calls per second, such as 50,100.")] = "",
    slo: Annotated[
        str | None, typer.Option(help="Find the highest rate that meets this, such as 'p99<50ms'.")
    ] = None,
    warm_up: Annotated[
        float, typer.Option(min=0, help="Seconds before anything counts.")
    ] = _WARM_UP,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Measured seconds of each run.")
    ] = _SECONDS,
    processes: Annotated[int, typer.Option(min=1, help="Number of load generators.")] = 1,
    connections: Annotated[
        int,
        typer.Option(min=1, help="Connections of each load generator; a worker has its own."),
    ] = 1,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Time limit of a call in seconds.")
    ] = 10.0,
    distinct: Annotated[
        bool,
        typer.Option(
            "--distinct",
            help="Write a number into each JPEG or PNG that is sent, so that the server's cache "
            "never answers.",
        ),
    ] = False,
    authority: Annotated[
        str | None,
        typer.Option(
            help="TLS: PEM file of the authority that signed the server's certificate, or `system`."
        ),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Mutual TLS: PEM file of the client's certificate.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Mutual TLS: PEM file of the client's private key.")
    ] = None,
    plain_text_token: Annotated[
        bool,
        typer.Option(
            "--plain-text-token",
            help="Send CRL_TOKEN to another machine without TLS, where everyone on the way can "
            "read it.",
        ),
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Compare two reports of --out instead, as ratios with intervals."),
    ] = None,
    mlperf: Annotated[
        str | None,
        typer.Option(
            help="Let MLPerf's LoadGen send the calls: `all`, or some of single-stream, "
            "multi-stream, server and offline, comma-separated."
        ),
    ] = None,
    mlperf_logs: Annotated[
        Path, typer.Option(help="With --mlperf: directory for LoadGen's logs.")
    ] = Path("mlperf-logs"),
    overwrite: OverwriteOption = False,
    out_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the report to this JSON file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Plot latency over throughput to this .png or .html file.")
    ] = None,
    requests: Annotated[
        Path | None, typer.Option(help="Write a record of each call to this .jsonl or .parquet.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Read the server's Prometheus page too: host:port or a URL."),
    ] = None,
    burst: Annotated[
        str | None,
        typer.Option(
            help="Bursts in the open loop, as FACTOR:SECONDS:EVERY: 4:2:10 is four times the rate "
            "during 2 in every 10 seconds."
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(help="Send the calls of this file of --requests (.jsonl) at their times."),
    ] = None,
    speed: Annotated[
        float, typer.Option(min=0.001, max=1000, help="With --replay: 2 is twice as fast.")
    ] = 1.0,
    mix: Annotated[
        str | None,
        typer.Option(help="Criteria of calls with weights, such as color:3,shape:1,color+shape:1."),
    ] = None,
    cold: Annotated[
        int | None,
        typer.Option(min=1, help="Time this many first calls of a new connection, before any run."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure latency, throughput and failures of a server under load.

    The report also shows the times that the server reports. A bearer token is read from CRL_TOKEN.
    The server answers repeated images from its cache: pass --distinct to measure its engine. The
    exit status is 1 if an objective could not be judged or no call of a run succeeded.
    """
    if compare is not None:
        if address is not None or bundle is not None:
            raise InvalidInputError("expected --compare alone, without a server or --bundle")
        print_comparison(*compare, as_json=as_json)
        return
    of_servers = {
        "--slo": slo, "--concurrency": concurrency, "--rate": rate, "--images": images,
        "--criteria": criteria, "--kserve-model": kserve_model, "--distinct": distinct,
        "--authority": authority, "--certificate": certificate, "--key": key,
        "--requests": requests, "--metrics": metrics, "--burst": burst, "--replay": replay,
        "--mix": mix, "--cold": cold, "--mlperf": mlperf,
    }  # fmt: skip
    of_engines = {
        "--engine": engine != "auto", "--threads": threads, "--batches": batches != _DEFAULT_BATCHES
    }  # fmt: skip
    planned = {
        "--concurrency": concurrency, "--rate": rate, "--slo": slo, "--burst": burst,
        "--criteria": criteria, "--mix": mix, "--batch": batch != 1,
        "--warm-up": warm_up != _WARM_UP, "--seconds": seconds != _SECONDS,
    }  # fmt: skip
    _check_options(address, bundle, of_servers, of_engines)
    _check_mlperf(
        mlperf,
        {
            "--plot": plot, "--requests": requests, "--metrics": metrics, "--burst": burst,
            "--replay": replay, "--mix": mix, "--cold": cold,
        },
    )  # fmt: skip
    _check_replay(replay, speed, planned)
    require_new(out_file, plot, requests, overwrite=overwrite)
    try:
        from crl_benchmarks.bench import BenchSettings, measure_cold, report, server_settings
        from crl_benchmarks.bench_objective import Objective
        from crl_benchmarks.calls import read_trace
        from crl_benchmarks.images import read_images, synthetic_jpegs
        from crl_benchmarks.metrics_page import MetricsPage
        from crl_benchmarks.targets import Target, probe
        from crl_sdk.client._options import ClientSecurity
    except ImportError as error:
        raise MissingDependencyError(error.name or "pillow", "cpu", "crl bench") from error
    _check_files(plot, requests)
    command = shlex.join(["crl", *sys.argv[1:]])

    settings = BenchSettings(
        warm_up=warm_up, seconds=seconds, processes=processes,
        burst=_burst(burst, opened=bool(rate or slo)), mix=_mix(mix, criteria),
    )  # fmt: skip
    if trace := read_trace(replay, speed=speed) if replay is not None else None:
        settings = _settings_of(trace, processes)
    objective = Objective.parse(slo) if slo is not None else None
    ended_early, records, started = "", None, None
    if bundle is not None:
        target, described, rows = _engine(
            bundle, engine, threads, _numbers("--batches", batches, whole=True), settings
        )
    elif address is not None:
        loads = _loads(concurrency, rate, searched=objective is not None or cold is not None)
        named = settings.mix.criteria if settings.mix is not None else _names(criteria)
        if trace is not None:
            loads, batch, named = [("replay", speed)], trace.most_images, trace.criteria
        calls = Target(
            address=address,
            images=read_images(images) if images else synthetic_jpegs(count, _size(size)),
            kind=api,
            batch=batch,
            criteria=named,
            model=kserve_model,
            timeout=timeout,
            security=ClientSecurity(
                os.environ.get("CRL_TOKEN", ""), authority, certificate, key, plain_text_token
            ),
            distinct=distinct,
            connections=connections,
        )
        if mlperf is not None:
            run_mlperf(
                calls,
                mlperf,
                settings=settings,
                rates=_numbers("--rate", rate, whole=False),
                callers=_numbers("--concurrency", concurrency, whole=True),
                objective=objective,
                logs=mlperf_logs,
                overwrite=overwrite,
                out_file=out_file,
                as_json=as_json,
            )
            return
        page = MetricsPage(metrics) if metrics is not None else None
        started = asyncio.run(measure_cold(calls, cold)) if cold is not None else None
        target, described = asyncio.run(probe(calls)), server_settings(calls, settings)
        with _recorded(requests, command, address) as records:
            rows, ended_early = _server(calls, settings, loads, objective, records, page)
    result = objective.conclude(rows) if objective is not None else None
    document = report(
        command, target, described, rows,
        objective=result, ended_early=ended_early, cold=started,
    )  # fmt: skip
    _show(document, out_file, plot, as_json=as_json)
    not_judged = result is not None and result.outcome == "not_judged"
    if not_judged or (records is not None and records.failed):
        raise typer.Exit(1)


@contextmanager
def _recorded(path: Path | None, command: str, address: str) -> Iterator[CallRecords | None]:
    """Yield where calls are recorded, and write the file however the block ends.

    An error of the file is printed and noted, since the report is still to come.

    Args:
        path: File of the records; None for no records.
        command: Command line.
        address: Address of the server.
    """
    if path is None:
        yield None
        return
    from crl_benchmarks.call_records import CallRecords

    records = CallRecords(path, command=command, address=address)
    try:
        yield records
    finally:
        try:
            if count := records.write():
                note(f"wrote {path}, {count:,} calls")
        except CrlError as error:
            print_error(error, as_json=False)  # stdout has its one document


def _check_options(
    address: str | None,
    bundle: Path | None,
    of_servers: Mapping[str, object],
    of_engines: Mapping[str, object],
) -> None:
    """Refuse options that would have no effect.

    Args:
        address: Address of a server.
        bundle: Bundle of an engine.
        of_servers: Options of servers by name; one that was not given is false.
        of_engines: The same of engines.
    """
    if (address is None) == (bundle is None):
        raise InvalidInputError("expected either the address of a server or --bundle")
    needed = "--bundle" if bundle is None else "the address of a server"
    for name, value in (of_engines if bundle is None else of_servers).items():
        if value:
            raise InvalidInputError(f"{name} needs {needed}: leave {name} out")


def _check_files(plot: Path | None, requests: Path | None) -> None:
    """Check before any work that a plot can be drawn and that records can be written."""
    if requests is not None:
        from crl_benchmarks.call_records import check_records_path

        check_records_path(requests)
    if plot is None:
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "bench", "--plot") from error
    from crl_benchmarks.plot import check_plot

    check_plot(plot)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _check_mlperf(scenarios: str | None, others: Mapping[str, object]) -> None:
    """Refuse options that have no effect on LoadGen's runs.

    Args:
        scenarios: Value of --mlperf; None if it was not given.
        others: Options of other loads by name; one that was not given is None or empty.
    """
    for name, value in others.items():
        if scenarios is not None and value:
            raise InvalidInputError(f"{name}: not allowed with --mlperf: leave one of them out")


def _check_replay(path: Path | None, speed: float, planned: Mapping[str, object]) -> None:
    """Refuse options that a trace decides, and a speed without a trace.

    Args:
        path: File of the trace.
        speed: Factor of the recorded speed.
        planned: Options of other loads by name; one that was not given is false.
    """
    if path is None:
        if speed != 1:
            raise InvalidInputError("--speed needs --replay: add --replay, or leave --speed out")
        return
    for name, value in planned.items():
        if value:
            raise InvalidInputError(f"--replay: the trace decides {name}: leave {name} out")


def _settings_of(trace: Trace, processes: int) -> BenchSettings:
    """Return settings with the times of a trace."""
    from crl_benchmarks.bench import BenchSettings

    return BenchSettings(
        warm_up=trace.warm_up, seconds=trace.seconds, processes=processes, trace=trace
    )


def _burst(text: str | None, *, opened: bool) -> Burst | None:
    """Return the bursts of open loops, if there are any."""
    from crl_benchmarks.arrivals import Burst

    if text is None:
        return None
    if not opened:
        raise InvalidInputError("--burst needs an open loop: add --rate or --slo")
    return Burst.parse(text)


def _mix(text: str | None, criteria: str) -> Mix | None:
    """Return the criteria of calls that differ, if they do."""
    from crl_benchmarks.calls import Mix

    if text is None:
        return None
    if criteria:
        raise InvalidInputError("--mix names the criteria of each call: leave --criteria out")
    return Mix.parse(text)


def _loads(concurrency: str, rate: str, *, searched: bool) -> list[tuple[str, float]]:
    """Return mode and load of each run."""
    loads = [("closed", each) for each in _numbers("--concurrency", concurrency, whole=True)]
    loads += [("open", each) for each in _numbers("--rate", rate, whole=False)]
    if not loads and not searched:
        loads = [("closed", each) for each in (1, 2, 4, 8, 16)]
    return loads


def _show(document: Report, out_file: Path | None, plot: Path | None, *, as_json: bool) -> None:
    """Print the report first, then write the files: if that fails, the tables are there."""
    if as_json:
        warn_of_cache(document)
        print_json(msgspec.to_builtins(document))
    else:
        print_report(document)
    try:
        if out_file is not None:
            write_record(out_file, document, InvalidInputError)
            note(f"wrote {out_file}")
        if plot is not None:
            from crl_benchmarks.plot import write_plot

            write_plot(document, plot)
            note(f"wrote {plot}")
        if document.ended_early:
            raise ServiceError(document.ended_early)
    except CrlError as error:
        print_error(error, as_json=False)  # stdout has its one document
        raise typer.Exit(1) from error


def _engine(
    path: Path, engine: str, threads: int | None, batches: list[float], settings: BenchSettings
) -> tuple[Subject, dict[str, Setting], list[LoadResult]]:
    from crl_benchmarks.bench import engine_rows
    from crl_benchmarks.bench_report import Subject
    from crl_benchmarks.sensors import Sensors
    from crl_sdk.engines._selection import open_engine
    from crl_sdk.model._bundle import ModelBundle

    if not batches:
        raise InvalidInputError("--batches: expected batch sizes, such as 1,8; got none")
    bundle = ModelBundle.open(path)
    with spinner("opening") as status:
        opened = open_engine(bundle, engine, threads=threads)
        sizes = [int(each) for each in batches]
        try:
            with Sensors() as sensors:
                rows = engine_rows(
                    bundle, opened, sizes, settings,
                    lambda size: status.update(f"batches of {size}"), sensors=sensors,
                )  # fmt: skip
        finally:
            opened.close()
    subject = Subject(
        model=bundle.manifest.name, fingerprint=bundle.fingerprint, engine=str(opened.name)
    )
    described: dict[str, Setting] = {
        "threads": threads or "one per core",
        "warm_up_seconds": settings.warm_up,
        "measured_seconds": settings.seconds,
    }
    return subject, described, rows


def _server(
    target: Target,
    settings: BenchSettings,
    loads: list[tuple[str, float]],
    objective: Objective | None,
    records: CallRecords | None,
    page: MetricsPage | None,
) -> tuple[list[LoadResult], str]:
    """Return the runs, and why they ended early. What was measured until then is kept."""
    from crl_benchmarks.bench import Generators
    from crl_benchmarks.bench_objective import search
    from crl_benchmarks.bench_report import name_load
    from crl_benchmarks.sensors import Sensors

    rows: list[LoadResult] = []
    with (
        spinner("starting the generators") as status,
        Sensors() as sensors,
        Generators(target, settings, records=records, sensors=sensors, metrics=page) as generators,
    ):

        def measure(mode: str, load: float) -> LoadResult:
            status.update(name_load(mode, load))
            row = generators.measure(mode, load)
            rows.append(row)
            if row.failed_calls and not row.served_calls:
                raise ServiceError(f"{target.address}: {row.name}: {row.why}")
            return row

        try:
            for mode, load in loads:
                measure(mode, load)
            if objective is not None:
                search(objective, measure)
        except ServiceError as error:
            return rows, str(error)
        except KeyboardInterrupt:
            if not rows:
                raise
            return rows, "interrupted"
    return rows, ""


def _numbers(option: str, text: str, *, whole: bool) -> list[float]:
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = [0.0]
    if any(not 0 < value < 1e6 or (whole and value != int(value)) for value in values):
        example = "1,2,4" if whole else "50,100"
        raise InvalidInputError(f"{option}: expected numbers, such as {example}; got {text!r}")
    return values


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise InvalidInputError(f"--size: expected width x height, such as 640x480; got {text!r}")
    return int(parts[0]), int(parts[1])
