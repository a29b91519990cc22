"""Writes stored embeddings to a store and prints a line after each batch; it is to be killed."""

from __future__ import annotations

import sys
from pathlib import Path

from crl_sdk import Basis
from crl_sdk.vector_stores import StoredRows, open_store, store_embeddings

if __name__ == "__main__":
    source, address, *bases = sys.argv[1:]
    with open_store(address) as store:
        store_embeddings(
            StoredRows.open(Path(source)), store, [Basis.load(path) for path in bases],
            batch_rows=100, progress=lambda report: print(report.done, flush=True),
        )  # fmt: skip
