"""The backend xllamacpp: llama.cpp's server inside this process, from wheels without a compiler."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xllamacpp

from crl_sdk.basis._llm_backend import Sampling

_LONGEST_SOCKET_PATH = 100
"""Bytes of the longest path of a Unix socket; systems allow 104 or 108."""

_FORCE = 1000.0
"""Bias that makes any token the most likely one."""

_ALL = 1_000_000
"""Number of most likely tokens to report, larger than any vocabulary."""


class XLlamaCpp:
    """A model that xllamacpp runs. Its server is called in process, never over its socket."""

    name = "xllamacpp"
    version = str(xllamacpp.__version__)

    def __init__(self, server: xllamacpp.Server) -> None:
        """Store a server with its model."""
        self._server: Any = server

    def complete(
        self, prompt: str, grammar: str, sampling: Sampling, on_piece: Callable[[str], None]
    ) -> None:
        """Continue a prompt, see `GgufBackend`."""
        raised: list[BaseException] = []

        def receive(chunk: dict[str, Any]) -> bool:
            """Take a part of the answer, and return whether to stop."""
            try:
                if piece := _choice(chunk)["text"]:
                    on_piece(piece)
            except BaseException as error:  # xllamacpp would drop it, also Ctrl-C
                raised.append(error)
            return bool(raised)

        request = {
            "prompt": prompt, "temperature": sampling.temperature, "seed": sampling.seed,
            "repeat_penalty": sampling.repeat_penalty, "max_tokens": sampling.max_tokens,
            "stream": True,
            # the defaults of llama-cpp-python
            "repeat_last_n": 64, "top_k": 40, "top_p": 0.95, "min_p": 0.05,
            # the reuse of an earlier prompt changes the last bits, and so the answer
            "cache_prompt": False,
        }  # fmt: skip
        if grammar:
            request["grammar"] = grammar
        self._server.handle_completions(request, receive)
        if raised:
            raise raised[0]

    def log_likelihoods(self, prefix: str, texts: Sequence[str]) -> list[float]:
        """Return the log probabilities of texts, see `GgufBackend`."""
        (space, *_), *tokenized = self._tokenize([" a", *(f" {text}" for text in texts)])
        found, cache = [], False
        for tokens in tokenized:
            total = 0.0
            for position, token in enumerate(tokens):
                prompt = [prefix, *tokens[:position]]
                # the first answer must not depend on earlier calls
                total += self._log_probability(prompt, token, space, cache_prompt=cache)
                cache = True
            found.append(total)
        return found

    def _log_probability(
        self, prompt: list[Any], token: int, other: int, *, cache_prompt: bool
    ) -> float:
        """Return the log probability of a token after a prompt of texts and tokens.

        The answer is one token that its bias forces. What is reported for it is without the bias,
        but nothing is reported for a token that ends within a character. Then `other` is the
        answer, and the token is found among all that could have been.
        """
        for forced, listed in ((token, 1), (other, _ALL)):
            reply = self._ask(
                prompt=prompt, max_tokens=1, logit_bias=[[forced, _FORCE]], n_probs=listed,
                cache_prompt=cache_prompt,
            )  # fmt: skip
            reported = _choice(reply)["logprobs"]
            if reported is not None:
                taken = reported["content"][0]
                for step in (taken, *taken["top_logprobs"]):
                    if step["id"] == token:
                        return float(step["logprob"])
        raise RuntimeError(f"no log probability was reported for token {token}")

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts, without one for the beginning.

        The server takes texts in `logit_bias`, and reports their tokens with the settings of an
        answer. The biases tell the texts apart.
        """
        if not texts:
            return []
        biases = [[text, float(number)] for number, text in enumerate(texts, start=1)]
        reply = self._ask(prompt=" ", max_tokens=1, verbose=True, logit_bias=biases)
        tokens: list[list[int]] = [[] for _ in texts]
        for entry in reply["__verbose"]["generation_settings"]["logit_bias"]:
            tokens[int(entry["bias"]) - 1].append(entry["token"])
        return tokens

    def _ask(self, **request: Any) -> dict[str, Any]:
        reply: dict[str, Any] = self._server.handle_completions(
            {"temperature": 0, "repeat_penalty": 1.0, **request}
        )
        _choice(reply)
        return reply

    def close(self) -> None:
        """Free the memory of the model, and end the server."""
        self._server = None


def open_backend(path: Path, context: int, threads: int) -> XLlamaCpp:
    """Load a GGUF file.

    Args:
        path: Path of the file.
        context: Number of tokens of prompt and answer together.
        threads: Number of threads.

    Raises:
        RuntimeError: If llama.cpp cannot load it; xllamacpp does not say why.
    """
    params: Any = xllamacpp.CommonParams()
    params.model.path = os.fspath(path)
    params.n_ctx = context
    params.n_parallel = 1
    params.n_batch = params.n_ubatch = 512  # as llama-cpp-python
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cpuparams.poll = params.cpuparams_batch.poll = 0  # wait without keeping a core busy
    params.no_extra_bufts = True  # weights as they are in the file, see _llama_cpp_python
    # The log likelihoods then equal those of llama-cpp-python.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.swa_full = True  # as llama-cpp-python; without it, prompts are never continued
    params.fit_params = False  # the context as it was asked for
    params.cache_ram_mib = 0  # no copies of earlier prompts
    params.warmup = False
    params.offline = True
    params.ui = params.endpoint_slots = False
    params.n_threads_http = 1
    params.verbosity = -1  # it would write to stderr
    with tempfile.TemporaryDirectory(prefix="crl-llm-") as folder:
        _hide_listener(params, Path(folder, "unused.sock"))
        return XLlamaCpp(xllamacpp.Server(params))


def _hide_listener(params: Any, socket: Path) -> None:
    """Let the server listen where nobody reaches it; it cannot be told not to listen.

    The directory of the Unix socket belongs to this user only, and is removed when the model is
    loaded. Then the socket cannot be connected to. Where there are no Unix sockets, the server
    listens on the loopback interface and wants a key that nobody knows.
    """
    if os.name == "posix" and len(os.fsencode(socket)) <= _LONGEST_SOCKET_PATH:
        params.hostnames = [os.fspath(socket)]
        return
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.api_keys = [secrets.token_urlsafe(32)]


def _choice(reply: dict[str, Any]) -> dict[str, Any]:
    """Return the answer in a reply of the server, or raise what the server refused."""
    if not reply.get("choices"):
        error = reply.get("error", reply)
        raise RuntimeError(str(error.get("message", error)))
    choice: dict[str, Any] = reply["choices"][0]
    return choice
