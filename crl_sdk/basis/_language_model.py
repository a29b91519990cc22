"""A local language model: a GGUF file, run by a backend."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crl_sdk._lifetime import ForkGuard, Lifetime
from crl_sdk._processors import count_cores
from crl_sdk.basis._gguf import read_metadata
from crl_sdk.basis._llm_backend import LlmBackend, OpenBackend, Sampling, find_backend
from crl_sdk.basis._llm_files import find_model
from crl_sdk.errors import CrlError, GenerationError
from crl_sdk.model._bundle import sha256_file

CONTEXT = 1024
"""Number of tokens of prompt and answer together. The requests of this package are far shorter."""

CHAT_PARAMETERS = 1_000_000_000
"""Size from which an instruct model is asked through its chat template (see docs/BASES.md)."""

SMALL_BYTES = 500_000_000
"""Size below which a model runs in one thread.

The threads of llama.cpp wait for each other after each layer. With the default model a second
thread saves a quarter of the time on two idle cores (2.0 s in place of 2.7 s for four answers).
Beside two busy processes it doubles the time (16 s in place of 8 s), though its threads sleep while
they wait.
"""

_several_threads = ForkGuard(
    "llama.cpp with several threads", "pass threads=1 (the threads of OpenMP do not survive a fork)"
)

OnToken = Callable[[int, float], None]


class LanguageModel:
    """A language model in memory. `LanguageModel.open` loads one and `close` frees it.

    Attributes:
        source: What `open` loaded: the absolute path of a GGUF file.
        name: Name of the model.
        follows_instructions: Whether it has a chat template and is large enough to follow it.
        tokens: Number of tokens generated so far.
        seconds: Seconds spent on them.
    """

    def __init__(
        self,
        backend: LlmBackend,
        source: str,
        *,
        name: str,
        follows_instructions: bool,
        details: Mapping[str, Any],
    ) -> None:
        """Store a loaded model.

        Args:
            backend: What runs the model.
            source: What `open` loaded.
            name: Name of the model.
            follows_instructions: Whether the model answers better through its chat template.
            details: What else a basis records about the model, as JSON values.
        """
        self._lifetime = Lifetime("language model")
        self._backend = backend
        self._details = details
        self.source = source
        self.name = name
        self.follows_instructions = follows_instructions
        self.tokens, self.seconds = 0, 0.0

    @classmethod
    def open(
        cls,
        llm: str | os.PathLike[str] | None = None,
        *,
        context: int = CONTEXT,
        threads: int | None = None,
    ) -> LanguageModel:
        """Load a language model with llama-cpp-python, or with xllamacpp if that is not installed.

        Args:
            llm: A GGUF file; `hf:OWNER/REPO/FILE.gguf`, which is downloaded once from the Hugging
                Face hub; or None for the default model.
            context: Number of tokens of prompt and answer together.
            threads: Number of threads. None for one with a small model, and for one per core that
                this process may use with a larger one.

        Raises:
            GenerationError: If the file does not exist, is not a GGUF file, cannot be loaded, or
                needs more memory than is available.
            ForkError: If there are several threads, and this process was forked after its parent
                had loaded a model with several.
            MissingDependencyError: If neither llama-cpp-python nor xllamacpp is installed.
        """
        open_backend = find_backend()
        return cls._open_file(find_model(llm), open_backend, context, threads)

    @classmethod
    def _open_file(
        cls, path: Path, open_backend: OpenBackend, context: int, threads: int | None
    ) -> LanguageModel:
        """Load a GGUF file. A model that is not a file would have a method like this one."""
        threads = threads or _default_threads(path)
        if threads > 1:
            _several_threads.use()
        metadata = read_metadata(path)
        _require_memory(path, metadata, context)
        try:
            backend = open_backend(path, context, threads)
        except Exception as error:  # backends raise ValueError, AssertionError and others
            raise _unreadable(path, metadata, str(error)) from error
        return cls(
            backend,
            os.fspath(path.absolute()),
            name=str(metadata.get("general.name") or path.stem),
            follows_instructions="tokenizer.chat_template" in metadata
            and _parameters(metadata) >= CHAT_PARAMETERS,
            details={
                "file": path.name, "sha256": sha256_file(path), "context": context,
                "threads": threads,
            },
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Return what a basis records about its language model, as JSON values."""
        return {
            "name": self.name,
            "backend": self._backend.name,
            "backend_version": self._backend.version,
            **self._details,
        }

    def complete(
        self, prompt: str, grammar: str, sampling: Sampling, on_token: OnToken | None = None
    ) -> str:
        """Continue a prompt with text that matches a grammar.

        Args:
            prompt: Plain text. The caller makes sure that it contains no markup of the model.
            grammar: Grammar in llama.cpp's GBNF format, with a rule `root`.
            sampling: How the answer is sampled.
            on_token: Called after each token with the tokens and seconds of this model so far.

        Returns:
            The answer.

        Raises:
            GenerationError: If prompt and answer do not fit the context, or llama.cpp fails.
            ClosedError: If the model is closed.
            ForkError: If this process was forked after the model had been loaded.
        """
        return self._generate(prompt, grammar, sampling, on_token, chat=False)

    def chat(
        self, message: str, grammar: str, sampling: Sampling, on_token: OnToken | None = None
    ) -> str:
        """Answer a message through the model's chat template; otherwise like `complete`.

        Args:
            message: Plain text. The caller makes sure that it contains no markup of the model.
            grammar: Grammar in llama.cpp's GBNF format, with a rule `root`.
            sampling: How the answer is sampled.
            on_token: Called after each token with the tokens and seconds of this model so far.

        Returns:
            The answer.

        Raises:
            GenerationError: If message and answer do not fit the context, or llama.cpp fails.
        """
        return self._generate(message, grammar, sampling, on_token, chat=True)

    def log_likelihoods(self, prefix: str, texts: Sequence[str]) -> list[float]:
        """Return how likely each text is after a prefix: its log probability, in nats.

        Args:
            prefix: Plain text, such as `A color, such as`.
            texts: The texts. A space is put before each.

        Raises:
            GenerationError: If prefix and text do not fit the context, or llama.cpp fails.
        """
        with self._running():
            return self._backend.log_likelihoods(prefix, texts)

    def _generate(
        self,
        prompt: str,
        grammar: str,
        sampling: Sampling,
        on_token: OnToken | None,
        *,
        chat: bool,
    ) -> str:
        parts: list[str] = []
        started = time.perf_counter()

        def receive(piece: str) -> None:
            parts.append(piece)
            self.tokens += 1
            if on_token is not None:
                on_token(self.tokens, self.seconds + time.perf_counter() - started)

        with self._running():
            self._backend.generate(prompt, grammar, sampling, receive, chat=chat)
        return "".join(parts)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Count the seconds of a call of the backend, and name the model in its errors."""
        self._lifetime.require()
        started = time.perf_counter()
        try:
            yield
        except CrlError:  # raised by on_token, to stop the generation
            raise
        except Exception as error:  # backends raise bare ValueError and RuntimeError
            raise GenerationError(f"{self.name}: {self._backend.name} failed ({error})") from error
        finally:
            self.seconds += time.perf_counter() - started

    def close(self) -> None:
        """Free the memory of the model. Further calls do nothing."""
        if not self._lifetime.closed:
            self._lifetime.closed = True
            self._backend.close()

    def __enter__(self) -> LanguageModel:
        """Return the model; leaving the context closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the model."""
        self.close()


def _default_threads(path: Path) -> int:
    return 1 if path.stat().st_size < SMALL_BYTES else count_cores()


def _unreadable(path: Path, metadata: dict[str, Any], log: str) -> GenerationError:
    reason = " ".join(log.split())[-300:] or "no reason given"
    kind = metadata.get("general.architecture", "unknown")
    return GenerationError(
        f"{path}: llama.cpp cannot load it ({reason}; architecture {kind!r}); download the file "
        "again, or use another"
    )


def _require_memory(path: Path, metadata: dict[str, Any], context: int) -> None:
    """Raise an error if weights and context do not fit into the available memory.

    Otherwise the system would kill the process instead of llama.cpp raising an error.
    """
    free = available_memory()
    cache = context * _cache_bytes_per_token(metadata)
    needed = path.stat().st_size + cache
    if needed > free:
        raise GenerationError(
            f"{path}: needs about {needed >> 20} MiB ({cache >> 20} MiB of it for a context of "
            f"{context} tokens), {free >> 20} MiB are free: use a smaller model or context"
        )


def available_memory() -> int:
    """Return the available memory of this machine, in bytes."""
    import psutil

    return int(psutil.virtual_memory().available)


def _cache_bytes_per_token(metadata: dict[str, Any]) -> int:
    """Return the bytes of one token's keys and values in fp16, over all layers."""
    kind = metadata.get("general.architecture", "")

    def number(key: str, otherwise: int) -> int:
        value = metadata.get(f"{kind}.{key}")
        return value if isinstance(value, int) else otherwise

    heads = number("attention.head_count", 1)
    per_head = number("attention.key_length", number("embedding_length", 0) // heads)
    return 2 * 2 * number("block_count", 0) * number("attention.head_count_kv", heads) * per_head


def _parameters(metadata: dict[str, Any]) -> float:
    """Return the number of parameters from `general.size_label`, such as 1.7B; 0 if unknown."""
    match = re.fullmatch(r"([\d.]+)([KMB])", str(metadata.get("general.size_label", "")).upper())
    return float(match[1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[match[2]] if match else 0.0
