"""How many processors this process may use. All pools and engines ask here.

The number of processors of the machine says little in a container. An affinity mask
(`docker run --cpuset-cpus`, `taskset`) leaves some of them, and a quota (`docker run --cpus`,
Kubernetes' `limits.cpu`) gives a share of their time. Threads beyond the quota only make each other
wait.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def count_processors() -> int:
    """Return the number of logical processors that this process may use, at least 1.

    This is the number that its affinity mask allows, or less if a quota of its control group
    (version 1 or 2, or of a group above it) gives it less. Parts of a processor count as one.

    Example:
        >>> 1 <= count_processors() <= os.cpu_count()
        True
    """
    allowed, quota = _count_allowed(), find_quota()
    return allowed if quota >= allowed else max(1, math.ceil(quota))


def is_limited() -> bool:
    """Return whether this process may use fewer processors than the machine has."""
    return count_processors() < (os.cpu_count() or 1)


def count_cores() -> int:
    """Return the number of physical cores to compute with, at least 1.

    Threads of one core share its arithmetic units, so that engines run one thread per core.
    """
    import psutil

    return min(psutil.cpu_count(logical=False) or count_processors(), count_processors())


def find_quota(root: Path = _ROOT) -> float:
    """Return the processors' worth of time that control groups allow; infinite without a quota.

    Args:
        root: Directory that holds `proc` and `sys`.
    """
    return min(_quotas(root), default=math.inf)


def _count_allowed() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS, Windows


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quotas of the control groups of this process, in processors."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        # A container sees its own group as the root, though the path may name one of the host.
        groups = [PurePosixPath(path), *PurePosixPath(path).parents]
        for group in groups:
            inside = str(group).lstrip("/")
            if not controllers:  # version 2
                text = _read(root / "sys/fs/cgroup" / inside / "cpu.max")
                quota, period = [*text.split(), "", ""][:2]
                yield from _share(quota, period)
            elif "cpu" in controllers.split(","):
                for mount in (controllers, "cpu", "cpu,cpuacct"):
                    folder = root / "sys/fs/cgroup" / mount / inside
                    yield from _share(
                        _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
                    )


def _share(quota: str, period: str) -> Iterator[float]:
    """Yield quota / period, unless there is no quota (`max` or -1) or a file is missing."""
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
