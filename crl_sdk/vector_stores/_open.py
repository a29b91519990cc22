"""Open the collection of an address."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from crl_sdk.errors import VectorStoreError
from crl_sdk.vector_stores._address import StoreAddress, parse_address
from crl_sdk.vector_stores._contract import VectorStore
from crl_sdk.vector_stores._registry import STORES


def open_store(
    address: str | StoreAddress, password: str = "", *, create: bool = True
) -> VectorStore:
    """Connect to a collection of a vector store. The collection need not exist.

    Args:
        address: Address in one of `crl_sdk.vector_stores.FORMS`.
        password: Password or API key, if the address has none.
        create: Whether a directory or file that does not exist is created.

    Returns:
        The store. Close it, or use it as a context manager.

    Raises:
        InvalidInputError: If the address is malformed.
        MissingDependencyError: If the store's package is not installed.
        VectorStoreError: If the store cannot be reached, or does not exist and is not created.
    """
    where = parse_address(address, password) if isinstance(address, str) else address
    local = where.location and "://" not in where.location
    if not create and local and not Path(where.location).exists():
        raise VectorStoreError(
            f"{where}: {where.location} does not exist; make it with crl store STORED --to {where}"
        )
    chosen = STORES[where.kind]
    store: type[VectorStore] = getattr(import_module(f"{__package__}.{chosen.module}"), chosen.name)
    return store.open(where)
