"""`crl embed --out DIR`: embed any number of pictures into a directory of Parquet parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from crl_sdk.bulk._job import BulkJob, Progress, check_new
from crl_sdk.bulk._part import PartCounts
from crl_sdk.bulk._sources import ParquetColumns
from crl_sdk.cli._console import leave_out, note, print_facts, print_json, progress_bar
from crl_sdk.cli._options import load_basis, open_bundle
from crl_sdk.errors import CrlError, InvalidInputError
from crl_sdk.stored._directory import ABOUT, MANIFEST, Manifest, import_pyarrow

RunParts = Callable[[BulkJob, Callable[[Progress], None]], PartCounts]
"""Makes the parts of a job that are not there yet."""


def embed_directory(
    out_directory: Path,
    sources: Sequence[Path],
    given: Mapping[str, Any],
    *,
    bundle: Path | None,
    bases: Path,
    criteria: Sequence[str],
    options: Mapping[str, Any],
    columns: ParquetColumns,
    resume: bool,
    as_json: bool,
    run: RunParts = BulkJob.run,
) -> None:
    """Begin a job or go on with one, and print what became of it.

    Args:
        out_directory: Directory to write to.
        sources: Sources on the command line.
        given: Values of those options that the command line names, by their names in the manifest.
        bundle: Bundle on the command line.
        bases: Directory of bases.
        criteria: Names of bases.
        options: Options of `BulkJob.create`.
        columns: Columns of Parquet sources.
        resume: Whether to go on with a job.
        as_json: Whether to print JSON.
        run: Function that makes the parts.

    Raises:
        InvalidInputError: If an option is wrong, or differs from what the job began with.
        typer.Exit: With status 1, if images could not be read.
    """
    import_pyarrow("writing .parquet files")
    started = time.monotonic()
    if resume and (out_directory / ABOUT / MANIFEST).exists():
        job = BulkJob.resume(out_directory, leave_out)
        _require_same(job, sources, given)
    else:
        if not sources:
            raise InvalidInputError("expected images to embed, got none; see crl embed --help")
        check_new(out_directory)
        opened = open_bundle(bundle)
        job = BulkJob.create(
            out_directory, sources, opened.path,
            [load_basis(bases, name, opened.fingerprint, bundle) for name in criteria],
            columns=columns, leave_out=leave_out, **options,
        )  # fmt: skip
    with job, _told_how_to_resume(out_directory):
        began: Progress | None = None  # where this run began, and when its last part was complete
        whole: Progress | None = None

        def tell(now: Progress) -> None:
            nonlocal began, whole
            began = began or now
            if whole is None or now.parts != whole.parts:
                whole = now
            expected = replace(now, total=_estimate_total(whole))
            seconds = time.monotonic() - started
            progress.update(
                task, description=_describe(expected, began.rows, seconds),
                completed=now.rows, total=expected.total,
            )  # fmt: skip

        with progress_bar() as progress:
            task = progress.add_task("embedding", total=None)
            counts = run(job, tell)
    _print(out_directory, job.manifest, counts, time.monotonic() - started, as_json=as_json)
    if counts.errors:
        raise typer.Exit(1)


def _estimate_total(whole: Progress) -> int | None:
    """Return the number of rows in the end. Archives are taken to be as large as those so far.

    Args:
        whole: Progress at a moment when no part was begun.
    """
    if whole.total is not None or not whole.parts:
        return whole.total
    return round(whole.rows / whole.parts * whole.all_parts)


def _describe(now: Progress, before: int, seconds: float) -> str:
    """Return the progress of this run in words."""
    rate = (now.rows - before) / max(seconds, 1e-9)
    left = ""
    if now.total is not None and rate > 0 and now.rows < now.total:
        left = f", {_duration((now.total - now.rows) / rate)} left"
    return (
        f"embedding: part {min(now.parts + 1, now.all_parts):,} of {now.all_parts:,}, "
        f"{rate:,.0f} a second, {now.errors:,} failed{left}"
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


@contextmanager
def _told_how_to_resume(directory: Path) -> Iterator[None]:
    """Say how to go on, if the block ends early."""
    try:
        yield
    except (CrlError, KeyboardInterrupt, OSError):
        note(f"what is complete stays in {directory}; run the same command with --resume to go on")
        raise


def _require_same(job: BulkJob, sources: Sequence[Path], given: Mapping[str, Any]) -> None:
    """Check that a command line asks for what the job began with."""
    try:
        manifest = job.manifest
        if sources and tuple(map(str, sources)) != manifest.sources:
            raise InvalidInputError(
                f"expected the sources of the job, {', '.join(manifest.sources)}; got "
                f"{', '.join(map(str, sources))}: leave them out with --resume"
            )
        for name, value in given.items():
            if not _is_same(manifest, name, value):
                raise InvalidInputError(
                    f"--{name.replace('_', '-')}: the job in {job.path} began with "
                    f"{_shown(getattr(manifest, name))}, got {_shown(value)}: leave the option out "
                    "with --resume"
                )
    except BaseException:
        job.close()
        raise


def _is_same(manifest: Manifest, name: str, value: Any) -> bool:
    if name == "engine":
        return value in ("auto", "fastest") or f"{manifest.engine}/".startswith(f"{value}/")
    if name == "criteria":
        return sorted(manifest.criteria) == sorted(value)
    if name == "bundle":
        return open_bundle(value).fingerprint == manifest.fingerprint
    return bool(getattr(manifest, name) == value)


def _shown(value: Any) -> str:
    return repr(", ".join(value) if isinstance(value, dict | list) else str(value))


def _print(
    directory: Path, manifest: Manifest, counts: PartCounts, seconds: float, *, as_json: bool
) -> None:
    facts: dict[str, Any] = {
        "out": str(directory),
        "rows": counts.rows,
        "failed": counts.errors,
        "parts": manifest.parts,
        "universal": manifest.dim,
        "criteria": list(manifest.criteria),
        "dtype": manifest.dtype,
        "engine": manifest.engine,
        "fingerprint": manifest.fingerprint,
        "seconds": round(seconds, 3),
    }
    if as_json:
        print_json(facts)
        return
    shown = {**facts, "criteria": ", ".join(manifest.criteria) or "none"}
    print_facts(str(directory), {name: shown[name] for name in shown if name != "out"})
    if counts.errors:
        note(f"{counts.errors:,} images could not be read; the column `error` has the reasons")
