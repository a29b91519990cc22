"""Triton model (python backend): encoded images to the pixels of a bundle's model.

`crl export-triton` copies this file to `model.py`, and what it imports from crl_sdk beside it. It
needs numpy and Pillow in Triton's Python, and nothing else.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the copy of crl_sdk

from crl_sdk._processors import count_processors  # noqa: E402
from crl_sdk.errors import ImageError  # noqa: E402
from crl_sdk.model._preprocess import PreprocessSpec, load_pixels  # noqa: E402


class TritonPythonModel:
    """Decodes and resizes the images of all requests of a batch in a pool of threads."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the preprocessing and start the threads."""
        spec = json.loads((HERE / "preprocess.json").read_text("utf-8"))
        self.spec = PreprocessSpec(**spec)
        self.pool = ThreadPoolExecutor(count_processors())

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return a response for each request: pixels, or an error that names its image."""
        return [self._answer(work) for work in [self._begin(request) for request in requests]]

    def finalize(self) -> None:
        """Stop the threads."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, request: Any) -> list[Future[Any]]:
        images = triton.get_input_tensor_by_name(request, "IMAGE").as_numpy().reshape(-1)
        return [
            self.pool.submit(load_pixels, bytes(image), self.spec, source=f"image {i}")
            for i, image in enumerate(images)
        ]

    def _answer(self, work: list[Future[Any]]) -> Any:
        try:
            pixels = np.stack([each.result() for each in work])
        except ImageError as error:
            refused = triton.TritonError(str(error), triton.TritonError.INVALID_ARG)
            return triton.InferenceResponse(output_tensors=[], error=refused)
        return triton.InferenceResponse(output_tensors=[triton.Tensor("PIXELS", pixels)])
