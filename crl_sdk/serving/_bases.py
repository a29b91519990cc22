"""The server's bases: a directory it owns, read at the start, changed while it runs.

Readers take a snapshot: an immutable mapping that no later change touches. A change is on disk
before it is seen, and a file is replaced whole, so that a kill at any moment leaves the old or the
new basis.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from crl_sdk._criterion import normalise_criterion
from crl_sdk.basis._basis import Basis, basis_path
from crl_sdk.errors import (
    BasisError,
    BasisExistsError,
    CriterionError,
    CrlError,
    UnknownCriterionError,
)
from crl_sdk.storage._checksummed_safetensors import SUFFIX

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredBasis:
    """A basis with the digest of its file: its version."""

    basis: Basis
    sha256: str


class BasisStore:
    """Bases of one model in one directory. Changes come from any thread, one at a time."""

    def __init__(self, directory: Path, fingerprint: str) -> None:
        """Store where the bases are; `open` reads them."""
        self.directory = directory
        self.fingerprint = fingerprint
        self._bases: Mapping[str, StoredBasis] = MappingProxyType({})
        self._changing = threading.Lock()
        self._lock_file: int | None = None

    def open(self) -> None:
        """Take the directory and read its bases; files that are not of this model are left alone.

        Raises:
            BasisError: another server owns the directory, or it cannot be made or read.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock_file = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise BasisError(f"{self.directory}: cannot be used ({error.strerror})") from error
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise BasisError(
                f"{self.directory}: another server owns it; stop that one, or give this one a "
                "directory of its own with --bases"
            ) from error
        for leftover in self.directory.glob(f".*{SUFFIX}.*.tmp"):  # of a write that was killed
            leftover.unlink(missing_ok=True)
        found = {}
        for path in sorted(self.directory.glob(f"*{SUFFIX}")):
            try:
                basis = Basis.load(path)
                basis.require_fingerprint(self.fingerprint)
                if path.name != basis_path(self.directory, basis.criterion).name:
                    raise BasisError(f"{path}: holds the basis of {basis.criterion!r}; rename it")
            except CrlError as error:
                _log.warning("basis skipped: %s", error)
                continue
            found[basis.criterion] = StoredBasis(basis, basis.sha256())
        self._bases = MappingProxyType(found)

    def close(self) -> None:
        """Give the directory back. Idempotent."""
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    @property
    def snapshot(self) -> Mapping[str, StoredBasis]:
        """All bases as of now, by criterion; it never changes."""
        return self._bases

    def select(self, criteria: Sequence[str]) -> list[StoredBasis]:
        """Give the bases of criteria, all of one moment.

        Raises:
            CriterionError: a name is malformed or given twice.
            UnknownCriterionError: there is no basis of a name; lists those there are.
        """
        bases = self._bases
        names = [normalise_criterion(criterion) for criterion in criteria]
        if len(set(names)) != len(names):
            raise CriterionError(f"expected each criterion once, got {names}")
        unknown = [name for name in names if name not in bases]
        if unknown:
            raise UnknownCriterionError(
                f"no basis {unknown[0]!r}; known are {sorted(bases)}. Add it with PutBasis or "
                f"crl basis create {unknown[0]!r}"
            )
        return [bases[name] for name in names]

    def put(self, basis: Basis, *, replace: bool = True) -> tuple[StoredBasis, bool]:
        """Store a basis; it is on disk when this returns.

        Returns:
            What is stored, and whether it replaced another.

        Raises:
            BasisMismatchError: it was made for another model.
            BasisExistsError: there is one of its name already and `replace` is false.
            BasisError: it cannot be written.
        """
        basis.require_fingerprint(self.fingerprint)
        stored = StoredBasis(basis, basis.sha256())
        with self._changing:
            existed = basis.criterion in self._bases
            if existed and not replace:
                raise BasisExistsError(f"there is a basis {basis.criterion!r} already")
            basis.save(basis_path(self.directory, basis.criterion))
            self._bases = MappingProxyType({**self._bases, basis.criterion: stored})
        return stored, existed

    def delete(self, criterion: str) -> None:
        """Remove a basis.

        Raises:
            UnknownCriterionError: there is none of this name.
            BasisError: its file cannot be removed.
        """
        with self._changing:
            (stored,) = self.select([criterion])
            name = stored.basis.criterion
            path = basis_path(self.directory, name)
            try:
                path.unlink()
            except OSError as error:
                raise BasisError(f"{path}: cannot be removed ({error.strerror})") from error
            self._bases = MappingProxyType({k: v for k, v in self._bases.items() if k != name})
