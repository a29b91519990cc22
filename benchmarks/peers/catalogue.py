"""The engines that are compared: environment, script, options and precision of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crl_benchmarks.peers.environments import OWN
from crl_benchmarks.peers.records import Environment
from crl_benchmarks.peers.weights import ARCHITECTURE, Weights


@dataclass(frozen=True, slots=True)
class Inputs:
    """Input of all peers.

    Attributes:
        weights: One model in all formats.
        images: JPEG files for timing and comparing.
        calibration: Other JPEG files, for peers that quantise.
        threads: Number of threads, one per physical core.
    """

    weights: Weights
    images: tuple[Path, ...]
    calibration: tuple[Path, ...]
    threads: int


@dataclass(frozen=True, slots=True)
class EnginePeer:
    """An engine that a worker runs.

    Attributes:
        name: Name in the tables.
        environment: Name of its virtual environment.
        script: File name of its worker in `workers/`.
        options: Function that returns the options of the worker.
        precision: `fp32`, `bf16`, `int8` or `auto`.
        variables: Function that returns additional environment variables of the process.
        prepares: Whether its first start writes a file that later starts use. Such an engine is
            started once before the start that is measured.
    """

    name: str
    environment: str
    script: str
    options: Callable[[Inputs], dict[str, Any]]
    precision: str = "fp32"
    variables: Callable[[Inputs], Mapping[str, str]] = field(default=lambda _: {})
    prepares: bool = False


@dataclass(frozen=True, slots=True)
class Setup:
    """What engines and services need for being measured.

    Attributes:
        environments: Environments by name, including those that could not be created.
        pythons: Interpreter of each environment.
        given: Weights and images.
        reference: Embeddings of the first images that all must agree with, shape (n, d), float32.
        logs: Directory for the output of all processes.
        tell: Function that shows what is being done.
    """

    environments: Mapping[str, Environment]
    pythons: Mapping[str, Path]
    given: Inputs
    reference: NDArray[np.float32]
    logs: Path
    tell: Callable[[str], None]


CRL_FP32, CRL_AUTO, CRL_INT8 = "crl fp32", "crl auto", "crl int8"

CRL_BF16, CRL_OPENVINO = "crl bf16", "crl fp32 in OpenVINO"

_ENGINES = {
    CRL_FP32: "onnx/cpu/fp32",
    CRL_OPENVINO: "openvino/cpu/fp32",
    CRL_AUTO: "auto",
    CRL_INT8: "onnx/cpu/int8",
    CRL_BF16: "openvino/cpu/bf16",
}


def _crl(name: str) -> EnginePeer:
    return EnginePeer(
        name, OWN, "crl_worker.py",
        lambda given: {"bundle": str(given.weights.bundle), "engine": _ENGINES[name]},
        precision=name.split()[1],
    )  # fmt: skip


def _open_clip(name: str, precision: str, compiled: bool) -> EnginePeer:
    return EnginePeer(
        name, "open-clip", "open_clip_worker.py",
        lambda given: {
            "architecture": ARCHITECTURE, "weights": str(given.weights.open_clip),
            "precision": precision, "compile": compiled,
        },
        precision=precision,
    )  # fmt: skip


def _openvino(name: str, precision: str) -> EnginePeer:
    return EnginePeer(
        name, "openvino", "openvino_worker.py",
        lambda given: {
            "onnx": str(given.weights.onnx), "precision": precision,
            "int8": str(given.weights.root / "openvino-int8.xml"),
            "calibration": [str(path) for path in given.calibration],
        },
        precision="fp32" if precision == "f32" else precision, prepares=precision == "int8",
    )  # fmt: skip


ENGINES: tuple[EnginePeer, ...] = (
    *(_crl(name) for name in _ENGINES),
    EnginePeer(
        "ONNX Runtime", "onnxruntime", "onnxruntime_worker.py",
        lambda given: {"onnx": str(given.weights.onnx)},
    ),
    _openvino("OpenVINO fp32", "f32"),
    _openvino("OpenVINO bf16", "bf16"),
    _openvino("OpenVINO int8", "int8"),
    _open_clip("open_clip eager", "fp32", compiled=False),
    _open_clip("open_clip compiled", "fp32", compiled=True),
    _open_clip("open_clip compiled bf16", "bf16", compiled=True),
    EnginePeer(
        "transformers", "transformers", "transformers_worker.py",
        lambda given: {"model": str(given.weights.hugging_face)},
    ),
    EnginePeer(
        "faster-clip", "faster-clip", "faster_clip_worker.py", lambda _: {}, precision="int8",
        variables=lambda given: {
            "FASTER_CLIP_CACHE": str(given.weights.faster_clip),
            "RAYON_NUM_THREADS": str(given.threads),
        },
    ),
)  # fmt: skip
