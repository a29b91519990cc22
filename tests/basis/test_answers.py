"""Lists in the answers of language models, in all their forms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crl_sdk.basis._answers import read_answer


@pytest.mark.parametrize(
    ("answer", "texts"),
    [(" red, blue, sky blue\n", ["red", "blue", "sky blue"]),
     (" red, blue, sky b", ["red", "blue"]),  # cut off
     ("- Red\n- Blue\n* Green\n• gray\n", ["red", "blue", "green", "gray"]),
     ("1. Red\n2) Blue\n(3) Green\n", ["red", "blue", "green"]),
     ("**Colors:**\n1. **Red**: a warm color\n2. *Blue* - like the sky\n", ["red", "blue"]),
     ("Here is a list of colors: red, blue, and green.\n", ["red", "blue", "green"]),
     ('["red", "blue"]', ["red", "blue"]),
     ('```json\n["red", "blue",\n "green"]\n```\n', ["red", "blue", "green"]),
     ('[{"name": "red", "hex": "f00"}, {"name": "blue"}]', ["red", "blue"]),
     ('"red", \'blue\', “green”\n', ["red", "blue", "green"]),
     ("<think>red or pink, hm</think>\nblue, green\n", ["blue", "green"]),
     ("<think>red or pink, and so on", []),
     ("赤、青、緑\n", ["赤", "青", "緑"]),
     ("red; blue；green\n", ["red", "blue", "green"]),
     ("the artist's view, 3d art, t-shirt\n", ["the artist's view", "3d art", "t-shirt"]),
     ("red, <|im_end|>, blue\n", ["red", "blue"]),
     ("red, a sentence that goes on and on, blue\n", ["red", "blue"]),
     ("red, etc.\n", ["red"]), ("", []), ("\n\n", []), ("[", []), ("[1, 2]\n", ["1", "2"])],
)  # fmt: skip
def test_forms_of_lists(answer, texts):
    assert read_answer(answer, 4) == texts


def test_the_number_of_words():
    answer = "red, light red, a very light red\n"
    assert read_answer(answer, 1) == ["red"]
    assert read_answer(answer, 4) == ["red", "light red", "a very light red"]


@given(st.text())
def test_any_answer_gives_clean_texts(answer):
    for text in read_answer(answer, 3):
        assert text == " ".join(text.split()) and 0 < len(text) <= 80
        assert not set('<>|{}[]\\"`#,') & set(text)


def test_deep_json_is_no_list():
    assert read_answer("[" * 100_000 + "]" * 100_000, 3) == []
