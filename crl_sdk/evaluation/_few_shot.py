"""Few-shot protocol of the paper: logistic regression on a few images of each class.

Two choices of the authors can be switched off. First, they centre the conditional rows on the mean
of all rows, including the test rows (`transductive`). Second, their conditional rows have a norm of
about √k, while the universal rows have norm 1. With the same penalty C = 1, the larger norm alone
lets the regression fit more closely (`rms_norm`, `rescale`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.evaluation._check_labels import check_labels
from crl_sdk.evaluation._mean_std import MeanStd
from crl_sdk.projection._projection import EPSILON
from crl_sdk.tasks._few_shot import standardise_rows
from crl_sdk.tasks._few_threads import few_threads

SHOTS = (1, 5, 10)
SPLITS = 20


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Positions of the training rows, shape (t,), and of the test rows, shape (n - t,), int64."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]


def splits(
    labels: NDArray[np.integer],
    shots: int,
    count: int = SPLITS,
    groups: NDArray[np.integer] | None = None,
) -> Iterator[Split]:
    """Draw the splits of the paper: `shots` training rows of each class, all others for testing.

    Split i shuffles each class, in the order of the labels, with NumPy's legacy generator of seed
    i. Equal labels therefore give the same splits as the authors' `linear_probe.py`.

    Args:
        labels: Label of each row, shape (n,), integers.
        shots: Number of training rows of each class.
        count: Number of splits.
        groups: Group of each row, shape (n,), integers, such as near-duplicates. The training rows
            of a class are then of different groups, and no other row of these groups is tested.
            None if no rows belong together.

    Yields:
        The splits.

    Raises:
        InvalidInputError: If `shots` or `count` is below 1, or a class has no row left to test.
    """
    if shots < 1 or count < 1:
        raise InvalidInputError(f"expected shots >= 1 and splits >= 1, got {shots} and {count}")
    codes = np.asarray(labels)
    related = np.arange(len(codes)) if groups is None else np.asarray(groups)
    classes = np.unique(codes)
    sizes = np.array([len(np.unique(related[codes == each])) for each in classes])
    if sizes.min() <= shots:
        what = "images" if groups is None else "groups"
        raise InvalidInputError(
            f"{shots} shots need at least {shots + 1} {what} of each class, class "
            f"{classes[sizes.argmin()]} has {sizes.min()}: take fewer shots"
        )
    for seed in range(count):
        generator = np.random.RandomState(seed)
        train, test = [], []
        for each in classes:
            members = np.flatnonzero(codes == each)
            generator.shuffle(members)
            first = np.sort(np.unique(related[members], return_index=True)[1])[:shots]
            train.append(members[first])
            test.append(np.delete(members, first))
        used, rest = np.concatenate(train), np.concatenate(test)
        rest = rest[~np.isin(related[rest], related[used])]
        if len(rest) == 0:
            raise InvalidInputError(
                f"with {shots} shots no image is left to test, because every group has a training "
                "image: take fewer shots"
            )
        yield Split(used, rest)


def standardise_all(
    rows: NDArray[np.float32], reference: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return (row - mean of the reference) / standard deviation of the row, for each row.

    Args:
        rows: Conditional rows R = I·Tᵀ, shape (n, m) with m >= 2, float32.
        reference: Rows whose overall mean is subtracted, shape (r, m), float32. None for `rows`,
            as in the paper; the mean then includes the test rows.

    Returns:
        Standardised rows, shape (n, m), float32.

    Raises:
        InvalidInputError: If there are fewer than two columns.
    """
    if rows.shape[1] < 2:
        raise InvalidInputError(
            f"expected rows with two columns or more, got {rows.shape}: add texts to the basis"
        )
    mean = np.mean(rows if reference is None else reference, dtype=np.float64)
    return standardise_rows(rows, float(mean))


def rms_norm(rows: NDArray[np.float32]) -> float:
    """Return the root mean square of the norms of rows, shape (n, m)."""
    return float(np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1).mean()))


def rescale(rows: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """Multiply rows, shape (n, m), by the number that makes their `rms_norm` equal `scale`."""
    return np.asarray(rows * (scale / max(rms_norm(rows), EPSILON)), np.float32)


def few_shot(
    rows: NDArray[np.floating],
    labels: NDArray[np.integer],
    shots: int,
    *,
    standardise: bool,
    transductive: bool = True,
    count: int = SPLITS,
) -> MeanStd:
    """Train a classifier on a few images of each class and test it on all others.

    The protocol is that of the authors' `linear_probe.py`: `LogisticRegression(max_iter=1000)`,
    whose C is 1. The paper reports the mean over twenty splits.

    Args:
        rows: Conditional rows R = I·Tᵀ or universal embeddings, shape (n, m), of a float dtype.
        labels: Label of each row, shape (n,), integers.
        shots: Number of training images of each class.
        standardise: Whether to standardise the rows. The paper does so for conditional rows only.
        transductive: Whether `standardise` subtracts the mean of all rows, as in the paper, or
            that of the training rows.
        count: Number of splits.

    Returns:
        Accuracy over the splits.

    Raises:
        InvalidInputError: If the shapes do not match, a value is NaN, there is only one class, or
            a class has too few images.
        MissingDependencyError: If scikit-learn is not installed.
    """
    return MeanStd.of(
        few_shot_runs(
            rows, labels, splits(np.asarray(labels), shots, count),
            standardise=standardise, transductive=transductive,
        )
    )  # fmt: skip


def few_shot_runs(
    rows: NDArray[np.floating],
    labels: NDArray[np.integer],
    drawn: Iterable[Split],
    *,
    standardise: bool,
    transductive: bool = True,
) -> list[float]:
    """Return the accuracy of `few_shot` for each of some splits, in their order."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", "tasks", "few-shot classification") from error

    given, codes = check_labels(rows, labels)
    inputs = standardise_all(given) if standardise and transductive else given
    accuracies = []
    for split in drawn:
        used = inputs
        if standardise and not transductive:
            used = standardise_all(given, given[split.train])
        model = LogisticRegression(C=1.0, max_iter=1000)
        with warnings.catch_warnings(), few_threads(used[split.train]):
            warnings.simplefilter("ignore", ConvergenceWarning)  # the paper stops at the same limit
            model.fit(used[split.train], codes[split.train])
        accuracies.append(float(model.score(used[split.test], codes[split.test])))
    return accuracies
