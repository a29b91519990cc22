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
from crl_sdk.basis._llm_requests import compose_chat, compose_completion, few_shot_lines
from crl_sdk.basis._votes import VoteCounter, text_key
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
    assert all("in 1 of 3 answers only" in reason for reason in reasons.values())


def test_an_answer_votes_once_and_its_cut_off_end_not_at_all():
    model = Scripted(" red, red, reds, blue, green\n", " red, blue, green, yel")
    found = generate_texts("color", model, GenerationOptions(max_answers=2))
    assert {c.text: c.votes for c in found.texts} == {"red": 2, "blue": 2, "green": 2}
    assert not found.dropped


class Parrot(Scripted):
    """Repeats what its prompt shows, and adds answers of its own."""

    def complete(self, prompt, grammar, sampling, on_token=None):
        said = super().complete(prompt, grammar, sampling, on_token)
        shown = [line.partition(": ")[2] for line in prompt.splitlines()[:-1]]
        return f" {', '.join(shown)},{said}"


def test_what_a_prompt_shows_is_no_answer_to_it():
    found = generate_texts(
        "color", Parrot(" colors, color, red, blue, green\n"), GenerationOptions(max_answers=24)
    )
    assert [c.text for c in found.texts] == ["red", "blue", "green"]
    assert {d.text: d.reason for d in found.dropped} == {"colors": "echoes the criterion"}


def test_a_text_of_the_few_shot_lines_is_kept_if_answers_without_that_line_name_it():
    """Metal, wood and glass were dropped from every list of textures."""
    model = Scripted(" metal, wood, glass, rough, smooth\n")
    found = generate_texts("texture", model, GenerationOptions(max_answers=24, patience=24))
    assert {c.text for c in found.texts} == {"metal", "wood", "glass", "rough", "smooth"}
    votes = {c.text: c.votes for c in found.texts}
    assert votes["rough"] == 24 and 8 <= votes["metal"] < 24  # some answers were shown metal


def test_a_users_own_example_is_no_echo_and_an_example_of_the_criterion_is_left_out():
    own = {"pattern": ("striped", "dotted", "plain")}
    model = Scripted(" striped, dotted, plain\n")
    found = generate_texts("texture", model, GenerationOptions(max_answers=2, examples=own))
    assert [c.text for c in found.texts] == ["striped", "dotted", "plain"]
    assert all("pattern: " in prompt for prompt, _ in model.asked)
    for criterion in ("materials", "made of"):
        for seed in range(24):
            assert "material" not in few_shot_lines(criterion, GenerationOptions(), seed)


def test_the_users_own_texts_come_first_and_theirs_to_leave_out_go():
    model = Scripted(" red, blue, green, pink\n")
    options = GenerationOptions(max_answers=2, include=("teal", "Green"), exclude=("reds",))
    found = generate_texts("color", model, options, embed_text=lambda t: np.eye(9)[: len(t)])
    assert [(c.text, c.votes) for c in found.texts] == [
        ("teal", 0), ("Green", 2), ("blue", 2), ("pink", 2),
    ]  # fmt: skip
    assert [(d.text, d.reason) for d in found.dropped] == [("red", "excluded by the user")]


def test_a_text_in_other_cases_widths_and_scripts_is_counted_once():
    counter = VoteCounter()
    counter.add(["Red", "red", "\uff32\uff25\uff24", "the reds", "\u8d64", "\u8d64"])
    assert [(each.text, each.votes) for each in counter.ranking()] == [("Red", 1), ("\u8d64", 1)]


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
    with pytest.raises(GenerationError, match=r"own texts likely .*: beagle"):
        generate_texts("dog breed", model, GenerationOptions(max_answers=10))
    told = generate_texts("dog breed", model, GenerationOptions(max_answers=10, accept_unsure=True))
    assert told.unsure and told.provenance["mean_relevance"] < 0
    assert told.provenance["relevance"]["beagle"] == 5


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
        generate_texts(criterion, model, GenerationOptions(hint=hint, max_answers=1))
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
     {"max_tokens": 1}, {"max_words": 0}, {"max_words": 13}, {"spread": -1.0},
     {"spread": float("nan")}, {"form": "lists"}, {"include": "teal"}, {"exclude": "teal"},
     {"examples": {"size": "big"}}],
)  # fmt: skip
def test_options_out_of_range(change):
    with pytest.raises(InvalidInputError, match=f"expected {next(iter(change))}"):
        replace(GenerationOptions(), **change)


def prompt_of(criterion="color", options=GenerationOptions(), seed=0):  # noqa: B008 - frozen
    return compose_completion(criterion, options, few_shot_lines(criterion, options, seed))


def test_the_few_shot_lines_follow_the_seed():
    assert len({prompt_of(seed=seed) for seed in range(6)}) == 6
    assert prompt_of(seed=3) == prompt_of(seed=3)
    hinted = prompt_of(options=GenerationOptions(hint="as a painter would say"))
    assert hinted.endswith("\ncolor (as a painter would say):")


def flat(count, answers, per_answer=16):
    """Answers that name equally likely values."""
    words = [f"w{i}" for i in range(count)]
    rng = np.random.default_rng(0)
    return [
        " " + ", ".join(rng.choice(words, per_answer, replace=False)) + "\n" for _ in range(answers)
    ]


def test_more_answers_give_more_texts_even_if_all_are_equally_likely():
    """Of 320 equally likely texts, 24 answers kept 90 and 200 answers 8."""
    kept = []
    for answers in (24, 200):
        options = GenerationOptions(
            count=320, max_answers=answers, patience=answers, accept_unsure=True
        )
        model = Scripted(*flat(320, answers))
        kept.append(len(generate_texts("word", model, options).texts))
    assert kept[0] >= 90 and kept[1] >= 300


def test_a_text_with_few_votes_must_be_relevant():
    """Of 24 answers, two name algebra; it is kept only if the criterion makes it likely."""
    answers = [" red, green, blue\n"] * 22 + [" red, green, blue, algebra\n"] * 2
    options = GenerationOptions(max_answers=24, patience=24)
    found = generate_texts("color", Scripted(*answers), options)
    assert [each.text for each in found.texts] == ["red", "green", "blue", "algebra"]
    without = generate_texts("color", Scripted(*answers, irrelevant=["algebra"]), options)
    assert [each.text for each in without.texts] == ["red", "green", "blue"]
    assert "log ratio -3.0, needed 2.7" in without.dropped[0].reason


class Chatting(Scripted):
    """A model with a chat template, which answers messages and prompts differently."""

    chats = True

    def __init__(self, *answers, prompts=(" x, y\n",), tells_likelihoods=True):
        super().__init__(*answers)
        self.prompts, self.messages = prompts, []
        self.tells_likelihoods = tells_likelihoods

    def complete(self, prompt, grammar, sampling, on_token=None):
        self.asked.append((prompt, sampling))
        return self.prompts[(len(self.asked) - 1) % len(self.prompts)]

    def chat(self, message, grammar, sampling, on_token=None):
        self.messages.append((message, grammar, sampling))
        return self.answers[(len(self.messages) - 1) % len(self.answers)]

    def log_likelihoods(self, prefix, texts):
        assert self.tells_likelihoods
        return super().log_likelihoods(prefix, texts)


ANIMALS = " dog, cat, horse, cow, sheep, lion, tiger, bear\n"


def test_the_form_is_chosen_by_trying_both():
    """The size in a file's name says nothing about 8x7B, E2B or a file without a label."""
    good = Chatting(ANIMALS, " red, blue, green\n", " pink\n")
    found = generate_texts("color", good)
    assert found.provenance["form"] == "list"
    assert found.provenance["probe"] == {"completion": 0, "list": 8}
    assert [each.text for each in found.texts] == ["red", "blue", "green", "pink"]
    bad = Chatting(" I am a helpful assistant\n", prompts=[ANIMALS])
    found = generate_texts("animal", bad, GenerationOptions(max_answers=4, accept_unsure=True))
    assert found.provenance["form"] == "completion"
    assert found.provenance["probe"] == {"completion": 8, "list": 0}
    assert "probe" not in generate_texts("color", Scripted(" red, blue, green\n")).provenance


def test_a_long_list_is_continued_until_nothing_new_comes():
    answers = [f" w{i}, w{i + 1}, w{i + 2}, w{i + 3}\n" for i in range(0, 40, 4)]
    model = Chatting(*answers, " w0, w1, W2, the w3\n")
    options = GenerationOptions(form="list", count=200, subject="the color of objects")
    found = generate_texts("color", model, options)
    assert [each.text for each in found.texts] == [f"w{i}" for i in range(40)]
    assert len(model.messages) == 11
    first, second = model.messages[0][0], model.messages[1][0]
    assert first.startswith("Generate common expressions to describe the color of objects, as many")
    assert "none of these: w0, w1, w2, w3." in second
    assert not found.unsure
    few = generate_texts("color", Chatting(*answers), replace(options, count=6))
    assert len(few.texts) == 6 and few.answers == 2


def test_a_list_without_a_grammar_and_without_likelihoods():
    """An endpoint answers in any form, and tells no probabilities."""
    said = "Sure! Here are colors:\n1. **Red**\n2. Sky Blue\n3. a very long sentence about green\n"
    model = Chatting(said, "Sorry, no more.\n", tells_likelihoods=False)
    options = GenerationOptions(include=("green",), form="list")
    found = generate_texts("color", model, options)
    assert [each.text for each in found.texts] == ["green", "red", "sky blue"]
    assert "mean_relevance" not in found.provenance and found.provenance["form"] == "list"


def test_votes_through_a_chat_template():
    model = Chatting(" red, blue, green\n")
    options = GenerationOptions(max_answers=2, hint="as a painter would", form="chat")
    found = generate_texts("color", model, options)
    assert found.provenance["form"] == "chat"
    lines = few_shot_lines("color", options, 0)
    assert model.messages[0][0] == compose_chat("color", options, lines)
    assert "Answer as a painter would." in model.messages[0][0]


def test_pictures_vote_on_texts():
    """Pictures of red, blue and green things never fit algebra, and hardly differ in it."""
    rng = np.random.default_rng(2)
    axes = np.eye(8, dtype=np.float32)
    words = {"red": axes[0], "blue": axes[1], "green": axes[2], "algebra": axes[3], "tax": axes[4]}
    pictures = 0.3 * axes[rng.integers(0, 3, 60)] + axes[7] + rng.normal(0, 0.01, (60, 8))
    pictures = (pictures / np.linalg.norm(pictures, axis=1, keepdims=True)).astype(np.float32)
    background = (axes[[5, 6]] + axes[7]) / 2
    model = Scripted(" algebra, red, blue, tax, green\n")

    def texts(count, include=()):
        found = generate_texts(
            "color", model, GenerationOptions(max_answers=4, count=count, include=include),
            embed_text=lambda given: np.array([words[text] for text in given]),
            background=background, pictures=pictures[:count],
        )  # fmt: skip
        return found

    found = texts(40)
    assert {each.text for each in found.texts} == {"red", "blue", "green"}
    assert {each.text for each in found.dropped} == {"algebra", "tax"}
    assert all("% of the pictures best" in each.reason for each in found.dropped)
    assert found.provenance["pictures"]["count"] == 40
    assert set(found.provenance["pictures"]["share"]) == {"red", "blue", "green"}
    kept = texts(40, include=("tax",))
    assert kept.texts[0].text == "tax"
    with pytest.raises(InvalidInputError, match="at least 20 pictures to vote, got 19"):
        texts(19)
