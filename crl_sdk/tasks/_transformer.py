"""scikit-learn transformer from universal to conditional embeddings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from crl_sdk._criterion import normalise_criterion
from crl_sdk.basis._basis import Basis
from crl_sdk.basis._directory import BasisDirectory
from crl_sdk.basis._methods import (
    Method,
    default_method,
    find_method,
    known_method,
    make_projection,
)
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import Post, Projection, check_embeddings
from crl_sdk.tasks._sharpen import sharpen_projection


class ConditionalTransformer(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # untyped
    """Pipeline step that returns conditional embeddings, `post(x @ weight + bias)`.

    It learns nothing from X unless `sharpen` is set. Criterion, method and row normalisation can be
    searched like any parameter, for example `{"crl__criterion": ["color", "shape"]}` for a step
    named `crl`. As in all of scikit-learn, parameters are checked in `fit`.

    Args:
        basis: A Basis, the path of its file, or a directory of bases made by `crl basis create`.
            None if `text_embeddings` is given.
        criterion: Criterion of the basis in the directory. A basis of another criterion is
            refused.
        texts: The k texts, which name the columns. Only together with `text_embeddings`.
        text_embeddings: Text embeddings from `embed_text` of an `Embedder` or a `Client`, shape
            (k, d), of a float dtype or int8, unit rows.
        method: Method that makes the projection from the texts, see `crl_sdk.basis`. None for the
            projection of the basis as it is, or the default with `text_embeddings`. A projection
            that is made again knows no other criteria, so that methods that need them cannot be
            used.
        background: Embeddings of generic texts, shape (b, d), of a float dtype, unit rows, such as
            `ModelBundle.background`, for a projection that is made here.
        post: Row normalisation. None for that of the basis, or `l2` with `text_embeddings`.
        sharpen: Whether `fit` sharpens the projection with X, see `crl_sdk.tasks.sharpen`, and
            with y if it is given. The method must be `contrastive`.

    Attributes:
        projection_: The projection, a `Projection`.
        texts_: The texts, a tuple. None if they were not given.
        method_: Method that made the projection.
        n_features_in_: Number of columns of X, d.
    """

    def __init__(
        self,
        basis: Basis | str | os.PathLike[str] | None = None,
        *,
        criterion: str | None = None,
        texts: Sequence[str] | None = None,
        text_embeddings: NDArray[Any] | None = None,
        method: Method | None = None,
        background: NDArray[Any] | None = None,
        post: Post | None = None,
        sharpen: bool = False,
    ) -> None:
        """Store the parameters. See the class for their meaning."""
        self.basis = basis
        self.criterion = criterion
        self.texts = texts
        self.text_embeddings = text_embeddings
        self.method = method
        self.background = background
        self.post = post
        self.sharpen = sharpen

    def fit(self, X: Any, y: Any = None) -> ConditionalTransformer:
        """Make the projection.

        Args:
            X: Universal embeddings, shape (n, d), of a float dtype or int8, unit rows.
            y: Labels for `sharpen`, shape (n,). Otherwise ignored.

        Returns:
            The transformer itself.

        Raises:
            InvalidInputError: If neither or both of `basis` and `text_embeddings` are given, X has
                another dimension, holds NaN or infinity or is no array (n, d), a parameter is
                malformed, or there are too few rows to sharpen.
            BasisError: If a basis file cannot be read.
            IntegrityError: If a file is not a basis file.
            TypeError: If X is sparse or holds no numbers (raised by scikit-learn).
        """
        checked = self._validated(X, reset=True)
        embeddings, texts, made, method, post = self._source(checked.shape[1])
        if made is None or self.method is not None:
            made = make_projection(
                embeddings, find_method(method).name, post=post, background=self.background
            )
        if self.sharpen:
            if method != "contrastive":
                raise InvalidInputError(
                    f"expected the method 'contrastive' with sharpen=True, got {method!r}"
                )
            made = sharpen_projection(made, len(embeddings), checked, y)[0]
        self.projection_ = Projection(made.weight, made.bias, post)
        self.texts_, self.method_ = texts, method
        if self.projection_.input_dim != self.n_features_in_:
            raise InvalidInputError(
                f"expected X of {self.projection_.input_dim} columns, the embeddings of the model "
                f"that the basis was made for, got {self.n_features_in_}"
            )
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Return the conditional embeddings of universal embeddings.

        Args:
            X: Universal embeddings, shape (n, d), of a float dtype or int8, unit rows.

        Returns:
            Conditional embeddings, shape (n, m), float32.

        Raises:
            InvalidInputError: If X is no array (n, d), or a row holds NaN or infinity.
            TypeError: If X is sparse or holds no numbers (raised by scikit-learn).
            NotFittedError: If `fit` was not called (raised by scikit-learn).
        """
        check_is_fitted(self)
        checked = self._validated(X, reset=False)
        return self.projection_.apply(checked)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Return the names of the columns.

        They are the texts if each column belongs to one text, else `crl0`, `crl1` and so on.

        Args:
            input_features: Ignored, but checked as scikit-learn requires.

        Returns:
            Names, shape (m,), object.
        """
        check_is_fitted(self)
        if input_features is not None:
            known = getattr(self, "feature_names_in_", None)
            if known is not None and not np.array_equal(known, input_features):
                raise ValueError("input_features is not equal to feature_names_in_")
            if len(input_features) != self.n_features_in_:
                raise ValueError(
                    "input_features should have length equal to number of features "
                    f"({self.n_features_in_}), got {len(input_features)}"
                )
        columns = self.projection_.output_dim
        record = known_method(self.method_)
        if record is not None and record.columns_are_texts and self.texts_ is not None:
            return np.asarray(self.texts_, dtype=object)
        return np.asarray([f"crl{i}" for i in range(columns)], dtype=object)

    def __sklearn_tags__(self) -> Any:
        """Declare to scikit-learn that the output is float32 for every input dtype."""
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _validated(self, X: Any, *, reset: bool) -> NDArray[np.float32]:
        """Return X as float32, after the checks of scikit-learn and ours of single rows."""
        try:
            checked = validate_data(
                self, X, dtype=[np.float32, np.float64], ensure_all_finite=False, reset=reset
            )
        except ValueError as error:
            raise InvalidInputError(str(error)) from error
        return check_embeddings(checked, checked.shape[1])

    def _source(
        self, dim: int
    ) -> tuple[NDArray[Any], tuple[str, ...] | None, Projection | None, str, Post]:
        """Return text embeddings, texts, the projection of the basis if any, method and post."""
        if (self.basis is None) == (self.text_embeddings is None):
            raise InvalidInputError(
                "expected either basis= (a Basis or its path) or text_embeddings= (k, d), got "
                + ("neither" if self.basis is None else "both")
            )
        if self.basis is not None:
            if self.texts is not None:
                raise InvalidInputError(
                    "expected texts= only together with text_embeddings=: leave it out, because a "
                    "basis has its own texts"
                )
            basis = self._basis(self.basis)
            return (
                basis.text_embeddings, basis.texts, basis.projection, self.method or basis.method,
                self.post or basis.projection.post,
            )  # fmt: skip
        embeddings = np.asarray(self.text_embeddings)
        if embeddings.ndim != 2 or embeddings.shape[1] != dim:
            raise InvalidInputError(
                f"expected text_embeddings (k, {dim}), as wide as X, got {embeddings.shape}"
            )
        texts = None if self.texts is None else tuple(self.texts)
        if texts is not None and (len(texts) != len(embeddings) or len(set(texts)) != len(texts)):
            raise InvalidInputError(
                f"expected one distinct text for each of {len(embeddings)} text embeddings, got "
                f"{len(texts)}: {', '.join(map(str, texts[:6]))}"
            )
        method = self.method or default_method(len(embeddings))
        return embeddings, texts, None, method, self.post or "l2"

    def _basis(self, given: Any) -> Basis:
        if isinstance(given, Basis):
            basis = given
        elif Path(given).is_dir():
            if self.criterion is None:
                raise InvalidInputError(
                    f"{given} is a directory of bases: choose one with criterion="
                )
            return BasisDirectory(given).load(self.criterion)
        else:
            basis = Basis.load(given)
        if self.criterion is not None and normalise_criterion(self.criterion) != basis.criterion:
            raise InvalidInputError(
                f"expected a basis of criterion {self.criterion!r}, got a basis of "
                f"{basis.criterion!r}: leave criterion= out, or pass the directory of bases"
            )
        return basis
