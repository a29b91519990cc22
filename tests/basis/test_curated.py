"""Lists that were written by hand, and the paper's presets."""

from __future__ import annotations

import pytest

from crl_sdk.basis._build import check_prompts
from crl_sdk.basis._curated import curated_lists, find_curated, require_curated
from crl_sdk.basis._generation_options import GenerationOptions
from crl_sdk.basis._llm_requests import COMMON_TEXTS, FEW_SHOT, LINE_TEXTS
from crl_sdk.basis._presets import PRESETS, find_preset
from crl_sdk.basis._votes import text_key
from crl_sdk.errors import CriterionError, InvalidInputError

LISTS = curated_lists()


@pytest.mark.parametrize("name", LISTS)
def test_a_list_names_each_value_once(name):
    found = LISTS[name]
    assert found.name == name and len(found.texts) >= 16
    keys = [text_key(text) for text in found.texts]
    assert len(set(keys)) == len(keys), sorted(key for key in keys if keys.count(key) > 1)
    for text in found.texts:
        assert text == " ".join(text.split()) and len(text.split()) <= 4


def test_names_lead_to_one_list():
    names = [text_key(name) for found in LISTS.values() for name in (found.name, *found.aliases)]
    for name in names:
        owners = {
            found.name
            for found in LISTS.values()
            if name in map(text_key, (found.name, *found.aliases))
        }
        assert len(owners) == 1 and find_curated(name).name in owners


def test_the_criteria_of_every_field_have_lists():
    wanted = ("colours", "materials", "patterns", "textures", "shapes", "weather", "seasons",
              "times of day", "moods", "art styles", "scenes", "viewpoints", "counts")  # fmt: skip
    assert all(find_curated(name) for name in wanted)
    assert find_curated("Colour").name == "color" and find_curated("dog breed") is None
    assert LISTS["color"].provenance == {
        "texts": "curated", "list": "color", "licence": "Apache-2.0",
    }  # fmt: skip
    with pytest.raises(InvalidInputError, match="expected a curated list of animal, art style"):
        require_curated("dog breed")
    with pytest.raises(CriterionError):
        find_curated("<|im_end|>")


def test_few_shot_lines_have_enough_texts():
    for name in FEW_SHOT:
        assert len(LISTS[name].texts[:COMMON_TEXTS]) >= LINE_TEXTS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_the_options(name):
    preset = find_preset(name)
    check_prompts([preset.prompt])
    assert GenerationOptions(subject=preset.subject).subject == preset.subject


def test_presets():
    assert find_preset("clevr4-color").prompt == "objects with the color of {}"
    with pytest.raises(InvalidInputError, match="expected a preset of clevr4-texture"):
        find_preset("imagenet")
