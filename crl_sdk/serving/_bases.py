"""The bases of a server: read at the start, and changed while it runs.

Readers take a snapshot, an immutable mapping that later changes do not affect. A change is stored
before readers see it, and a file is replaced as a whole: if the process is killed at any moment,
either the old or the new basis remains.

There are two stores. `DirectoryBasisStore` is a directory that one server owns, with its workers.
`SharedBasisStore` (`_shared_bases.py`) is a place that many servers share.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from crl_sdk.serving._basis_watcher import BasisWatcher
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


class BasisStore(ABC):
    """Bases of one model. Any thread may read and change them.

    Attributes:
        fingerprint: Fingerprint of the model.
        read_only: Whether the bases cannot be changed through this store.
        watcher: Looks for changes that other processes make; None if there are none.
    """

    def __init__(self, fingerprint: str, *, read_only: bool = False) -> None:
        """Store the model's fingerprint. `open` reads the bases."""
        self.fingerprint = fingerprint
        self.read_only = read_only
        self.watcher: BasisWatcher | None = None
        self._bases: Mapping[str, StoredBasis] = MappingProxyType({})
        self._changing = threading.Lock()

    @abstractmethod
    def open(self) -> None:
        """Read the bases.

        Raises:
            BasisError: If the place cannot be used. The message says what to do.
        """

    def close(self) -> None:
        """Stop watching, and free the place for others. It may be called more than once."""
        if self.watcher is not None:
            self.watcher.stop()

    def _start_watching(self) -> None:
        if self.watcher is not None:
            self.watcher.start()

    @abstractmethod
    def put(self, basis: Basis, *, replace: bool = True) -> tuple[StoredBasis, bool]:
        """Store a basis. It is stored when this method returns.

        Args:
            basis: Basis to store.
            replace: Whether an existing basis of the same criterion is replaced.

        Returns:
            The stored basis, and whether it replaced another one.

        Raises:
            BasisMismatchError: If the basis was made for another model.
            BasisExistsError: If the criterion has a basis already and `replace` is false.
            BasisStoreError: If the bases may not be changed.
            BasisError: If the basis cannot be written.
        """

    @abstractmethod
    def delete(self, criterion: str) -> None:
        """Delete a basis.

        Raises:
            UnknownCriterionError: If the criterion has no basis.
            BasisStoreError: If the bases may not be changed.
            BasisError: If the change cannot be written.
        """

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

    async def find(self, criteria: Sequence[str]) -> list[StoredBasis]:
        """Return the bases of criteria like `select`, but look again before one is unknown.

        Raises:
            CriterionError: If a name is malformed or occurs twice.
            UnknownCriterionError: If a criterion has no basis. The message lists the known ones.
        """
        try:
            return self.select(criteria)
        except UnknownCriterionError:
            if self.watcher is None:
                raise
            await self.watcher.look_again()
            return self.select(criteria)

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

    def require_writable(self) -> None:
        """Raise an error if the bases may not be changed.

        Raises:
            BasisStoreError: If they may not.
        """
        if self.read_only:
            raise BasisStoreError(
                "this server only reads its bases (--read-only-bases): change them where they are "
                "written, such as with crl basis publish"
            )

    def _keep(self, stored: StoredBasis) -> None:
        """Let readers see a basis."""
        self._bases = MappingProxyType({**self._bases, stored.basis.criterion: stored})

    def _drop(self, criterion: str) -> None:
        """Let readers no longer see a basis."""
        self._bases = MappingProxyType({k: v for k, v in self._bases.items() if k != criterion})


class DirectoryBasisStore(BasisStore):
    """Bases in a directory that one server owns. Its workers, if it has any, share it."""

    def __init__(
        self,
        directory: Path,
        fingerprint: str,
        *,
        read_only: bool = False,
        worker_poll_seconds: float | None = None,
    ) -> None:
        """Store the directory of bases and the model's fingerprint. `open` reads the bases.

        Args:
            directory: Directory of bases, which may also hold those of other models.
            fingerprint: Fingerprint of the model.
            read_only: Whether to refuse changes.
            worker_poll_seconds: Seconds between two looks for changes of other workers; None for a
                server without workers, which owns the directory alone.
        """
        super().__init__(fingerprint, read_only=read_only)
        self.directory = BasisDirectory(directory).of_model(fingerprint)
        self._lock_file: int | None = None
        self._has_workers = worker_poll_seconds is not None
        self._loaded: dict[str, tuple[object, StoredBasis | None]] = {}  # by file name
        if worker_poll_seconds is not None:
            self.watcher = BasisWatcher(self._refresh, worker_poll_seconds, str(self.directory))

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
            kind = fcntl.LOCK_SH if self._has_workers else fcntl.LOCK_EX
            fcntl.flock(self._lock_file, kind | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise BasisError(
                f"{self.directory}: another server owns it; stop that server, or choose another "
                "directory with --bases, or let both use one place with --shared-bases"
            ) from error
        if loose := sorted(self.directory.parent.glob(f"*{SUFFIX}")):
            _log.warning(
                "%d bases in %s are in no directory of a model and are not served, such as %s: "
                "move those of this model to %s", len(loose), self.directory.parent, loose[0].name,
                self.directory,
            )  # fmt: skip
        remove_leftovers(self.directory, f"*{SUFFIX}")
        self._read()
        self._start_watching()

    def close(self) -> None:
        """Unlock the directory. It may be called more than once."""
        super().close()
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def put(self, basis: Basis, *, replace: bool = True) -> tuple[StoredBasis, bool]:
        """Store a basis, see `BasisStore.put`. It is on disk when this method returns."""
        self.require_writable()
        basis.require_fingerprint(self.fingerprint)
        stored = StoredBasis(basis, basis.sha256())
        with self._alone():
            existed = basis.criterion in self._bases
            if not replace:
                self.require_new(basis.criterion)
            try:
                basis.save(self.directory / basis_file_name(basis.criterion))
            except BasisError as error:
                what = f"store {basis.criterion!r}"
                raise store_error(what, str(error), error.__cause__) from error
            self._keep(stored)
        return stored, existed

    def delete(self, criterion: str) -> None:
        """Delete a basis and its file, see `BasisStore.delete`."""
        self.require_writable()
        with self._alone():
            (stored,) = self.select([criterion])
            name = stored.basis.criterion
            path = self.directory / basis_file_name(name)
            try:
                delete_file(path)
            except OSError as error:
                message = f"{path}: cannot be deleted ({error.strerror})"
                raise store_error(f"delete {name!r}", message, error) from error
            self._drop(name)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no other thread or worker change the bases, and see what others have changed."""
        with self._changing, ExitStack() as cleanup:
            if self._has_workers:
                try:
                    opened = os.open(self.directory / ".changing", os.O_RDWR | os.O_CREAT, 0o644)
                    cleanup.callback(os.close, opened)
                    fcntl.flock(opened, fcntl.LOCK_EX)
                    self._read()
                except OSError as error:
                    message = f"{self.directory}: cannot be changed ({error.strerror})"
                    raise store_error("change its bases", message, error) from error
            yield

    def _refresh(self) -> None:
        """Read what other workers have changed."""
        with self._changing:
            self._read()

    def _read(self) -> None:
        """Read the files that are new or changed since they were read last.

        Raises:
            OSError: If the directory is away. The bases then stay.
        """
        self.directory.stat()  # `glob` finds nothing in a directory that is away
        served = {basis_file_name(name): stored for name, stored in self._bases.items()}
        loaded: dict[str, tuple[object, StoredBasis | None]] = {}
        for path in sorted(self.directory.glob(f"*{SUFFIX}")):
            try:
                status = path.stat()
            except FileNotFoundError:  # another worker has deleted it just now
                continue
            version = (status.st_ino, status.st_mtime_ns, status.st_size)
            known = self._loaded.get(path.name)
            if known is None or known[0] != version:
                known = (version, self._load(path) or served.get(path.name))
            loaded[path.name] = known
        bases = [stored for _, stored in loaded.values() if stored is not None]
        self._loaded = loaded
        self._bases = MappingProxyType({stored.basis.criterion: stored for stored in bases})

    def _load(self, path: Path) -> StoredBasis | None:
        """Return the basis in a file. One that is damaged, misnamed or strange is only logged."""
        try:
            basis = Basis.load(path)
            basis.require_fingerprint(self.fingerprint)
            if path.name != basis_file_name(basis.criterion):
                raise BasisError(f"{path}: holds the basis of {basis.criterion!r}; rename it")
        except CrlError as error:
            _log.warning("basis skipped: %s", error)
            return None
        return StoredBasis(basis, basis.sha256())


def store_error(
    what: str, message: str, error: BaseException | None, option: str = "the disk of --bases"
) -> BasisError:
    """Log what failed, with its path, and return the error for the client, who gets no paths.

    Args:
        what: What the server could not do.
        message: What the operator needs to know.
        error: Error of the system, which has the reason.
        option: What the operator must mend.
    """
    _log.error("%s", message)
    reason = getattr(error, "strerror", None) or "unknown reason"
    forbidden = getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS)
    return (BasisStoreError if forbidden else BasisError)(
        f"the server cannot {what} ({reason}): its operator must mend {option}; the server's "
        "log names the file"
    )
