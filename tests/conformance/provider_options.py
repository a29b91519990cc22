"""List the options of ONNX Runtime's GPU providers, found in their libraries. Needs no GPU.

The script downloads the wheels (400 MB) and writes `tests/engines/provider_options.json`. Tests
compare the options that `crl_sdk.engines` sets with this file. Run the script to support a newer
ONNX Runtime.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SOURCES = {
    "cuda": ("onnxruntime-gpu", "libonnxruntime_providers_cuda.so", rb"[a-z][a-z0-9_]{5,40}"),
    "tensorrt": ("onnxruntime-gpu", "libonnxruntime_providers_tensorrt.so", rb"trt_[a-z0-9_]+"),
    "tensorrt-rtx": (
        "onnxruntime-ep-nv-tensorrt-rtx-cu12",
        "libonnxruntime_providers_nv_tensorrt_rtx.so",
        rb"nv_[a-z0-9_]+",
    ),
}

CUDA = (
    "arena_extend_strategy", "cudnn_conv_algo_search", "cudnn_conv_use_max_workspace", "device_id",
    "do_copy_in_default_stream", "enable_cuda_graph", "gpu_mem_limit", "prefer_nhwc", "use_tf32",
)  # fmt: skip
"""Options that are documented at onnxruntime.ai. The file lists those that the library has."""


def main() -> None:
    """Read the libraries of the newest wheels."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for device, (package, library, pattern) in SOURCES.items():
            if not list(Path(folder).glob(f"{package.replace('-', '_')}-*.whl")):
                command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
                subprocess.run([*command, "--dest", folder, package], check=True)
            (wheel,) = Path(folder).glob(f"{package.replace('-', '_')}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [each for each in archive.namelist() if each.endswith(library)]
                data = archive.read(name)
            names = {each.decode() for each in re.findall(rb"\0(" + pattern + rb")(?=\0)", data)}
            names &= set(CUDA) if device == "cuda" else names
            if b"\0device_id\0" in data:
                names.add("device_id")
            found[device] = {
                "package": package,
                "version": wheel.name.split("-")[1],
                "options": sorted(names),
            }
    target = Path(__file__).parents[1] / "engines" / "provider_options.json"
    target.write_text(json.dumps(found, indent=2) + "\n")
    print({device: len(each["options"]) for device, each in found.items()})


if __name__ == "__main__":
    main()
