"""How many processors this process may use: affinity masks, and quotas of control groups."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from crl_sdk import Embedder, _processors, demo_bundle
from crl_sdk._processors import count_cores, count_processors, find_quota, is_limited
from crl_sdk.basis import _language_model
from crl_sdk.engines import _onnx_sessions


def machine(tmp_path, files):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, math.inf),
        ({"proc/self/cgroup": "0::/\n"}, math.inf),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "max 100000\n"}, math.inf),
        ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/cpu.max": "50000 100000\n",
          f"{V2}/a/b/cpu.max": "max 100000\n"}, 0.5),  # the quota of a group above
        ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/cpu.max": "300000 100000\n",
          f"{V2}/a/b/cpu.max": "200000 100000\n"}, 2.0),
        ({"proc/self/cgroup": "0::/../host/path\n", f"{V2}/cpu.max": "100000 100000"}, 1.0),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n2:memory:/\n",
          f"{V1}/cpu.cfs_quota_us": "250000\n", f"{V1}/cpu.cfs_period_us": "100000\n"}, 2.5),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/x\n", f"{V1}/x/cpu.cfs_quota_us": "100000\n",
          f"{V1}/x/cpu.cfs_period_us": "100000\n", f"{V1}/cpu.cfs_quota_us": "-1\n",
          f"{V1}/cpu.cfs_period_us": "100000\n"}, 1.0),
        ({"proc/self/cgroup": "4:cpu:/x\n", f"{V1}/x/cpu.cfs_quota_us": "-1",
          f"{V1}/x/cpu.cfs_period_us": "100000"}, math.inf),
        ({"proc/self/cgroup": "nonsense", f"{V2}/cpu.max": "1"}, math.inf),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "100 0"}, math.inf),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "\xff\xfe"}, math.inf),
    ],
)  # fmt: skip
def test_quotas_of_both_versions(tmp_path, files, quota):
    assert find_quota(machine(tmp_path, files)) == quota


@pytest.mark.parametrize(
    ("allowed", "quota", "count"),
    [(8, math.inf, 8), (8, 2.0, 2), (8, 1.5, 2), (8, 0.1, 1), (2, 16.0, 2), (1, math.inf, 1)],
)
def test_mask_and_quota_together(monkeypatch, allowed, quota, count):
    monkeypatch.setattr(_processors, "_count_allowed", lambda: allowed)
    monkeypatch.setattr(_processors, "find_quota", lambda: quota)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert count_processors() == count and count_cores() <= count
    assert is_limited() == (count < 8)


def test_a_system_that_does_not_limit_a_process_to_some_processors(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(_processors, "find_quota", lambda: math.inf)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert count_processors() == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert count_processors() == 1


def test_pools_and_engines_use_what_they_may(monkeypatch, tmp_path):
    """One processor of two: no pool and no engine starts a second thread."""
    monkeypatch.setattr(_processors, "find_quota", lambda: 1.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert _onnx_sessions.default_threads() == 1
    large = tmp_path / "large.gguf"
    with large.open("wb") as file:
        file.truncate(_language_model.SMALL_BYTES)
    assert _language_model._default_threads(large) == 1
    with Embedder.open(demo_bundle()) as embedder:
        images = [np.zeros((96, 96, 3), np.uint8)] * 16
        embedder.embed(images, batch_size=4)
        assert embedder._pool._max_workers == 1 and len(embedder._pool._threads) == 1
    monkeypatch.setattr(_processors, "find_quota", lambda: math.inf)
    monkeypatch.setattr(_processors, "_count_allowed", lambda: 2)
    assert _onnx_sessions.default_threads() == 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_an_affinity_mask_is_seen_in_a_new_process():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from crl_sdk._processors import count_processors; print(count_processors())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "1"


def test_no_other_module_counts_processors():
    """All of them ask `_processors`, which knows masks and quotas."""
    asking = [
        path.name
        for path in Path(_processors.__file__).parent.rglob("*.py")
        if path.name not in ("_processors.py", "_machine.py")
        and "cpu_count" in path.read_text(encoding="utf-8")
    ]
    assert asking == []
