"""Bulk embedding: many pictures into a directory of Parquet parts, resumed after any end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.bulk._add_criteria import add_criteria
    from crl_sdk.bulk._job import BulkJob, Progress
    from crl_sdk.bulk._part import PartCounts, PartTask, make_part, open_job_embedder
    from crl_sdk.bulk._sources import ParquetColumns

__all__ = [
    "BulkJob",
    "ParquetColumns",
    "PartCounts",
    "PartTask",
    "Progress",
    "add_criteria",
    "make_part",
    "open_job_embedder",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_add_criteria": ("add_criteria",),
        "_job": ("BulkJob", "Progress"),
        "_part": ("PartCounts", "PartTask", "make_part", "open_job_embedder"),
        "_sources": ("ParquetColumns",),
    },
    extra="parquet",
)
