"""The peers: which environment, script, options and settings each has."""

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
    """What all peers are given.

    Attributes:
        weights: one model in all formats.
        pictures: JPEGs that are timed and compared.
        calibration: other JPEGs, for who quantises.
        threads: physical cores.
    """

    weights: Weights
    pictures: tuple[Path, ...]
    calibration: tuple[Path, ...]
    threads: int


@dataclass(frozen=True, slots=True)
class EnginePeer:
    """An engine that a worker runs.

    Attributes:
        name: in the tables.
        environment: of its process.
        script: of `workers/`.
        options: that it is given.
        precision: `fp32`, `bf16`, `int8` or `auto`.
        variables: of its process's environment.
        prepares: whether its first start makes a file that stays; it is then started once before
            what is measured.
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
    """What engines and services are measured with.

    Attributes:
        environments: by name, those that could not be made too.
        pythons: interpreter of each environment.
        given: weights and pictures.
        reference: embeddings of the first pictures that all must agree with, (n, d) float32.
        logs: directory that takes what everybody says.
        tell: is told what is done now.
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
