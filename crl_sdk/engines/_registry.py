"""The runtimes of this package. To add one, write its module and add its family here."""

from __future__ import annotations

from crl_sdk.engines._engine_name import EngineName
from crl_sdk.engines._family import EngineFamily
from crl_sdk.engines._onnx import ONNX
from crl_sdk.engines._openvino import OPENVINO
from crl_sdk.engines._tensorrt_family import TENSORRT, TENSORRT_RTX

FAMILIES: tuple[EngineFamily, ...] = (TENSORRT_RTX, TENSORRT, ONNX, OPENVINO)
"""`auto` prefers the engines of an earlier family."""


def family_of(name: EngineName) -> EngineFamily:
    """Return the family that a candidate's engine belongs to."""
    return next(family for family in FAMILIES if family.runtime == name.runtime)
