"""A scikit-learn transformer: universal embeddings in, conditional embeddings out."""

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
from crl_sdk.basis._basis import Basis, Method, basis_path
from crl_sdk.basis._methods import TEXT_COLUMNS, default_method, make_projection
from crl_sdk.errors import InvalidInputError
from crl_sdk.projection._projection import Post, Projection


class ConditionalTransformer(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # untyped
    """Conditional embeddings as a step of a pipeline: `post(x @ weight + bias)`.

    It learns nothing of X, unless `centre` is set. Criteria, methods and normalisations can be
    searched like any parameter: `{"crl__criterion": ["color", "shape"], "crl__method": ["cosine",
    "centred"]}`. Constructor and parameters follow scikit-learn: nothing is checked before `fit`.

    Args:
        basis: a Basis, the path of its file, or a directory of bases, as `crl basis create` fills
            it; None to give `text_embeddings`.
        criterion: which basis of the directory; a basis of another criterion is refused.
        texts: k texts, the names of the columns; beside `text_embeddings` alone.
        text_embeddings: (k, d) float, unit rows, as `embed_text` of an `Embedder` or a `Client`
            gives them.
        method: how to make the projection of the texts, see `crl_sdk.basis`; None takes that of
            the basis as it is, and `centred` for texts. Made anew it knows no reference images,
            and those that begin with `exclusive` cannot be made without a basis' against.
        post: normalisation of each row; None for the basis' own, or `l2` for texts.
        centre: take the mean of X in `fit` as that of typical images, which the method removes;
            the projection is then made anew of the texts.

    Attributes:
        projection_: the map, a `Projection`.
        texts_: the texts, a tuple; None if their names were not given.
        method_: how it was made.
        n_features_in_: d.
    """

    def __init__(
        self,
        basis: Basis | str | os.PathLike[str] | None = None,
        *,
        criterion: str | None = None,
        texts: Sequence[str] | None = None,
        text_embeddings: NDArray[Any] | None = None,
        method: Method | None = None,
        post: Post | None = None,
        centre: bool = False,
    ) -> None:
        """Store the parameters; see the class."""
        self.basis = basis
        self.criterion = criterion
        self.texts = texts
        self.text_embeddings = text_embeddings
        self.method = method
        self.post = post
        self.centre = centre

    def fit(self, X: Any, y: Any = None) -> ConditionalTransformer:
        """Make the projection.

        Args:
            X: (n, d) float, universal embeddings, unit rows.
            y: not used.

        Returns:
            itself.

        Raises:
            InvalidInputError: neither a basis nor text embeddings are given, or both; X is of
                another dimension than they are; a parameter is malformed.
            BasisError: a basis file cannot be read.
            IntegrityError: it is not a basis file.
            ValueError: X is not a finite (n, d) array, as scikit-learn says it.
        """
        del y
        checked = validate_data(self, X, dtype=[np.float32, np.float64])
        embeddings, texts, made, method, post = self._source(checked.shape[1])
        if made is None or self.method is not None or self.centre:
            made = make_projection(
                embeddings, method, post=post, reference=checked if self.centre else None
            )
        self.projection_ = Projection(made.weight, made.bias, post)
        self.texts_, self.method_ = texts, method
        if self.projection_.input_dim != self.n_features_in_:
            raise InvalidInputError(
                f"expected X of {self.projection_.input_dim} columns, the embeddings of the model "
                f"that the basis was made for, got {self.n_features_in_}"
            )
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Give the conditional embeddings of universal ones.

        Args:
            X: (n, d) float, unit rows.

        Returns:
            (n, m) float32.

        Raises:
            ValueError: X is not a finite (n, d) array, as scikit-learn says it.
        """
        check_is_fitted(self)
        checked = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        return self.projection_.apply(checked)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Name the columns: the texts where each column is one, else `crl0`, `crl1` and on.

        Args:
            input_features: not used; checked as scikit-learn asks.
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
        if self.method_ in TEXT_COLUMNS and self.texts_ is not None:
            return np.asarray(self.texts_, dtype=object)
        return np.asarray([f"crl{i}" for i in range(columns)], dtype=object)

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that the output is float32, whatever the input."""
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _source(
        self, dim: int
    ) -> tuple[NDArray[Any], tuple[str, ...] | None, Projection | None, Method, Post]:
        """Give text embeddings, texts, the projection as it is if there is one, method and post."""
        if (self.basis is None) == (self.text_embeddings is None):
            raise InvalidInputError(
                "expected either basis=, a Basis or its path, or text_embeddings= (k, d); got "
                + ("neither" if self.basis is None else "both")
            )
        if self.basis is not None:
            if self.texts is not None:
                raise InvalidInputError(
                    "expected texts= beside text_embeddings= alone: a basis has its own"
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
        method = self.method or default_method(against=False)
        return embeddings, texts, None, method, self.post or "l2"

    def _basis(self, given: Any) -> Basis:
        if isinstance(given, Basis):
            basis = given
        elif Path(given).is_dir():
            if self.criterion is None:
                raise InvalidInputError(
                    f"{given} is a directory of bases: name one of them with criterion="
                )
            return Basis.load(basis_path(Path(given), self.criterion))
        else:
            basis = Basis.load(given)
        if self.criterion is not None and normalise_criterion(self.criterion) != basis.criterion:
            raise InvalidInputError(
                f"expected a basis of criterion {self.criterion!r}, got one of "
                f"{basis.criterion!r}: leave criterion= out, or pass the directory of bases"
            )
        return basis
