"""How many processors this process may use. Every pool of threads and every engine asks here.

Containers limit processors in two ways. `cpuset` and affinity name the processors of a process. A
quota limits its time: with a quota of 2, threads on 64 processors would use it up in a fraction of
each period, and then all of them stand still. `os.cpu_count` knows neither.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_ROOT = Path("/")
_share = (0, 1)
_assigned: list[float] = []  # what `assign_processors` was told last
_WAIT = "OMP_WAIT_POLICY"
_MOUNT = re.compile(r"^\S+ \S+ \S+ (\S+) (\S+) .*- (\S+) \S+ (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Processors:
    """The processors of this machine, and what this process may use of them.

    Attributes:
        machine: Number of processors of the machine, two for a core with two threads.
        allowed: Number of those on which this process may run.
        allowed_cores: Number of physical cores that these belong to.
        quota: Processor time per time that a container or `assign_processors` allows, such as 1.5;
            None without a limit.
    """

    machine: int
    allowed: int
    allowed_cores: int
    quota: float | None

    @property
    def number(self) -> int:
        """Number of threads that can work at once. A fraction of the quota counts as one more."""
        return self._within_quota(self.allowed)

    @property
    def cores(self) -> int:
        """Number of threads of a matrix product, which gain nothing from sharing a core."""
        return self._within_quota(self.allowed_cores)

    def _within_quota(self, number: int) -> int:
        if self.quota is not None:
            number = min(number, math.ceil(self.quota))
        worker, workers = _share
        return max(1, number // workers + (worker < number % workers))


def share_processors(worker: int, workers: int) -> None:
    """Let this process count only its part of the processors from now on.

    Args:
        worker: Number of this process among the workers of a server, from 0.
        workers: Number of workers.
    """
    global _share  # noqa: PLW0603 - it belongs to the process
    _share = (worker, workers)


def count_processors() -> int:
    """Return the number of threads that can work at once in this process."""
    return find_processors().number


def count_cores() -> int:
    """Return the number of threads of a matrix product: one for each core that may be used."""
    return find_processors().cores


def assign_processors(number: float) -> None:
    """Limit this whole process to some processors, such as those that a scheduler assigned to it.

    Pools and engines that are made later have that many threads, as with the quota of a container.

    Args:
        number: Number of processors, > 0; a fraction counts as one more thread.
    """
    _assigned[:] = [number]


def limit_libraries(environment: MutableMapping[str, str]) -> None:
    """Limit OpenMP and BLAS to the quota of a container, unless the user has set their threads.

    They know the affinity of a process and no quota. They read the environment when they are
    loaded.

    Args:
        environment: Environment of this process.
    """
    processors = find_processors()
    if processors.number < processors.allowed:
        environment.setdefault("OMP_NUM_THREADS", str(processors.number))


@contextmanager
def sleeping_openmp() -> Iterator[None]:
    """Let the OpenMP runtime that a block loads put its threads to sleep while they wait.

    By default they wait in busy loops, which takes the processors from other processes. The
    setting of the user counts, and runtimes that were loaded before are not changed.
    """
    if _WAIT in os.environ:
        yield
        return
    os.environ[_WAIT] = "PASSIVE"
    try:
        yield
    finally:
        os.environ.pop(_WAIT, None)


def is_limited() -> bool:
    """Return whether this process may use fewer processors than the machine has."""
    found = find_processors()
    return found.number < found.machine


def find_processors(root: Path = _ROOT) -> Processors:
    """Return the processors of this process.

    Quotas may change while a process runs, so the answer is not kept.

    Args:
        root: Directory that contains `proc` and `sys`.
    """
    machine = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
    else:  # macOS and Windows
        allowed = list(range(machine))
    return Processors(
        machine=machine,
        allowed=len(allowed),
        allowed_cores=len({_core(root, number) for number in allowed}),
        quota=min([*_quotas(root), *_assigned], default=None),
    )


def _core(root: Path, number: int) -> str:
    """Return the same text for processors of one core."""
    folder = root / "sys/devices/system/cpu" / f"cpu{number}" / "topology"
    return _read(folder / "thread_siblings_list").strip() or str(number)


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quotas of the control groups of this process, and of the groups around them."""
    mounts = list(_mounts(root))
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        for kind, top, place in mounts:
            if kind == ("cgroup" if controllers else "cgroup2"):
                for group in _groups(path, top, root / place.lstrip("/")):
                    quota = _quota_v1(group) if controllers else _quota_v2(group)
                    if quota is not None:
                        yield quota


def _mounts(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the kind, the topmost group and the place of each mounted tree of control groups."""
    for top, place, kind, options in _MOUNT.findall(_read(root / "proc/self/mountinfo")):
        if kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(",")):
            yield kind, top, place.replace(r"\040", " ")


def _groups(path: str, top: str, place: Path) -> Iterator[Path]:
    """Yield the directories of a control group and of the groups around it, as far as mounted."""
    try:
        inner = PurePosixPath(path).relative_to(top)
    except ValueError:  # the path is told as seen from outside of this container
        inner = PurePosixPath()
    if ".." in inner.parts:
        inner = PurePosixPath()
    for group in (inner, *inner.parents):
        yield place / group


def _quota_v1(group: Path) -> float | None:
    return _ratio(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _quota_v2(group: Path) -> float | None:
    quota, _, period = _read(group / "cpu.max").partition(" ")
    return _ratio(quota, period)


def _ratio(quota: str, period: str) -> float | None:
    """Return quota / period; None if there is no limit, which is `max` or -1."""
    try:
        ratio = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return ratio if ratio > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux, or not readable in this container
        return ""
