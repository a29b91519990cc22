"""A worker of a bulk job on Ray, without Ray: what it says about its node."""

from __future__ import annotations

import pytest

from crl_sdk import __version__
from crl_sdk.errors import InvalidInputError, ServiceError
from crl_sdk.integrations.ray._bulk import RayWorkers, _fit, _Worker


def test_a_node_that_does_not_see_the_directory_says_so(tmp_path):
    with pytest.raises(InvalidInputError, match="does not see this directory"):
        _Worker(tmp_path / "nowhere", __version__).open()


def test_a_node_with_another_version_says_so(tmp_path):
    with pytest.raises(ServiceError, match="pip install"):
        _Worker(tmp_path, "0.0.1").open()


@pytest.mark.parametrize(
    ("resources", "workers", "fit"),
    [
        ({"CPU": 8.0}, RayWorkers(cpus=2), 4),
        ({"CPU": 8.0, "GPU": 2.0}, RayWorkers(cpus=1, gpus=0.5), 4),
        ({"CPU": 8.0}, RayWorkers(gpus=1), 0),
        ({"CPU": 1.0}, RayWorkers(cpus=2), 0),
        ({}, RayWorkers(), 0),
    ],
)
def test_workers_fit_on_a_node_by_processors_and_gpus(resources, workers, fit):
    assert _fit(resources, workers) == fit
