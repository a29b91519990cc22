"""The vector stores. A new store is one module and one line of `STORES`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreKind:
    """A kind of vector store, and the addresses of its collections.

    Attributes:
        module: Module of this package.
        name: Name of its class, a `VectorStore`.
        port: Port of its server; 0 if it has none.
        local: What an address without a server names, such as `DIR`; empty if it needs a server.
        database: Whether the path of an address is a database. Otherwise it is the collection.
        tls: Whether a server can be reached over https.
    """

    module: str
    name: str
    port: int = 0
    local: str = ""
    database: bool = False
    tls: bool = False

    def forms(self, scheme: str) -> list[str]:
        """Return the forms of addresses of this kind."""
        server = "//USER@HOST:PORT/DATABASE" if self.database else "//HOST:PORT/COLLECTION"
        found = [f"{scheme}:{self.local}"] if self.local else []
        found += [f"{scheme}:{server}"] if self.port else []
        return found + ([f"{scheme}+https:{server}"] if self.tls else [])


STORES = {
    "qdrant": StoreKind("_qdrant", "Qdrant", port=6333, local="DIR", tls=True),
    "lancedb": StoreKind("_lancedb", "LanceDB", local="DIR"),
    "postgresql": StoreKind("_pgvector", "PostgreSQL", port=5432, database=True),
    "milvus": StoreKind("_milvus", "Milvus", port=19530, local="FILE.db", tls=True),
}
"""Kinds of vector stores, by the scheme of their addresses."""

FORMS = tuple(form for scheme, kind in STORES.items() for form in kind.forms(scheme))
"""Forms of addresses. `#NAME` after one without COLLECTION names the collection or table."""
