"""Projection methods: each compared with a second implementation of its definition.

`python tests/basis/test_methods.py --write` writes the table of methods to docs/PROJECTIONS.md.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import scipy.linalg

from crl_sdk._embedder import Embedder
from crl_sdk.basis._basis import Basis
from crl_sdk.basis._build import build_basis, edit_basis
from crl_sdk.basis._contrastive import text_weights
from crl_sdk.basis._methods import (
    DEFAULT_METHOD,
    METHODS,
    PROJECTION_METHODS,
    Method,
    default_method,
    find_method,
    make_projection,
)
from crl_sdk.basis._spectrum import bend
from crl_sdk.errors import BasisError, BasisMismatchError, InvalidInputError
from crl_sdk.model._bundle import demo_bundle
from crl_sdk.projection._projection import normalise_rows

D = 24
PAGE = Path(__file__).parents[2] / "docs" / "PROJECTIONS.md"


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def texts_of(k=9, seed=0, towards=3.0):
    """Unit rows around one direction, like those of a text tower."""
    rng = np.random.default_rng(seed)
    return unit(rng.standard_normal((k, D)) + towards * rng.standard_normal(D))


IMAGES = texts_of(40, seed=9)


AGAINST = [texts_of(5, seed=1), texts_of(4, seed=2)]
BACKGROUND = texts_of(60, seed=3, towards=1.0)


def options_of(method):
    return {"against": AGAINST} if find_method(method).needs_against else {}


def definition(  # noqa: PLR0911
    method, texts, images, *, mean=None, against=(), background=None
):
    """Each method implemented from its description, in float64 and without an affine map."""
    x, t = images.astype(np.float64), texts.astype(np.float64)
    centred = t - t.mean(axis=0)
    # eigenvectors of the texts' covariance, not the singular vectors of the texts
    values, vectors = np.linalg.eigh(centred.T @ centred)
    order = np.argsort(values)[::-1][: len(t) - 1]
    axes, strengths = vectors[:, order], np.sqrt(values[order])
    against = [each.astype(np.float64) for each in against]
    if method == "cosine":
        return x @ t.T
    if method == "orthogonal":
        return x @ axes[:, : bend(strengths)]
    if method == "exclusive-orthogonal":
        spans = []
        for other in against:
            _, s, v = np.linalg.svd(other - other.mean(axis=0), full_matrices=False)
            s = s[s > s[0] * 1e-6]
            spans.append(v[: bend(s)])
        kept = np.eye(D) - np.linalg.pinv(np.concatenate(spans)) @ np.concatenate(spans)
        return x @ kept @ axes[:, : bend(strengths)]
    if method == "contrastive":
        return x @ contrastive_axes(t, against, background)
    if method == "ignore":
        axes = np.linalg.qr(contrastive_axes(t, (), background))[0]
        return x - sum(np.outer(x @ axis, axis) for axis in axes.T)
    if method == "tangent":
        at = t.mean(axis=0) / np.linalg.norm(t.mean(axis=0))

        def logarithm(rows, point):
            cosines = rows @ point
            flat = rows - cosines[:, None] * point
            return flat * (np.arccos(cosines) / np.linalg.norm(flat, axis=1))[:, None]

        logs = logarithm(t, at)
        _, s, v = np.linalg.svd(logs - logs.mean(axis=0), full_matrices=False)
        axes = v[: bend(s[: len(t) - 1])].T
        if mean is None:
            return logarithm(x, at) @ axes
        point = mean / np.linalg.norm(mean)
        normal = (point - at) / np.linalg.norm(point - at)
        turned = logarithm(x, point) @ (np.eye(D) - 2 * np.outer(normal, normal))
        return turned @ axes
    raise NotImplementedError(f"write the definition of {method!r} here, independently of the SDK")


def cosine_of(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def contrastive_weights(texts, against, background):
    """The weights of `text_weights`, one text at a time."""
    weights = []
    for i, text in enumerate(texts):
        weight = 1.0
        if background is not None:
            centre = background.astype(np.float64).mean(axis=0)
            near = sorted(
                cosine_of(text - centre, other - centre) for j, other in enumerate(texts) if j != i
            )
            weight = 0.1 + max(np.mean(near[-3:]), 0)
        weights.append(weight)
    if against:
        centre = np.concatenate([texts, *against]).mean(axis=0)
        for i, text in enumerate(texts):
            near = max(cosine_of(text - centre, o - centre) for other in against for o in other)
            weights[i] *= max(1 - max(near, 0), 1e-3)
    return np.array(weights)


def contrastive_axes(texts, against, background):
    """The weighted directions of `contrastive`, by scipy's generalised eigenvectors."""
    parts = []
    if against:
        theirs = [np.cov(each.T, bias=True) for each in against]
        parts.append(sum(each / np.trace(each) for each in theirs) / len(theirs))
    if background is not None:
        every = np.cov(background.astype(np.float64).T, bias=True)
        parts.append(every / np.trace(every))
    nuisance = sum(parts) / len(parts) if parts else np.zeros((D, D))
    own = np.cov(texts.T, aweights=contrastive_weights(texts, against, background), bias=True)
    return reference_directions(own, nuisance, len(texts) - 1)


def reference_directions(signal, nuisance, count):
    strengths, axes = scipy.linalg.eigh(signal, nuisance + 10 / D * np.eye(D))
    strengths, axes = strengths[::-1][:count], axes[:, ::-1][:, :count]
    kept = []
    for axis in axes.T:  # Gram and Schmidt
        rest = axis - sum(((axis @ before) * before for before in kept), np.zeros(D))
        kept.append(rest / np.linalg.norm(rest))
    return np.array(kept).T * (strengths / strengths[0]) ** 0.3


def alike(rows, expected, atol=2e-5):
    """Compare up to the sign of each column, which a decomposition leaves open."""
    signs = np.sign((rows * expected).sum(axis=0))
    np.testing.assert_allclose(rows, expected * signs, atol=atol)


def cases():
    for method in PROJECTION_METHODS:
        for given in (False, True) if method.takes_against else (False,):
            for generic in (False, True) if method.takes_background else (False,):
                for reference in (False, True) if method.takes_reference else (False,):
                    if given or not method.needs_against:
                        yield method.name, given, generic, reference


@pytest.mark.parametrize(("method", "given", "generic", "referenced"), [*cases()])
def test_an_affine_map_gives_what_the_definition_gives(method, given, generic, referenced):
    """Tolerance 2e-5 of a unit row, from float32 weights."""
    texts, reference = texts_of(), texts_of(30, seed=5) if referenced else None
    options = {"against": AGAINST if given else (), "background": BACKGROUND if generic else None}
    projection = make_projection(texts, method, reference=reference, **options)
    mean = reference.astype(np.float64).mean(axis=0) if referenced else None
    expected = definition(method, texts, IMAGES, mean=mean, **options).astype(np.float32)
    alike(projection.apply(IMAGES), normalise_rows(expected, "l2"))
    assert projection.weight.dtype == projection.bias.dtype == np.float32


@pytest.mark.parametrize("against", [[], AGAINST])
@pytest.mark.parametrize("background", [None, BACKGROUND])
def test_the_weights_of_texts_are_those_of_their_definition(against, background):
    texts = texts_of().astype(np.float64)
    expected = contrastive_weights(texts, against, background)
    found = text_weights(texts, against, background)
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-6)


def test_the_directions_of_other_criteria_are_removed():
    texts = texts_of()
    other = texts_of(3, seed=1)  # few enough that all their directions are taken
    projection = make_projection(texts, "exclusive-orthogonal", against=[other])
    within = (other - other.mean(axis=0)) @ projection.weight
    assert np.abs(within).max() < 1e-6
    assert np.abs(projection.weight).max() > 0.01


def test_what_is_ignored_is_removed_alone_and_from_any_method():
    texts, other = texts_of(), texts_of(4, seed=1)
    varies = other - other.mean(axis=0)
    alone = make_projection(other, "ignore")
    assert alone.output_dim == D
    np.testing.assert_allclose(varies @ alone.weight, 0.0, atol=1e-5)
    ignored = make_projection(other, "contrastive")
    for method in METHODS:
        plain = make_projection(texts, method, **options_of(method))
        projection = make_projection(texts, method, ignore=[ignored], **options_of(method))
        assert projection.weight.shape == plain.weight.shape
        np.testing.assert_allclose(varies @ projection.weight, 0.0, atol=1e-5)
        assert np.abs(projection.weight).max() > 0.01
    both = [ignored, make_projection(texts_of(4, seed=2), "contrastive")]
    weight = make_projection(texts, ignore=both).weight
    for each in both:  # whatever their order, and though they are not orthogonal
        np.testing.assert_allclose(each.weight.T @ weight, 0.0, atol=1e-5)
    assert np.abs(both[0].weight.T @ both[1].weight).max() > 0.1
    with pytest.raises(InvalidInputError, match="from 24 dimensions in ignore, got 5"):
        make_projection(texts, ignore=[make_projection(other[:, :5], "cosine")])


def test_the_mean_image_is_turned_onto_the_mean_text():
    texts, reference = texts_of(), texts_of(30, seed=5)
    projection = make_projection(texts, "tangent", reference=reference)
    mean = reference.mean(axis=0, keepdims=True)
    assert np.abs(mean @ projection.weight + projection.bias).max() < 1e-6


def test_the_type_of_methods_lists_the_registry():
    assert get_args(Method) == METHODS
    assert len(set(METHODS)) == len(METHODS)
    assert DEFAULT_METHOD in METHODS
    assert not find_method(DEFAULT_METHOD).needs_against
    assert default_method(3) == default_method(1) == default_method(2, against=1) == "contrastive"
    assert default_method(2) == "cosine"


@pytest.mark.parametrize("method", PROJECTION_METHODS, ids=METHODS)
def test_the_record_of_a_method_is_true(method):
    projection = make_projection(texts_of(5), method.name, **options_of(method.name))
    if method.columns_are_texts:
        assert projection.output_dim == 5
    assert method.source == "this project" or "arXiv" in method.source


def test_contrastive_sees_through_a_variation_that_all_texts_share():
    """The inversion of real CLIP texts: they vary most in what no criterion is about.

    Texts share a mean and a strong nuisance direction, and images vary in it too. Weighted texts
    keep the nuisance; directions against the other criteria's texts do not.
    """
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((D, D)))[0].T
    values, nuisance, common = axes[:4], axes[4], axes[5]

    def texts(own, strength):
        noise = strength * rng.standard_normal((len(own), 1)) * nuisance
        return unit(2 * common + own + noise + 0.05 * rng.standard_normal((len(own), D)))

    own = texts(0.4 * values[np.repeat(np.arange(4), 3)], 0.8)
    others = [texts(0.4 * axes[6 + np.arange(6)], 0.8), texts(0.4 * axes[12 + np.arange(6)], 0.8)]
    labels = rng.integers(0, 4, 400)
    images = unit(
        common + 0.4 * values[labels] + 1.5 * rng.standard_normal((400, 1)) * nuisance
        + 0.05 * rng.standard_normal((400, D))
    )  # fmt: skip
    same = labels[:, None] == labels[None]
    found = {}
    generic = texts(np.zeros((60, D)), 0.8)
    for name, method, options in (
        ("cosine", "cosine", {}),
        ("others", "contrastive", {"against": others}),
        ("generic", "contrastive", {"background": generic}),
        ("both", "contrastive", {"against": others, "background": generic}),
    ):
        rows = make_projection(own, method, **options).apply(images)
        near = np.where(np.eye(400), -2, rows @ rows.T).argsort(axis=1)[:, -20:]
        found[name] = np.take_along_axis(same, near, axis=1).mean()
    assert min(found["others"], found["generic"], found["both"]) > 0.9
    assert found["cosine"] < found["others"] - 0.2


def test_contrastive_counts_texts_of_another_criterion_little():
    own, other = texts_of(6), texts_of(6, seed=1)
    clean = make_projection(own, "contrastive", against=[other])
    mixed = make_projection(np.concatenate([own, other[:3]]), "contrastive", against=[other])
    rows = [np.linalg.qr(each.weight)[0] for each in (clean, mixed)]
    kept = np.linalg.svd(rows[0].T @ rows[1], compute_uv=False)  # cosines of the angles between
    assert kept.min() > 0.95
    same = make_projection(np.tile(own[:1], (3, 1)), "contrastive", against=[other])
    assert np.isfinite(same.weight).all()
    assert np.isfinite(make_projection(other, "contrastive", against=[other]).weight).all()


def test_contrastive_counts_a_stray_text_little():
    """A text without siblings in the list, seen against generic texts."""
    rng = np.random.default_rng(0)
    own = unit(texts_of(8, seed=0) + 2.0 * texts_of(1, seed=7))
    stray = unit(rng.standard_normal((1, D)))
    weights = text_weights(np.concatenate([own, stray]).astype(np.float64), (), BACKGROUND)
    assert weights[8] < 0.4 * weights[:8].min()


def test_orthogonal_columns_are_orthonormal_and_few():
    projection = make_projection(texts_of(), "orthogonal")
    gram = projection.weight.T @ projection.weight
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)
    assert projection.output_dim < 9


def test_the_bend_of_a_spectrum():
    assert bend(np.array([10.0, 9.0, 8.0, 0.5, 0.4, 0.3])) == 3
    assert bend(np.array([10.0, 1.0, 0.9, 0.8])) == 2  # one column would be a sign
    assert bend(np.array([10.0, 6.0, 6.0, 6.0, 6.0, 0.5, 0.4])) == 5  # not after the first
    assert bend(np.array([1.0, 0.99, 0.98, 0.97, 0.96])) == 5  # flat: nothing to drop
    assert bend(np.array([3.0, 2.0])) == 2
    assert bend(np.array([1.0])) == 1
    assert bend(np.array([0.0])) == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 2, 3, 200])
def test_any_number_of_texts(method, k):
    """From two texts, which have one direction, to more texts than dimensions."""
    if k < find_method(method).min_texts:
        with pytest.raises(InvalidInputError, match=r"at least \d distinct texts, got"):
            make_projection(texts_of(k), method, **options_of(method))
        return
    if method == "ignore" and k > D // 2:
        with pytest.raises(InvalidInputError, match="give at most 12 texts"):
            make_projection(texts_of(k), method)
        return
    projection = make_projection(texts_of(k), method, **options_of(method))
    rows = projection.apply(IMAGES)
    assert 1 <= projection.output_dim <= (D if method == "ignore" else k)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)


def test_bad_input():
    texts = texts_of()
    with pytest.raises(InvalidInputError, match="expected a method in"):
        make_projection(texts, "nonsense")
    with pytest.raises(InvalidInputError, match="'cosine' takes no other criteria"):
        make_projection(texts, "cosine", against=[texts])
    with pytest.raises(InvalidInputError, match="'exclusive-orthogonal' needs other criteria"):
        make_projection(texts, "exclusive-orthogonal")
    for wrong in ({"against": [texts[:, :5]]}, {"background": texts[:, :5]}):
        with pytest.raises(InvalidInputError, match=r"shape \(n, 24\)"):
            make_projection(texts, **wrong)
    with pytest.raises(InvalidInputError, match="at least one background"):
        make_projection(texts, background=texts[:0])
    with pytest.raises(InvalidInputError, match="takes no reference"):
        make_projection(texts, "cosine", reference=texts)
    with pytest.raises(InvalidInputError, match="at least one reference"):
        make_projection(texts, "tangent", reference=texts[:0])
    with pytest.raises(InvalidInputError, match="NaN"):
        make_projection(np.full_like(texts, np.nan))


def test_a_basis_remembers_what_it_was_made_with(tmp_path):
    words = {word: row for word, row in zip("abcdefghi", texts_of(), strict=True)}

    def embed_text(texts):
        return np.stack([words[text] for text in texts])

    def make(name, texts, **options):
        return build_basis(name, texts, embed_text, fingerprint="ab" * 32, **options)

    other, ignored = make("shape", list("abc")), make("size", list("bc"))
    basis = make("color", list("defgh"), against=[other], ignore=[ignored], background=BACKGROUND)
    basis.save(tmp_path / "color.safetensors")
    loaded = Basis.load(tmp_path / "color.safetensors")
    weights = loaded.provenance["weights"]
    assert loaded.provenance == {
        "against": ["shape"], "ignore": ["size"], "background": 60, "weights": weights,
    }  # fmt: skip
    assert len(weights) == 5 and max(weights) == 1.0
    assert loaded.method == "contrastive" and loaded.sha256() == basis.sha256()
    with pytest.raises(BasisError, match=r"made with against shape: pass the bases"):
        edit_basis(loaded, embed_text, fingerprint="ab" * 32, add=["i"])
    given = {"against": [other], "ignore": [ignored], "background": BACKGROUND}
    edited = edit_basis(loaded, embed_text, fingerprint="ab" * 32, add=["i"], **given)
    again = make("color", list("defghi"), **given)
    np.testing.assert_array_equal(edited.projection.weight, again.projection.weight)
    assert edited.provenance["edits"] == [{"added": ["i"], "removed": []}]
    assert len(edited.provenance["weights"]) == 6
    with pytest.raises(InvalidInputError, match="got 'shape' itself"):
        make("Shape", list("defgh"), against=[other])
    foreign = build_basis("size", list("abc"), embed_text, fingerprint="cd" * 32)
    with pytest.raises(BasisMismatchError, match="made for model"):
        make("color", list("defgh"), against=[foreign])
    with pytest.raises(BasisMismatchError, match="made for model"):
        make("color", list("defgh"), ignore=[foreign])


@pytest.mark.parametrize("method", METHODS)
def test_the_graph_knows_no_method(method):
    """One engine run computes bases of all methods; tolerance 1e-5 to NumPy."""
    with Embedder.open(demo_bundle(), engine="onnx/cpu/fp32") as embedder:
        other = embedder.create_basis("count", ["one", "two", "three"])
        against = {"against": [other]} if find_method(method).needs_against else {}
        embedder.create_basis(
            "color", ["red", "green", "blue", "yellow", "pink"], method=method, **against
        )
        pixels = np.random.default_rng(0).integers(0, 256, (3, 80, 90, 3), np.uint8)
        result = embedder.embed(list(pixels), ["color", "count"])
        expected = embedder.project(result.universal, "color")
        np.testing.assert_allclose(result["color"], expected, atol=1e-5)
        assert result["color"].shape == (3, embedder.bases["color"].projection.output_dim)


def table_of_methods() -> str:
    """The records of all methods as a Markdown table."""
    lines = ["| method | columns | source | takes |", "|---|---|---|---|"]
    for method in PROJECTION_METHODS:
        source = re.sub(
            r"arXiv (\S+)", r"[arXiv \1](https://arxiv.org/abs/\1)",
            method.source.replace("this project", "ours"),
        )  # fmt: skip
        takes = ["other criteria"] * method.takes_against
        takes += ["background"] * method.takes_background + ["references"] * method.takes_reference
        default = " (default)" * (method.name == DEFAULT_METHOD)
        cells = (f"`{method.name}`{default}", method.columns, source, ", ".join(takes))
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def table_on_the_page() -> str:
    text = PAGE.read_text(encoding="utf-8")
    start = text.index("| method | columns |")
    return text[start : text.index("\n\n", start) + 1]


def test_the_page_has_the_table_of_methods():
    assert table_on_the_page() == table_of_methods(), (
        "run: python tests/basis/test_methods.py --write"
    )


if __name__ == "__main__" and "--write" in sys.argv:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(table_on_the_page(), table_of_methods()), encoding="utf-8")
