"""The backend llama-cpp-python: llama.cpp, compiled where it is installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from crl_sdk.basis._llm_backend import Sampling


class LlamaCppPython:
    """A model that llama-cpp-python runs."""

    name = "llama-cpp-python"
    version = str(llama_cpp.__version__)

    def __init__(self, llama: llama_cpp.Llama) -> None:
        """Store a loaded model."""
        self._llama = llama

    def complete(
        self, prompt: str, grammar: str, sampling: Sampling, on_piece: Callable[[str], None]
    ) -> None:
        """Continue a prompt, see `GgufBackend`."""
        self._llama.reset()  # type: ignore[no-untyped-call]
        chunks: Any = self._llama.create_completion(
            prompt,
            grammar=llama_cpp.llama_grammar.LlamaGrammar.from_string(grammar, verbose=False)
            if grammar
            else None,
            temperature=sampling.temperature,
            seed=sampling.seed,
            repeat_penalty=sampling.repeat_penalty,
            max_tokens=sampling.max_tokens,
            stream=True,
        )
        for chunk in chunks:
            on_piece(chunk["choices"][0]["text"])

    def log_likelihoods(self, prefix: str, texts: Sequence[str]) -> list[float]:
        """Return the log probabilities of texts, see `GgufBackend`."""
        llama = self._llama
        beginning = llama.tokenize(prefix.encode())
        self._require_room(len(beginning))
        llama.reset()  # type: ignore[no-untyped-call]
        llama.eval(beginning)
        first = self._log_probabilities()
        found = []
        for text in texts:
            tokens = llama.tokenize(f" {text}".encode(), add_bos=False)
            self._require_room(len(beginning) + len(tokens))
            total = float(first[tokens[0]])
            llama.n_tokens = len(beginning)  # go back to the end of the prefix
            for token, following in pairwise(tokens):
                llama.eval([token])
                total += float(self._log_probabilities()[following])
            found.append(total)
        return found

    def _require_room(self, tokens: int) -> None:
        if tokens > self._llama.n_ctx():
            raise ValueError(f"{tokens} tokens do not fit into a context of {self._llama.n_ctx()}")

    def _log_probabilities(self) -> NDArray[np.float64]:
        """Return the log probabilities of the next token, shape (vocabulary,)."""
        # Llama.scores holds logits only with logits_all, which needs the whole context's memory
        last = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        logits = np.ctypeslib.as_array(last, (self._llama.n_vocab(),)).astype(np.float64)
        logits -= logits.max()
        return np.asarray(logits - np.log(np.exp(logits).sum()))

    def close(self) -> None:
        """Free the memory of the model."""
        self._llama.close()


def open_backend(path: Path, context: int, threads: int) -> LlamaCppPython:
    """Load a GGUF file.

    Args:
        path: Path of the file.
        context: Number of tokens of prompt and answer together.
        threads: Number of threads.

    Raises:
        ValueError: If llama.cpp cannot load it. The message is what llama.cpp logged.
    """
    llama_cpp.llama_log_set(_keep_line(), None)
    with _captured_log() as log, _plain_weights():
        try:
            return LlamaCppPython(
                llama_cpp.Llama(
                    os.fspath(path), n_ctx=context, n_threads=threads, n_threads_batch=threads,
                    verbose=False,
                )
            )  # fmt: skip
        except Exception as error:  # it raises ValueError, AssertionError and others
            raise ValueError("".join(log) or str(error)) from error


@contextmanager
def _plain_weights() -> Iterator[None]:
    """Load weights as they are in the file, without repacking them for special instructions.

    llama.cpp's kernels for Intel's AMX end the process with an illegal instruction in some virtual
    machines that report AMX. Its Python class has no argument for this choice.
    """
    library: Any = llama_cpp.llama_cpp
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
def _keep_line() -> Any:
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
