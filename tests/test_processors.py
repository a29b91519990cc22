"""How many processors this process may use, and that pools, engines and commands ask for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from crl_sdk import Embedder, _processors, demo_bundle
from crl_sdk._processors import Processors, find_processors, limit_libraries, sleeping_openmp
from crl_sdk.engines import _openvino
from crl_sdk.engines._onnx_sessions import default_threads, open_session
from crl_sdk.errors import EngineError
from crl_sdk.model import ModelBundle

TIMEOUT = 300

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
)
PERIOD = {"cpu.cfs_period_us": "100000\n"}

TREES = {
    "no control groups": ("", "", {}, None),
    "version 2": (V2, "0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
    "version 2 without a limit": (V2, "0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    "an inner group with the smaller quota": (
        V2,
        "0::/pod/container\n",
        {
            "sys/fs/cgroup/pod/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/pod/container/cpu.max": "50000 100000\n",
        },
        0.5,
    ),
    "an outer group with the smaller quota": (
        V2,
        "0::/pod/container\n",
        {
            "sys/fs/cgroup/pod/cpu.max": "50000 25000\n",
            "sys/fs/cgroup/pod/container/cpu.max": "max 100000\n",
        },
        2.0,
    ),
    "another group beside it": (
        V2, "0::/a\n", {"sys/fs/cgroup/b/cpu.max": "50000 100000\n"}, None,
    ),
    "a group of the same beginning": (
        V2.replace(" / ", " /a "), "0::/ab\n", {"sys/fs/cgroup/b/cpu.max": "5 10\n"}, None,
    ),
    "a path as seen from outside of the container": (
        V2, "0::/../../init\n", {"sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0,
    ),
    "version 1": (
        V1,
        "3:cpuset:/x\n1:cpu,cpuacct:/\n0::/\n",
        {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
         "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        2.5,
    ),
    "version 1 without a limit": (
        V1,
        "1:cpu,cpuacct:/\n",
        {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
         "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "version 1 in Docker, which mounts the inner group alone": (
        V1.replace("0:29 / ", "0:29 /docker/1f "),
        "1:cpu,cpuacct:/docker/1f/inner\n",
        {"sys/fs/cgroup/cpu,cpuacct/inner/cpu.cfs_quota_us": "700000\n",
         "sys/fs/cgroup/cpu,cpuacct/inner/cpu.cfs_period_us": "100000\n",
         "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
         "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        4.0,
    ),
    "a mount with a space in its name": (
        V2.replace("/sys/fs/cgroup", r"/sys/fs/control\040groups"),
        "0::/\n",
        {"sys/fs/control groups/cpu.max": "100000 100000\n"},
        1.0,
    ),
    "nonsense": (
        V2 + "\n- \nx - cgroup2\n",
        "0::/\n\nx\n:\n",
        {"sys/fs/cgroup/cpu.max": "5 0\n"},
        None,
    ),
}  # fmt: skip


def write_tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize("name", TREES)
def test_quotas_of_control_groups(tmp_path, name):
    mounts, groups, files, quota = TREES[name]
    write_tree(tmp_path, {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups, **files})
    assert find_processors(tmp_path).quota == quota


def test_a_fraction_of_a_quota_counts_as_one_more():
    def of(quota, allowed=4, allowed_cores=2):
        found = Processors(machine=8, allowed=allowed, allowed_cores=allowed_cores, quota=quota)
        return found.number, found.cores

    assert of(None) == (4, 2) and of(64.0) == (4, 2)
    assert of(0.1) == (1, 1) and of(1.5) == (2, 2) and of(3.0) == (3, 2)


def test_two_threads_of_a_core_are_one_core(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 9}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    write_tree(
        tmp_path,
        {
            f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list": text
            for number, text in {0: "0,4\n", 1: "1,5\n", 4: "0,4\n"}.items()  # 9 is hidden
        },
    )
    found = find_processors(tmp_path)
    assert found == Processors(machine=16, allowed=4, allowed_cores=3, quota=None)
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS and Windows have none
    assert find_processors(tmp_path / "nowhere").number == 16


def test_pools_and_engines_use_that_many_threads(monkeypatch):
    few = Processors(machine=64, allowed=64, allowed_cores=32, quota=3.0)
    monkeypatch.setattr(_processors, "find_processors", lambda: few)
    bundle = ModelBundle.open(demo_bundle())
    session = open_session(bundle.image_graph("fp32"))
    assert session.get_session_options().intra_op_num_threads == 3
    session = open_session(bundle.image_graph("fp32"), threads=1)
    assert session.get_session_options().intra_op_num_threads == 1
    with Embedder.open(bundle) as embedder:
        embedder.embed([np.zeros((96, 96, 3), np.uint8)] * 16, batch_size=4)
        assert len(embedder._pool._threads) == 3
    given = {}

    class Core:
        def read_model(self, graph):
            return graph

        def compile_model(self, tower, device, options):
            given.update(options)
            raise RuntimeError("far enough")

    monkeypatch.setattr(_openvino, "_load", lambda: SimpleNamespace(Core=Core))
    monkeypatch.setattr(_openvino, "_tower", lambda runtime, model: model)
    with pytest.raises(EngineError, match="far enough"):
        _openvino.OpenVinoImageEngine.open(bundle, precision="fp32")
    assert given["INFERENCE_NUM_THREADS"] == 3


def test_a_whole_machine_is_left_to_the_choice_of_onnx_runtime(monkeypatch):
    """It then keeps its threads on their cores."""
    whole = Processors(machine=64, allowed=64, allowed_cores=32, quota=None)
    monkeypatch.setattr(_processors, "find_processors", lambda: whole)
    assert default_threads() == 0


def run(code, **environment):
    """Run Python code in a process that may use one processor, and return what it says."""
    before = (
        "import os\n"
        "if hasattr(os, 'sched_setaffinity'):\n"
        "    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", before + code],
        env={**clean, **environment}, capture_output=True, check=False, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity cannot be set here")
def test_doctor_shows_the_processors_of_this_process():
    code = "import sys\nfrom crl_sdk.__main__ import main\nsys.argv[1:] = {}\nmain()\n"
    machine = json.loads(run(code.format(["doctor", "--json"])).stdout)["machine"]
    assert (machine["allowed"], machine["threads"], machine["cores"]) == (1, 1, 1)
    assert machine["processors"] == os.cpu_count() and "quota" in machine
    shown = run(code.format(["doctor"]), COLUMNS="200").stdout
    assert f"1, 1 in an engine run (of {os.cpu_count()} processors" in shown
    if os.cpu_count() > 1:
        assert "1 allowed by the affinity of this process" in shown


def test_libraries_are_limited_to_a_quota_unless_the_user_has_set_their_threads(monkeypatch):
    few = Processors(machine=64, allowed=64, allowed_cores=32, quota=3.0)
    monkeypatch.setattr(_processors, "find_processors", lambda: few)
    environment = {}
    limit_libraries(environment)
    assert environment == {"OMP_NUM_THREADS": "3"}
    environment = {"OMP_NUM_THREADS": "9"}
    limit_libraries(environment)
    assert environment == {"OMP_NUM_THREADS": "9"}
    monkeypatch.setattr(
        _processors, "find_processors",
        lambda: Processors(machine=64, allowed=64, allowed_cores=32, quota=None),
    )  # fmt: skip
    environment = {}
    limit_libraries(environment)
    assert environment == {}


def test_openmp_is_told_to_sleep_only_while_a_language_model_is_imported(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with sleeping_openmp():
        assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with sleeping_openmp():
        assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.skipif(sys.platform != "linux", reason="asks the OpenMP runtime of GCC")
def test_the_threads_of_a_language_model_sleep_while_they_wait():
    code = "from crl_sdk.basis._llm_backend import find_backend\nfind_backend()\n"
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in run(code, OMP_DISPLAY_ENV="true").stderr


def test_many_rows_are_projected_in_that_many_threads(monkeypatch):
    from crl_sdk.projection import Projection, _project_rows

    asked = []
    monkeypatch.setattr(_project_rows, "count_processors", lambda: asked.append(1) or 2)
    rows = np.ones((2_000_000, 4), np.float32)
    weight = np.eye(4, dtype=np.float32)
    projection = Projection(weight=weight, bias=np.zeros(4, np.float32), post="none")
    (out,) = _project_rows.project_rows(rows, [projection])
    assert asked and np.array_equal(out, rows)
    asked.clear()
    _project_rows.project_rows(rows[:9], [projection])
    assert not asked  # starting threads would take longer


def test_nothing_else_counts_processors():
    """`os.cpu_count` knows no affinity and no quota; pools must not choose by themselves."""
    wrong = []
    for folder in ("crl_sdk", "export", "benchmarks"):
        for path in (Path(__file__).parent.parent / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if path.name != "_processors.py" and any(
                each in text
                for each in ("cpu_count", "sched_getaffinity", "PoolExecutor()", "mp.Pool()")
            ):
                wrong.append(str(path))
    assert not wrong


def test_a_scheduler_assigns_fewer_processors(monkeypatch):
    monkeypatch.setattr(_processors, "_assigned", [])
    before = find_processors()
    _processors.assign_processors(0.5)
    assert find_processors().number == find_processors().cores == 1
    _processors.assign_processors(before.machine + 10)
    assert find_processors().number == before.number
