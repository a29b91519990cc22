"""A classifier learned from a handful of labelled pictures, kept in one file without pickle."""

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
from crl_sdk.errors import BasisMismatchError, InvalidInputError, MissingDependencyError
from crl_sdk.projection._projection import EPSILON, check_embeddings
from crl_sdk.storage._atomic_files import write_atomically
from crl_sdk.tasks._classifier_file import Learned, decode, encode
from crl_sdk.tasks._kmeans import check_rows

_FOLDS = 5
_log = logging.getLogger(__name__)


class FewShotClassifier:
    """Logistic regression on conditional embeddings, from a few labelled pictures per class.

    As in Conditional Representation Learning (arXiv 2510.04564): rows less the mean of all their
    values, each divided by its own unbiased standard deviation, then L2-regularised logistic
    regression over all classes at once (C = 1).

    The probabilities are the regression's own. They are **not calibrated**: with a few pictures
    per class there is nothing to calibrate on, and they say which class is likelier, not how often
    that is right. `cross_validate` tells the latter, as far as the labelled pictures allow.
    """

    def __init__(
        self,
        basis: Basis | None = None,
        *,
        standardise: bool = True,
        regularisation: float = 1.0,
    ) -> None:
        """Store how to learn.

        Args:
            basis: that makes the rows. It is kept in the classifier's file, which then needs
                nothing else but its model to classify pictures; `project` uses it. None where rows
                come from elsewhere.
            standardise: bring rows to the paper's form first.
            regularisation: C of the regression, more than 0; less of it regularises more.

        Raises:
            InvalidInputError: `regularisation` is not above 0.
        """
        if not (np.isfinite(regularisation) and regularisation > 0):
            raise InvalidInputError(f"expected regularisation > 0, got {regularisation}")
        self.basis = basis
        self.standardise = standardise
        self.regularisation = float(regularisation)
        self._learned: Learned | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, sorted: the columns of `predict_proba`."""
        return self._known().classes

    @property
    def counts(self) -> Mapping[str, int]:
        """Labelled pictures that each class was learned from."""
        learned = self._known()
        return dict(zip(learned.classes, learned.counts, strict=True))

    @property
    def singletons(self) -> tuple[str, ...]:
        """Classes that were learned from one picture: what varies within them is not known."""
        return tuple(name for name, count in self.counts.items() if count == 1)

    def project(self, universal: NDArray[Any]) -> NDArray[np.float32]:
        """Give the rows (n, m) float32 of universal embeddings (n, d).

        Raises:
            InvalidInputError: the classifier has no basis, or a shape or value is wrong.
        """
        if self.basis is None:
            raise InvalidInputError(
                "this classifier has no basis: pass conditional rows, or FewShotClassifier(basis)"
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
        """Learn from labelled rows; a class with one picture is learned, and logged.

        Args:
            rows: (n, m) float, conditional embeddings.
            labels: n names of classes.
            classes: all names that are expected; None takes those of the labels.
            unlabelled: (u, m) float, rows to be classified later. With them the mean is that of
                all rows, as in the paper (transductive); without, of the labelled ones alone, so
                that a prediction does not hang on its neighbours (inductive).

        Returns:
            itself.

        Raises:
            InvalidInputError: rows hold NaN or do not fit the labels or the basis; labels are not
                strings, of one class only, or none of an expected class.
            MissingDependencyError: scikit-learn is not installed.
        """
        checked = self._check(rows)
        names, codes = _check_labels(labels, len(checked), classes)
        others = checked[:0] if unlabelled is None else self._check(unlabelled)
        if others.shape[1] != checked.shape[1]:
            raise InvalidInputError(
                f"expected unlabelled rows of {checked.shape[1]} columns, got {others.shape[1]}"
            )
        self._learned = self._learn(checked, names, codes, others)
        if self.singletons:
            _log.warning("one picture only of: %s", ", ".join(self.singletons))
        return self

    def predict_proba(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Give each row's probabilities, (n, c) float32, a column for each of `classes`.

        They are not calibrated: see the class.

        Args:
            rows: (n, m) float, conditional embeddings; n may be 0.

        Raises:
            InvalidInputError: nothing was fitted, or rows are of another width or hold NaN.
        """
        learned = self._known()
        checked = check_embeddings(rows, learned.coefficients.shape[1])
        if learned.standardise:
            checked = standardise_rows(checked, learned.mean)
        scores = (checked @ learned.coefficients.T).astype(np.float64) + learned.intercepts
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)

    def predict(self, rows: NDArray[Any]) -> list[str]:
        """Give each row's likeliest class; see `predict_proba`."""
        classes = self.classes
        return [classes[i] for i in self.predict_proba(rows).argmax(axis=1)]

    def cross_validate(self, rows: NDArray[Any], labels: Sequence[str]) -> float | None:
        """Give the share of labelled rows that is classified right by a classifier without them.

        Stratified folds, five at most and no more than the smallest class has pictures. With few
        pictures it is a rough figure: of 20 right ones, one more or less is 5 %.

        Args:
            rows: (n, m) float, conditional embeddings.
            labels: n names of classes.

        Returns:
            0 to 1; None if a class has one picture.

        Raises:
            InvalidInputError: see `fit`.
            MissingDependencyError: scikit-learn is not installed.
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
            part._learned = part._learn(checked[learn], names, codes[learn], checked[:0])
            right += int((part.predict_proba(checked[test]).argmax(axis=1) == codes[test]).sum())
        return right / len(checked)

    def require_fingerprint(self, fingerprint: str) -> None:
        """Refuse to be used with another model.

        Raises:
            BasisMismatchError: `fingerprint` is not that of the classifier's basis.
        """
        if self.basis is not None and self.basis.fingerprint != fingerprint:
            raise BasisMismatchError(
                f"this classifier by {self.basis.criterion!r} was learned on model "
                f"{self.basis.fingerprint[:12]}…, this bundle is {fingerprint[:12]}…: name the "
                "bundle it was learned with, or fit it again"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the classifier, with its basis; the file is replaced whole or not at all.

        Raises:
            InvalidInputError: nothing was fitted, or the file cannot be written.
        """
        write_atomically(Path(path), self.to_bytes(), InvalidInputError)

    def to_bytes(self) -> bytes:
        """Serialise the classifier as a safetensors file; equal ones give equal bytes.

        Raises:
            InvalidInputError: nothing was fitted.
        """
        return encode(self._known())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, fingerprint: str = "") -> FewShotClassifier:
        """Read a classifier's file and check it.

        Args:
            path: of the file.
            fingerprint: of the model whose pictures are to be classified; empty to leave that to
                `require_fingerprint`.

        Raises:
            InvalidInputError: the file cannot be read.
            IntegrityError: it is not a classifier, was changed, or its parts contradict each other.
            UnsupportedSchemaError: written in a schema this SDK does not read.
            BasisMismatchError: it was learned on another model.
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
        """Read a classifier from the bytes of its file; `where` names it in errors.

        Raises:
            IntegrityError: it is not a classifier, was changed, or its parts contradict each other.
            UnsupportedSchemaError: written in a schema this SDK does not read.
        """
        learned = decode(data, where)
        found = cls(
            learned.basis, standardise=learned.standardise, regularisation=learned.regularisation
        )
        found._learned = learned
        return found

    def _learn(
        self,
        rows: NDArray[np.float32],
        names: tuple[str, ...],
        codes: NDArray[np.int64],
        others: NDArray[np.float32],
    ) -> Learned:
        """Learn from checked rows (n, m), each one's place (n,) among the names, and others."""
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise MissingDependencyError("scikit-learn", "tasks", "few-shot learning") from error
        seen = np.concatenate([rows, others])
        mean = float(seen.mean(dtype=np.float64)) if self.standardise else 0.0
        model = LogisticRegression(C=self.regularisation, max_iter=1000)
        model.fit(standardise_rows(rows, mean) if self.standardise else rows, codes)
        weight, bias = model.coef_, model.intercept_
        if len(names) == 2:  # one row of it, for the second class against the first
            weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
        return Learned(
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

    def _known(self) -> Learned:
        if self._learned is None:
            raise InvalidInputError("expected a fitted classifier: call fit(rows, labels) first")
        return self._learned

    def _check(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        checked = check_rows(rows)
        if self.basis is not None and checked.shape[1] != self.basis.projection.output_dim:
            raise InvalidInputError(
                f"expected rows of basis {self.basis.criterion!r}, "
                f"{self.basis.projection.output_dim} columns, got {checked.shape[1]}: make them "
                "with project(universal)"
            )
        if self.standardise and checked.shape[1] < 2:
            raise InvalidInputError(
                "expected rows of two columns or more, since a single one has no standard "
                "deviation: add texts to the basis, or pass standardise=False"
            )
        return checked


def standardise_rows(rows: NDArray[np.float32], mean: float) -> NDArray[np.float32]:
    """Subtract one number from all rows; divide each by its own unbiased standard deviation.

    Args:
        rows: (n, m) float32.
        mean: of all values of the rows to learn from.

    Returns:
        (n, m) float32; a row whose values are all the same becomes zeros.
    """
    wide = rows.astype(np.float64)
    centred = wide - wide.mean(axis=1, keepdims=True)
    spread = np.sqrt(np.square(centred).sum(axis=1, keepdims=True) / max(rows.shape[1] - 1, 1))
    flat = spread <= EPSILON
    return np.asarray(np.where(flat, 0.0, (wide - mean) / np.where(flat, 1.0, spread)), np.float32)


def _check_labels(
    labels: Sequence[str], n: int, classes: Sequence[str] | None
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Give the sorted names of the classes and each label's place among them."""
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
            f"expected at least one picture of each class, there is none of {', '.join(without)}: "
            "label one, or leave the class out"
        )
    strange = sorted(set(counts) - set(names))
    if strange:
        raise InvalidInputError(f"expected labels of {', '.join(names)}, got {strange[0]!r}")
    if len(names) < 2:
        raise InvalidInputError(
            f"expected labels of two classes or more, got {names[0]!r} only: label some pictures "
            "that are something else"
        )
    place = {name: i for i, name in enumerate(names)}
    return names, np.array([place[str(label)] for label in given], np.int64)
