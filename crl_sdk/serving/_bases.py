"""The server's bases: a directory that it owns, reads at the start and changes while it runs.

Readers take a snapshot, an immutable mapping that later changes do not affect. A change is written
to disk before readers see it, and a file is replaced as a whole: if the process is killed at any
moment, either the old or the new basis remains.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from crl_sdk._criterion import normalise_criterion
from crl_sdk.basis._basis import Basis
from crl_sdk.basis._directory import BasisDirectory, basis_file_name
from crl_sdk.errors import (
    BasisError,
    BasisExistsError,
    BasisStoreError,
    CriterionError,
    CrlError,
    UnknownCriterionError,
)
from crl_sdk.storage._atomic_files import delete_file, make_directory, remove_leftovers
from crl_sdk.storage._checksummed_safetensors import SUFFIX

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredBasis:
    """A basis and its version.

    Attributes:
        basis: Basis.
        sha256: SHA-256 of its file, in hexadecimal.
    """

    basis: Basis
    sha256: str


class BasisStore:
    """Bases of one model in a directory of bases. Any thread may change them, one by one."""

    def __init__(self, directory: Path, fingerprint: str) -> None:
        """Store the directory of bases and the model's fingerprint. `open` reads the bases."""
        self.directory = BasisDirectory(directory).of_model(fingerprint)
        self.fingerprint = fingerprint
        self._bases: Mapping[str, StoredBasis] = MappingProxyType({})
        self._changing = threading.Lock()
        self._lock_file: int | None = None

    def open(self) -> None:
        """Lock the model's directory and read its bases. Other files are skipped and kept.

        Raises:
            BasisError: If another server owns the directory, or it cannot be created or read.
        """
        try:
            make_directory(self.directory, BasisError)
            self._lock_file = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except (BasisError, OSError) as error:
            reason = getattr(error.__cause__ or error, "strerror", error)
            raise BasisError(
                f"{self.directory}: cannot be used for bases ({reason}); choose another directory "
                "with --bases"
            ) from error
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise BasisError(
                f"{self.directory}: another server owns it; stop that server, or choose another "
                "directory with --bases"
            ) from error
        if loose := sorted(self.directory.parent.glob(f"*{SUFFIX}")):
            _log.warning(
                "%d bases in %s are in no directory of a model and are not served, such as %s: "
                "move those of this model to %s", len(loose), self.directory.parent, loose[0].name,
                self.directory,
            )  # fmt: skip
        remove_leftovers(self.directory, f"*{SUFFIX}")
        bases = {}
        for path in sorted(self.directory.glob(f"*{SUFFIX}")):
            try:
                basis = Basis.load(path)
                basis.require_fingerprint(self.fingerprint)
                if path.name != basis_file_name(basis.criterion):
                    raise BasisError(f"{path}: holds the basis of {basis.criterion!r}; rename it")
            except CrlError as error:
                _log.warning("basis skipped: %s", error)
                continue
            bases[basis.criterion] = StoredBasis(basis, basis.sha256())
        self._bases = MappingProxyType(bases)

    def close(self) -> None:
        """Unlock the directory. It may be called more than once."""
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    @property
    def snapshot(self) -> Mapping[str, StoredBasis]:
        """Immutable mapping from criterion to basis, as of now."""
        return self._bases

    def select(self, criteria: Sequence[str]) -> list[StoredBasis]:
        """Return the bases of criteria, all from the same moment.

        Raises:
            CriterionError: If a name is malformed or occurs twice.
            UnknownCriterionError: If a criterion has no basis. The message lists the known ones.
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

    def require_new(self, criterion: str) -> None:
        """Raise an error if a criterion has a basis already.

        Raises:
            CriterionError: If the criterion is malformed.
            BasisExistsError: If it has a basis.
        """
        name = normalise_criterion(criterion)
        if name in self._bases:
            raise BasisExistsError(
                f"there is a basis {name!r} already: delete it first, or allow it to be replaced"
            )

    def put(self, basis: Basis, *, replace: bool = True) -> tuple[StoredBasis, bool]:
        """Store a basis. It is on disk when this method returns.

        Args:
            basis: Basis to store.
            replace: Whether an existing basis of the same criterion is replaced.

        Returns:
            The stored basis, and whether it replaced another one.

        Raises:
            BasisMismatchError: If the basis was made for another model.
            BasisExistsError: If the criterion has a basis already and `replace` is false.
            BasisError: If the file cannot be written.
        """
        basis.require_fingerprint(self.fingerprint)
        stored = StoredBasis(basis, basis.sha256())
        with self._changing:
            existed = basis.criterion in self._bases
            if not replace:
                self.require_new(basis.criterion)
            try:
                basis.save(self.directory / basis_file_name(basis.criterion))
            except BasisError as error:
                what = f"store {basis.criterion!r}"
                raise _disk_error(what, str(error), error.__cause__) from error
            self._bases = MappingProxyType({**self._bases, basis.criterion: stored})
        return stored, existed

    def delete(self, criterion: str) -> None:
        """Delete a basis and its file.

        Raises:
            UnknownCriterionError: If the criterion has no basis.
            BasisError: If the file cannot be deleted.
        """
        with self._changing:
            (stored,) = self.select([criterion])
            name = stored.basis.criterion
            path = self.directory / basis_file_name(name)
            try:
                delete_file(path)
            except OSError as error:
                message = f"{path}: cannot be deleted ({error.strerror})"
                raise _disk_error(f"delete {name!r}", message, error) from error
            self._bases = MappingProxyType({k: v for k, v in self._bases.items() if k != name})


def _disk_error(what: str, message: str, error: BaseException | None) -> BasisError:
    """Log what failed, with its path, and return the error for the client, who gets no paths.

    Args:
        what: What the server could not do.
        message: What the operator needs to know.
        error: Error of the system, which has the reason.
    """
    _log.error("%s", message)
    reason = getattr(error, "strerror", None) or "unknown reason"
    forbidden = getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS)
    return (BasisStoreError if forbidden else BasisError)(
        f"the server cannot {what} ({reason}): its operator must mend the disk of --bases; the "
        "server's log names the file"
    )
