"""Ray: embeddings in a Ray Data pipeline, and the bulk job and the service on a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.integrations.ray._bulk import RayWorkers, run_on_ray
    from crl_sdk.integrations.ray._cluster import connect
    from crl_sdk.integrations.ray._embed_images import EmbedImages
    from crl_sdk.integrations.ray._serve import grpc_options, make_application

__all__ = [
    "EmbedImages",
    "RayWorkers",
    "connect",
    "grpc_options",
    "make_application",
    "run_on_ray",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_bulk": ("RayWorkers", "run_on_ray"),
        "_cluster": ("connect",),
        "_embed_images": ("EmbedImages",),
        "_serve": ("grpc_options", "make_application"),
    },
    extra="ray",
)
