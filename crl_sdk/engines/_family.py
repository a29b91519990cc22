"""What a runtime offers to the choice of engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from crl_sdk.basis._basis import Basis
from crl_sdk.engines._contract import ImageEngine
from crl_sdk.engines._engine_name import EngineName, EnginePattern
from crl_sdk.engines._hardware import Hardware
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._parity import TOLERANCES, Tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCandidate:
    """An engine that exists for a bundle, whether or not it can run on this machine.

    Attributes:
        name: Name of the engine.
        usable: Whether it can run here.
        automatic: Whether `auto` may choose it.
        reason: Why it can run, why it cannot, or why `auto` does not choose it.
        starts_slowly: Whether its first start takes minutes, so that it is not tried on its own.
        measured: Whether it was compared and timed on this machine.
    """

    name: EngineName
    usable: bool
    automatic: bool
    reason: str
    starts_slowly: bool = False
    measured: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFamily:
    """All engines of one runtime: which there are, and how to open one.

    The module of a runtime defines its family, and `crl_sdk.engines._registry` lists it. Nothing
    else has to know the runtime.

    Attributes:
        runtime: First part of the engines' names, such as `onnx`.
        packages: Distributions whose installed versions `crl doctor` reports.
        list_candidates: Function that returns the engines of a bundle, best first, usable on this
            hardware or not. It raises no errors: a problem is the `reason` of its candidate.
        open: Function that opens an engine of a bundle by its name. The third argument is the
            number of threads of a run on a CPU, or None for one per physical core.
        open_baked: Function that opens one of the engines that a pattern selects, with a basis
            compiled into it. None if the runtime has no such engines.
        tolerances: By precision, how far embeddings may be from the fp32 graph's. A runtime that
            computes in a precision that no graph has adds its own.
        automatic_tolerances: The same for engines that `auto` may choose, where that is stricter.
    """

    runtime: str
    packages: tuple[str, ...]
    list_candidates: Callable[[ModelBundle, Hardware], list[EngineCandidate]]
    open: Callable[[ModelBundle, EngineName, int | None], ImageEngine]
    open_baked: Callable[[ModelBundle, EnginePattern, Basis], ImageEngine] | None = None
    tolerances: Mapping[str, Tolerance] = field(default_factory=lambda: TOLERANCES)
    automatic_tolerances: Mapping[str, Tolerance] = field(default_factory=dict)

    def automatic_tolerance(self, precision: str) -> Tolerance:
        """Return how far embeddings may be from the fp32 graph's for `auto` to choose an engine."""
        return self.automatic_tolerances.get(precision, self.tolerances[precision])
