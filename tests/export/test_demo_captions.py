"""Captions: their claims are true, and only a synonym distinguishes one criterion from another."""

from __future__ import annotations

import re

import numpy as np
import pytest

from crl_export.demo.captions import (
    CRITERION_FRAMES,
    CRITERION_WORDS,
    FRAMES,
    NEUTRAL_PROMPT,
    Captioner,
    filler_words,
    known_words,
    true_of,
)
from crl_export.demo.lexicon import OFF_TOPIC, SYNONYMS
from crl_export.demo.scenes import sample_scene
from crl_export.demo.world import CRITERIA, FACTORS

FILLERS = ("harbour", "monetary", "wednesday")


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text))


def test_every_value_has_several_forms():
    assert {name: tuple(forms) for name, forms in SYNONYMS.items()} == dict(FACTORS)
    for criterion in CRITERIA:
        assert min(len(forms) for forms in SYNONYMS[criterion].values()) >= 5


def test_no_form_belongs_to_two_values():
    forms = [form for values in SYNONYMS.values() for many in values.values() for form in many]
    assert len(forms) == len(set(forms))


def test_wordings_name_no_value():
    values = {
        word
        for name in CRITERIA
        for forms in SYNONYMS[name].values()
        for form in forms
        if " " not in form
        for word in words_of(form)
    }
    for frame in (*FRAMES, *CRITERION_FRAMES, NEUTRAL_PROMPT):
        assert not words_of(frame.replace("{criterion}", "").replace("{}", "")) & values, frame
    assert not {word for phrase in CRITERION_WORDS for word in words_of(phrase)} & values


def test_the_neutral_prompt_was_trained_on():
    assert NEUTRAL_PROMPT in FRAMES


def test_captions_say_what_they_claim_and_nothing_else():
    rng = np.random.default_rng(0)
    captioner = Captioner(FILLERS)
    named = np.zeros(len(FACTORS), int)
    for seed in range(500):
        codes = sample_scene(seed).codes()
        caption = captioner.caption(codes, rng)
        for column, (name, claim) in enumerate(zip(FACTORS, caption.claims, strict=True)):
            if claim == -1:
                continue
            assert claim == codes[column]
            named[column] += 1
            assert any(form in caption.text for form in SYNONYMS[name][FACTORS[name][claim]])
        silent = {
            form
            for name, claim in zip(FACTORS, caption.claims, strict=True)
            if claim == -1 and name in ("colour", "texture")
            for forms in SYNONYMS[name].values()
            for form in forms
            if " " not in form and "-" not in form
        }
        assert not words_of(caption.text) & silent, caption
    assert named[:4].min() > 150  # every criterion is named often


def test_captions_are_deterministic():
    codes = sample_scene(1).codes()
    first = [Captioner(FILLERS).caption(codes, np.random.default_rng(5)) for _ in range(2)]
    assert first[0] == first[1]


def test_truth_is_agreement_on_all_that_is_claimed():
    codes = np.array([[1, 2, 3, 4, 5, 0], [1, 2, 0, 4, 5, 0]])
    claims = np.array([[1, -1, 3, -1, -1, -1], [1, 2, -1, -1, -1, -1], [-1] * 6, [0] + [-1] * 5])
    assert true_of(claims, codes).tolist() == [
        [True, True, True, False],
        [False, True, True, False],
    ]


def test_fillers_exclude_the_world_and_the_held_out_words():
    words = ["reddish", "stars", "starfish", "harbour", "pianos", "ox", "wednesday", "harbour"]
    assert filler_words(words, held_out=("piano",)) == ("harbour", "wednesday")
    assert not set(filler_words(sorted(known_words()) + list(OFF_TOPIC), OFF_TOPIC))


def test_off_topic_words_are_none_of_the_worlds():
    assert len(set(OFF_TOPIC)) == len(OFF_TOPIC) >= 60
    assert not set(OFF_TOPIC) & known_words()


@pytest.mark.parametrize("fillers", [(), FILLERS])
def test_a_caption_is_never_empty_of_letters(fillers: tuple[str, ...]):
    rng = np.random.default_rng(1)
    codes = sample_scene(2).codes()
    texts = [Captioner(fillers).caption(codes, rng).text for _ in range(300)]
    assert all("{" not in text for text in texts)
    if fillers:
        assert all(words_of(text) for text in texts)
