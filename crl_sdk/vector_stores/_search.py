"""Search a collection by one or several criteria.

The store is asked once for each criterion. The rows that any of these lists names are then scored
exactly, from their stored vectors, as `crl_sdk.tasks.Index` does. A row that no list names cannot
score higher than the sum of the worst similarity in each list (Fagin's threshold algorithm). The
lists are made longer until this sum is below the last result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._basis import Basis
from crl_sdk.errors import (
    BasisMismatchError,
    CriterionError,
    InvalidInputError,
    StoreMismatchError,
    VectorStoreError,
)
from crl_sdk.model._fingerprint import short_fingerprint
from crl_sdk.projection._projection import EPSILON, check_embeddings
from crl_sdk.stored._directory import UNIVERSAL
from crl_sdk.vector_stores._contract import StoreRecord, VectorStore
from crl_sdk.vector_stores._fields import field_of
from crl_sdk.vector_stores._load import criteria_of, fields_of, read_record

FIRST_CANDIDATES = 100
"""Rows that the store is asked for at first, for each criterion."""

MOST_CANDIDATES = 3200
"""Rows that the store is asked for at most, for each criterion."""

_GROWTH = 4
_DECIMALS = 6  # as in `Index`: copies of an image must have equal scores


@dataclass(frozen=True, slots=True, eq=False)
class StoreResults:
    """Rows that a search found, best first. Equal scores are in the order of the ids.

    Attributes:
        ids: Ids.
        paths: Paths of the images.
        scores: Scores that the rows are ranked by, shape (n,), float32.
        parts: Cosine of each criterion, each of shape (n,), float32.
        weights: Weight of each criterion.
        candidates: Rows that the store was asked for, for each criterion.
        complete: Whether no other row can score higher, if the lists of the store are right. It is
            False if that would have taken more than `MOST_CANDIDATES`.
    """

    ids: list[str]
    paths: list[str]
    scores: NDArray[np.float32]
    parts: Mapping[str, NDArray[np.float32]]
    weights: Mapping[str, float]
    candidates: int
    complete: bool


def open_record(store: VectorStore) -> StoreRecord:
    """Return the record of a collection that is to be searched.

    Raises:
        VectorStoreError: If there is no such collection.
        StoreMismatchError: If it was not made by this SDK.
    """
    there = store.describe()
    if there is None:
        raise VectorStoreError(
            f"{store.address}: there is no such collection; make it with crl store STORED --to "
            f"{store.address} --criteria 'color'"
        )
    return read_record(store, there)


def require_searchable(
    store: VectorStore,
    record: StoreRecord,
    bases: Sequence[Basis],
    fingerprint: str,
    *,
    universal: bool = False,
) -> None:
    """Check that a collection has the vectors of bases, of the same model and versions.

    Args:
        store: The open store.
        record: Record of its collection.
        bases: Bases of the query.
        fingerprint: Fingerprint of the model that embedded the query.
        universal: Whether universal embeddings are compared.

    Raises:
        BasisMismatchError: If the model of the query is another one.
        CriterionError: If a criterion is missing in the collection.
        StoreMismatchError: If the collection has another version of a basis.
    """
    if record.fingerprint != fingerprint:
        raise BasisMismatchError(
            f"{store.address}: holds embeddings of model {short_fingerprint(record.fingerprint)}, "
            f"the query is of {short_fingerprint(fingerprint)}: name the other bundle with --bundle"
        )
    if universal and UNIVERSAL not in record.fields:
        raise CriterionError(
            f"{store.address}: has no universal embeddings, it has {criteria_of(record)}: name one "
            f"with --criteria, or add them with crl store STORED --to {store.address}"
        )
    for name, each in fields_of(bases).items():
        has = record.fields.get(name)
        if has is None:
            raise CriterionError(
                f"{store.address}: has no vectors of {each.criterion!r}, it has "
                f"{criteria_of(record)}: add them with crl store STORED --to {store.address} "
                f"--criteria '{each.criterion}'"
            )
        if has != each:
            raise StoreMismatchError(
                f"{store.address}: its vectors of {each.criterion!r} are of version "
                f"{has.basis_sha256[:12]}… of the basis, the one given is "
                f"{each.basis_sha256[:12]}…: name the directory of that version with --bases"
            )


def search_store(
    store: VectorStore,
    query: Mapping[str, NDArray[Any]],
    weights: Mapping[str, float] | None = None,
    n: int = 10,
    *,
    candidates: int | None = None,
) -> StoreResults:
    """Find the rows nearest to a query.

    score = sum over the criteria of weight * cosine, as in `crl_sdk.tasks.Index.nearest`.

    Args:
        store: The open store.
        query: Row of each criterion, shape (m,) or (1, m), of a float dtype. The criterion
            `universal` stands for the universal embeddings.
        weights: Weight of each criterion, not 0. A negative weight prefers dissimilar images. None
            gives every criterion of the query the weight 1.
        n: Largest number of results.
        candidates: Rows that the store is asked for, for each criterion. None: as many as it
            takes, from `FIRST_CANDIDATES` up to `MOST_CANDIDATES`.

    Returns:
        The best n rows.

    Raises:
        CriterionError: If a criterion is malformed or missing in the query.
        InvalidInputError: If a row or a weight is not finite, or `n` is below 1.
        VectorStoreError: If the store fails.
    """
    chosen = dict.fromkeys(query, 1.0) if weights is None else dict(weights)
    _check(query, chosen, n)
    fields = {name: _field(name) for name in chosen}
    units = {name: _unit(query[name]) for name in chosen}
    asked = candidates or max(FIRST_CANDIDATES, 10 * n)
    while True:
        names: dict[str, None] = {}
        lists: dict[str, list[str]] = {}
        for name, field in fields.items():
            sign = np.float32(np.sign(chosen[name]))
            lists[name] = store.search(field, sign * units[name], asked)
            names.update(dict.fromkeys(lists[name]))
        rows = store.fetch(list(names), list(fields.values()))
        parts = {name: _cosines(rows.vectors[fields[name]], units[name]) for name in chosen}
        scores = np.zeros(len(rows))
        for name, values in parts.items():
            scores += chosen[name] * values.astype(np.float64)
        order = np.lexsort((np.array(rows.ids, dtype=object), -np.round(scores, _DECIMALS)))
        order = order[np.isfinite(scores[order])][:n]
        bound = sum(
            _worst(lists[name], asked, rows.ids, chosen[name] * parts[name]) for name in chosen
        )
        complete = bound == -np.inf or (len(order) == n and bool(scores[order[-1]] >= bound))
        if complete or candidates is not None or asked >= MOST_CANDIDATES:
            break
        asked = min(asked * _GROWTH, MOST_CANDIDATES)
    return StoreResults(
        ids=[rows.ids[i] for i in order],
        paths=[rows.paths[i] for i in order],
        scores=scores[order].astype(np.float32),
        parts={name: values[order] for name, values in parts.items()},
        weights=chosen,
        candidates=asked,
        complete=complete,
    )


def _check(query: Mapping[str, Any], weights: Mapping[str, float], n: int) -> None:
    if n < 1:
        raise InvalidInputError(f"expected n >= 1, got {n}")
    if not weights or not all(np.isfinite(w) and w != 0 for w in weights.values()):
        raise InvalidInputError(
            f"expected weights that are numbers other than 0, got {dict(weights)}"
        )
    for name in weights:
        if name not in query:
            raise CriterionError(f"the query has no criterion {name!r}, it has {sorted(query)}")


def _field(name: str) -> str:
    return UNIVERSAL if name == UNIVERSAL else field_of(name)


def _unit(row: NDArray[Any]) -> NDArray[np.float32]:
    given = np.atleast_2d(np.asarray(row))
    one = check_embeddings(given, given.shape[-1])
    if len(one) != 1:
        raise InvalidInputError(
            f"expected one query row, got {len(one)}: search for one query at a time"
        )
    return np.asarray(one[0] / max(float(np.linalg.norm(one[0])), EPSILON), np.float32)


def _cosines(rows: NDArray[np.float32], unit: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cosine of each row with a unit row; 0 for rows of zeros, NaN for missing rows."""
    lengths = np.linalg.norm(rows, axis=1)
    scales = np.where(lengths > EPSILON, 1 / np.maximum(lengths, EPSILON), 0)
    scales[np.isnan(lengths)] = np.nan
    return np.asarray((rows @ unit) * scales, np.float32)


def _worst(
    found: Sequence[str], asked: int, ids: Sequence[str], values: NDArray[np.float32]
) -> float:
    """Return the lowest value in a list, which rows outside it do not exceed.

    Args:
        found: Ids of the list.
        asked: Length of the list that was asked for. A shorter one has all rows.
        ids: Ids of the values.
        values: Weighted cosines, shape (n,).
    """
    if len(found) < asked:
        return -np.inf
    inside = set(found)
    listed = [float(value) for each, value in zip(ids, values, strict=True) if each in inside]
    return min(listed, default=-np.inf)
