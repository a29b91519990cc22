"""Clustering, few-shot classification and retrieval on arrays of conditional embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.tasks._cluster_quality import ClusterQuality, examine
    from crl_sdk.tasks._clustering import Cluster, Clustering, cluster
    from crl_sdk.tasks._few_shot import FewShotClassifier
    from crl_sdk.tasks._kmeans import Choice, choose_k
    from crl_sdk.tasks._retrieval import Hits, Index
    from crl_sdk.tasks._transformer import ConditionalTransformer

__all__ = [
    "Choice",
    "Cluster",
    "ClusterQuality",
    "Clustering",
    "ConditionalTransformer",
    "FewShotClassifier",
    "Hits",
    "Index",
    "choose_k",
    "cluster",
    "examine",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_cluster_quality": (
            "ClusterQuality",
            "examine",
        ),
        "_clustering": (
            "Cluster",
            "Clustering",
            "cluster",
        ),
        "_few_shot": ("FewShotClassifier",),
        "_kmeans": (
            "Choice",
            "choose_k",
        ),
        "_retrieval": (
            "Hits",
            "Index",
        ),
        "_transformer": ("ConditionalTransformer",),
    },
    extra="tasks",
)
