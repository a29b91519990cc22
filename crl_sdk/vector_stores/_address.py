"""Addresses of collections in vector stores, such as `qdrant://localhost:6333/photos`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from crl_sdk.errors import InvalidInputError
from crl_sdk.vector_stores._registry import FORMS, STORES, StoreKind

DEFAULT_COLLECTION = "images"

_COLLECTION = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,62}")
_OTHER_NAMES = {"postgres": "postgresql"}
_TLS = "+https"
_HIDDEN = "***"


@dataclass(frozen=True, slots=True, repr=False)
class StoreAddress:
    """Where a collection is. Its text never shows the password.

    Attributes:
        kind: Kind of the store: `qdrant`, `lancedb`, `postgresql` or `milvus`.
        collection: Name of the collection or table.
        location: Directory, file or URI of a store that is opened in this process; empty for a
            server.
        host: Host of the server; empty for a store that is opened in this process.
        port: Port of the server.
        tls: Whether the server is reached over https.
        database: Database of the server. Empty if it has none.
        user: User; may be empty.
        password: Password or API key; may be empty.
    """

    kind: str
    collection: str
    location: str = ""
    host: str = ""
    port: int = 0
    tls: bool = False
    database: str = ""
    user: str = ""
    password: str = ""

    def __str__(self) -> str:
        """Return the address without its password."""
        if self.location:
            return f"{self.kind}:{self.location}#{self.collection}"
        who = self.user + (f":{_HIDDEN}" if self.password else "")
        host = f"[{self.host}]" if ":" in self.host else self.host
        where = f"{who}{'@' if who else ''}{host}:{self.port}"
        scheme = f"{self.kind}+https" if self.tls else self.kind
        if self.database:
            return f"{scheme}://{where}/{self.database}#{self.collection}"
        return f"{scheme}://{where}/{self.collection}"

    __repr__ = __str__

    def scrub(self, text: object) -> str:
        """Return a text, such as the message of a driver, without the password."""
        shown = " ".join(str(text).split())
        return shown.replace(self.password, _HIDDEN) if self.password else shown


def parse_address(text: str, password: str = "") -> StoreAddress:
    """Return the parts of an address.

    Args:
        text: Address in one of `crl_sdk.vector_stores.FORMS`.
        password: Password or API key, if the address has none.

    Raises:
        InvalidInputError: If the address has another form. The message does not repeat it, because
            it may hold a password.

    Example:
        >>> from crl_sdk.vector_stores import parse_address
        >>> parse_address("qdrant://:secret@localhost/photos")
        qdrant://:***@localhost:6333/photos
    """
    scheme, colon, rest = text.strip().partition(":")
    scheme = _OTHER_NAMES.get(scheme.lower(), scheme.lower())
    name = scheme.removesuffix(_TLS)
    kind = STORES.get(name)
    if not colon or not rest or kind is None or (scheme != name and not kind.tls):
        raise _wrong(scheme if colon else text.strip(), "an unknown kind of store")
    if rest.startswith("//"):
        if not kind.port:
            raise _wrong(scheme, f"it is opened in this process: {', '.join(kind.forms(name))}")
        return _parse_server(kind, scheme, rest, password)
    if not kind.local or scheme != name:
        raise _wrong(scheme, "it has no '//HOST'")
    location, _, collection = rest.partition("#")
    if not location:
        raise _wrong(scheme, f"it names no {kind.local}")
    return StoreAddress(name, _collection(collection, scheme), location)


def _parse_server(kind: StoreKind, scheme: str, rest: str, password: str) -> StoreAddress:
    try:
        parts = urlsplit(f"{scheme}:{rest}")
        port = parts.port or kind.port
    except ValueError:
        raise _wrong(scheme, "host or port is malformed") from None
    if not parts.hostname:
        raise _wrong(scheme, "it names no host")
    if parts.query:
        raise _wrong(scheme, "options after '?' are not read")
    path = parts.path.strip("/")
    database, name = "", path
    if kind.database:
        database, name = unquote(path), parts.fragment
        if not database:
            raise _wrong(scheme, "it names no database")
    elif parts.fragment or "/" in path:
        raise _wrong(scheme, "the collection is the path: //HOST:PORT/COLLECTION")
    return StoreAddress(
        scheme.removesuffix(_TLS),
        _collection(name, scheme),
        host=parts.hostname,
        port=port,
        tls=scheme.endswith(_TLS),
        database=database,
        user=unquote(parts.username or ""),
        password=unquote(parts.password or "") or password,
    )


def _collection(name: str, scheme: str) -> str:
    name = name or DEFAULT_COLLECTION
    if not _COLLECTION.fullmatch(name):
        raise _wrong(
            scheme,
            "a collection has 1 to 63 letters, digits, '_' and '-', a letter first",
        )
    return name


def _wrong(scheme: str, why: str) -> InvalidInputError:
    return InvalidInputError(
        f"expected a store such as {', '.join(FORMS)}, with '#NAME' for another table than "
        f"{DEFAULT_COLLECTION!r}; got one that begins with {scheme[:20]!r}: {why}"
    )
