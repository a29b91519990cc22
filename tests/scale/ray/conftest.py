"""A Ray cluster of two nodes on this machine, on loopback, without dashboard or reports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# Ray reads it when it is imported: nodes then have the address 127.0.0.1 and not that of the
# machine, which others reach.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"

pytest.importorskip("ray")

MEMORY = 100 << 20
"""Size of the object store of a node, in bytes."""


@contextmanager
def two_nodes(processors: int = 2) -> Iterator[Any]:
    """Start two nodes, and stop them at the end."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": processors, "object_store_memory": MEMORY, "include_dashboard": False,
        },
    )  # fmt: skip
    try:
        cluster.add_node(num_cpus=processors, object_store_memory=MEMORY)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Two nodes of two processors each, for all tests of this folder."""
    with two_nodes() as started:
        yield started
