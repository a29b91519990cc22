"""A local language model: a GGUF file, run by a backend."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crl_sdk._lifetime import ForkGuard, Lifetime
from crl_sdk._processors import count_cores
from crl_sdk.basis._chat_template import TemplateChat
from crl_sdk.basis._endpoint import Endpoint, is_endpoint
from crl_sdk.basis._gguf import GgufHeader, read_header
from crl_sdk.basis._llm_backend import LlmBackend, OpenBackend, Sampling, find_backend
from crl_sdk.basis._llm_files import find_model
from crl_sdk.errors import CrlError, GenerationError
from crl_sdk.model._bundle import sha256_file

CONTEXT = 2048
"""Number of tokens of prompt and answer together. The longest request of this package, a long list
that is continued, fits."""

SMALL_BYTES = 500_000_000
"""Size below which a model runs in one thread.

The threads of llama.cpp wait for each other after each layer. With the default model a second
thread makes four answers slower, on idle cores and more so beside busy processes
(benchmarks/results/busy-machine.md), though its threads sleep while they wait.
"""

_several_threads = ForkGuard(
    "llama.cpp with several threads", "pass threads=1 (the threads of OpenMP do not survive a fork)"
)

OnToken = Callable[[int, float], None]


class LanguageModel:
    """A language model in memory. `LanguageModel.open` loads one and `close` frees it.

    Attributes:
        source: What `open` loaded: the absolute path of a GGUF file, or a URL.
        name: Name of the model.
        chats: Whether it answers messages.
        tells_likelihoods: Whether it tells how likely texts are.
        tokens: Number of tokens generated so far.
        seconds: Seconds spent on them.
    """

    def __init__(
        self,
        backend: LlmBackend,
        source: str,
        *,
        name: str,
        chats: bool,
        tells_likelihoods: bool = True,
        details: Mapping[str, Any],
    ) -> None:
        """Store a loaded model.

        Args:
            backend: What runs the model.
            source: What `open` loaded.
            name: Name of the model.
            chats: Whether the model answers messages.
            tells_likelihoods: Whether it tells how likely texts are.
            details: What else a basis records about the model, as JSON values.
        """
        self._lifetime = Lifetime("language model")
        self._backend = backend
        self._details = details
        self.source = source
        self.name = name
        self.chats, self.tells_likelihoods = chats, tells_likelihoods
        self.tokens, self.seconds = 0, 0.0

    @classmethod
    def open(
        cls,
        llm: str | os.PathLike[str] | None = None,
        *,
        context: int = CONTEXT,
        threads: int | None = None,
        token: str | None = None,
    ) -> LanguageModel:
        """Load a language model with llama-cpp-python, or with xllamacpp if that is not installed.

        Args:
            llm: A GGUF file; `hf:OWNER/REPO/FILE.gguf`, which is downloaded once from the Hugging
                Face hub; the URL of an endpoint with OpenAI's API, such as
                `http://127.0.0.1:8080/v1`, to which criteria are then sent; or None for the default
                model.
            context: Number of tokens of prompt and answer together.
            threads: Number of threads. None for one with a small model, and for one per core that
                this process may use with a larger one.
            token: Token of an endpoint that asks for one.

        Raises:
            GenerationError: If the file does not exist, is not a GGUF file, cannot be loaded, or
                needs more memory than is available; or if the endpoint cannot be reached.
            ForkError: If there are several threads, and this process was forked after its parent
                had loaded a model with several.
            MissingDependencyError: If neither llama-cpp-python nor xllamacpp is installed, or
                httpx2 for an endpoint.
        """
        if is_endpoint(llm):
            return cls._open_endpoint(str(llm), token)
        open_backend = find_backend()
        return cls._open_file(find_model(llm), open_backend, context, threads)

    @classmethod
    def _open_endpoint(cls, url: str, token: str | None) -> LanguageModel:
        """Connect to the model of an endpoint."""
        endpoint = Endpoint(url, token)
        return cls(
            endpoint, endpoint.url, name=endpoint.model, chats=True, tells_likelihoods=False,
            details={"endpoint": endpoint.url},
        )  # fmt: skip

    @classmethod
    def _open_file(
        cls, path: Path, open_backend: OpenBackend, context: int, threads: int | None
    ) -> LanguageModel:
        """Load a GGUF file."""
        threads = threads or _default_threads(path)
        if threads > 1:
            _several_threads.use()
        header = read_header(path)
        _require_memory(path, header, context)
        try:
            backend = open_backend(path, context, threads)
        except Exception as error:  # backends raise ValueError, AssertionError and others
            raise _unreadable(path, header, str(error)) from error
        return cls(
            TemplateChat(backend, header.chat_template),
            os.fspath(path.absolute()),
            name=path.stem,
            chats=bool(header.chat_template),
            details={
                "file": path.name, "sha256": sha256_file(path), "parameters": header.parameters,
                "context": context, "threads": threads,
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
        return self._generate(self._backend.complete, prompt, grammar, sampling, on_token)

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
            GenerationError: If message and answer do not fit the context, or the backend fails.
            ClosedError: If the model is closed.
            ForkError: If this process was forked after the model had been loaded.
        """
        return self._generate(self._backend.chat, message, grammar, sampling, on_token)

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
        ask: Callable[[str, str, Sampling, Callable[[str], None]], None],
        prompt: str,
        grammar: str,
        sampling: Sampling,
        on_token: OnToken | None,
    ) -> str:
        parts: list[str] = []
        started = time.perf_counter()

        def receive(piece: str) -> None:
            parts.append(piece)
            self.tokens += 1
            if on_token is not None:
                on_token(self.tokens, self.seconds + time.perf_counter() - started)

        with self._running():
            ask(prompt, grammar, sampling, receive)
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

    def __repr__(self) -> str:
        """Return the name of the model, and where it was loaded from."""
        return f"LanguageModel({self.name!r}, {self.source!r})"

    def __enter__(self) -> LanguageModel:
        """Return the model; leaving the context closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the model."""
        self.close()


def _default_threads(path: Path) -> int:
    return 1 if path.stat().st_size < SMALL_BYTES else count_cores()


def _unreadable(path: Path, header: GgufHeader, log: str) -> GenerationError:
    reason = " ".join(log.split())[-300:] or "no reason given"
    kind = header.metadata.get("general.architecture", "unknown")
    return GenerationError(
        f"{path}: llama.cpp cannot load it ({reason}; architecture {kind!r}); download the file "
        "again, or use another"
    )


def _require_memory(path: Path, header: GgufHeader, context: int) -> None:
    """Raise an error if weights and context do not fit into the available memory.

    Otherwise the system would kill the process instead of llama.cpp raising an error.
    """
    free = available_memory()
    cache = context * _cache_bytes_per_token(header.metadata)
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
