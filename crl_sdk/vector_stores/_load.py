"""Write stored embeddings to a vector store, and go on where an earlier run stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import numpy as np

from crl_sdk._version import __version__
from crl_sdk.basis._basis import Basis, require_one_model
from crl_sdk.errors import InvalidInputError, StoreMismatchError, VectorStoreError
from crl_sdk.model._fingerprint import short_fingerprint
from crl_sdk.projection._projection import Projection
from crl_sdk.stored._directory import UNIVERSAL
from crl_sdk.vector_stores._contract import (
    RECORD_SCHEMA,
    Collection,
    Rows,
    StoredField,
    StoreRecord,
    VectorStore,
)
from crl_sdk.vector_stores._fields import criterion_of, field_of
from crl_sdk.vector_stores._rows import RowBatch, StoredRows


@dataclass(slots=True)
class LoadReport:
    """What a run of `store_embeddings` did.

    Attributes:
        new: Rows that were written.
        completed: Rows that were there and got vectors of further criteria.
        there: Rows that were there with all their vectors.
        failed: Rows of images that failed, which are left out.
        total: Rows of the source.
        fields: Name of the vector of each criterion, and of the universal embeddings.
        seconds: Duration.
    """

    new: int = 0
    completed: int = 0
    there: int = 0
    failed: int = 0
    total: int = 0
    fields: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def done(self) -> int:
        """Rows of the source that are dealt with."""
        return self.new + self.completed + self.there + self.failed

    def progress(self) -> str:
        """Return how many rows are in, for a message."""
        return (
            f"{self.new + self.completed + self.there:,} of {self.total:,} rows are in the store "
            f"({self.failed:,} of failed images were left out)"
        )


def store_embeddings(
    rows: StoredRows,
    store: VectorStore,
    bases: Sequence[Basis] = (),
    *,
    universal: bool = True,
    fingerprint: str | None = None,
    batch_rows: int | None = None,
    progress: Callable[[LoadReport], None] | None = None,
) -> LoadReport:
    """Write embeddings to a collection, which is made if there is none.

    Rows are written by id. A run that was stopped is repeated as it was: rows that are there with
    all their vectors are left alone. A criterion that the collection lacks is added to it, and its
    other vectors stay as they are.

    Args:
        rows: The stored embeddings.
        store: The open store.
        bases: Bases of the criteria, at most one of each.
        universal: Whether the universal embeddings are written too.
        fingerprint: Fingerprint of the bundle; None if no bundle is given.
        batch_rows: Number of rows that are written at once. None: what suits the store.
        progress: Called after each batch with what was done so far.

    Returns:
        What was done.

    Raises:
        BasisMismatchError: If embeddings and bases belong to different models.
        InvalidInputError: If an id occurs twice, or neither bases nor `universal` are given.
        StoreMismatchError: If the collection belongs to another model, or has another version of a
            basis, or was not made by this SDK.
        VectorStoreError: If the store fails. The message says how many rows are in.
    """
    started = time.perf_counter()
    model = _model_of(rows, bases, fingerprint)
    wanted = _wanted(rows, bases, universal)
    if not wanted:
        raise InvalidInputError(
            "expected at least one criterion or the universal embeddings: pass --criteria 'color'"
        )
    rows.require_distinct_ids()
    report = LoadReport(total=rows.size, fields={f.criterion or UNIVERSAL: name
                                                 for name, f in wanted.items()})  # fmt: skip
    projections = {field_of(basis.criterion): basis.projection for basis in bases}
    writer = _Writer(store, wanted, projections, report)
    prepare(store, model, wanted)
    empty = not store.count()
    with _telling(store, report):
        for batch in rows.batches(batch_rows or store.batch_rows):
            good, dropped = _without_failed(batch)
            report.failed += dropped
            if good.ids:
                has = {} if empty else store.filled(good.ids, list(wanted))
                writer.write(good, has)
            if progress is not None:
                progress(report)
        store.finish(list(wanted))
    report.seconds = time.perf_counter() - started
    return report


def read_record(store: VectorStore, collection: Collection) -> StoreRecord:
    """Return the record of a collection, checked against the vectors that the store has.

    Raises:
        StoreMismatchError: If the collection was not made by this SDK, or was changed since.
    """
    vectors = ", ".join(f"{name} {dim}" for name, dim in collection.dims.items()) or "no vectors"
    if not collection.record:
        raise StoreMismatchError(
            f"{store.address}: this collection was not made by crl store (it has {vectors}"
            f"{', ' + collection.other if collection.other else ''}), so nothing says which model "
            "its vectors are of: choose another name"
        )
    try:
        record = msgspec.json.decode(collection.record.encode(), type=StoreRecord)
    except msgspec.MsgspecError as error:
        raise StoreMismatchError(
            f"{store.address}: the record of this collection cannot be read ({error}): use the "
            "version of crl-embeddings that wrote it, or another name"
        ) from error
    if record.schema != RECORD_SCHEMA:
        raise StoreMismatchError(
            f"{store.address}: its record has schema {record.schema}, this SDK reads "
            f"{RECORD_SCHEMA}: install the version that wrote it, {record.crl_sdk}"
        )
    if collection.other:
        raise StoreMismatchError(
            f"{store.address}: expected vectors that are compared by cosine, found "
            f"{collection.other}: choose another name"
        )
    for name, stored in record.fields.items():
        if collection.dims.get(name, stored.dim) != stored.dim:
            raise StoreMismatchError(
                f"{store.address}: expected vectors {name!r} of {stored.dim} values, as its record "
                f"says, found {collection.dims[name]}: it was changed; choose another name"
            )
    return record


def prepare(store: VectorStore, model: str, wanted: Mapping[str, StoredField]) -> None:
    """Make the collection, or add to it what it lacks, or refuse it.

    The record of a field is written before the field, so that a run that was killed between them
    is repeated without harm.
    """
    there = store.describe()
    if there is None:
        record = StoreRecord(
            schema=RECORD_SCHEMA, crl_sdk=__version__, fingerprint=model, fields=dict(wanted)
        )
        store.create(_encode(record), {name: each.dim for name, each in wanted.items()})
        return
    record = read_record(store, there)
    _require_same(store, record, model, wanted)
    lacking = {name: each for name, each in wanted.items() if name not in record.fields}
    foreign = sorted(set(lacking) & set(there.dims))
    if foreign:
        raise StoreMismatchError(
            f"{store.address}: has vectors {', '.join(foreign)} that crl store did not write: "
            "remove them, or choose another name"
        )
    if lacking and store.closed_to_fields:
        raise VectorStoreError(
            f"{store.address}: lacks {', '.join(lacking)}, and {store.closed_to_fields}: write all "
            "criteria to a new collection"
        )
    if lacking:
        record = msgspec.structs.replace(record, fields={**record.fields, **lacking})
        store.write_record(_encode(record))
    for name, each in wanted.items():
        if name not in there.dims:
            store.add_field(name, each.dim)


def _require_same(
    store: VectorStore, record: StoreRecord, model: str, wanted: Mapping[str, StoredField]
) -> None:
    """Check that a collection holds the same model and the same versions of bases."""
    if record.fingerprint != model:
        raise StoreMismatchError(
            f"{store.address}: holds embeddings of model {short_fingerprint(record.fingerprint)}, "
            f"these are of {short_fingerprint(model)}, and the two cannot be compared: choose "
            "another name for the collection, or embed the images with that model"
        )
    for name, each in wanted.items():
        has = record.fields.get(name)
        if has is not None and has != each:
            raise StoreMismatchError(
                f"{store.address}: holds version {has.basis_sha256[:12]}… of {each.criterion!r} "
                f"({has.dim} values), the basis given is version {each.basis_sha256[:12]}… "
                f"({each.dim} values), and the two cannot be compared: name the directory of the "
                "other version with --bases, give this one another name with crl basis create, or "
                "choose another name for the collection"
            )


def fields_of(bases: Sequence[Basis]) -> dict[str, StoredField]:
    """Return what a record says about the vectors of bases, by name.

    Raises:
        InvalidInputError: If two bases have one criterion.
    """
    fields = {
        field_of(basis.criterion): StoredField(
            criterion=basis.criterion,
            dim=basis.projection.output_dim,
            basis_sha256=basis.sha256(),
        )
        for basis in bases
    }
    if len(fields) != len(bases):
        raise InvalidInputError(
            f"expected each criterion once, got {[basis.criterion for basis in bases]}"
        )
    return fields


def _wanted(rows: StoredRows, bases: Sequence[Basis], universal: bool) -> dict[str, StoredField]:
    first = {UNIVERSAL: StoredField(criterion="", dim=rows.dim, basis_sha256="")}
    wanted = {**(first if universal else {}), **fields_of(bases)}
    for basis in bases:
        if basis.projection.input_dim != rows.dim:
            raise InvalidInputError(
                f"basis {basis.criterion!r} is for embeddings of {basis.projection.input_dim} "
                f"values, {rows.path} has {rows.dim}: name the files of that model"
            )
    return wanted


def _model_of(rows: StoredRows, bases: Sequence[Basis], fingerprint: str | None) -> str:
    known = rows.fingerprint or fingerprint
    if rows.fingerprint and fingerprint and rows.fingerprint != fingerprint:
        raise StoreMismatchError(
            f"{rows.path} was made by model {short_fingerprint(rows.fingerprint)}, --bundle is "
            f"{short_fingerprint(fingerprint)}: name the bundle that made the embeddings"
        )
    if bases:
        return require_one_model(bases, known)
    if known is None:
        raise InvalidInputError(
            f"{rows.path} does not say which model made it: name its bundle with --bundle"
        )
    return known


def _without_failed(batch: RowBatch) -> tuple[RowBatch, int]:
    good = np.isfinite(batch.universal).all(axis=1)
    if good.all():
        return batch, 0
    kept = np.flatnonzero(good)
    return (
        RowBatch(
            [batch.ids[i] for i in kept], [batch.paths[i] for i in kept], batch.universal[kept]
        ),
        int((~good).sum()),
    )


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes what the store lacks of a batch, and counts it."""

    store: VectorStore
    wanted: Mapping[str, StoredField]
    projections: Mapping[str, Projection]
    report: LoadReport

    def write(self, batch: RowBatch, has: Mapping[str, set[str]]) -> None:
        """Write the rows of a batch; `has` says which vectors the rows have that are there."""
        new: list[int] = []
        lacking: dict[frozenset[str], list[int]] = {}
        for position, each in enumerate(batch.ids):
            if each not in has:
                new.append(position)
            elif lacks := frozenset(self.wanted) - has[each]:
                lacking.setdefault(lacks, []).append(position)
            else:
                self.report.there += 1
        if new:
            self.store.insert(self._rows(batch, new, self.wanted))
            self.report.new += len(new)
        for names, chosen in lacking.items():
            self.store.fill(self._rows(batch, chosen, names))
            self.report.completed += len(chosen)

    def _rows(self, batch: RowBatch, chosen: list[int], names: Iterable[str]) -> Rows:
        universal = batch.universal[chosen]
        vectors = {
            name: universal if name == UNIVERSAL else self.projections[name].apply(universal)
            for name in names
        }
        return Rows([batch.ids[i] for i in chosen], [batch.paths[i] for i in chosen], vectors)


@contextmanager
def _telling(store: VectorStore, report: LoadReport) -> Iterator[None]:
    """Add to an error how many rows are in, and how to go on."""
    try:
        yield
    except StoreMismatchError:
        raise
    except VectorStoreError as error:
        raise VectorStoreError(
            f"{error}. {report.progress()}; run the same command again when the store is back: it "
            "goes on where it stopped"
        ) from None


def _encode(record: StoreRecord) -> str:
    return msgspec.json.encode(record, order="deterministic").decode()


def criteria_of(record: StoreRecord) -> list[str]:
    """Return the criteria of a collection."""
    return [each.criterion or criterion_of(name) for name, each in record.fields.items()
            if name != UNIVERSAL]  # fmt: skip
