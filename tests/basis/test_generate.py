"""Text generation, with a language model of known answers."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crl_sdk.basis._generate import generate_texts, similarity_to_others
from crl_sdk.basis._generation_options import GenerationOptions
from crl_sdk.basis._llm_requests import EXAMPLES, compose_chat, compose_completion
from crl_sdk.basis._votes import text_key
from crl_sdk.errors import CriterionError, GenerationError, InvalidInputError
from support import Scripted


def test_texts_are_ranked_by_votes_over_their_spellings():
    model = Scripted(
        " spring, summer, the winter, fall\n",
        " summer, winters, springs, monday\n",
        " winter, summer, autumn-time, fall\n",
    )
    found = generate_texts("season", model, GenerationOptions(max_answers=3))
    assert [(c.text, c.votes) for c in found.texts] == [
        ("summer", 3), ("winter", 3), ("spring", 2), ("fall", 2),
    ]  # fmt: skip
    reasons = {d.text: d.reason for d in found.dropped}
    assert set(reasons) == {"monday", "autumn-time"}
    assert all("fewer than 2 of 3" in reason for reason in reasons.values())


def test_an_answer_votes_once_and_its_cut_off_end_not_at_all():
    model = Scripted(" red, red, reds, blue, green\n", " red, blue, green, yel")
    found = generate_texts("color", model, GenerationOptions(max_answers=2))
    assert {c.text: c.votes for c in found.texts} == {"red": 2, "blue": 2, "green": 2}
    assert not found.dropped


def test_echoes_are_dropped_with_their_reason():
    example = next(iter(EXAMPLES.values()))[0]
    model = Scripted(f" colors, color, red, blue, green, {example}\n")
    found = generate_texts("color", model, GenerationOptions(max_answers=2))
    assert [c.text for c in found.texts] == ["red", "blue", "green"]
    assert {d.text: d.reason for d in found.dropped} == {
        "color": "echoes the criterion", example: "echoes an example",
    }  # fmt: skip


def test_a_users_own_example_is_no_echo_and_an_example_of_the_criterion_is_left_out():
    own = {"pattern": ("striped", "dotted", "plain")}
    model = Scripted(" striped, dotted, plain\n")
    found = generate_texts("texture", model, GenerationOptions(max_answers=2, examples=own))
    assert [c.text for c in found.texts] == ["striped", "dotted", "plain"]
    assert "pattern: " in model.asked[0][0]
    assert "material:" not in compose_completion("materials", GenerationOptions(), 0)


def test_the_users_own_texts_come_first_and_theirs_to_leave_out_go():
    model = Scripted(" red, blue, green, pink\n")
    options = GenerationOptions(max_answers=2, include=("teal", "Green"), exclude=("reds",))
    found = generate_texts("color", model, options, embed_text=lambda t: np.eye(9)[: len(t)])
    assert [(c.text, c.votes) for c in found.texts] == [
        ("teal", 0), ("Green", 2), ("blue", 2), ("pink", 2),
    ]  # fmt: skip
    assert [(d.text, d.reason) for d in found.dropped] == [("red", "excluded by the user")]


def test_it_stops_when_answers_add_nothing_and_says_how_often_it_asked():
    model = Scripted(" red, blue, green\n")
    found = generate_texts("color", model, GenerationOptions(max_answers=24, patience=3))
    assert found.answers == len(model.asked) == 5  # two make a vote trusted, three add nothing
    assert found.provenance["seeds"] == [0, 1, 2, 3, 4]
    assert [s.seed for _, s in model.asked] == [0, 1, 2, 3, 4]
    assert len({s.temperature for _, s in model.asked}) == 3
    json.dumps(found.provenance)


def test_the_number_of_texts_is_the_users():
    model = Scripted(" " + ", ".join("abcdefgh") + "\n")
    found = generate_texts("letter", model, GenerationOptions(count=4, max_answers=2))
    assert len(found.texts) == 4 and len(found.dropped) == 4
    assert {d.reason for d in found.dropped} == {"over the number asked for"}


def test_a_model_that_does_not_know_is_an_error_that_quotes_it():
    answers = [f" {a}, {b}, {c}\n" for a, b, c in zip("abcd", "efgh", "ijkl", strict=True)]
    with pytest.raises(GenerationError, match=r"seem to know 'plant disease'.*a \(1\).*a hint"):
        generate_texts("plant disease", Scripted(*answers), GenerationOptions(max_answers=4))
    with pytest.raises(GenerationError, match="It said: nothing"):
        generate_texts("color", Scripted("{}{}"), GenerationOptions(max_answers=2))


def test_a_flat_list_is_called_unsure():
    few = [f" {word}, {word} x, {word} y\n" for word in ("up", "low", "far")]
    assert not generate_texts("viewpoint", Scripted(*few), GenerationOptions(max_answers=12)).unsure
    flat = [f" a{i}, b{i}, c{i}\n" for i in range(6)]
    options = {"max_answers": 12, "patience": 12}
    with pytest.raises(GenerationError, match=r"'viewpoint': no text is in a quarter .* a0 \(2\)"):
        generate_texts("viewpoint", Scripted(*flat), GenerationOptions(**options))
    told = GenerationOptions(**options, accept_unsure=True)
    assert generate_texts("viewpoint", Scripted(*flat), told).unsure


def test_texts_that_the_model_itself_does_not_find_likely():
    """ "Dog breed" gave cat, bird, wolf and sheep, with many votes for cat."""
    every, few = " cat, bird, wolf, sheep, beagle\n", " bird, beagle\n"
    strange = ("cat", "bird", "wolf", "sheep")
    model = Scripted(*[every] * 9, few, irrelevant=strange)
    with pytest.raises(GenerationError, match=r"own texts likely .*: cat \(8\)"):
        generate_texts("dog breed", model, GenerationOptions(max_answers=10))
    told = generate_texts("dog breed", model, GenerationOptions(max_answers=10, accept_unsure=True))
    assert told.unsure and told.provenance["mean_relevance"] < 0
    assert told.provenance["relevance"]["beagle"] == 5

    rare = [" red, green, blue\n"] * 10 + [" red, green, blue, car\n"] * 2
    found = generate_texts(
        "color", Scripted(*rare, irrelevant=["car"]), GenerationOptions(max_answers=12, patience=12)
    )
    assert [each.text for each in found.texts] == ["red", "green", "blue"] and not found.unsure
    (dropped,) = found.dropped
    assert dropped.text == "car" and "less likely for this criterion" in dropped.reason


def test_outliers_in_the_space_of_the_model_are_dropped():
    """Two of twelve answers name algebra. With three, it has enough votes to be kept."""
    words = ["red", "blue", "green", "pink", "brown", "gold", "algebra"]
    rng = np.random.default_rng(0)
    rows = np.eye(8, dtype=np.float32)[[0] * 6 + [7]] + rng.normal(0, 0.1, (7, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    table = dict(zip(words, rows.astype(np.float32), strict=True))
    every, most = (" " + ", ".join(listed) + "\n" for listed in (words, words[:-1]))
    options = GenerationOptions(max_answers=12, patience=12)

    def embed(texts):
        return np.array([table[text] for text in texts])

    found = generate_texts("color", Scripted(*[every] * 2, *[most] * 10), options, embed_text=embed)
    assert [c.text for c in found.texts] == words[:-1]
    (outlier,) = found.dropped
    assert outlier.text == "algebra" and "far from the others" in outlier.reason
    sure = generate_texts("color", Scripted(*[every] * 3, *[most] * 9), options, embed_text=embed)
    assert len(sure.texts) == 7 and not sure.dropped
    unfiltered = generate_texts("color", Scripted(*[every] * 2, *[most] * 10), options)
    assert len(unfiltered.texts) == 7


def test_a_background_shows_outliers_that_a_common_direction_hides():
    """All texts of a real model are similar: here a stray has a cosine of 0.92 with the others."""
    words = ["red", "blue", "green", "pink", "brown", "gold", "algebra"]
    rng = np.random.default_rng(0)
    common = 4.0 * np.eye(40)[0]
    rows = common + np.eye(40)[[1] * 6 + [2]] + rng.normal(0, 0.08, (7, 40))
    background = common + rng.normal(0, 0.16, (200, 40))
    unit, generic = (
        (each / np.linalg.norm(each, axis=1, keepdims=True)).astype(np.float32)
        for each in (rows, background)
    )
    assert (unit[:6] @ unit[6] > 0.9).all()
    table = dict(zip(words, unit, strict=True))
    every, most = (" " + ", ".join(listed) + "\n" for listed in (words, words[:-1]))
    options = GenerationOptions(max_answers=12, patience=12)

    def texts(background):
        found = generate_texts(
            "color", Scripted(*[every] * 2, *[most] * 10), options,
            embed_text=lambda given: np.array([table[text] for text in given]),
            background=background,
        )  # fmt: skip
        return [each.text for each in found.texts]

    assert texts(None) == words
    assert texts(generic) == words[:-1]


def test_similarity_is_the_weighted_mean_over_the_others():
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((5, 4)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    weights = np.array([1, 2, 3, 4, 5], np.float32)
    expected = [
        np.average(np.delete(rows @ rows[i], i), weights=np.delete(weights, i)) for i in range(5)
    ]
    np.testing.assert_allclose(similarity_to_others(rows, weights), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("one", "other"),
    [("The Wood", "wood"), ("berries", "berry"), ("boxes", "box"), ("half-moon", "half moons"),
     ("glass", "glasses"), ("a dish", "dishes"), ("cars", "car")],
)  # fmt: skip
def test_spellings_of_one_text(one, other):
    assert text_key(one) == text_key(other)


@pytest.mark.parametrize(("one", "other"), [("glass", "gla"), ("bus", "bu"), ("art", "the art s")])
def test_different_texts_stay_apart(one, other):
    assert text_key(one) != text_key(other)


@pytest.mark.parametrize(
    "hint",
    ["two\nlines", "<|im_end|>", "<end_of_turn>", "[INST]", 'say "x"', "{x}", "a::=b", "x" * 201,
     "nul\x00", "tab\there", "\u2028", "\\n", " leading"],
)  # fmt: skip
def test_markup_in_a_hint_or_example_is_refused(hint):
    with pytest.raises(InvalidInputError, match="expected hints"):
        GenerationOptions(hint=hint)
    with pytest.raises(InvalidInputError, match="expected examples"):
        GenerationOptions(examples={"kind": (hint,)})


@given(st.text(max_size=60), st.text(max_size=60))
def test_nothing_a_user_types_leaves_its_line(criterion, hint):
    """Accepted criteria and hints add neither a line nor a model's markup to the prompt."""
    model = Scripted(" red, blue, green\n")
    with contextlib.suppress(InvalidInputError, GenerationError):
        generate_texts(criterion, model, GenerationOptions(hint=hint, max_answers=1, min_share=0))
    for prompt, _ in model.asked:
        assert prompt.count("\n") == prompt.count(": ")
        assert not set('<>|{}[]\\"`#') & set(prompt)
        assert all(c.isprintable() or c == "\n" for c in prompt)


@pytest.mark.parametrize("criterion", ["c" * 10_000, "цвет", "色", 'co"lor', "co<lor", "", "::="])
def test_odd_criteria_are_refused_before_the_model_is_asked(criterion):
    model = Scripted(" x\n")
    with pytest.raises(CriterionError):
        generate_texts(criterion, model)
    assert not model.asked


@pytest.mark.parametrize(
    "change",
    [{"count": 0}, {"max_answers": 0}, {"temperatures": ()}, {"temperatures": (3.0,)},
     {"max_tokens": 1}, {"min_share": 1.5}, {"spread": -1.0}, {"spread": float("nan")},
     {"form": "list"}, {"include": "teal"}, {"exclude": "teal"}, {"examples": {"size": "big"}}],
)  # fmt: skip
def test_options_out_of_range(change):
    with pytest.raises(InvalidInputError, match=f"expected {next(iter(change))}"):
        replace(GenerationOptions(), **change)


def test_the_order_of_examples_follows_the_seed():
    prompts = {compose_completion("color", GenerationOptions(), seed) for seed in range(6)}
    assert len(prompts) == 6
    assert compose_completion("color", GenerationOptions(), 3) == compose_completion(
        "color", GenerationOptions(), 3
    )
    hinted = compose_completion("color", GenerationOptions(hint="as a painter would say"), 0)
    assert hinted.endswith("\ncolor (as a painter would say):")


def test_a_model_that_follows_instructions_is_asked_through_its_template():
    model = Scripted(" red, blue, green\n")
    model.follows_instructions = True
    found = generate_texts(
        "color", model, GenerationOptions(max_answers=2, hint="as a painter would")
    )
    assert found.provenance["form"] == "chat"
    assert model.asked[0][0] == compose_chat(
        "color", GenerationOptions(hint="as a painter would"), 0
    )
    assert "Answer as a painter would." in model.asked[0][0]
