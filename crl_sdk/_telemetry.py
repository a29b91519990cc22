"""Switch off the telemetry of libraries before they are imported."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping

_ONNX = "ORT_DISABLE_TELEMETRY"
_log = logging.getLogger(__name__)

SWITCHES = {
    _ONNX: "1",  # ONNX Runtime 1.32: a device id, a database, and a host look-up
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub: facts about this machine in its requests
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray: facts about clusters that this process starts
    "DO_NOT_TRACK": "1",  # read by several libraries
}
"""Environment variables that switch telemetry off, with their values."""


def switch_off_telemetry(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that switch the telemetry of libraries off, unless they are set already.

    ONNX Runtime reads its variable when it is imported, and cannot be told later: its function
    `disable_telemetry_events` does not keep version 1.32 from reporting. A program that imports
    ONNX Runtime before `crl_sdk` sets `ORT_DISABLE_TELEMETRY=1` itself, and is warned otherwise.
    """
    if "onnxruntime" in sys.modules and _ONNX not in environment:
        _log.warning(
            "onnxruntime was imported before crl_sdk, and may report to its makers: import crl_sdk "
            "first, or set %s=1 before Python starts",
            _ONNX,
        )
    for name, value in SWITCHES.items():
        environment.setdefault(name, value)
