"""Connecting to a cluster, and what is said if that fails."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import threading
from concurrent import futures
from functools import cache
from pathlib import Path

import grpc
import psutil
import pytest

from crl_sdk._telemetry import SWITCHES
from crl_sdk.errors import InvalidInputError, ServiceError
from crl_sdk.integrations.ray import connect
from crl_sdk.integrations.ray._cluster import require_version

ray = pytest.importorskip("ray")


@pytest.fixture
def silent_port():
    """A port that accepts connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_an_address_without_a_cluster_is_said_at_once(silent_port, monkeypatch):
    monkeypatch.setattr("crl_sdk.integrations.ray._cluster.PROBE_SECONDS", 1.0)
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", f"127.0.0.1:{silent_port}"):
        with pytest.raises(ServiceError, match="ray start --head"), connect(address):
            pass
    assert not ray.is_initialized()


def test_a_server_that_is_no_cluster_is_told_from_one():
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(ServiceError, match="no Ray cluster"), connect(f"127.0.0.1:{port}"):
            pass
    finally:
        server.stop(None)


def test_a_cluster_that_asks_for_a_token_says_which(monkeypatch):
    class Refusing(grpc.GenericRpcHandler):
        def service(self, details):
            def refuse(request, context):
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")

            return grpc.unary_unary_rpc_method_handler(refuse)

    def init(**options):  # after 20 seconds
        raise ConnectionError("Failed to connect")

    monkeypatch.setattr("ray.init", init)
    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[Refusing()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(ServiceError, match="RAY_AUTH_TOKEN"), connect(f"127.0.0.1:{port}"):
            pass
    finally:
        server.stop(None)


@pytest.mark.parametrize("address", ["nowhere", "http://127.0.0.1:8265", "127.0.0.1:", ""])
def test_a_malformed_address_is_said(address):
    with pytest.raises(InvalidInputError), connect(address):
        pass


def test_without_a_cluster_on_this_machine_auto_says_how_to_start_one(monkeypatch, tmp_path):
    # the clusters of other tests are not found
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", cache(set))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ServiceError, match="ray start --head"), connect("auto"):
        pass


def test_other_versions_of_ray_and_python_are_said(cluster, monkeypatch):
    monkeypatch.setattr("ray._private.utils.compute_version_info", lambda: ("2.50.0", "3.10.1"))
    with (
        pytest.raises(ServiceError, match=rf"{ray.__version__}.*2\.50\.0"),
        connect(cluster.address),
    ):
        pass
    assert not ray.is_initialized()


def test_another_version_of_the_sdk_on_a_node_is_said():
    with pytest.raises(ServiceError, match="pip install 'crl-embeddings"):
        require_version("0.0.1")


def test_nothing_is_reported(cluster):
    """Ray starts a process that reports, whose environment tells it not to."""
    assert SWITCHES["RAY_USAGE_STATS_ENABLED"] == "0"
    with connect(cluster.address):
        from ray._common.usage.usage_lib import get_cluster_metadata
        from ray._private.worker import global_worker

        facts = get_cluster_metadata(global_worker.gcs_client)
        session = Path(global_worker.node.get_session_dir_path())
    assert set(facts) == {"ray_version", "python_version", "ray_init_cluster"}
    assert not list(session.rglob("usage_stats*.json"))
    reporters = [
        process
        for process in psutil.Process().children(recursive=True)
        if any("UsageStatsHead" in part for part in process.cmdline())
    ]
    assert len(reporters) == 1
    assert reporters[0].environ()["RAY_USAGE_STATS_ENABLED"] == "0"


def test_reports_are_off_although_ray_was_imported_first():
    code = (
        "import ray, crl_sdk\n"
        "from ray._common.usage.usage_lib import usage_stats_enabled\n"
        "print(usage_stats_enabled())"
    )
    clean = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "False"


def test_a_cluster_that_reports_is_named(cluster, monkeypatch, caplog):
    monkeypatch.setattr(
        "ray._common.usage.usage_lib.get_cluster_metadata",
        lambda _: {"ray_version": ray.__version__, "python_version": platform.python_version(),
                   "session_start_timestamp_ms": 1},
    )  # fmt: skip
    with connect(cluster.address):
        assert "RAY_USAGE_STATS_ENABLED=0 ray start --head" in caplog.text


def test_a_connected_process_stays_connected(cluster):
    with connect(cluster.address) as first:
        with connect("127.0.0.1:1") as second:
            assert first is second
        assert ray.is_initialized()
        node = ray.get_runtime_context().get_node_id()
        assert node in {each["NodeID"] for each in ray.nodes()}
        assert sum(each["Alive"] for each in ray.nodes()) == 2
    assert not ray.is_initialized() and threading.active_count() < 20
