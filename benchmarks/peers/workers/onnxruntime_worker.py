"""ONNX Runtime as it is usually used: the bundle's graph in a session, and Pillow."""

from __future__ import annotations

from typing import Any

import loop
import numpy as np
import pillow_pixels

DIM = 512


class OnnxRuntime(loop.Engine):
    """A session on the CPU."""

    def __init__(self, options: dict[str, Any]) -> None:
        """Open the graph at the path `onnx`."""
        import onnxruntime

        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads = options["threads"]
        session_options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            options["onnx"], session_options, providers=["CPUExecutionProvider"]
        )
        # the graph can project onto bases; no basis is given
        self._none = {"weight": np.zeros((DIM, 0), np.float32), "bias": np.zeros(0, np.float32)}
        self.settings = "all graph optimisations (default), sequential, intra-op threads = cores"

    def decode(self, data: bytes) -> np.ndarray:
        """See `loop.Engine.decode`."""
        return pillow_pixels.decode(data)

    def run(self, batch: np.ndarray) -> np.ndarray:
        """See `loop.Engine.run`."""
        return self._session.run(["embedding"], {"image": batch, **self._none})[0]


if __name__ == "__main__":
    loop.run(OnnxRuntime)
