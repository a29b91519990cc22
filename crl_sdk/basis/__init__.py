"""Bases: a criterion's texts, given or written by a local language model, and their projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._criterion import normalise_criterion
from crl_sdk._lazy import lazy_names
from crl_sdk._progress import GenerationProgress

if TYPE_CHECKING:
    from crl_sdk.basis._basis import Basis, MergedText
    from crl_sdk.basis._build import DEFAULT_PROMPT, build_basis, edit_basis
    from crl_sdk.basis._curated import CuratedList, curated_lists, find_curated
    from crl_sdk.basis._directory import BasisDirectory
    from crl_sdk.basis._from_vectors import build_basis_from_vectors
    from crl_sdk.basis._generate import GeneratedTexts, generate_texts
    from crl_sdk.basis._generation_options import GenerationOptions
    from crl_sdk.basis._language_model import LanguageModel
    from crl_sdk.basis._methods import (
        METHODS,
        PROJECTION_METHODS,
        Method,
        ProjectionMethod,
        make_projection,
    )
    from crl_sdk.basis._votes import RankedText

__all__ = [
    "DEFAULT_PROMPT",
    "METHODS",
    "PROJECTION_METHODS",
    "Basis",
    "BasisDirectory",
    "CuratedList",
    "GeneratedTexts",
    "GenerationOptions",
    "GenerationProgress",
    "LanguageModel",
    "MergedText",
    "Method",
    "ProjectionMethod",
    "RankedText",
    "build_basis",
    "build_basis_from_vectors",
    "curated_lists",
    "edit_basis",
    "find_curated",
    "generate_texts",
    "make_projection",
    "normalise_criterion",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_basis": ("Basis", "MergedText"),
        "_build": ("DEFAULT_PROMPT", "build_basis", "edit_basis"),
        "_curated": ("CuratedList", "curated_lists", "find_curated"),
        "_directory": ("BasisDirectory",),
        "_from_vectors": ("build_basis_from_vectors",),
        "_generate": ("GeneratedTexts", "generate_texts"),
        "_generation_options": ("GenerationOptions",),
        "_language_model": ("LanguageModel",),
        "_methods": (
            "METHODS",
            "PROJECTION_METHODS",
            "Method",
            "ProjectionMethod",
            "make_projection",
        ),
        "_votes": ("RankedText",),
    },
    extra="cpu",
)
