"""Few-shot classification: learn classes from a few labelled images."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._basis import Basis
from crl_sdk.errors import InvalidInputError, MissingDependencyError
from crl_sdk.model._fingerprint import require_same_model
from crl_sdk.projection._projection import EPSILON, check_embeddings
from crl_sdk.storage._atomic_files import write_atomically
from crl_sdk.tasks._classifier_file import (
    ClassifierState,
    decode_classifier,
    encode_classifier,
)
from crl_sdk.tasks._few_threads import few_threads
from crl_sdk.tasks._kmeans import check_rows

_FOLDS = 5
_log = logging.getLogger(__name__)


class FewShotClassifier:
    """Logistic regression on conditional embeddings, with a few labelled images per class.

    The method is that of Conditional Representation Learning (arXiv 2510.04564). The mean of all
    values of all rows is subtracted, and each row is divided by its own unbiased standard
    deviation. Then an L2-regularised multinomial logistic regression (C = 1) is fitted.

    The probabilities come directly from the regression and are **not calibrated**, because a few
    images per class are too few to calibrate on. They say which class is more likely, not how
    often the prediction is right. `cross_validate` estimates that from the labelled images.

    A fitted classifier predicts without scikit-learn. Its file contains no pickle.

    Example:
        >>> import numpy as np
        >>> from crl_sdk.tasks import FewShotClassifier
        >>> rows = np.eye(4, dtype=np.float32)
        >>> classifier = FewShotClassifier().fit(rows, ["red", "red", "blue", "blue"])
        >>> classifier.predict(rows[:1])
        ['red']
    """

    def __init__(
        self,
        basis: Basis | None = None,
        *,
        standardise: bool = True,
        regularisation: float = 1.0,
    ) -> None:
        """Store the settings.

        Args:
            basis: Basis that makes the rows. `project` uses it, and it is stored in the classifier
                file, so that this file and the bundle are enough to classify images. None if the
                rows are made elsewhere.
            standardise: Whether to standardise the rows as in the paper.
            regularisation: Parameter C of the regression, above 0. Smaller values regularise more.

        Raises:
            InvalidInputError: If `regularisation` is not above 0.
        """
        if not (np.isfinite(regularisation) and regularisation > 0):
            raise InvalidInputError(f"expected regularisation > 0, got {regularisation}")
        self.basis = basis
        self.standardise = standardise
        self.regularisation = float(regularisation)
        self._state: ClassifierState | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, sorted: the columns of `predict_proba`."""
        return self._fitted().classes

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of labelled images of each class."""
        state = self._fitted()
        return dict(zip(state.classes, state.counts, strict=True))

    @property
    def singletons(self) -> tuple[str, ...]:
        """Classes with only one labelled image. Their variation is unknown."""
        return tuple(name for name, count in self.counts.items() if count == 1)

    def project(self, universal: NDArray[Any]) -> NDArray[np.float32]:
        """Return the conditional embeddings of universal embeddings.

        Args:
            universal: Universal embeddings, shape (n, d), of a float dtype or int8, unit rows.

        Returns:
            Conditional embeddings, shape (n, m), float32.

        Raises:
            InvalidInputError: If the classifier has no basis, or a shape or value is wrong.
        """
        if self.basis is None:
            raise InvalidInputError(
                "this classifier has no basis: pass conditional rows, or make it with "
                "FewShotClassifier(basis)"
            )
        return self.basis.projection.apply(universal)

    def fit(
        self,
        rows: NDArray[Any],
        labels: Sequence[str],
        *,
        classes: Sequence[str] | None = None,
        unlabelled: NDArray[Any] | None = None,
    ) -> FewShotClassifier:
        """Fit the classifier to labelled rows. Classes with only one image are logged.

        Args:
            rows: Conditional embeddings, shape (n, m), of a float dtype or int8.
            labels: Name of the class of each row.
            classes: Names of all classes. None to take them from `labels`.
            unlabelled: Conditional embeddings to be classified later, shape (u, m), of a float
                dtype. With them, the mean is computed from all rows, as in the paper
                (transductive). Without them, it is computed from the labelled rows only, so that
                a prediction does not depend on the other rows (inductive).

        Returns:
            The classifier itself.

        Raises:
            InvalidInputError: If rows hold NaN or do not match the labels or the basis, if labels
                are not strings or all equal, or if a class has no label.
            MissingDependencyError: If scikit-learn is not installed.
        """
        checked = self._check(rows)
        names, codes = _check_labels(labels, len(checked), classes)
        others = checked[:0] if unlabelled is None else self._check(unlabelled)
        if others.shape[1] != checked.shape[1]:
            raise InvalidInputError(
                f"expected unlabelled rows of {checked.shape[1]} columns, got {others.shape[1]}"
            )
        self._state = self._learn(checked, names, codes, others)
        if self.singletons:
            _log.warning("only one labelled image of: %s", ", ".join(self.singletons))
        return self

    def predict_proba(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Return the probability of each class for each row. It is not calibrated.

        Args:
            rows: Conditional embeddings, shape (n, m), of a float dtype or int8; n may be 0.

        Returns:
            Probabilities, shape (n, c), float32, with one column for each of `classes`.

        Raises:
            InvalidInputError: If the classifier is not fitted, or rows have the wrong width or
                hold NaN.
        """
        state = self._fitted()
        checked = check_embeddings(rows, state.coefficients.shape[1])
        if state.standardise:
            checked = standardise_rows(checked, state.mean)
        scores = (checked @ state.coefficients.T).astype(np.float64) + state.intercepts
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)

    def predict(self, rows: NDArray[Any]) -> list[str]:
        """Return the most likely class of each row. See `predict_proba`."""
        classes = self.classes
        return [classes[i] for i in self.predict_proba(rows).argmax(axis=1)]

    def cross_validate(self, rows: NDArray[Any], labels: Sequence[str]) -> float | None:
        """Return the accuracy of stratified cross-validation on labelled rows.

        The number of folds is five, or the number of images of the smallest class if that is less.
        With few images the accuracy is rough: of 20 images, one more or less is 5 %.

        Args:
            rows: Conditional embeddings, shape (n, m), of a float dtype or int8.
            labels: Name of the class of each row.

        Returns:
            Accuracy, 0 to 1. None if a class has only one image.

        Raises:
            InvalidInputError: If `fit` would refuse the arguments.
            MissingDependencyError: If scikit-learn is not installed.
        """
        checked = self._check(rows)
        names, codes = _check_labels(labels, len(checked), None)
        folds = min(_FOLDS, int(np.bincount(codes).min()))
        if folds < 2:
            return None
        try:
            from sklearn.model_selection import StratifiedKFold
        except ImportError as error:
            raise MissingDependencyError("scikit-learn", "tasks", "few-shot learning") from error
        right = 0
        for learn, test in StratifiedKFold(folds, shuffle=True, random_state=0).split(rows, codes):
            part = FewShotClassifier(
                standardise=self.standardise, regularisation=self.regularisation
            )
            part._state = part._learn(checked[learn], names, codes[learn], checked[:0])
            right += int((part.predict_proba(checked[test]).argmax(axis=1) == codes[test]).sum())
        return right / len(checked)

    def require_fingerprint(self, fingerprint: str) -> None:
        """Check that the classifier was made for a model.

        Args:
            fingerprint: Fingerprint of the model.

        Raises:
            BasisMismatchError: If the basis of the classifier was made for another model.
        """
        if self.basis is not None:
            require_same_model(
                f"this classifier for {self.basis.criterion!r}",
                self.basis.fingerprint,
                fingerprint,
                remedy="use the bundle that it was fitted with, or fit it again",
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the classifier and its basis to a file. The file is replaced atomically.

        Args:
            path: Path of the file.

        Raises:
            InvalidInputError: If the classifier is not fitted or the file cannot be written.
        """
        write_atomically(Path(path), self.to_bytes(), InvalidInputError)

    def to_bytes(self) -> bytes:
        """Return the bytes of the classifier file. Equal classifiers give equal bytes.

        Raises:
            InvalidInputError: If the classifier is not fitted.
        """
        return encode_classifier(self._fitted())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, fingerprint: str = "") -> FewShotClassifier:
        """Read a classifier file and check it.

        Args:
            path: Path of the file.
            fingerprint: Fingerprint of the model whose embeddings are to be classified. Empty to
                skip this check; call `require_fingerprint` later.

        Raises:
            InvalidInputError: If the file cannot be read.
            IntegrityError: If it is not a classifier, was changed, or its parts contradict each
                other.
            UnsupportedSchemaError: If it was written in a schema that this SDK does not read.
            BasisMismatchError: If it was fitted with another model.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise InvalidInputError(
                f"{path}: cannot be read ({error.strerror}); check the path"
            ) from error
        loaded = cls.from_bytes(data, where=str(path))
        if fingerprint:
            loaded.require_fingerprint(fingerprint)
        return loaded

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str = "classifier") -> FewShotClassifier:
        """Read a classifier from the bytes of its file.

        Args:
            data: Content of the file.
            where: Name of the file in errors.

        Raises:
            IntegrityError: If it is not a classifier, was changed, or its parts contradict each
                other.
            UnsupportedSchemaError: If it was written in a schema that this SDK does not read.
        """
        state = decode_classifier(data, where)
        found = cls(state.basis, standardise=state.standardise, regularisation=state.regularisation)
        found._state = state
        return found

    def _learn(
        self,
        rows: NDArray[np.float32],
        names: tuple[str, ...],
        codes: NDArray[np.int64],
        others: NDArray[np.float32],
    ) -> ClassifierState:
        """Fit to checked rows (n, m) with codes (n,): positions in `names`."""
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise MissingDependencyError("scikit-learn", "tasks", "few-shot learning") from error
        seen = np.concatenate([rows, others])
        mean = float(seen.mean(dtype=np.float64)) if self.standardise else 0.0
        model = LogisticRegression(C=self.regularisation, max_iter=1000)
        inputs = standardise_rows(rows, mean) if self.standardise else rows
        with few_threads(inputs):
            model.fit(inputs, codes)
        weight, bias = model.coef_, model.intercept_
        if len(names) == 2:  # scikit-learn has one row: the second class against the first
            weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
        return ClassifierState(
            classes=names,
            counts=tuple(int(count) for count in np.bincount(codes)),
            standardise=self.standardise,
            mean=mean,
            mean_of=len(seen),
            regularisation=self.regularisation,
            coefficients=np.ascontiguousarray(weight, np.float32),
            intercepts=np.ascontiguousarray(bias, np.float32),
            basis=self.basis,
        )

    def _fitted(self) -> ClassifierState:
        if self._state is None:
            raise InvalidInputError("expected a fitted classifier: call fit(rows, labels) first")
        return self._state

    def _check(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        checked = check_rows(rows)
        if self.basis is not None and checked.shape[1] != self.basis.projection.output_dim:
            raise InvalidInputError(
                f"expected rows of basis {self.basis.criterion!r}, "
                f"{self.basis.projection.output_dim} columns, got {checked.shape[1]}: make the "
                "rows with project(universal)"
            )
        if self.standardise and checked.shape[1] < 2:
            raise InvalidInputError(
                "expected rows with two columns or more, because one value has no standard "
                "deviation: add texts to the basis, or pass standardise=False"
            )
        return checked


def standardise_rows(rows: NDArray[np.float32], mean: float) -> NDArray[np.float32]:
    """Return (row - mean) / unbiased standard deviation of the row, for each row.

    Args:
        rows: Rows, shape (n, m), float32.
        mean: Mean of all values of the rows to learn from.

    Returns:
        Standardised rows, shape (n, m), float32. Rows whose values are all equal become zeros.
    """
    wide = rows.astype(np.float64)
    centred = wide - wide.mean(axis=1, keepdims=True)
    spread = np.sqrt(np.square(centred).sum(axis=1, keepdims=True) / max(rows.shape[1] - 1, 1))
    flat = spread <= EPSILON
    return np.asarray(np.where(flat, 0.0, (wide - mean) / np.where(flat, 1.0, spread)), np.float32)


def _check_labels(
    labels: Sequence[str], n: int, classes: Sequence[str] | None
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the sorted names of the classes and the position of each label among them."""
    if isinstance(labels, str):
        raise InvalidInputError(f"expected a list of labels, got one string {labels[:40]!r}")
    given = list(labels)
    wrong = [label for label in given if not isinstance(label, str) or not label.strip()]
    if wrong:
        raise InvalidInputError(
            f"expected labels that are names, such as 'red', got {wrong[0]!r}: pass "
            "[str(label) for label in labels]"
        )
    if len(given) != n:
        raise InvalidInputError(f"expected one label for each of {n} rows, got {len(given)}")
    counts = Counter(str(label) for label in given)
    names = tuple(sorted(counts if classes is None else set(classes)))
    without = [name for name in names if not counts[name]]
    if without:
        raise InvalidInputError(
            f"expected at least one image of each class, there is none of {', '.join(without)}: "
            "label one, or leave the class out"
        )
    strange = sorted(set(counts) - set(names))
    if strange:
        raise InvalidInputError(f"expected labels of {', '.join(names)}, got {strange[0]!r}")
    if len(names) < 2:
        raise InvalidInputError(
            f"expected labels of two classes or more, got only {names[0]!r}: label some images "
            "of another class"
        )
    place = {name: i for i, name in enumerate(names)}
    return names, np.array([place[str(label)] for label in given], np.int64)
