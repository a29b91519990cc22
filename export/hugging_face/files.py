"""Checks the files of a directory in the format of Hugging Face before a library opens them."""

from __future__ import annotations

import re
from pathlib import Path

from crl_export.model_files import check_own_file, read_json
from crl_sdk.errors import ExportError

_READ = re.compile(r".*\.(json|txt|model|safetensors|bin)")
"""Names of the files that transformers may read."""

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def check_files(directory: Path) -> None:
    """Check that the files of a directory are its own, and not pointers to others.

    Args:
        directory: Directory in the format of Hugging Face.

    Raises:
        ExportError: If one leads out of the directory, or is a pointer of Git LFS.
    """
    for path in sorted(directory.iterdir()):
        if _READ.fullmatch(path.name):
            check_own_file(path, directory)


def check_weights(directory: Path) -> None:
    """Check that a directory has all files of weights, and that none is truncated.

    Raises:
        ExportError: If one is missing or truncated.
    """
    names = _weight_files(directory)
    for name in names:
        path = directory / name
        if not path.is_file():
            raise ExportError(
                f"{path}: missing, one of {len(names)} files of weights; download it too"
            )
        if path.suffix == ".safetensors":
            _check_safetensors(path)


def _weight_files(directory: Path) -> list[str]:
    """Return the names of the files of weights that transformers would read."""
    for name in _WEIGHTS:
        if (directory / name).is_file():
            return [name]
        index = directory / f"{name}.index.json"
        if index.is_file():
            named = read_json(index).get("weight_map")
            names = set(named.values()) if isinstance(named, dict) else set()
            if not names or not all(isinstance(each, str) for each in names):
                raise ExportError(f"{index}: has no `weight_map` of files; get the file again")
            if outside := [each for each in names if Path(each).name != each]:
                raise ExportError(
                    f"{index}: names {outside[0]!r}, which is not a file of {directory}; do not "
                    "use this model, get it from a source you trust"
                )
            return sorted(names)
    raise ExportError(
        f"{directory}: has no weights; expected {' or '.join(_WEIGHTS)}, download one of them. "
        "Weights of TensorFlow, Flax, GGUF and ONNX are not read here; for ONNX: crl import"
    )


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise ExportError(
            f"{path}: not a complete file of safetensors ({str(error)[:200]}); download it again"
        ) from error
