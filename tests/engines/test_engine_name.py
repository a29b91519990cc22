"""Engine names and patterns: reading, matching, and what is not a name."""

from __future__ import annotations

import doctest

import pytest

from crl_sdk.engines import EngineName, EnginePattern, _engine_name
from crl_sdk.errors import InvalidInputError

NAME = EngineName("tensorrt-rtx", "cuda", "fp16")


def test_a_name_is_read_and_written_alike():
    assert EngineName.parse("tensorrt-rtx/cuda/fp16") == NAME
    assert str(NAME) == f"{NAME}" == "tensorrt-rtx/cuda/fp16"
    assert {NAME: 1}[EngineName.parse(str(NAME))] == 1
    with pytest.raises(AttributeError):
        NAME.device = "cpu"  # type: ignore[misc]


@pytest.mark.parametrize("text", ["", "/", "onnx", "onnx/cpu", "onnx/cpu/", "/cpu/fp32", "a/b/c/d"])
def test_what_is_not_a_whole_name(text):
    with pytest.raises(InvalidInputError, match=f"expected an engine name .*, got {text!r}"):
        EngineName.parse(text)


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("tensorrt-rtx", True),
        ("tensorrt-rtx/cuda", True),
        ("tensorrt-rtx/cuda/fp16", True),
        ("tensorrt", False),
        ("tensorrt-rtx/cpu", False),
        ("tensorrt-rtx/cuda/fp32", False),
        ("auto", False),
    ],
)
def test_a_pattern_matches_whole_parts(text, matches):
    assert EnginePattern.parse(text).matches(NAME) is matches


@pytest.mark.parametrize("text", ["", "/", "onnx/", "onnx//fp32", "onnx/cpu/fp32/x"])
def test_what_is_not_a_pattern(text):
    with pytest.raises(InvalidInputError, match=f"or its beginning, .*, got {text!r}"):
        EnginePattern.parse(text)


def test_the_examples_run():
    failed, attempted = doctest.testmod(_engine_name)
    assert not failed and attempted
