"""Bases that many servers share: in a directory that all can reach, or in an object store.

```
s3://bucket/bases/
  4f1e8c0d2a7b6e35/                        a model: the first 16 digits of its fingerprint
    files/3f2a….safetensors                a basis, named by its SHA-256; it never changes
    versions/color.00000007.json           {"schema": 1, "sha256": "3f2a…"}: color, seventh change
    versions/shape.00000002.json           {"schema": 1, "sha256": null}: shape is deleted
```

The version with the highest number counts. A change writes the basis and then creates the next
version, which succeeds for one of several writers; the others look again and take the number after.
So the order of changes depends on no clock, and a reader sees a change completely or not at all.
A version that cannot be read is passed over for the one before it. Basis files are never removed.
"""

from __future__ import annotations

import logging
import re
from types import MappingProxyType

import msgspec

from crl_sdk.basis._basis import Basis
from crl_sdk.basis._directory import BasisDirectory
from crl_sdk.errors import BasisError, CrlError
from crl_sdk.serving._bases import BasisStore, StoredBasis, store_error
from crl_sdk.serving._basis_watcher import BasisWatcher
from crl_sdk.storage._checksummed_safetensors import SUFFIX
from crl_sdk.storage._shared_files import SharedFiles, open_shared_files

POLL_SECONDS = 2.0
"""Seconds between two looks for changes, unless the operator wants others."""

_SCHEMA = 1
_KEPT_VERSIONS = 16
"""Versions of a criterion that are kept. A writer may sleep while others make that many changes."""

_ATTEMPTS = 100
_VERSION_NAME = re.compile(r"([a-z0-9_+-]{1,64})\.([0-9]{8,15})\.json")

_log = logging.getLogger(__name__)


class _Version(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Content of a file in `versions`.

    Attributes:
        schema: Schema of the file.
        sha256: SHA-256 of the basis; None if it was deleted.
    """

    schema: int
    sha256: str | None


class SharedBasisStore(BasisStore):
    """Bases of one model that many servers share. Each sees the changes of the others."""

    def __init__(
        self,
        url: str,
        fingerprint: str,
        *,
        poll_seconds: float = POLL_SECONDS,
        read_only: bool = False,
    ) -> None:
        """Store where the bases are. `open` reads them.

        Args:
            url: Directory or URL, see `open_shared_files`. Bases of other models may be there too.
            fingerprint: Fingerprint of the model.
            poll_seconds: Seconds between two looks for changes.
            read_only: Whether to refuse changes.

        Raises:
            InvalidInputError: If fsspec does not know the URL.
            MissingDependencyError: If fsspec or its driver for the URL is not installed.
        """
        super().__init__(fingerprint, read_only=read_only)
        self.place = f"{url.rstrip('/')}/{BasisDirectory('.').of_model(fingerprint).name}"
        self.watcher = BasisWatcher(self._refresh, poll_seconds, self.place)
        self._files: SharedFiles = open_shared_files(self.place)
        self._known: dict[str, tuple[int, StoredBasis | None]] = {}  # newest version that was read
        self._warned: set[str] = set()

    def open(self) -> None:
        """Read the bases, and begin to look for changes.

        Raises:
            BasisError: If the place cannot be read.
        """
        try:
            self._refresh()
        except OSError as error:
            raise BasisError(
                f"{self.place}: the shared bases cannot be read ({error.strerror or error}); check "
                "the place, its credentials and --shared-bases"
            ) from error
        self._start_watching()

    def put(self, basis: Basis, *, replace: bool = True) -> tuple[StoredBasis, bool]:
        """Store a basis, see `BasisStore.put`. Other servers see it at their next look."""
        self.require_writable()
        basis.require_fingerprint(self.fingerprint)
        stored = StoredBasis(basis, basis.sha256())
        with self._changing:
            try:
                return stored, self._put(stored, replace)
            except OSError as error:
                raise self._error(f"store {basis.criterion!r}", error) from error

    def delete(self, criterion: str) -> None:
        """Delete a basis, see `BasisStore.delete`. Other servers see it at their next look."""
        self.require_writable()
        with self._changing:
            try:
                while True:
                    newest = self._read()
                    (stored,) = self.select([criterion])
                    name = stored.basis.criterion
                    if self._create(name, newest[name] + 1, None):
                        return
            except OSError as error:
                raise self._error(f"delete {criterion!r}", error) from error

    def _put(self, stored: StoredBasis, replace: bool) -> bool:
        """Store a basis and return whether it replaced another one."""
        name = stored.basis.criterion
        written = False
        for _ in range(_ATTEMPTS):
            newest = self._read()
            existed = name in self._bases
            if not replace:
                self.require_new(name)
            if existed and self._bases[name].sha256 == stored.sha256:
                return True
            if not written:
                self._files.write(_basis_name(stored.sha256), stored.basis.to_bytes())
                written = True
            if self._create(name, newest.get(name, 0) + 1, stored):
                return existed
        raise OSError(f"{_ATTEMPTS} other changes of {name!r} came first")

    def _create(self, criterion: str, number: int, stored: StoredBasis | None) -> bool:
        """Create a version and return True; return False if another writer was faster."""
        version = _Version(schema=_SCHEMA, sha256=stored.sha256 if stored else None)
        try:
            self._files.create(_version_name(criterion, number), msgspec.json.encode(version))
        except FileExistsError:
            return False
        self._known[criterion] = (number, stored)
        if stored is None:
            self._drop(criterion)
        else:
            self._keep(stored)
        try:
            self._files.remove(_version_name(criterion, number - _KEPT_VERSIONS))
        except OSError as error:
            _log.warning("%s: an old version cannot be removed (%s)", self.place, error)
        return True

    def _refresh(self) -> None:
        """Read what others have changed."""
        with self._changing:
            self._read()

    def _read(self) -> dict[str, int]:
        """Read the versions that are new, and return the highest number of each criterion.

        Raises:
            OSError: If the place cannot be read, or has lost versions. The bases then stay.
        """
        numbers: dict[str, list[int]] = {}
        for file in self._files.names("versions"):
            if match := _VERSION_NAME.fullmatch(file):
                numbers.setdefault(match[1].replace("+", " "), []).append(int(match[2]))
        if lost := sorted(self._known.keys() - numbers.keys()):  # a deletion is a version too
            raise OSError(f"it has lost all versions of {', '.join(lost)}")
        for criterion, found in numbers.items():
            for number in sorted(found, reverse=True):
                known = self._known.get(criterion)
                if known is not None and known[0] >= number:
                    break
                try:
                    self._known[criterion] = (number, self._load(criterion, number))
                    break
                except (FileNotFoundError, CrlError) as error:
                    self._warn(_version_name(criterion, number), error)
        bases = {name: stored for name, (_, stored) in self._known.items() if stored is not None}
        self._bases = MappingProxyType(bases)
        return {criterion: max(found) for criterion, found in numbers.items()}

    def _load(self, criterion: str, number: int) -> StoredBasis | None:
        """Return the basis of a version, or None if the version says that it was deleted.

        Raises:
            CrlError: If the version or its basis is damaged or does not belong here.
            FileNotFoundError: If the version or its basis is missing.
            OSError: If the place cannot be read.
        """
        try:
            version = msgspec.json.decode(
                self._files.read(_version_name(criterion, number)), type=_Version
            )
        except msgspec.MsgspecError as error:
            raise BasisError(f"not a version of a basis ({error})") from error
        if version.schema != _SCHEMA:
            raise BasisError(f"schema {version.schema}, this SDK reads {_SCHEMA}")
        if version.sha256 is None:
            return None
        name = _basis_name(version.sha256)
        basis = Basis.from_bytes(self._files.read(name), where=f"{self.place}/{name}")
        basis.require_fingerprint(self.fingerprint)
        if (basis.criterion, basis.sha256()) != (criterion, version.sha256):
            raise BasisError(f"{name} holds another basis, of {basis.criterion!r}")
        return StoredBasis(basis, version.sha256)

    def _warn(self, name: str, error: Exception) -> None:
        """Log once that a version is passed over."""
        if name not in self._warned:
            self._warned.add(name)
            _log.warning(
                "%s/%s: passed over (%s); put the basis again, and the version before is served "
                "until then", self.place, name, getattr(error, "strerror", None) or error,
            )  # fmt: skip

    def _error(self, what: str, error: OSError) -> BasisError:
        reason = error.strerror or str(error)
        message = f"{self.place}: cannot {what} ({reason})"
        return store_error(what, message, error, "--shared-bases")


def _basis_name(sha256: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", sha256):  # it becomes part of a path
        raise BasisError(f"expected a SHA-256 of 64 hex digits, got {sha256[:80]!r}")
    return f"files/{sha256}{SUFFIX}"


def _version_name(criterion: str, number: int) -> str:
    return f"versions/{criterion.replace(' ', '+')}.{number:08d}.json"
