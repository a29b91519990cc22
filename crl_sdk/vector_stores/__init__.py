"""Vector stores: write embeddings to them, one vector per criterion, and search them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.vector_stores._address import StoreAddress, parse_address
    from crl_sdk.vector_stores._contract import (
        Collection,
        Rows,
        StoredField,
        StoreRecord,
        VectorStore,
    )
    from crl_sdk.vector_stores._fields import criterion_of, field_of
    from crl_sdk.vector_stores._load import LoadReport, store_embeddings
    from crl_sdk.vector_stores._open import open_store
    from crl_sdk.vector_stores._registry import FORMS
    from crl_sdk.vector_stores._rows import StoredRows
    from crl_sdk.vector_stores._search import (
        StoreResults,
        open_record,
        require_searchable,
        search_store,
    )

__all__ = [
    "FORMS",
    "Collection",
    "LoadReport",
    "Rows",
    "StoreAddress",
    "StoreRecord",
    "StoreResults",
    "StoredField",
    "StoredRows",
    "VectorStore",
    "criterion_of",
    "field_of",
    "open_record",
    "open_store",
    "parse_address",
    "require_searchable",
    "search_store",
    "store_embeddings",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_address": ("StoreAddress", "parse_address"),
        "_contract": ("Collection", "Rows", "StoreRecord", "StoredField", "VectorStore"),
        "_fields": ("criterion_of", "field_of"),
        "_load": ("LoadReport", "store_embeddings"),
        "_open": ("open_store",),
        "_registry": ("FORMS",),
        "_rows": ("StoredRows",),
        "_search": ("StoreResults", "open_record", "require_searchable", "search_store"),
    },
    extra="cpu",
)
