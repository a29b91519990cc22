"""Check that our code for TensorRT matches its bindings: each name, and the arity of each call.

The libraries of enterprise TensorRT are not on PyPI, but its bindings are. The bindings load over
empty libraries, made here with a C compiler, as long as nothing is called. As a script, this checks
the oldest and the newest version that crl supports. The unit tests check TensorRT-RTX, whose
libraries are on PyPI.
"""

from __future__ import annotations

import ast
import ctypes
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

VERSIONS = ("10.3.0", "11.4.0.106")
"""JetPack 6 has 10.3, JetPack 7.2.2 and later 11.4."""

CLASSES = {
    "export/tensorrt.py": {
        "trt": "", "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser",
        "config": "IBuilderConfig", "profile": "IOptimizationProfile", "layer": "ILayer",
        "tensor": "ITensor",
    },
    "crl_sdk/engines/_tensorrt_runtime.py": {"trt": ""},
    "crl_sdk/engines/_tensorrt.py": {
        "trt": "", "engine": "ICudaEngine", "_engine": "ICudaEngine",
        "context": "IExecutionContext", "config": "IRuntimeConfig", "cache": "IRuntimeCache",
        "_cache": "IRuntimeCache",
    },
}  # fmt: skip
"""TensorRT class of our variables and attributes, by file. Empty for the TensorRT module."""

RTX_ONLY = {
    "ComputeCapability", "num_compute_capabilities", "set_compute_capability",
    "REQUIRE_USER_ALLOCATION", "DynamicShapesKernelSpecializationStrategy", "CudaGraphStrategy",
    "create_runtime_config", "IRuntimeConfig", "IRuntimeCache",
}  # fmt: skip
"""Names that the code uses with TensorRT-RTX only."""

ENTRIES = (
    "getNvOnnxParserVersion", "getPluginRegistry", "getBuilderPluginRegistry",
    "initLibNvInferPlugins", "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL", "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
)  # fmt: skip
"""Functions that the bindings look up when they load."""


def find_mismatches(module: Any, *, rtx: bool) -> tuple[int, list[str]]:
    """Look up each use of TensorRT in our code.

    Args:
        module: TensorRT module with the bindings.
        rtx: Whether this is TensorRT-RTX.

    Returns:
        Number of uses, and a message for each name that is missing or takes other arguments.
    """
    seen, wrong = 0, []
    for file, holders in CLASSES.items():
        for path, arguments, line in _uses((ROOT / file).read_text(), holders):
            if not rtx and RTX_ONLY & set(path):
                continue
            seen += 1
            told = _mismatch(module, path, arguments)
            if told:
                wrong.append(f"{file}:{line}: {told}")
    return seen, wrong


def _uses(code: str, holders: dict[str, str]) -> Iterator[tuple[list[str], int | None, int]]:
    """Yield the class and members of each use, the argument count of a call, and the line."""
    tree = ast.parse(code)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in inner:
            continue
        members, value = [node.attr], node.value
        while isinstance(value, ast.Attribute) and value.attr not in holders:
            members.insert(0, value.attr)
            value = value.value
        name = value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", None)
        if name not in holders:
            continue
        call = calls.get(id(node))
        fixed = call is not None and not any(isinstance(a, ast.Starred) for a in call.args)
        path = [holders[name], *members] if holders[name] else members
        yield path, len(call.args) if fixed else None, node.lineno


def _mismatch(module: Any, path: Sequence[str], arguments: int | None) -> str:
    found = module
    for i, name in enumerate(path):
        if name == "__init__" or isinstance(found, property):
            return ""  # defined by Python, or known for instances only
        if not hasattr(found, name):
            return f"no {'.'.join(path[: i + 1])}"
        found = getattr(found, name)
    if arguments is None or isinstance(found, type):
        return ""
    signatures = re.findall(
        rf"^(?:\d+\. )?{path[-1]}\((.*)\) ->", found.__doc__ or "", re.MULTILINE
    )
    takes = [_arity(each) for each in signatures if each != "*args, **kwargs"]
    if takes and not any(low <= arguments <= high for low, high in takes):
        return f"{'.'.join(path)} takes {takes} arguments, our code passes {arguments}"
    return ""


def _arity(signature: str) -> tuple[int, int]:
    """Return the minimum and maximum number of arguments of a pybind11 signature, without self."""
    flat = signature
    while (shorter := re.sub(r"\[[^\[\]]*\]|<[^<>]*>", "", flat)) != flat:
        flat = shorter
    parameters = [each for each in flat.split(",") if each.strip()]
    parameters = parameters[1:] if parameters and parameters[0].startswith("self") else parameters
    return sum("=" not in each for each in parameters), len(parameters)


def install_bindings(version: str, folder: Path) -> list[Path]:
    """Install the bindings of a TensorRT version into a folder, and make the empty libraries."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, f"tensorrt-cu12-bindings=={version}"], check=True)
    code = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in ENTRIES)
    made = []
    for library in ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin"):
        made.append(folder / f"{library}.so.{version.split('.', maxsplit=1)[0]}")
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{made[-1].name}"]
        subprocess.run([*command, "-o", str(made[-1])], input=code.encode(), check=True)
    return made


def load_bindings(version: str, folder: Path) -> Any:
    """Import the bindings of a TensorRT version over empty libraries."""
    for library in install_bindings(version, folder):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(folder / "tensorrt_bindings"))
    return importlib.import_module("tensorrt")


def main() -> None:
    """Check the version in the arguments, or each version in a separate process."""
    if not sys.argv[1:]:
        for version in VERSIONS:
            subprocess.run([sys.executable, __file__, version], check=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        module = load_bindings(sys.argv[1], Path(folder))
        seen, wrong = find_mismatches(module, rtx=False)
        print("\n".join(wrong) or f"TensorRT {sys.argv[1]}: {seen} uses match its bindings")
        sys.exit(bool(wrong) or seen < 40)


if __name__ == "__main__":
    main()
