"""Triton model (python backend): runs `model.onnx` beside this file with ONNX Runtime.

`crl export-triton --backend python` copies this file to `model.py`. It needs numpy and onnxruntime
in Triton's Python, and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton

_BYTE_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp")


class TritonPythonModel:
    """Runs the rows of all requests of a batch at once."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph with the number of threads in the configuration."""
        config = json.loads(args["model_config"])
        self.outputs = [each["name"] for each in config["output"]]
        options = onnxruntime.SessionOptions()
        threads = config["parameters"].get("intra_op_thread_count", {}).get("string_value", "0")
        options.intra_op_num_threads, options.inter_op_num_threads = int(threads), 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not any(each in Path("/proc/cpuinfo").read_text() for each in _BYTE_PRODUCTS):
            # without these instructions, int8 products overflow unless ONNX Runtime is told
            options.add_session_config_entry("session.x64quantprecision", "1")
        graph = Path(__file__).resolve().with_name("model.onnx")
        self.session = onnxruntime.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"]
        )
        self.input = self.session.get_inputs()[0].name

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return a response for each request."""
        rows = [triton.get_input_tensor_by_name(each, self.input).as_numpy() for each in requests]
        results = self.session.run(self.outputs, {self.input: np.concatenate(rows)})
        ends = np.cumsum([len(each) for each in rows])[:-1]
        parts = [np.split(_encoded(result), ends) for result in results]
        return [
            triton.InferenceResponse(
                output_tensors=[
                    triton.Tensor(name, np.ascontiguousarray(part))
                    for name, part in zip(self.outputs, each, strict=True)
                ]
            )
            for each in zip(*parts, strict=True)
        ]


def _encoded(values: Any) -> Any:
    """Return strings as bytes, which is how Triton takes them."""
    return np.char.encode(values.astype(str)).astype(object) if values.dtype == object else values
