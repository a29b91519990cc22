"""OpenVINO with the bundle's fp32 graph in f32 or bf16, or quantised to int8 by NNCF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loop
import numpy as np
import pillow_pixels


class OpenVino(loop.Engine):
    """A compiled model on the CPU that serves one request at a time."""

    def __init__(self, options: dict[str, Any]) -> None:
        """Compile the graph at the path `onnx` in `precision`."""
        import openvino

        core, precision = openvino.Core(), options["precision"]
        if precision == "int8":
            kept = Path(options["int8"])
            if not kept.exists():
                self._quantise(core, options, kept)
            model = core.read_model(kept)
        else:
            model = _tower(core.read_model(options["onnx"]))
        hint = {"f32": "f32", "bf16": "bf16", "int8": "f32"}[precision]
        properties = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": options["threads"],
        }
        self._request = core.compile_model(model, "CPU", properties).create_infer_request()
        self.settings = (
            f"LATENCY hint (two streams of half the batch each are no faster), {hint} activations, "
            "threads = cores" + (", NNCF post-training quantisation" if precision == "int8" else "")
        )

    def decode(self, data: bytes) -> np.ndarray:
        """See `loop.Engine.decode`."""
        return pillow_pixels.decode(data)

    def run(self, batch: np.ndarray) -> np.ndarray:
        """See `loop.Engine.run`."""
        return next(iter(self._request.infer({0: batch}).values()))

    def _quantise(self, core: Any, options: dict[str, Any], kept: Path) -> None:
        import nncf
        import openvino

        images = [self.decode(Path(file).read_bytes())[None] for file in options["calibration"]]
        quantised = nncf.quantize(
            _tower(core.read_model(options["onnx"])),
            nncf.Dataset(images),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(images),
        )
        openvino.save_model(quantised, kept, compress_to_fp16=False)


def _tower(model: Any) -> Any:
    """Reduce the graph to the image tower, since OpenVINO does not accept a basis of zero texts."""
    import openvino

    embedding = next(each for each in model.outputs if "embedding" in each.get_names())
    image = next(each for each in model.get_parameters() if each.get_friendly_name() == "image")
    return openvino.Model([embedding], [image])


if __name__ == "__main__":
    loop.run(OpenVino)
