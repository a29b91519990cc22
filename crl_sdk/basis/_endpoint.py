"""Language models behind an HTTP endpoint that speaks OpenAI's API.

llama.cpp's server, Ollama and vLLM have one. Nothing is sent unless the user names its URL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from crl_sdk.basis._llm_backend import Sampling
from crl_sdk.errors import GenerationError, MissingDependencyError

ANSWER_BYTES = 1 << 20
"""Largest size of an answer, with everything around it."""

CONNECT_SECONDS, SILENT_SECONDS = 10.0, 300.0
"""Longest wait for a connection, and for the next part of an answer."""

REASONING_TOKENS = 2048
"""Tokens that an answer may have beside its list, for models that reason first."""

_URL = re.compile(r"https?://", re.IGNORECASE)


def is_endpoint(llm: object) -> bool:
    """Return whether a language model is named by a URL."""
    return isinstance(llm, str) and _URL.match(llm) is not None


class Endpoint:
    """Runs the model of an endpoint. It is a backend, see `LlmBackend`.

    It has no grammars, and does not tell how likely texts are.

    Attributes:
        url: URL of the API, without a user name and a password.
        model: Name of the model at the endpoint.
    """

    name, version = "OpenAI API", "v1"

    def __init__(self, url: str, token: str | None = None) -> None:
        """Connect, and find the model.

        Args:
            url: URL of the API, such as `http://127.0.0.1:8080/v1`. A fragment, as in `…/v1#qwen3`,
                chooses one of several models.
            token: Token, if the endpoint asks for one.

        Raises:
            GenerationError: If the URL is malformed, the endpoint cannot be reached, or does not
                say which model it has.
            MissingDependencyError: If httpx2 is not installed.
        """
        try:
            import httpx2 as httpx
        except ImportError as error:
            raise MissingDependencyError(
                "httpx2", "generate-endpoint", "a language model behind a URL"
            ) from error
        base, _, self.model = url.partition("#")
        self._url = base.rstrip("/")
        try:
            parts = urlsplit(self._url)
            host = parts.hostname or ""
        except ValueError as error:
            raise GenerationError(f"{base[:120]}: not a URL ({error})") from error
        self.url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        if not host:
            raise GenerationError(
                f"{base[:120]}: expected a URL such as http://127.0.0.1:8080/v1, got no host"
            )
        self._errors = httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError
        self._client = httpx.Client(
            timeout=httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS),
            headers={"Authorization": f"Bearer {token}"} if token else None,
            trust_env=host not in ("localhost", "127.0.0.1", "::1"),  # no proxy for this machine
        )
        try:
            self.model = self.model or self._find_model()
        except BaseException:
            self.close()
            raise

    def complete(
        self, prompt: str, grammar: str, sampling: Sampling, on_piece: Callable[[str], None]
    ) -> None:
        """Continue a prompt up to the end of its line. The grammar is left out."""
        request = {
            "model": self.model, "prompt": prompt, "temperature": sampling.temperature,
            "seed": sampling.seed, "max_tokens": sampling.max_tokens, "stop": ["\n"],
            "stream": True,
        }  # fmt: skip
        self._answer("/completions", request, on_piece)

    def chat(
        self, message: str, grammar: str, sampling: Sampling, on_piece: Callable[[str], None]
    ) -> None:
        """Answer a message, see `LlmBackend`. The grammar is left out."""
        request = {
            "model": self.model, "messages": [{"role": "user", "content": message}],
            "temperature": sampling.temperature, "seed": sampling.seed,
            "max_tokens": sampling.max_tokens + REASONING_TOKENS, "stream": True,
        }  # fmt: skip
        self._answer("/chat/completions", request, on_piece)

    def log_likelihoods(self, prefix: str, texts: Sequence[str]) -> list[float]:
        """Refuse: the API does not tell how likely texts are."""
        raise GenerationError(f"{self.url} does not tell how likely texts are")

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _answer(self, path: str, request: dict[str, Any], on_piece: Callable[[str], None]) -> None:
        """Send a request, and report the pieces of its answer."""
        for event in self._events(path, request):
            choice = self._first_choice(event)
            if choice is None:
                continue
            message = choice.get("delta") or choice.get("message") or {}
            content = message.get("content") if isinstance(message, dict) else None
            piece = content or choice.get("text")
            if isinstance(piece, str) and piece:
                on_piece(piece)
            if choice.get("finish_reason") == "stop":
                on_piece("\n")  # the last text is not cut off

    def _find_model(self) -> str:
        """Return the name of the only model."""
        lines = list(self._lines("GET", "/models", None))
        try:
            names = [str(each["id"]) for each in json.loads("\n".join(lines))["data"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._odd("\n".join(lines), "a list of models") from error
        if len(names) != 1:
            listed = ", ".join(names[:10]) or "none"
            raise GenerationError(
                f"{self.url} has {len(names)} models ({listed[:300]}): name one, as in "
                f"{self.url}#NAME"
            )
        return names[0]

    def _events(self, path: str, request: dict[str, Any]) -> Iterator[Any]:
        """Yield the JSON documents of an answer: a stream of events, or a single document."""
        whole: list[str] = []
        streamed = False
        for line in self._lines("POST", path, request):
            if line.startswith("data:"):
                streamed = True
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                yield self._parse(data)
            elif not line.startswith(("event:", "id:", "retry:", ":")):
                whole.append(line)
        if not streamed:
            yield self._parse("\n".join(whole))

    def _parse(self, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._odd(text, "JSON") from error

    def _first_choice(self, event: Any) -> dict[str, Any] | None:
        """Return the first choice of an event; None if it has none, such as one with statistics."""
        if isinstance(event, dict) and "error" in event:
            raise GenerationError(f"{self.url} failed: {_shorten(str(event['error']))}")
        if not isinstance(event, dict) or not isinstance(event.get("choices"), list):
            raise self._odd(json.dumps(event), "an answer with `choices`")
        first = event["choices"][0] if event["choices"] else None
        return first if isinstance(first, dict) else None

    def _lines(self, method: str, path: str, request: dict[str, Any] | None) -> Iterator[str]:
        """Yield the lines of a response, up to `ANSWER_BYTES`."""
        size = 0
        try:
            with self._client.stream(method, f"{self._url}{path}", json=request) as response:
                if response.status_code != 200:
                    body = next(response.iter_text(4096), "")
                    raise GenerationError(
                        f"{self.url}{path} answered with the status {response.status_code} "
                        f"({_shorten(body)}): check the URL, which usually ends with /v1, the name "
                        f"of the model, and its token (CRL_LLM_TOKEN) if it asks for one"
                    )
                rest = ""
                for text in response.iter_text(65536):
                    size += len(text)
                    if size > ANSWER_BYTES:
                        raise GenerationError(
                            f"{self.url}{path} sent more than {ANSWER_BYTES >> 20} MiB: expected "
                            "the answer of a language model"
                        )
                    *lines, rest = (rest + text).split("\n")
                    yield from (line.rstrip("\r") for line in lines)
                if rest:
                    yield rest
        except self._errors as error:
            raise GenerationError(
                f"{self.url}{path} cannot be reached or broke off ({type(error).__name__}: "
                f"{_shorten(str(error))}): check that the server runs there"
            ) from error

    def _odd(self, text: str, expected: str) -> GenerationError:
        return GenerationError(
            f"{self.url}: expected {expected} of OpenAI's API, got {_shorten(text)!r}: check the "
            "URL, which usually ends with /v1"
        )


def _shorten(text: str) -> str:
    return " ".join(text.split())[:200]
