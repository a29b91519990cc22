"""What users do with conditional embeddings: cluster, classify from few examples, retrieve.

Everything works on NumPy arrays, so that it serves a folder (`Embedder`), stored embeddings
(`crl_sdk.stored`) and the service (`Client`) alike. Names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crl_sdk.tasks.clustering import Cluster, Clustering, cluster
    from crl_sdk.tasks.few_shot import FewShotClassifier
    from crl_sdk.tasks.kmeans import Choice, choose_k
    from crl_sdk.tasks.retrieval import Hits, Index
    from crl_sdk.tasks.transformer import ConditionalTransformer
    from crl_sdk.tasks.trust import Trust, examine

_HOMES = {
    "Choice": "kmeans",
    "Cluster": "clustering",
    "Clustering": "clustering",
    "ConditionalTransformer": "transformer",
    "FewShotClassifier": "few_shot",
    "Hits": "retrieval",
    "Index": "retrieval",
    "Trust": "trust",
    "choose_k": "kmeans",
    "cluster": "clustering",
    "examine": "trust",
}

__all__ = [
    "Choice",
    "Cluster",
    "Clustering",
    "ConditionalTransformer",
    "FewShotClassifier",
    "Hits",
    "Index",
    "Trust",
    "choose_k",
    "cluster",
    "examine",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'crl_sdk.tasks' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"crl_sdk.tasks.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("sklearn", "scipy"):
            raise
        from crl_sdk.errors import MissingDependencyError

        raise MissingDependencyError("scikit-learn", "tasks", f"crl_sdk.tasks.{name}") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
