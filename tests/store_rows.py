"""What the tests of vector stores share: a store in memory, stored embeddings and bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crl_sdk import Basis
from crl_sdk.projection import Projection
from crl_sdk.vector_stores import Collection, Rows, StoreAddress, VectorStore

MODEL = "a" * 64
DIM = 16


def basis(criterion: str, *, dim: int = 5, seed: int = 0, model: str = MODEL) -> Basis:
    """Return a basis with random projection."""
    rng = np.random.default_rng([seed, *criterion.encode()])
    texts = tuple(f"{criterion} {i}" for i in range(dim))
    rows = rng.standard_normal((dim, DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return Basis(
        criterion, texts, (1,) * dim, ("{}",), rows,
        Projection(np.ascontiguousarray(rows.T), np.zeros(dim, np.float32)), "cosine", model,
    )  # fmt: skip


def unit_rows(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Return random unit rows, shape (count, 16)."""
    rows = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def stored_file(
    path: Path,
    universal: NDArray[np.float32],
    *,
    names: Sequence[str] | None = None,
    model: str | None = MODEL,
) -> Path:
    """Write a file as `crl embed` does."""
    paths = [f"photos/{i}.jpg" for i in range(len(universal))] if names is None else list(names)
    arrays = {"path": np.array(paths), "universal": universal}
    if model is not None:
        arrays["fingerprint"] = np.array(model)
    np.savez(path, **arrays)
    return path


class MemoryStore(VectorStore):
    """A store in memory, which can go away after some calls."""

    batch_rows = 10

    def __init__(self, fails_after: int | None = None) -> None:
        super().__init__(StoreAddress("qdrant", "images", host="db", port=1, password="hunter2"))
        self.record: str | None = None
        self.dims: dict[str, int] = {}
        self.other = ""
        self.rows: dict[str, tuple[str, dict[str, NDArray[np.float32]]]] = {}
        self.writes: list[str] = []
        self.fails_after = fails_after
        self.asked: list[int] = []

    @classmethod
    def open(cls, address: StoreAddress) -> MemoryStore:
        raise NotImplementedError

    def _write(self, what: str) -> None:
        if self.fails_after is not None and len(self.writes) >= self.fails_after:
            with self.doing("be written to"):
                raise ConnectionError("no route to hunter2@db")
        self.writes.append(what)

    def describe(self) -> Collection | None:
        return None if self.record is None else Collection(self.record, self.dims, self.other)

    def create(self, record: str, dims: Mapping[str, int]) -> None:
        self.record, self.dims = record, dict(dims)

    def write_record(self, record: str) -> None:
        self.record = record

    def add_field(self, name: str, dim: int) -> None:
        self._write(f"add {name}")
        self.dims[name] = dim

    def filled(self, ids: Sequence[str], fields: Sequence[str]) -> dict[str, set[str]]:
        return {each: set(self.rows[each][1]) & set(fields) for each in ids if each in self.rows}

    def insert(self, rows: Rows) -> None:
        self._write(f"insert {len(rows)}")
        for i, each in enumerate(rows.ids):
            self.rows[each] = (rows.paths[i], {name: v[i] for name, v in rows.vectors.items()})

    def fill(self, rows: Rows) -> None:
        self._write(f"fill {len(rows)} {sorted(rows.vectors)}")
        for i, each in enumerate(rows.ids):
            self.rows[each][1].update({name: v[i] for name, v in rows.vectors.items()})

    def finish(self, fields: Sequence[str]) -> None:
        self.writes.append("finish")

    def search(self, field: str, row: NDArray[np.float32], count: int) -> list[str]:
        self.asked.append(count)
        cosines = {
            each: float(v[field] @ row / max(float(np.linalg.norm(v[field])), 1e-12))
            for each, (_, v) in self.rows.items()
            if field in v
        }
        return sorted(cosines, key=lambda each: -cosines[each])[:count]

    def fetch(self, ids: Sequence[str], fields: Sequence[str]) -> Rows:
        vectors = {
            name: np.stack(
                [self.rows[i][1].get(name, np.full(self.dims[name], np.nan)) for i in ids]
            ).astype(np.float32)
            for name in fields
        }
        return Rows(list(ids), [self.rows[i][0] for i in ids], vectors)

    def count(self) -> int:
        return len(self.rows)

    def close(self) -> None:
        pass
