"""Which TensorRT is installed: one shim over its flavours and their versions."""

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

_FIRST = {"tensorrt-rtx": (1, 4), "tensorrt": (10, 3)}
"""The oldest version of each that this package writes for; 10.3 is JetPack 6's."""


@dataclass(frozen=True, slots=True)
class TensorRTRuntime:
    """An installed TensorRT.

    Attributes:
        runtime: its flavour.
        version: as it tells, such as `1.7.1.116`.
        module: its Python bindings; both flavours have one API.
    """

    runtime: PlanRuntime
    version: str
    module: Any

    @property
    def architectures(self) -> tuple[str, ...]:
        """What it compiles for on any machine; empty where only for the GPU it finds."""
        if self.runtime == "tensorrt":
            return ()
        names = self.module.ComputeCapability.__members__
        numbers = sorted(int(name[2:]) for name in names if name.startswith("SM"))
        return tuple(f"sm{number}" for number in numbers)

    @property
    def network_flags(self) -> int:
        """How networks are made: types come from the graph, and nothing is made fp16 unasked.

        Strong typing is a flag of TensorRT 10 and of TensorRT-RTX; TensorRT 11 knows nothing else.
        """
        if self.runtime == "tensorrt" and _numbers(self.version) >= (11,):
            return 0
        return 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def logger(self) -> Any:
        """Make a logger for it: errors are kept in its `errors`, the rest goes to `logging`."""
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
        MissingDependencyError: it is not installed.
        PlanError: it is older than what this package writes for.
    """
    module = _import_rtx() if runtime == "tensorrt-rtx" else _import("tensorrt")
    if module is None:
        extra = "tensorrt-rtx" if runtime == "tensorrt-rtx" else "tensorrt"
        raise MissingDependencyError(runtime, extra, f"--runtime {runtime}")
    version, first = str(module.__version__), _FIRST[runtime]
    if _numbers(version) < first:
        raise PlanError(
            f"expected {runtime} {'.'.join(map(str, first))} or newer, found {version}: upgrade it"
        )
    return TensorRTRuntime(runtime, version, module)


def _import_rtx() -> Any:
    """Import TensorRT-RTX; its wheel of bindings finds its libraries only once they are loaded."""
    if (module := _import("tensorrt_rtx")) is not None:
        return module
    libraries = importlib.util.find_spec("tensorrt_rtx_libs")
    for folder in (libraries.submodule_search_locations or ()) if libraries else ():
        for library in sorted(Path(folder).glob("lib*.so*"), reverse=True):  # the parser needs it
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
