"""The tokenizer. A parity test of the export compares its ids with open_clip's."""

from __future__ import annotations

import numpy as np
import pytest

from crl_sdk import ModelBundle, demo_bundle
from crl_sdk.errors import IntegrityError, InvalidInputError
from crl_sdk.model._tokenizer import Tokenizer, clean_text


@pytest.fixture(scope="module")
def tokenizer():
    return ModelBundle.open(demo_bundle()).tokenizer()


def test_rows_are_padded_to_the_context(tokenizer):
    short, longer = tokenizer.encode(["star", "three small red stars on grey"])
    assert short.shape == longer.shape == (tokenizer.context_length,)
    assert short.dtype == np.int64
    assert (short == tokenizer.pad_id).sum() > (longer == tokenizer.pad_id).sum() > 0


def test_texts_longer_than_the_context(tokenizer):
    long = "red " * 500
    with pytest.raises(InvalidInputError, match=r"text 1 has \d+ tokens, the model reads"):
        tokenizer.encode(["fine", long])
    cut = tokenizer.encode([long], truncate=True)[0]
    whole = tokenizer.encode(["red"])[0]
    assert cut[0] == whole[0] and cut[-1] == whole[2]  # start, …, end


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], "empty list"),
        ("red", r"pass \['red'\]"),
        ([""], "text 0 has no visible characters"),
        (["red", " \n\t"], "text 1 has no visible characters"),
        (["red", None], "text 1: expected a string, got NoneType"),
        ([b"red"], "got bytes"),
    ],
)
def test_bad_texts(tokenizer, texts, words):
    with pytest.raises(InvalidInputError, match=words):
        tokenizer.encode(texts)


def test_any_script_is_tokenised(tokenizer):
    rows = tokenizer.encode(["赤い星", "красная звезда", "⭐️", "नीला", "a&amp;b"], truncate=True)
    assert len({tuple(row) for row in rows}) == 5


def test_cleaning():
    assert clean_text(" A&amp;lt;B   CaT\n", "lower") == "a<b cat"
    assert clean_text(" Two  Words ", "whitespace") == "Two Words"
    assert clean_text("Ice-cream, 50% (off)!", "canonicalize") == "icecream 50 off"
    assert clean_text("schÃ¶n", "lower") == "schön"


def test_a_file_that_is_no_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(IntegrityError, match="export the model again"):
        Tokenizer.open(path, context_length=8, pad_id=0, clean="lower")
