"""Small problems of scikit-learn are solved in one thread."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from numpy.typing import NDArray

from crl_sdk.errors import MissingDependencyError

SINGLE_THREAD_VALUES = 1 << 19
"""Number of values from which several threads save more than they cost. Beside busy processes they
cost far more, because threads that wait for each other do so by computing."""


def few_threads(rows: NDArray[Any]) -> AbstractContextManager[Any]:
    """Limit BLAS and OpenMP to one thread, in the whole process, while few rows are worked on.

    Args:
        rows: The rows, shape (n, d).

    Raises:
        MissingDependencyError: If scikit-learn is not installed.
    """
    try:
        import sklearn.cluster  # noqa: F401  # limits apply to loaded libraries only
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", "tasks", "clustering") from error
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1) if rows.size < SINGLE_THREAD_VALUES else nullcontext()
