"""The installed TensorRT: one interface to enterprise TensorRT and TensorRT-RTX."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from crl_sdk.engines._tensorrt_plans import PlanRuntime
from crl_sdk.errors import MissingDependencyError, PlanError

_log = logging.getLogger(__name__)

_OLDEST = {"tensorrt-rtx": (1, 4), "tensorrt": (10, 3)}
"""Oldest supported versions. JetPack 6 has 10.3."""


@dataclass(frozen=True, slots=True)
class TensorRTRuntime:
    """An installed TensorRT.

    Attributes:
        runtime: Which TensorRT it is.
        version: Version that it reports, such as `1.7.1.116`.
        module: Its Python bindings. Both runtimes have the same API.
    """

    runtime: PlanRuntime
    version: str
    module: Any

    @property
    def architectures(self) -> tuple[str, ...]:
        """Architectures that it compiles for on any machine; empty if it needs the GPU itself."""
        if self.runtime == "tensorrt":
            return ()
        names = self.module.ComputeCapability.__members__
        numbers = sorted(int(name[2:]) for name in names if name.startswith("SM"))
        return tuple(f"sm{number}" for number in numbers)

    @property
    def network_flags(self) -> int:
        """Flags for a strongly typed network: every type comes from the graph.

        Strong typing is a flag of TensorRT 10 and of TensorRT-RTX. TensorRT 11 always uses it.
        """
        if self.runtime == "tensorrt" and _numbers(self.version) >= (11,):
            return 0
        return 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def logger(self) -> Any:
        """Return a logger for TensorRT that keeps errors in `errors`; `logging` gets the rest."""
        trt = self.module
        base: Any = trt.ILogger

        class Logger(base):  # type: ignore[misc]
            def __init__(self) -> None:
                base.__init__(self)
                self.errors: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                    self.errors.append(message)
                elif severity == trt.ILogger.WARNING:
                    _log.info("%s", message)
                else:
                    _log.debug("%s", message)

        return Logger()


@cache
def load_tensorrt(runtime: PlanRuntime) -> TensorRTRuntime:
    """Import a TensorRT.

    Raises:
        MissingDependencyError: If it is not installed.
        PlanError: If it is older than the oldest supported version.
    """
    module = _import_rtx() if runtime == "tensorrt-rtx" else _import("tensorrt")
    if module is None:
        extra = "tensorrt-rtx" if runtime == "tensorrt-rtx" else "tensorrt"
        raise MissingDependencyError(runtime, extra, f"--runtime {runtime}")
    version, oldest = str(module.__version__), _OLDEST[runtime]
    if _numbers(version) < oldest:
        raise PlanError(
            f"expected {runtime} {'.'.join(map(str, oldest))} or newer, found {version}: upgrade it"
        )
    return TensorRTRuntime(runtime, version, module)


def _import_rtx() -> Any:
    """Import TensorRT-RTX. The wheel of bindings needs its libraries to be loaded before."""
    if (module := _import("tensorrt_rtx")) is not None:
        return module
    libraries = importlib.util.find_spec("tensorrt_rtx_libs")
    for folder in (libraries.submodule_search_locations or ()) if libraries else ():
        for library in sorted(Path(folder).glob("lib*.so*"), reverse=True):  # the parser last
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return _import("tensorrt_rtx_bindings")


def _import(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        _log.info("%s is installed but does not load (%s)", name, error)
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
