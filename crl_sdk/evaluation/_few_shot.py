"""The paper's few-shot protocol: logistic regression on a few pictures of each class.

Two choices of the authors are offered both ways. Their conditional rows are centred on the mean of
all rows, those that are tested included (`transductive`). And their rows have a norm of about √k,
where the universal ones they are compared with have 1: under the same penalty C = 1, that alone
changes how far a regression fits (`scale_of`, `scaled_to`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.evaluation._figures import Figure, check_labelled
from crl_sdk.projection._projection import EPSILON
from crl_sdk.tasks._few_shot import standardise_rows

SHOTS = (1, 5, 10)
SPLITS = 20


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Which rows are trained on and which are tested, (t,) and (n − t,) int64."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]


def splits(labels: NDArray[np.integer], shots: int, count: int = SPLITS) -> Iterator[Split]:
    """Draw the authors' splits: of each class, in the order of the labels, `shots` are trained on.

    Split i shuffles with NumPy's legacy generator of seed i, so that equal labels give the very
    splits of their `linear_probe.py`.

    Args:
        labels: (n,) integers.
        shots: pictures of each class.
        count: of splits.

    Raises:
        InvalidInputError: shots or count is below 1, or a class has no picture left to test.
    """
    if shots < 1 or count < 1:
        raise InvalidInputError(f"expected shots >= 1 and splits >= 1, got {shots} and {count}")
    codes = np.asarray(labels)
    classes, sizes = np.unique(codes, return_counts=True)
    if sizes.min() <= shots:
        raise InvalidInputError(
            f"{shots} shots need {shots + 1} pictures of each class or more, class "
            f"{classes[sizes.argmin()]} has {sizes.min()}: take fewer shots"
        )
    for seed in range(count):
        generator = np.random.RandomState(seed)
        train, test = [], []
        for each in classes:
            members = np.flatnonzero(codes == each)
            generator.shuffle(members)
            train.append(members[:shots])
            test.append(members[shots:])
        yield Split(np.concatenate(train), np.concatenate(test))


def standardised(
    rows: NDArray[np.float32], reference: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Subtract one number from all rows and divide each by its own standard deviation.

    Args:
        rows: (n, m) float32, R = I·Tᵀ; m >= 2.
        reference: rows whose overall mean is subtracted, (r, m) float32; None for `rows` itself,
            as the authors do, which looks at the rows to be tested too.

    Returns:
        (n, m) float32, see `crl_sdk.tasks.standardise_rows`.

    Raises:
        InvalidInputError: fewer than two columns.
    """
    if rows.shape[1] < 2:
        raise InvalidInputError(
            f"expected rows of two columns or more, got {rows.shape}: add texts to the basis"
        )
    mean = np.mean(rows if reference is None else reference, dtype=np.float64)
    return standardise_rows(rows, float(mean))


def scale_of(rows: NDArray[np.float32]) -> float:
    """Give the root mean square of the norms of rows (n, m)."""
    return float(np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1).mean()))


def scaled_to(rows: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """Multiply rows (n, m) by the one number that brings their `scale_of` to `scale`."""
    return np.asarray(rows * (scale / max(scale_of(rows), EPSILON)), np.float32)


def few_shot(
    rows: NDArray[np.floating],
    labels: NDArray[np.integer],
    shots: int,
    *,
    standardise: bool,
    transductive: bool = True,
    count: int = SPLITS,
) -> Figure:
    """Classify from a few pictures of each class and test on all others.

    As the authors' `linear_probe.py`: `LogisticRegression(max_iter=1000)`, which has C = 1; the
    mean over twenty splits is what the paper prints.

    Args:
        rows: (n, m) float: R = I·Tᵀ, or universal embeddings.
        labels: (n,) integers.
        shots: pictures of each class to train on.
        standardise: whether to bring rows through `standardised`: the paper's conditional rows are,
            its universal ones are not.
        transductive: with `standardise`, centre on all rows, as the paper does, or on the mean of
            those trained on.
        count: of splits.

    Returns:
        Accuracy over the splits.

    Raises:
        InvalidInputError: shapes do not fit, NaN, one class only, or a class has too few pictures.
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", "tasks", "few-shot classification") from error

    given, codes = check_labelled(rows, labels)
    inputs = standardised(given) if standardise and transductive else given
    accuracies = []
    for split in splits(codes, shots, count):
        used = inputs
        if standardise and not transductive:
            used = standardised(given, given[split.train])
        model = LogisticRegression(C=1.0, max_iter=1000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the paper stops there as well
            model.fit(used[split.train], codes[split.train])
        accuracies.append(float(model.score(used[split.test], codes[split.test])))
    return Figure.of(accuracies)
