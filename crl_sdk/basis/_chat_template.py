"""Chat templates: the text that a model wants to read before its answer, and where it reasons."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

from crl_sdk.basis._llm_backend import GgufBackend, Sampling
from crl_sdk.errors import MissingDependencyError

REASONING_TOKENS = 768
"""Largest number of tokens of reasoning. It is cut off there, and the answer begins."""

REASONING_MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
)
"""Beginnings and ends of reasoning in the templates of reasoning models."""

_DAY = datetime(2025, 1, 1)

_SWITCHES = ("enable_thinking", "thinking")
"""Variables with which templates switch reasoning off, such as those of Qwen3 and DeepSeek-V3.1."""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A message as a model wants to read it.

    Attributes:
        text: The text before the answer, without the token that begins every text.
        reasoning: Marks around the reasoning that comes before the answer; None if the model does
            not reason, or was told not to.
    """

    text: str
    reasoning: tuple[str, str] | None

    @property
    def is_reasoning(self) -> bool:
        """Whether the text ends within the reasoning, which the model only has to continue."""
        return self.reasoning is not None and self.text.rstrip().endswith(self.reasoning[0])


def render_chat(template: str, message: str) -> ChatPrompt:
    """Write a message through a chat template, with reasoning switched off where it can be.

    Args:
        template: A model's Jinja template, from its GGUF file. It is run in a sandbox.
        message: The user's message.

    Returns:
        The text, and the marks of the reasoning to expect.

    Raises:
        MissingDependencyError: If Jinja2 is not installed.
        ValueError: If the template is malformed or refuses the message.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingDependencyError("Jinja2", "generate", "using a chat template") from error

    def refuse(reason: str) -> None:
        raise TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    try:
        text = environment.from_string(template).render(
            messages=[{"role": "user", "content": message}],
            add_generation_prompt=True,
            bos_token="",  # llama.cpp adds it
            eos_token="",  # ends answers of earlier turns, of which there are none
            raise_exception=refuse,
            strftime_now=_DAY.strftime,  # the same texts on every day
            **dict.fromkeys(_SWITCHES, False),
        )
    except Exception as error:  # templates run code, which raises anything
        raise ValueError(f"its chat template fails: {error}") from error
    if message not in text:
        raise ValueError("its chat template leaves out the message")
    return ChatPrompt(text, _expected_reasoning(template, text))


def _expected_reasoning(template: str, text: str) -> tuple[str, str] | None:
    """Return the marks of the reasoning that will follow a text."""
    marks = next((each for each in REASONING_MARKS if each[0] in template), None)
    if marks is None:
        return None
    if text.rstrip().endswith(marks[0]):
        return marks
    switched_off = any(switch in template for switch in _SWITCHES)
    closed = text.rstrip().endswith(marks[1])
    return None if switched_off or closed else marks


class TemplateChat:
    """Adds messages to a backend for GGUF files, by the chat template of the file."""

    def __init__(self, backend: GgufBackend, template: str) -> None:
        """Store a backend and a template.

        Args:
            backend: What runs the model.
            template: The model's chat template; empty if it has none.
        """
        self._backend, self._template = backend, template
        self.name, self.version = backend.name, backend.version
        self.complete, self.log_likelihoods = backend.complete, backend.log_likelihoods
        self.close = backend.close

    def chat(
        self, message: str, grammar: str, sampling: Sampling, on_piece: Callable[[str], None]
    ) -> None:
        """Answer a message, see `LlmBackend`. Reasoning comes first and is not reported."""
        if not self._template:
            raise ValueError("the model has no chat template: use the form completion")
        prompt = render_chat(self._template, message)
        text = prompt.text
        if prompt.reasoning is not None:
            text += self._reason(prompt, prompt.reasoning, sampling)
        self._backend.complete(text, grammar, sampling, on_piece)

    def _reason(self, prompt: ChatPrompt, marks: tuple[str, str], sampling: Sampling) -> str:
        """Return the model's reasoning up to its end, which is added where the model finds none.

        The answer is empty if the model does not reason.
        """
        begin, end = marks
        said = ""

        def receive(piece: str) -> None:
            nonlocal said
            said += piece
            starts = prompt.is_reasoning or said.lstrip().startswith(begin[: len(said.lstrip())])
            if end in said or not starts:
                raise _Enough

        with contextlib.suppress(_Enough):
            self._backend.complete(
                prompt.text, "", replace(sampling, max_tokens=REASONING_TOKENS), receive
            )
        if not prompt.is_reasoning and not said.lstrip().startswith(begin):
            return ""
        reasoning = said.partition(end)[0]
        return f"{reasoning}{end}\n\n"


class _Enough(Exception):
    """Ends an answer that has said enough."""
