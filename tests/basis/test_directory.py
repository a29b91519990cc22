"""A directory of bases: one subdirectory for each model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crl_sdk import Basis
from crl_sdk.basis import BasisDirectory, build_basis_from_vectors
from crl_sdk.errors import BasisMismatchError, CriterionError
from support import save_basis

ONE, TWO = "ab" * 32, "cd" * 32
VECTORS = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


def put(directory: BasisDirectory, criterion: str, model: str) -> Basis:
    basis = build_basis_from_vectors(criterion, ["a", "b", "c"], np.array(VECTORS), model=model)
    save_basis(basis, directory.path)
    return basis


@pytest.fixture
def bases(tmp_path: Path) -> BasisDirectory:
    directory = BasisDirectory(tmp_path / "bases")
    for criterion, model in (("color", ONE), ("color", TWO), ("animal habitat", ONE)):
        put(directory, criterion, model)
    return directory


def test_models_do_not_meet(bases):
    assert bases.criteria() == ["animal habitat", "color"]
    assert bases.criteria(TWO) == ["color"] and bases.criteria("0" * 64) == []
    assert [bases.load("Color", model).fingerprint for model in (ONE, TWO)] == [ONE, TWO]
    assert bases.load("animal habitat").fingerprint == ONE  # the only model that has it
    assert [path.parent.name for path in bases.files("color")] == [ONE[:16], TWO[:16]]
    assert len(bases.files()) == 3


def test_what_is_missing_is_said(bases):
    with pytest.raises(CriterionError, match=r"2 models have a basis 'color' .*: name the model"):
        bases.load("color")
    with pytest.raises(CriterionError, match=r"'animal habitat' of this .* has color; another"):
        bases.load("animal habitat", TWO)
    with pytest.raises(CriterionError, match=r"no basis 'mood' in .* has animal habitat, color$"):
        bases.load("mood")
    bases.load("color", ONE).save(bases.path / "mood.safetensors")
    with pytest.raises(CriterionError, match=r"mood.safetensors is not in the directory of"):
        bases.load("mood", ONE)
    with pytest.raises(CriterionError, match="which has none"):
        BasisDirectory(bases.path / "nowhere").load("color", ONE)
    assert BasisDirectory(bases.path / "nowhere").files() == []


def test_a_basis_in_the_directory_of_another_model_is_refused(bases):
    bases.load("color", TWO).save(bases.path_of("color", ONE))
    with pytest.raises(BasisMismatchError):
        bases.load("color", ONE)


def test_models_that_are_known_by_name(bases):
    names = ["openai/clip-vit-b-32", "openai-clip-vit-b-32", "../../etc", "ä" * 200]
    made = [put(bases, "style", name) for name in names]
    folders = {bases.of_model(basis.fingerprint) for basis in made}
    assert len(folders) == 4 and all(folder.parent == bases.path for folder in folders)
    for basis in made:
        assert bases.load("style", basis.fingerprint).fingerprint == basis.fingerprint
    assert replace(made[0], criterion="x").fingerprint == "name:openai/clip-vit-b-32"
