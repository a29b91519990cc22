"""A bulk job on a Ray cluster: actors make the parts of its plan.

A part is done when its file is there, as in one process: the same plan, files and resumption. Ray
Data's checkpoints are not used. They note the ids of written rows. A restarted job loads all of
them into memory, embeds the rows that are left in other batches, and writes files of random names.
The parts of a plan have the batches and names that they have in one process.
"""

from __future__ import annotations

import logging
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crl_sdk._version import __version__
from crl_sdk.bulk._job import BulkJob, Progress, count_parts
from crl_sdk.bulk._part import PartCounts, PartTask, make_part, open_job_embedder
from crl_sdk.errors import CrlError, InvalidInputError, ServiceError
from crl_sdk.integrations.ray._cluster import connect, require_version, use_assigned_processors
from crl_sdk.stored._directory import EmbeddingDirectory, Manifest

if TYPE_CHECKING:
    from crl_sdk._embedder import Embedder

RETRIES = 3
"""How often a part is made again whose worker died. It may have died of this part."""

_NOTE_SECONDS = 30.0
"""Seconds without a worker after which a warning says what the job waits for."""

_NAMED = re.compile(r"[\w.]*(Error|Exception): ")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RayWorkers:
    """The workers of a job on a cluster. Each opens one engine.

    Attributes:
        number: Number of workers; None for as many as the cluster has room for now.
        cpus: Processors of a worker, which are its threads.
        gpus: GPUs of a worker; a fraction lets workers share one.
    """

    number: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InvalidInputError: If one is too small.
        """
        if (self.number is not None and self.number < 1) or self.cpus <= 0 or self.gpus < 0:
            raise InvalidInputError(
                f"expected workers >= 1 with processors > 0 and GPUs >= 0, got {self}"
            )


def run_on_ray(
    job: BulkJob,
    progress: Callable[[Progress], None] = lambda _: None,
    *,
    address: str,
    workers: RayWorkers = RayWorkers(),
) -> PartCounts:
    """Make all parts of a job that are not there yet, on a cluster.

    A part whose worker dies is made again, by another one. If this process ends, the workers end
    too, and `BulkJob.resume` goes on, here or on a cluster.

    Args:
        job: Open job. Each node must see its directory, its sources and its bundle at the same
            paths.
        progress: Called after each part.
        address: Address of the cluster, see `connect`.
        workers: Number and size of the workers.

    Returns:
        What all parts hold together.

    Raises:
        InvalidInputError: If the address is malformed, a node does not see the directory, a source
            cannot be read, or a part cannot be written. What is complete stays.
        EngineError: If an engine fails.
        MissingDependencyError: If Ray is not installed.
        ServiceError: If no cluster answers, it has other versions, or a part ends its workers again
            and again.
    """
    rows, errors, parts = count_parts(job.path, job.manifest)
    total, all_parts = job.total, job.manifest.parts or 0
    progress(Progress(rows, errors, total, parts, all_parts))
    if parts < all_parts:
        with connect(address) as ray:
            _warn_of_size(ray, workers)
            number = min(workers.number or _room(ray, workers), all_parts - parts)
            with _pool(ray, job, workers, number) as pool:
                for counts in _make_parts(ray, pool, job):
                    rows, errors, parts = rows + counts.rows, errors + counts.errors, parts + 1
                    progress(Progress(rows, errors, total, parts, all_parts))
        for leftover in job.path.glob(".part-*.tmp"):  # of workers that died
            leftover.unlink(missing_ok=True)
    return job.finish()


class _Worker:
    """An actor that makes parts. Its model is opened by a call, whose error the caller sees."""

    def __init__(self, directory: Path, version: str) -> None:
        self._directory, self._version = directory, version
        self._opened: tuple[Embedder, Manifest] | None = None

    def open(self) -> None:
        """Open the model of the job."""
        if self._opened is not None:
            return
        require_version(self._version)
        if not self._directory.is_dir():
            raise InvalidInputError(
                f"{self._directory}: the node {platform.node()} does not see this directory; "
                "choose one on storage that all nodes of the cluster mount at this path"
            )
        use_assigned_processors()
        manifest = EmbeddingDirectory.open(self._directory).manifest
        self._opened = open_job_embedder(self._directory), manifest

    def make(self, task: PartTask) -> PartCounts:
        """Make a part."""
        self.open()
        assert self._opened is not None
        return make_part(task, *self._opened)


@contextmanager
def _pool(ray: Any, job: BulkJob, workers: RayWorkers, number: int) -> Iterator[list[Any]]:
    """Start workers, and end them with the context."""
    kind = ray.remote(
        num_cpus=workers.cpus, num_gpus=workers.gpus, max_restarts=-1, max_task_retries=RETRIES
    )(_Worker)
    pool = [kind.remote(job.path.absolute(), __version__) for _ in range(number)]
    try:
        yield pool
    finally:
        for worker in pool:
            ray.kill(worker)


def _make_parts(ray: Any, pool: Sequence[Any], job: BulkJob) -> Iterator[PartCounts]:
    """Yield what each part holds, in the order in which they are done.

    A worker gets its first part when it has opened the model, so that no part waits for a worker
    for which the cluster has no room.
    """
    tasks = (replace(task, directory=job.path.absolute()) for task in job.pending())
    busy: dict[Any, tuple[Any, PartTask | None]] = {
        worker.open.remote(): (worker, None) for worker in pool
    }
    started, opened = time.monotonic(), 0
    while busy:
        done, _ = ray.wait(list(busy), num_returns=1, timeout=_NOTE_SECONDS)
        if not done and not opened:
            _log.warning(
                "no worker of the cluster has started in %.0f s: `ray status` shows what it waits "
                "for; free now are %s", time.monotonic() - started, ray.available_resources(),
            )  # fmt: skip
        for reference in done:
            worker, task = busy.pop(reference)
            counts = _result(ray, reference, task)
            opened += task is None
            if task is not None:
                yield counts
            if following := next(tasks, None):
                busy[worker.make.remote(following)] = (worker, following)
            elif not any(task for _, task in busy.values()):
                return  # only workers that have not started are left


def _result(ray: Any, reference: Any, task: PartTask | None) -> Any:
    """Return the result of a call, or raise the error of the worker as an error of the SDK."""
    what = "opening the model" if task is None else task.path.name
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, CrlError):
            raise error.cause from None
        raise _not_installed(what, error) from error
    except ray.exceptions.RayError as error:
        if "creation task" in str(error):  # the worker could not import its own code
            raise _not_installed(what, error) from error
        raise ServiceError(
            f"{what}: {RETRIES + 1} workers of the cluster died of it or with it; look for a node "
            "without memory, give a worker more of a node, and run the same command with --resume "
            f"({_reason(error)})"
        ) from error


def _not_installed(what: str, error: BaseException) -> ServiceError:
    return ServiceError(
        f"{what}: failed on the cluster ({_reason(error)}); install crl-embeddings {__version__} "
        "and what it needs on each node, and run the same command with --resume"
    )


def _reason(error: BaseException) -> str:
    """Return the line of a message of Ray that names the error, or else its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if _NAMED.match(line)), lines[0] if lines else "")


def _room(ray: Any, workers: RayWorkers) -> int:
    """Return the number of workers for which the cluster has processors and GPUs."""
    return max(1, sum(_fit(node["Resources"], workers) for node in ray.nodes() if node["Alive"]))


def _fit(resources: dict[str, float], workers: RayWorkers) -> int:
    """Return the number of workers for which a node has processors and GPUs."""
    fit = resources.get("CPU", 0) // workers.cpus
    return int(min(fit, resources.get("GPU", 0) // workers.gpus) if workers.gpus else fit)


def _warn_of_size(ray: Any, workers: RayWorkers) -> None:
    """Warn if no node has room for a worker. A cluster may get larger nodes by itself."""
    if not any(_fit(node["Resources"], workers) for node in ray.nodes() if node["Alive"]):
        _log.warning(
            "no node of the cluster has %g processors and %g GPUs for a worker: the job waits for "
            "one; name smaller workers to begin at once", workers.cpus, workers.gpus,
        )  # fmt: skip
