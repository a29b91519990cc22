"""The contract of a backend, which runs a language model, and the choice of one.

`LanguageModel` knows prompts, progress and errors. A backend only continues a prompt, answers a
message and says how likely texts are. A backend for GGUF files does not know chat templates:
`TemplateChat` adds them. Each backend is a module of its own with a function that opens it.
`find_backend` chooses among those that run GGUF files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

from crl_sdk._processors import sleeping_openmp
from crl_sdk.errors import GenerationError, MissingDependencyError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one answer is sampled.

    Attributes:
        temperature: Sampling temperature; 0 always takes the most likely token.
        seed: Seed of the sampler. Equal seeds give equal answers on one machine with one backend.
        repeat_penalty: Penalty for recent tokens; 1 is none.
        max_tokens: Largest number of tokens, because under a grammar a model may never stop.
    """

    temperature: float
    seed: int
    repeat_penalty: float = 1.0
    max_tokens: int = 96


class GgufBackend(Protocol):
    """Runs the model of a GGUF file. Its methods may raise any exception.

    Attributes:
        name: Name of the package that runs the model.
        version: Version of that package.
    """

    name: str
    version: str

    def complete(
        self, prompt: str, grammar: str, sampling: Sampling, on_piece: Callable[[str], None]
    ) -> None:
        """Continue a prompt.

        Args:
            prompt: Text to continue. Markup of the model is read as such.
            grammar: Grammar of the answer in llama.cpp's GBNF format, with a rule `root`; empty for
                any text.
            sampling: How the answer is sampled.
            on_piece: Called with the text of each token. What it raises ends the answer, and is
                raised here.
        """

    def log_likelihoods(self, prefix: str, texts: Sequence[str]) -> list[float]:
        """Return the log probability of each text after the prefix and a space, in nats."""

    def close(self) -> None:
        """Free the memory of the model."""


class LlmBackend(GgufBackend, Protocol):
    """Runs a language model that also answers messages. Its methods may raise any exception."""

    def chat(
        self, message: str, grammar: str, sampling: Sampling, on_piece: Callable[[str], None]
    ) -> None:
        """Answer a message. The arguments are those of `complete`.

        A backend that has no grammars leaves out the grammar, which the caller must expect.
        """


OpenBackend = Callable[[Path, int, int], GgufBackend]
"""Opens a GGUF file with a context in tokens and a number of threads."""

_BACKENDS = (("llama-cpp-python", "llama_cpp"), ("xllamacpp", "xllamacpp"))
"""Packages that run GGUF files and their modules, the preferred one first.

llama-cpp-python is preferred, because it is compiled for the processor it runs on.
"""


def find_backend() -> OpenBackend:
    """Return the function that opens a GGUF file with the first backend that can be imported.

    Raises:
        GenerationError: If a backend is installed, but none can be imported.
        MissingDependencyError: If no backend is installed.
    """
    broken = []
    for package, module in _BACKENDS:
        try:
            with sleeping_openmp():
                import_module(module)
        except (ImportError, OSError, RuntimeError) as error:  # as for a library that is missing
            if not (isinstance(error, ModuleNotFoundError) and error.name == module):
                broken.append(f"{package} is installed, but cannot be imported ({error})")
            continue
        backend = import_module(f"crl_sdk.basis._{package.replace('-', '_')}")
        found: OpenBackend = backend.open_backend
        return found
    if broken:
        raise GenerationError(
            f"generating texts: {'; '.join(broken)}. Install what is missing, such as libgomp.so.1 "
            "from the system's package libgomp1 or libgomp, or give the texts yourself with "
            "--texts FILE"
        )
    raise MissingDependencyError(
        "llama-cpp-python",
        "generate",
        "generating texts",
        otherwise="which compiles llama.cpp. Without a C++ compiler: "
        "pip install 'crl-embeddings[generate-wheels]', or give the texts yourself with --texts "
        "FILE",
    )
