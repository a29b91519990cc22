"""A local language model: a GGUF file, run by llama.cpp."""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._llm_files import check_gguf, find_model
from crl_sdk.errors import CrlError, GenerationError, MissingDependencyError
from crl_sdk.model._bundle import sha256_file

if TYPE_CHECKING:
    import llama_cpp

CONTEXT = 1024
"""Number of tokens of prompt and answer together. The requests of this package are far shorter."""

CHAT_PARAMETERS = 1_000_000_000
"""Size from which an instruct model is asked through its chat template (see docs/BASES.md)."""

SMALL_BYTES = 500_000_000
"""Size below which a model runs in one thread.

The threads of llama.cpp wait for each other in busy loops after each layer. With the default model
a second thread saves a quarter of the time on two idle cores (2.0 s in place of 2.7 s for four
answers). Beside a busy process it nearly doubles the time (5.2 s in place of 3.0 s).
"""

OnToken = Callable[[int, float], None]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one answer is sampled.

    Attributes:
        temperature: Sampling temperature; 0 always takes the most likely token.
        seed: Seed of the sampler. Equal seeds give equal answers on one machine.
        repeat_penalty: Penalty for recent tokens; 1 is none.
        max_tokens: Largest number of tokens, because under a grammar a model may never stop.
    """

    temperature: float
    seed: int
    repeat_penalty: float = 1.0
    max_tokens: int = 96


class LanguageModel:
    """A language model in memory. `LanguageModel.open` loads one and `close` frees it.

    Attributes:
        path: Path of the GGUF file.
        sha256: SHA-256 of the file, 64 hex digits.
        tokens: Number of tokens generated so far.
        seconds: Seconds spent on them.
    """

    def __init__(self, llama: llama_cpp.Llama, path: Path, sha256: str) -> None:
        """Store a loaded model.

        Args:
            llama: The model.
            path: Path of its file.
            sha256: SHA-256 of its file.
        """
        self._llama = llama
        self.path = path
        self.sha256 = sha256
        self.tokens, self.seconds = 0, 0.0

    @classmethod
    def open(
        cls,
        llm: str | os.PathLike[str] | None = None,
        *,
        context: int = CONTEXT,
        threads: int | None = None,
    ) -> LanguageModel:
        """Load a language model.

        Args:
            llm: A GGUF file; `hf:OWNER/REPO/FILE.gguf`, which is downloaded once from the Hugging
                Face hub; or None for the default model.
            context: Number of tokens of prompt and answer together.
            threads: Number of threads. None for one with a small model, and for one per core that
                this process may use with a larger one.

        Raises:
            GenerationError: If the file does not exist, is not a GGUF file, cannot be loaded, or
                needs more memory than is available.
            MissingDependencyError: If llama-cpp-python is not installed.
        """
        llama_cpp = _llama_cpp()
        path = find_model(llm)
        check_gguf(path)
        threads = threads or _default_threads(path)
        _require_memory(path, _read_metadata(llama_cpp, path), context)
        with _captured_log() as log, _plain_weights(llama_cpp):
            try:
                llama = llama_cpp.Llama(
                    str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads,
                    verbose=False,
                )  # fmt: skip
            except Exception as error:  # it raises ValueError, AssertionError and others
                raise _unreadable(path, "".join(log) or str(error)) from error
        return cls(llama, path, sha256_file(path))

    @property
    def name(self) -> str:
        """Name in the model's metadata, or else the name of its file."""
        return str(self._llama.metadata.get("general.name") or self.path.stem)

    @property
    def follows_instructions(self) -> bool:
        """Whether the model has a chat template and is large enough to follow it."""
        return "tokenizer.chat_template" in self._llama.metadata and (
            _parameters(self._llama.metadata) >= CHAT_PARAMETERS
        )

    def describe(self) -> dict[str, Any]:
        """Return what a basis records about its language model, as JSON values."""
        return {
            "name": self.name,
            "file": self.path.name,
            "sha256": self.sha256,
            "llama_cpp_python": _llama_cpp().__version__,
            "context": self._llama.n_ctx(),
            "threads": self._llama.n_threads,
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
        """
        return self._generate(
            lambda options: self._llama.create_completion(prompt, **options),
            grammar, sampling, on_token,
        )  # fmt: skip

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
        messages: Any = [{"role": "user", "content": message}]
        return self._generate(
            lambda options: self._llama.create_chat_completion(messages, **options),
            grammar, sampling, on_token,
        )  # fmt: skip

    def log_likelihoods(self, prefix: str, texts: Sequence[str]) -> list[float]:
        """Return how likely each text is after a prefix: its log probability, in nats.

        Args:
            prefix: Plain text, such as `A color, such as`.
            texts: The texts. A space is put before each.

        Raises:
            GenerationError: If prefix and text do not fit the context, or llama.cpp fails.
        """
        llama = self._llama
        started = time.perf_counter()
        try:
            beginning = llama.tokenize(prefix.encode())
            llama.reset()  # type: ignore[no-untyped-call]
            llama.eval(beginning)
            first = self._log_probabilities()
            found = []
            for text in texts:
                tokens = llama.tokenize(f" {text}".encode(), add_bos=False)
                total = float(first[tokens[0]])
                llama.n_tokens = len(beginning)  # go back to the end of the prefix
                for token, following in pairwise(tokens):
                    llama.eval([token])
                    total += float(self._log_probabilities()[following])
                found.append(total)
        except Exception as error:  # llama_cpp raises bare ValueError and RuntimeError
            raise GenerationError(f"{self.name}: llama.cpp failed ({error})") from error
        finally:
            self.seconds += time.perf_counter() - started
        return found

    def _log_probabilities(self) -> NDArray[np.float64]:
        """Return the log probabilities of the next token, shape (vocabulary,)."""
        # Llama.scores holds logits only with logits_all, which needs the whole context's memory
        last = _llama_cpp().llama_get_logits_ith(self._llama.ctx, -1)
        logits = np.ctypeslib.as_array(last, (self._llama.n_vocab(),)).astype(np.float64)
        logits -= logits.max()
        return np.asarray(logits - np.log(np.exp(logits).sum()))

    def _generate(
        self,
        start: Callable[[dict[str, Any]], Any],
        grammar: str,
        sampling: Sampling,
        on_token: OnToken | None,
    ) -> str:
        parts: list[str] = []
        started = time.perf_counter()
        try:
            self._llama.reset()  # type: ignore[no-untyped-call]
            compiled = _llama_cpp().LlamaGrammar.from_string(grammar, verbose=False)
            options = {
                "grammar": compiled, "temperature": sampling.temperature,
                "seed": sampling.seed, "repeat_penalty": sampling.repeat_penalty,
                "max_tokens": sampling.max_tokens, "stream": True,
            }  # fmt: skip
            for chunk in start(options):
                choice = chunk["choices"][0]
                parts.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
                self.tokens += 1
                if on_token is not None:
                    on_token(self.tokens, self.seconds + time.perf_counter() - started)
        except CrlError:  # raised by on_token, to stop the generation
            raise
        except Exception as error:  # llama_cpp raises bare ValueError and RuntimeError
            raise GenerationError(f"{self.name}: llama.cpp failed ({error})") from error
        finally:
            self.seconds += time.perf_counter() - started
        return "".join(parts)

    def close(self) -> None:
        """Free the memory of the model."""
        self._llama.close()

    def __enter__(self) -> LanguageModel:
        """Return the model; leaving the context closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the model."""
        self.close()


def _default_threads(path: Path) -> int:
    return 1 if path.stat().st_size < SMALL_BYTES else _count_cores()


def _count_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def _read_metadata(llama_cpp: Any, path: Path) -> dict[str, str]:
    """Read the metadata of a GGUF file without loading its weights."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    with _captured_log() as log:
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise _unreadable(path, "".join(log))
    try:
        metadata = {}
        for i in range(llama_cpp.llama_model_meta_count(model)):
            pair = []
            for read in (
                llama_cpp.llama_model_meta_key_by_index,
                llama_cpp.llama_model_meta_val_str_by_index,
            ):
                # longer values are cut; none of them is needed
                buffer = ctypes.create_string_buffer(512)
                read(model, i, buffer, len(buffer))
                pair.append(buffer.value.decode("utf-8", "replace"))
            metadata[pair[0]] = pair[1]
        return metadata
    finally:
        llama_cpp.llama_model_free(model)


def _unreadable(path: Path, log: str) -> GenerationError:
    reason = " ".join(log.split())[-300:] or "no reason given"
    return GenerationError(
        f"{path}: llama.cpp cannot load it ({reason}); download the file again, or use another"
    )


def _require_memory(path: Path, metadata: dict[str, str], context: int) -> None:
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


def _cache_bytes_per_token(metadata: dict[str, str]) -> int:
    """Return the bytes of one token's keys and values in fp16, over all layers."""
    kind = metadata.get("general.architecture", "")

    def number(key: str, otherwise: int) -> int:
        value = metadata.get(f"{kind}.{key}", "")
        return int(value) if value.isdigit() else otherwise

    heads = number("attention.head_count", 1)
    per_head = number("attention.key_length", number("embedding_length", 0) // heads)
    return 2 * 2 * number("block_count", 0) * number("attention.head_count_kv", heads) * per_head


def _parameters(metadata: dict[str, str]) -> float:
    """Return the number of parameters from `general.size_label`, such as 1.7B; 0 if unknown."""
    match = re.fullmatch(r"([\d.]+)([KMB])", metadata.get("general.size_label", "").upper())
    return float(match[1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[match[2]] if match else 0.0


@cache
def _llama_cpp() -> Any:
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingDependencyError("llama-cpp-python", "generate", "generating texts") from error
    llama_cpp.llama_log_set(_keep_line(llama_cpp), None)
    return llama_cpp


@contextmanager
def _plain_weights(llama_cpp: Any) -> Iterator[None]:
    """Load weights as they are in the file, without repacking them for special instructions.

    llama.cpp's kernels for Intel's AMX end the process with an illegal instruction in some virtual
    machines that report AMX. Its Python class has no argument for this choice.
    """
    library = llama_cpp.llama_cpp
    original = library.llama_model_default_params

    def params() -> Any:
        found = original()
        found.use_extra_bufts = False
        return found

    library.llama_model_default_params = params
    try:
        yield
    finally:
        library.llama_model_default_params = original


_log_lines: ContextVar[list[str] | None] = ContextVar("_log_lines", default=None)


@cache  # llama.cpp calls it until the process ends, so it must never be freed
def _keep_line(llama_cpp: Any) -> Any:
    def keep(_level: int, text: bytes, _data: Any) -> None:
        lines = _log_lines.get()
        if lines is not None:
            lines.append(text.decode("utf-8", "replace"))

    return llama_cpp.llama_log_callback(keep)


@contextmanager
def _captured_log() -> Iterator[list[str]]:
    """Yield a list that collects what llama.cpp logs in this thread. Other logs are dropped."""
    lines: list[str] = []
    token = _log_lines.set(lines)
    try:
        yield lines
    finally:
        _log_lines.reset(token)
