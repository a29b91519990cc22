"""Connect to a Ray cluster, or say within seconds why not."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from crl_sdk._processors import assign_processors, limit_libraries
from crl_sdk._telemetry import switch_off_telemetry
from crl_sdk._version import __version__
from crl_sdk.errors import InvalidInputError, MissingDependencyError, ServiceError

PROBE_SECONDS = 5.0
"""Seconds that a cluster has for its first answer. Ray itself waits for more than two minutes."""

_CLIENT = "ray://"
_PROBE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_log = logging.getLogger(__name__)


def import_ray() -> Any:
    """Return the module `ray`, with its usage statistics switched off.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    switch_off_telemetry()
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError("ray", "ray", "a Ray cluster") from error
    return ray


@contextmanager
def connect(address: str) -> Iterator[Any]:
    """Connect this process to a Ray cluster while the context is open.

    A process that is connected already stays connected, whatever the address.

    Args:
        address: `host:port` of a cluster; `auto` for the one that runs on this machine or that
            `RAY_ADDRESS` names; `local` for a new one of this machine, which ends with the context;
            or `ray://host:port` for Ray's client server.

    Yields:
        The module `ray`.

    Raises:
        InvalidInputError: If the address is malformed.
        MissingDependencyError: If Ray is not installed.
        ServiceError: If no cluster answers there, or it has another version of Ray or Python.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    target = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    options: dict[str, Any] = {"include_dashboard": False} if target == "local" else {}
    asks_for_token = target not in ("auto", "local") and _probe(target)
    try:
        ray.init(address=target, log_to_driver=False, logging_level=logging.WARNING, **options)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        if asks_for_token or not isinstance(error, ConnectionError):
            raise ServiceError(
                f"{target}: this Ray cluster asks for a token, which this process does not have; "
                "copy ~/.ray/auth_token from its head, or set RAY_AUTH_TOKEN, and set "
                f"RAY_AUTH_MODE=token ({error})"
            ) from error
        raise ServiceError(
            f"{target}: no Ray cluster answers ({error}); start one with `ray start --head`, or "
            "name one that runs: --ray HOST:PORT"
        ) from error
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise ServiceError(_mismatch(target, str(error))) from error
    try:
        _warn_of_reports(ray)
        yield ray
    finally:
        ray.shutdown()


def use_assigned_processors() -> None:
    """Use as many threads in this process as Ray has assigned processors to its task or actor.

    Ray starts a process for each actor, and its number of processors is a promise that nothing
    enforces: without this, each of several actors on a machine would use all of it.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    processors = ray.get_runtime_context().get_assigned_resources().get("CPU")
    if processors:
        assign_processors(processors)
        limit_libraries(os.environ)


def require_version(version: str) -> None:
    """Check that the process that sent this work has the version of the SDK that runs here.

    Raises:
        ServiceError: If it has another one.
    """
    if version != __version__:
        raise ServiceError(
            f"expected crl-embeddings {version} on this node of the cluster, found {__version__}: "
            f"run {shlex.join(['pip', 'install', f'crl-embeddings[cpu,ray]=={version}'])} on each"
        )


def _probe(address: str) -> bool:
    """Ask for any answer of Ray at an address, and return whether it asks for a token.

    Raises:
        InvalidInputError: If the address is malformed.
        ServiceError: If nothing answers in time, or it is no Ray cluster.
    """
    import grpc

    from crl_sdk.rpc._address import check_address

    place = address.removeprefix(_CLIENT)
    if "://" in place:
        raise InvalidInputError(
            f"expected HOST:PORT, auto, local or ray://HOST:PORT as the address of a Ray cluster, "
            f"got {address!r}"
        )
    check_address(place)
    with grpc.insecure_channel(place, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            ask: Any = channel.unary_unary(_PROBE)
            ask(b"", timeout=PROBE_SECONDS)
        except grpc.RpcError as error:
            code = error.code()
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise ServiceError(
                    f"{address}: no Ray cluster answers there ({code.name}: {error.details()}); "
                    "start one with `ray start --head`, which prints its address, and check that "
                    "this machine reaches it: `ray status --address HOST:PORT`"
                ) from error
            # Ray's client server has other methods.
            if code == grpc.StatusCode.UNIMPLEMENTED and not address.startswith(_CLIENT):
                raise ServiceError(
                    f"{address}: a gRPC server answers there that is no Ray cluster; "
                    "`ray start --head` prints the address of one"
                ) from error
            return bool(code == grpc.StatusCode.UNAUTHENTICATED)
    return False


def _mismatch(address: str, message: str) -> str:
    """Return what to say about a cluster with other versions."""
    facts = " ".join(message.split())
    return (
        f"{address}: the cluster and this process have different versions ({facts}); run this in "
        "an environment with the Python and the Ray of the cluster"
    )


def _warn_of_reports(ray: Any) -> None:
    """Warn if the cluster reports usage statistics, which its head decided when it started."""
    try:
        from ray._common.usage.usage_lib import get_cluster_metadata
        from ray._private.worker import global_worker

        metadata = get_cluster_metadata(global_worker.gcs_client) or {}
    except Exception:  # private names of Ray, or a connection through its client server
        return
    if "session_start_timestamp_ms" in metadata:  # recorded only if it reports
        _log.warning(
            "this Ray cluster reports usage statistics to its makers: start its head with "
            "RAY_USAGE_STATS_ENABLED=0 ray start --head --disable-usage-stats"
        )
