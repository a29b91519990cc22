"""Chat templates: broken ones, and models that reason before they answer."""

from __future__ import annotations

import pytest

from crl_sdk.basis._chat_template import REASONING_TOKENS, TemplateChat, render_chat
from crl_sdk.basis._llm_backend import Sampling

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# the marks stand in the templates of models that reason, though they print none here
_HIDDEN = "{{ '' if true else '<think></think>' }}"
THINKING = PLAIN + _HIDDEN
OPENED = PLAIN.replace("<|assistant|>", "<|assistant|><think>\n") + _HIDDEN
SWITCHED = PLAIN.replace(
    "<|assistant|>",
    "<|assistant|>{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}",
)


class Backend:
    """Gives known pieces: with a grammar the answer, without one the reasoning."""

    name, version = "known", "0"

    def __init__(self, reasoning="", answer=" red, blue\n"):
        self.reasoning, self.answer, self.prompts = reasoning, answer, []

    def complete(self, prompt, grammar, sampling, on_piece):
        self.prompts.append((prompt, grammar, sampling))
        for piece in self.answer if grammar else self.reasoning:
            on_piece(piece)

    def log_likelihoods(self, prefix, texts):
        return [0.0] * len(texts)

    def close(self):
        """Do nothing."""


def chat(template, backend):
    parts = []
    TemplateChat(backend, template).chat("colors", "root ::= x", Sampling(0.5, 1), parts.append)
    return "".join(parts)


def test_a_message_goes_through_the_template():
    backend = Backend()
    assert chat(PLAIN, backend) == " red, blue\n"
    assert [prompt for prompt, *_ in backend.prompts] == ["<|user|>colors<|assistant|>"]


def test_reasoning_passes_before_the_grammar_begins():
    backend = Backend("<think>perhaps red</think>and so on")
    assert chat(THINKING, backend) == " red, blue\n"
    (_, free, sampling), (prompt, grammar, _) = backend.prompts
    assert (free, grammar) == ("", "root ::= x") and sampling.max_tokens == REASONING_TOKENS
    assert prompt == "<|user|>colors<|assistant|><think>perhaps red</think>\n\n"


def test_reasoning_that_the_template_opens():
    backend = Backend("perhaps red</think>")
    assert chat(OPENED, backend) == " red, blue\n"
    assert backend.prompts[1][0] == "<|user|>colors<|assistant|><think>\nperhaps red</think>\n\n"


def test_reasoning_without_an_end_is_cut_off():
    backend = Backend("<think>on and on")
    assert chat(THINKING, backend) == " red, blue\n"
    assert backend.prompts[1][0].endswith("<think>on and on</think>\n\n")


def test_a_model_that_answers_without_reasoning():
    backend = Backend("red, blue, and other colors")
    assert chat(THINKING, backend) == " red, blue\n"
    assert backend.prompts[1][0] == "<|user|>colors<|assistant|>"


def test_a_switch_turns_reasoning_off():
    backend = Backend("never asked")
    assert chat(SWITCHED, backend) == " red, blue\n"
    ((prompt, *_),) = backend.prompts
    assert prompt == "<|user|>colors<|assistant|><think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "words"),
    [("{{ 1 / 0 }}", "its chat template fails: division by zero"),
     ("{% for %}", "its chat template fails"),
     ("{{ raise_exception('no user turns') }}", "no user turns"),
     ("hello", "leaves out the message"),
     ("{{ messages[0].content.__class__.__mro__ }}", "its chat template fails|leaves out"),
     ("{{ ''.__class__.__base__.__subclasses__() }}", "its chat template fails"),
     ("", "no chat template")],
)  # fmt: skip
def test_a_template_that_breaks(template, words):
    with pytest.raises(ValueError, match=words):
        chat(template, Backend())


def test_a_template_that_uses_what_templates_use():
    template = (
        "{{ strftime_now('%Y') }}{% for m in messages %}{% if loop.index == 9 %}{% break %}"
        "{% endif %}{{ m['content'] | trim }}{% endfor %}"
    )
    text = render_chat(template, "colors").text
    assert text == "2025colors"
