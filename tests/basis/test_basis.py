"""Bases: built from texts, stored in files (with a golden file), and bad input."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from crl_sdk.basis import normalise_criterion
from crl_sdk.basis._basis import Basis, require_one_model
from crl_sdk.basis._build import build_basis, edit_basis
from crl_sdk.basis._directory import BasisDirectory, basis_file_name
from crl_sdk.basis._methods import make_projection
from crl_sdk.errors import (
    BasisError,
    BasisMismatchError,
    CriterionError,
    IntegrityError,
    InvalidInputError,
    UnsupportedSchemaError,
)

FINGERPRINT = "ab" * 32
GOLDEN = Path(__file__).parent / "golden" / "basis.safetensors"


def embed_text(texts):
    """A text tower of eight dimensions that gives each text a fixed random direction."""
    rows = []
    for text in texts:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        rows.append(np.random.default_rng(seed).standard_normal(8))
    rows = np.array(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make(texts=("red", "green", "blue"), **options) -> Basis:
    return build_basis("Color", texts, embed_text, fingerprint=FINGERPRINT, **options)


def test_cosine_gives_the_papers_representation():
    basis = make(method="cosine", post="none", prompts=["a {} thing"])
    images = embed_text(["one", "two"])
    texts = embed_text(["a red thing", "a green thing", "a blue thing"])
    np.testing.assert_allclose(basis.projection.apply(images), images @ texts.T, atol=1e-6)
    np.testing.assert_allclose(basis.text_embeddings, texts, atol=1e-6)


def test_several_prompts_are_averaged():
    basis = make(prompts=["a {} thing", "something {}"])
    mean = embed_text(["a red thing"])[0] + embed_text(["something red"])[0]
    np.testing.assert_allclose(basis.text_embeddings[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_duplicates_are_merged_counted_and_reported():
    def tower(texts):  # `scarlet` is almost `red`
        return embed_text([text.replace("scarlet", "red") for text in texts])

    texts = ["red", " RED ", "green", "scarlet", "red", "light  blue", "Light Blue"]
    basis = build_basis("color", texts, tower, fingerprint=FINGERPRINT)
    assert basis.texts == ("red", "green", "light blue")
    assert basis.counts == (4, 1, 2)
    assert [(m.text, m.into) for m in basis.merged] == [
        ("RED", "red"),
        ("red", "red"),
        ("Light Blue", "light blue"),
        ("scarlet", "red"),
    ]
    assert basis.merged[-1].cosine == pytest.approx(1)
    exact_only = build_basis("color", texts, tower, fingerprint=FINGERPRINT, merge_threshold=1.0)
    assert exact_only.texts == ("red", "green", "scarlet", "light blue")
    with pytest.raises(InvalidInputError, match=r"the 2 texts merge into 'red', .* 0\.995"):
        build_basis("color", ["red", "scarlet"], tower, fingerprint=FINGERPRINT)


@pytest.mark.parametrize("method", ["cosine", "contrastive"])
@pytest.mark.parametrize("post", ["l2", "standardise", "none"])
def test_round_trip_byte_for_byte(tmp_path, method, post):
    basis = make(
        ["red", "Red", "grün", "青"],
        method=method,
        post=post,
        prompts=["{}", "very {}"],
        provenance={"seeds": [1, 2], "model": {"name": "x"}},
    )
    path = tmp_path / "color.safetensors"
    basis.save(path)
    again = Basis.load(path)
    assert again.to_bytes() == path.read_bytes() == basis.to_bytes()
    assert again.texts == basis.texts and again.counts == basis.counts
    assert again.merged == basis.merged and again.provenance == basis.provenance
    images = embed_text(["one", "two"])
    np.testing.assert_array_equal(again.projection.apply(images), basis.projection.apply(images))
    assert os.listdir(tmp_path) == ["color.safetensors"]


def test_a_whole_number_as_the_threshold_is_read_again():
    basis = make(merge_threshold=1)
    assert Basis.from_bytes(basis.to_bytes()).sha256() == basis.sha256()


def test_golden_file():
    """A file written by an earlier version is read, and written again to the same bytes."""
    basis = Basis.load(GOLDEN)
    assert basis.texts == ("red", "green", "blue") and basis.criterion == "color"
    assert basis.to_bytes() == GOLDEN.read_bytes()
    # its method is of that version, so that it can be used but not made again
    assert basis.method == "centred" and basis.projection.output_dim == 3
    with pytest.raises(InvalidInputError, match="expected a method in"):
        edit_basis(basis, embed_text, fingerprint=FINGERPRINT, add=["pink"])


@pytest.mark.parametrize(
    ("texts", "options", "error", "words"),
    [
        ([], {}, InvalidInputError, "at least one text"),
        ("red", {}, InvalidInputError, r"pass \['red'\]"),
        (["red", "  "], {}, InvalidInputError, "no visible characters"),
        (["red"], {}, InvalidInputError, "at least 3 distinct texts"),
        (["red", "RED"], {}, InvalidInputError, "at least 3 distinct texts"),
        (["red", "blue"], {"prompts": []}, InvalidInputError, "at least one prompt"),
        (["red", "blue"], {"prompts": ["no place"]}, InvalidInputError, "exactly one {}"),
        (["red", "blue"], {"prompts": ["{} {}"]}, InvalidInputError, "exactly one {}"),
        (["red", "blue"], {"merge_threshold": 0}, InvalidInputError, "merge_threshold"),
        (["red", "blue"], {"method": "magic"}, InvalidInputError, "expected a method"),
        (["red", "blue"], {"post": "magic"}, InvalidInputError, "expected post"),
        (["red", "blue"], {"background": np.ones((2, 7))}, InvalidInputError, r"\(n, 8\)"),
        (["red", "blue"], {"background": np.ones((0, 8))}, InvalidInputError, "at least one back"),
        (["red", "blue"], {"background": np.full((2, 8), np.nan)}, InvalidInputError, "NaN"),
    ],
)
def test_bad_arguments(texts, options, error, words):
    with pytest.raises(error, match=words):
        make(texts, **options)


def test_one_text_is_enough_for_cosine():
    assert make(["red"], method="cosine").projection.output_dim == 1
    with pytest.raises(InvalidInputError):
        make_projection(np.ones((1, 8), np.float32), "contrastive")


def test_basis_of_another_model():
    basis = make()
    basis.require_fingerprint(FINGERPRINT)
    with pytest.raises(BasisMismatchError) as caught:
        basis.require_fingerprint("cd" * 32)
    for words in ("abababababab", "cdcdcdcdcdcd", "crl basis create 'color'"):
        assert words in str(caught.value)


def test_bases_and_embeddings_of_one_model():
    bases = [make(), make(prompts=["a {}"])]
    assert require_one_model(bases) == require_one_model(bases, FINGERPRINT) == FINGERPRINT
    with pytest.raises(BasisMismatchError, match=r"but the model of the embeddings is cdcd"):
        require_one_model(bases, "cd" * 32)
    other = build_basis("size", ["big", "tiny"], embed_text, fingerprint="cd" * 32)
    with pytest.raises(BasisMismatchError, match=r"basis 'size' .* model of basis 'color' is abab"):
        require_one_model([*bases, other])


def header(data: bytes) -> dict:
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["crl_basis"])


def with_header(data: bytes, **changes) -> bytes:
    return save(load(data), {"crl_basis": json.dumps({**header(data), **changes})})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"criterion": "../../etc/passwd"}, "expected a criterion"),
        ({"criterion": 7}, "criterion"),
        ({"method": 7}, "method"),
        ({"method": "magic"}, "SHA-256"),
        ({"post": "magic"}, "post"),
        ({"texts": ["red"]}, r"expected text_embeddings \(1, 8\)"),
        ({"counts": [1]}, "one count for each"),
        ({"surprise": 1}, "unknown field"),
        ({"texts": ["red", "green", "violet"]}, "SHA-256"),
        ({"provenance": {"texts": "by hand"}}, "SHA-256"),
        ({"sha256": "00" * 32}, "SHA-256"),
    ],
)
def test_forged_headers(changes, words):
    with pytest.raises(IntegrityError, match=words):
        Basis.from_bytes(with_header(make().to_bytes(), **changes))


def test_newer_schema():
    with pytest.raises(UnsupportedSchemaError, match="upgrade crl-embeddings"):
        Basis.from_bytes(with_header(make().to_bytes(), schema=2))


def test_tensors_that_do_not_fit():
    data = make().to_bytes()
    metadata = {"crl_basis": json.dumps(header(data))}
    tensors = load(data)
    for name, value in [
        ("weight", tensors["weight"][:, :1]),
        ("weight", tensors["weight"].astype(np.float64)),
        ("bias", np.full(3, np.nan, np.float32)),
        ("text_embeddings", np.full((3, 8), np.inf, np.float32)),
    ]:
        with pytest.raises(IntegrityError):
            Basis.from_bytes(save({**tensors, name: np.ascontiguousarray(value)}, metadata))
    del tensors["weight"]
    with pytest.raises(IntegrityError, match="weight"):
        Basis.from_bytes(save(tensors, metadata))
    with pytest.raises(IntegrityError, match="it has no 'crl_basis'"):
        Basis.from_bytes(save(load(data)))


@given(st.data())
def test_damaged_files_are_refused_or_say_the_same(data):
    good = make().to_bytes()
    bad = bytearray(good)
    if data.draw(st.booleans()):
        del bad[data.draw(st.integers(0, len(good) - 1)) :]
    else:
        bad[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        basis = Basis.from_bytes(bytes(bad))
    except (IntegrityError, UnsupportedSchemaError):
        return
    assert basis.to_bytes() == good  # a flip in a place without meaning, such as JSON escapes


def test_no_such_file(tmp_path):
    with pytest.raises(BasisError, match="cannot be read"):
        Basis.load(tmp_path / "color.safetensors")


def test_criteria_have_one_written_form(tmp_path):
    assert normalise_criterion("  Animal   HABITAT ") == "animal habitat"
    assert basis_file_name("Animal habitat") == "animal+habitat.safetensors"
    bad = ["", " ", "../../x", "a/b", "a\\b", ".", "-x", "_x", "a" * 65, "naïve", "a\0b", "a+b", 7]
    for criterion in bad:
        with pytest.raises(CriterionError, match="expected a criterion"):
            basis_file_name(criterion)


@given(st.text(max_size=70))
def test_no_criterion_leaves_its_directory(criterion):
    try:
        path = BasisDirectory("bases").path_of(criterion, FINGERPRINT)
    except CriterionError:
        return
    assert path.parent.parent == Path("bases") and path.name.endswith(".safetensors")


def test_editing_keeps_how_it_was_made_and_tells_what_changed():
    basis = make(("red", "RED", "green", "blue"), prompts=["a {} thing"], post="standardise")
    changed = edit_basis(
        basis, embed_text, fingerprint=FINGERPRINT, add=["pink"], remove=["Green "]
    )
    assert changed.texts == ("red", "blue", "pink") and changed.counts == (2, 1, 1)
    expected = make(
        ("red", "RED", "blue", "pink"), prompts=["a {} thing"], post="standardise",
        provenance=changed.provenance,
    )  # fmt: skip
    assert changed.to_bytes() == expected.to_bytes()
    again = edit_basis(changed, embed_text, fingerprint=FINGERPRINT, add=["mauve"], remove=["red"])
    assert again.texts == ("blue", "pink", "mauve")
    assert again.provenance["edits"] == [
        {"added": ["pink"], "removed": ["Green "]}, {"added": ["mauve"], "removed": ["red"]},
    ]  # fmt: skip


def test_editing_refuses_what_it_cannot_do():
    basis = make()
    with pytest.raises(InvalidInputError, match="no text 'pink'; it has red, green, blue"):
        edit_basis(basis, embed_text, fingerprint=FINGERPRINT, remove=["pink"])
    with pytest.raises(BasisMismatchError):
        edit_basis(basis, embed_text, fingerprint="0" * 64, add=["pink"])
    with pytest.raises(InvalidInputError, match="has the text 'Red ' already"):
        edit_basis(basis, embed_text, fingerprint=FINGERPRINT, add=["Red "])
    replaced = edit_basis(basis, embed_text, fingerprint=FINGERPRINT, add=["Red"], remove=["red"])
    assert replaced.texts == ("green", "blue", "Red")
    with pytest.raises(InvalidInputError, match="at least 3"):
        edit_basis(basis, embed_text, fingerprint=FINGERPRINT, remove=["red", "blue"])
    with pytest.raises(BasisError, match="made with against nothing"):
        edit_basis(basis, embed_text, fingerprint=FINGERPRINT, add=["pink"], against=[replaced])
