"""What a vector store does for this SDK. Each store is one module that implements `VectorStore`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from crl_sdk.errors import CrlError, VectorStoreError
from crl_sdk.vector_stores._address import StoreAddress

RECORD_SCHEMA = 1

_REACHABLE = "check that it runs and is reachable"


class StoredField(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the record of a collection says about one vector of its rows.

    Attributes:
        criterion: Criterion in words; empty for the universal embeddings.
        dim: Length of the vector.
        basis_sha256: `Basis.sha256()` of the basis; empty for the universal embeddings.
    """

    criterion: str
    dim: int
    basis_sha256: str


class StoreRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The record that a collection carries: which model and which bases made its vectors.

    Attributes:
        schema: Schema of the record.
        crl_sdk: Version of the SDK that wrote it.
        fingerprint: Fingerprint of the model.
        fields: The vectors, by name.
    """

    schema: int
    crl_sdk: str
    fingerprint: str
    fields: dict[str, StoredField]


@dataclass(frozen=True, slots=True)
class Collection:
    """A collection as it is in the store.

    Attributes:
        record: JSON text of the record; empty if the collection was not made by this SDK.
        dims: Length of each vector that rows can have, by name.
        other: What else is known about vectors that are compared in another way than by their
            cosine, such as `color: Euclid`. Empty if there are none.
    """

    record: str
    dims: Mapping[str, int]
    other: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of a collection.

    Attributes:
        ids: Ids, unique in the collection.
        paths: Paths of the images.
        vectors: Vectors by name, each of shape (n, m), float32.
    """

    ids: Sequence[str]
    paths: Sequence[str]
    vectors: Mapping[str, NDArray[np.float32]]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)


class VectorStore(ABC):
    """An open collection. Every method may raise `VectorStoreError`.

    Attributes:
        batch_rows: Number of rows that are best written at once.
        address: Where the collection is.
        closed_to_fields: Why a collection that is there takes no further vectors; empty if it does.
    """

    batch_rows: ClassVar[int] = 1000

    def __init__(self, address: StoreAddress) -> None:
        """Store the address. `open` connects."""
        self.address = address
        self.closed_to_fields = ""
        self._dims: dict[str, int] = {}

    @classmethod
    @abstractmethod
    def open(cls, address: StoreAddress) -> VectorStore:
        """Connect to a store. Its collection need not exist.

        Raises:
            MissingDependencyError: If the store's package is not installed.
            VectorStoreError: If the store cannot be reached.
        """

    @abstractmethod
    def describe(self) -> Collection | None:
        """Return the collection as it is, or None if there is none."""

    @abstractmethod
    def create(self, record: str, dims: Mapping[str, int]) -> None:
        """Make the collection, with its record and its vectors, all at once.

        Args:
            record: JSON text of the record.
            dims: Length of each vector, by name. They are compared by cosine.
        """

    @abstractmethod
    def write_record(self, record: str) -> None:
        """Replace the record of the collection."""

    @abstractmethod
    def add_field(self, name: str, dim: int) -> None:
        """Add a vector to the collection, which no row has yet. Its rows stay as they are."""

    @abstractmethod
    def filled(self, ids: Sequence[str], fields: Sequence[str]) -> dict[str, set[str]]:
        """Return which of some vectors each row has.

        Args:
            ids: Ids to look up.
            fields: Names of vectors.

        Returns:
            Names of the vectors that a row has, by id. Ids that are not in the collection are left
            out.
        """

    @abstractmethod
    def insert(self, rows: Rows) -> None:
        """Write new rows. Rows that are there are replaced or left, never doubled."""

    @abstractmethod
    def fill(self, rows: Rows) -> None:
        """Write some vectors of rows that are there. Their other vectors stay as they are."""

    @abstractmethod
    def finish(self, fields: Sequence[str]) -> None:
        """Build what makes searches fast, when all rows are written."""

    @abstractmethod
    def search(self, field: str, row: NDArray[np.float32], count: int) -> list[str]:
        """Return the ids of the rows that are nearest by cosine, nearest first.

        Args:
            field: Name of the vector.
            row: Vector to compare with, shape (m,), float32.
            count: Number of rows. Fewer are returned only if the collection has fewer.
        """

    @abstractmethod
    def fetch(self, ids: Sequence[str], fields: Sequence[str]) -> Rows:
        """Return rows by their ids, in any order; NaN where a row lacks a vector."""

    @abstractmethod
    def count(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""

    def dim_of(self, field: str) -> int:
        """Return the length of a vector, which is asked of the store once."""
        if field not in self._dims:
            there = self.describe()
            self._dims = {} if there is None else dict(there.dims)
        if field not in self._dims:
            raise VectorStoreError(f"{self.address}: has no vectors {field!r}")
        return self._dims[field]

    def __enter__(self) -> VectorStore:
        """Return the store itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self.close()

    @contextmanager
    def doing(self, what: str, remedy: str = _REACHABLE) -> Iterator[None]:
        """Turn the errors of a driver into `VectorStoreError`, without the password.

        Args:
            what: What is being done, such as `read`.
            remedy: What the user should do.
        """
        with driver_errors(self.address, what, remedy):
            yield


@contextmanager
def driver_errors(address: StoreAddress, what: str, remedy: str = _REACHABLE) -> Iterator[None]:
    """Turn the errors of a driver into `VectorStoreError`, see `VectorStore.doing`.

    The driver's own error is not chained: its text may hold the password.
    """
    try:
        yield
    except CrlError:
        raise
    except Exception as error:  # drivers raise errors of many libraries below them
        why = address.scrub(error)[:300] or "no reason given"
        kind = type(error).__name__
        raise VectorStoreError(f"{address}: cannot {what} ({kind}: {why}); {remedy}") from None


def nan_rows(found: Sequence[Any], dim: int) -> NDArray[np.float32]:
    """Return vectors as an array, with NaN for those that are None.

    Args:
        found: Vectors or None, n of them.
        dim: Length of a vector.

    Returns:
        Vectors, shape (n, dim), float32.
    """
    rows = np.full((len(found), dim), np.nan, np.float32)
    for position, vector in enumerate(found):
        if vector is not None:
            rows[position] = vector
    return rows
