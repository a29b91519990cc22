"""Clustering, few-shot classification and retrieval on arrays of conditional embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.tasks._cluster_quality import ClusterQuality, assess_clusters
    from crl_sdk.tasks._clustering import Cluster, Clustering, cluster
    from crl_sdk.tasks._few_shot import FewShotClassifier
    from crl_sdk.tasks._kmeans import ClusterCount, choose_k
    from crl_sdk.tasks._naming import ClusterName
    from crl_sdk.tasks._retrieval import Index, SearchResults, condition_captions
    from crl_sdk.tasks._sharpen import Sharpened, sharpen
    from crl_sdk.tasks._transformer import ConditionalTransformer

__all__ = [
    "Cluster",
    "ClusterCount",
    "ClusterName",
    "ClusterQuality",
    "Clustering",
    "ConditionalTransformer",
    "FewShotClassifier",
    "Index",
    "SearchResults",
    "Sharpened",
    "assess_clusters",
    "choose_k",
    "cluster",
    "condition_captions",
    "sharpen",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_cluster_quality": ("ClusterQuality", "assess_clusters"),
        "_clustering": ("Cluster", "Clustering", "cluster"),
        "_few_shot": ("FewShotClassifier",),
        "_kmeans": ("ClusterCount", "choose_k"),
        "_naming": ("ClusterName",),
        "_retrieval": ("Index", "SearchResults", "condition_captions"),
        "_sharpen": ("Sharpened", "sharpen"),
        "_transformer": ("ConditionalTransformer",),
    },
    extra="tasks",
)
