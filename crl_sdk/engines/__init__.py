"""Engines: the runtimes that execute a bundle, the choice among them, and their verification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crl_sdk._lazy import lazy_names

if TYPE_CHECKING:
    from crl_sdk.engines._contract import ImageEngine, TextEngine
    from crl_sdk.engines._engine_name import EngineName, EnginePattern
    from crl_sdk.engines._family import EngineCandidate
    from crl_sdk.engines._kernels import ProjectionKernel
    from crl_sdk.engines._machine import Machine, inspect_machine
    from crl_sdk.engines._selection import (
        choose_engine,
        list_candidates,
        open_engine,
        open_text_engine,
    )
    from crl_sdk.engines._verify import KernelVerification, Verification, verify, verify_kernel

__all__ = [
    "EngineCandidate",
    "EngineName",
    "EnginePattern",
    "ImageEngine",
    "KernelVerification",
    "Machine",
    "ProjectionKernel",
    "TextEngine",
    "Verification",
    "choose_engine",
    "inspect_machine",
    "list_candidates",
    "open_engine",
    "open_text_engine",
    "verify",
    "verify_kernel",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_contract": (
            "ImageEngine",
            "TextEngine",
        ),
        "_engine_name": (
            "EngineName",
            "EnginePattern",
        ),
        "_kernels": ("ProjectionKernel",),
        "_machine": (
            "Machine",
            "inspect_machine",
        ),
        "_family": ("EngineCandidate",),
        "_selection": (
            "choose_engine",
            "list_candidates",
            "open_engine",
            "open_text_engine",
        ),
        "_verify": (
            "KernelVerification",
            "Verification",
            "verify",
            "verify_kernel",
        ),
    },
    extra="cpu",
)
