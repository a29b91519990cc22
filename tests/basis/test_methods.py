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
from crl_sdk.basis._methods import (
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


def options_of(method):
    against = {"against": [texts_of(5, seed=1), texts_of(4, seed=2)]}
    return against if find_method(method).needs_against else {}


def definition(method, texts, images, mean=None):  # noqa: PLR0911
    """Each method implemented from its description, in float64 and without an affine map."""
    x, t = images.astype(np.float64), texts.astype(np.float64)
    centred = t - t.mean(axis=0)
    # eigenvectors of the texts' covariance, not the singular vectors of the texts
    values, vectors = np.linalg.eigh(centred.T @ centred)
    order = np.argsort(values)[::-1][: len(t) - 1]
    axes, strengths = vectors[:, order], np.sqrt(values[order])
    moved = x if mean is None else x - mean
    if method == "cosine":
        return x @ t.T
    if method == "centred":
        return moved @ centred.T
    if method == "orthogonal":
        return moved @ axes[:, : bend(strengths)]
    if method == "pca":
        return (x - (t.mean(axis=0) if mean is None else mean)) @ axes
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
    if not find_method(method).needs_against:
        raise NotImplementedError(
            f"write the definition of {method!r} here, independently of the SDK"
        )
    against = [each.astype(np.float64) for each in options_of(method)["against"]]
    if method == "exclusive-weighted":
        theirs = [np.cov(each.T, bias=True) for each in against]
        spread = sum(each / np.trace(each) for each in theirs) / len(theirs)
        mean = sum(each.mean(axis=0) for each in against) / len(against)
        kept = []
        for text in t:
            away = text - mean  # the part that the Wiener filter assigns to the others:
            part = spread @ np.linalg.solve(spread + np.eye(D) / D, away)
            kept.append(1 - away @ part / (away @ away))
        return moved @ t.T * np.minimum(1, np.array(kept) / np.median(kept)) ** 2
    if method == "contrastive":
        return moved @ contrastive_axes(t, against)
    spans = []
    for other in against:
        _, s, v = np.linalg.svd(other - other.mean(axis=0), full_matrices=False)
        s = s[s > s[0] * 1e-6]
        spans.append(v[: bend(s)])
    kept = np.eye(D) - np.linalg.pinv(np.concatenate(spans)) @ np.concatenate(spans)
    inner = {"exclusive": "centred", "exclusive-orthogonal": "orthogonal"}[method]
    return definition(inner, texts, moved @ kept, None)


def contrastive_axes(texts, against):
    """The weighted directions of `contrastive`, by scipy's generalised eigenvectors."""
    centre = np.concatenate([texts, *against]).mean(axis=0)
    weights = []
    for text in texts - centre:
        cosines = [
            text @ other / (np.linalg.norm(text) * np.linalg.norm(other))
            for other in np.concatenate(against) - centre
        ]
        weights.append(1 - max(0, *cosines))
    theirs = [np.cov(each.T, bias=True) for each in against]
    background = sum(each / np.trace(each) for each in theirs) / len(theirs)
    own = np.cov(texts.T, aweights=weights, bias=True)
    strengths, axes = scipy.linalg.eigh(own, background + 10 / D * np.eye(D))
    strengths, axes = strengths[::-1][: len(texts) - 1], axes[:, ::-1][:, : len(texts) - 1]
    kept = []
    for axis in axes.T:  # Gram and Schmidt
        rest = axis - sum(((axis @ before) * before for before in kept), np.zeros(D))
        kept.append(rest / np.linalg.norm(rest))
    return np.array(kept).T * (strengths / strengths[0]) ** 0.25


def alike(rows, expected, atol=2e-5):
    """Compare up to the sign of each column, which a decomposition leaves open."""
    signs = np.sign((rows * expected).sum(axis=0))
    np.testing.assert_allclose(rows, expected * signs, atol=atol)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("referenced", [False, True])
def test_an_affine_map_gives_what_the_definition_gives(method, referenced):
    if referenced and not find_method(method).takes_reference:
        return  # see test_bad_input
    texts = texts_of()
    reference = texts_of(30, seed=5) if referenced else None
    projection = make_projection(texts, method, reference=reference, **options_of(method))
    mean = reference.astype(np.float64).mean(axis=0) if referenced else None
    expected = normalise_rows(definition(method, texts, IMAGES, mean).astype(np.float32), "l2")
    alike(projection.apply(IMAGES), expected)
    assert projection.weight.dtype == projection.bias.dtype == np.float32


def test_the_directions_of_other_criteria_are_removed():
    texts = texts_of()
    other = texts_of(3, seed=1)  # few enough that all their directions are taken
    for method in ("exclusive", "exclusive-orthogonal"):
        projection = make_projection(texts, method, against=[other])
        within = (other - other.mean(axis=0)) @ projection.weight
        assert np.abs(within).max() < 1e-6
        assert np.abs(projection.weight).max() > 0.01


def test_the_mean_image_becomes_nothing_or_is_turned_onto_the_mean_text():
    texts, reference = texts_of(), texts_of(30, seed=5)
    mean = reference.mean(axis=0, keepdims=True)
    for method in METHODS:
        if not find_method(method).takes_reference:
            continue
        projection = make_projection(texts, method, reference=reference, **options_of(method))
        assert np.abs(mean @ projection.weight + projection.bias).max() < 1e-6, method


def test_a_text_of_another_criterion_counts_less():
    own, other = texts_of(6), texts_of(6, seed=1)
    projection = make_projection(
        np.concatenate([own, other[:2]]), "exclusive-weighted", against=[other]
    )
    weights = np.linalg.norm(projection.weight, axis=0)
    assert weights[6:].max() < 0.5 * weights[:6].min()
    assert weights.min() > 0 and weights.max() == pytest.approx(1)
    same = make_projection(np.tile(own[:1], (3, 1)), "exclusive-weighted", against=[other])
    np.testing.assert_allclose(np.linalg.norm(same.weight, axis=0), 1.0, atol=1e-6)


def test_the_type_of_methods_lists_the_registry():
    assert get_args(Method) == METHODS
    assert len(set(METHODS)) == len(METHODS)
    for needs_against in (False, True):
        assert sum(m.default for m in PROJECTION_METHODS if m.needs_against == needs_against) == 1


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
    for method in ("cosine", "exclusive-weighted", "contrastive"):
        against = others if find_method(method).needs_against else ()
        rows = make_projection(own, method, against=against).apply(images)
        near = np.where(np.eye(400), -2, rows @ rows.T).argsort(axis=1)[:, -20:]
        found[method] = np.take_along_axis(same, near, axis=1).mean()
    assert found["contrastive"] > 0.9
    assert max(found["cosine"], found["exclusive-weighted"]) < found["contrastive"] - 0.2


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


def test_the_default_method():
    assert default_method(against=False) == "centred"
    assert default_method(against=True) == "exclusive-weighted"


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
        with pytest.raises(InvalidInputError, match="at least 2 distinct texts, got 1"):
            make_projection(texts_of(1), method, **options_of(method))
        return
    projection = make_projection(texts_of(k), method, **options_of(method))
    rows = projection.apply(IMAGES)
    assert 1 <= projection.output_dim <= k
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)


def test_bad_input():
    texts = texts_of()
    with pytest.raises(InvalidInputError, match="expected a method in"):
        make_projection(texts, "nonsense")
    with pytest.raises(InvalidInputError, match="'centred' takes no other criteria"):
        make_projection(texts, "centred", against=[texts])
    with pytest.raises(InvalidInputError, match="'exclusive' needs other criteria"):
        make_projection(texts, "exclusive")
    with pytest.raises(InvalidInputError, match=r"shape \(n, 24\)"):
        make_projection(texts, "exclusive", against=[texts[:, :5]])
    with pytest.raises(InvalidInputError, match="takes no reference"):
        make_projection(texts, "cosine", reference=texts)
    with pytest.raises(InvalidInputError, match="at least one reference"):
        make_projection(texts, "tangent", reference=texts[:0])
    with pytest.raises(InvalidInputError, match="NaN"):
        make_projection(np.full_like(texts, np.nan), "pca")


def test_a_basis_remembers_what_it_was_made_with(tmp_path):
    words = {word: row for word, row in zip("abcdefghi", texts_of(), strict=True)}

    def embed_text(texts):
        return np.stack([words[text] for text in texts])

    def make(name, texts, **options):
        return build_basis(name, texts, embed_text, fingerprint="ab" * 32, **options)

    other = make("shape", list("abc"))
    basis = make(
        "color",
        list("defgh"),
        method="exclusive",
        against=[other],
        reference=texts_of(7, seed=3),
    )
    basis.save(tmp_path / "color.safetensors")
    loaded = Basis.load(tmp_path / "color.safetensors")
    assert loaded.provenance == {"references": 7, "against": ["shape"]}
    assert loaded.method == "exclusive" and loaded.sha256() == basis.sha256()
    with pytest.raises(BasisError, match="made with reference images and other criteria"):
        edit_basis(loaded, embed_text, fingerprint="ab" * 32, add=["i"])
    edited = edit_basis(make("size", list("abc"), method="pca"), embed_text, fingerprint="ab" * 32,
                        add=["i"])  # fmt: skip
    assert edited.projection.bias.any() and edited.texts == ("a", "b", "c", "i")
    assert make("color", list("defgh"), against=[other]).method == "exclusive-weighted"
    with pytest.raises(InvalidInputError, match="got 'shape' itself"):
        make("Shape", list("defgh"), against=[other])
    foreign = build_basis("size", list("abc"), embed_text, fingerprint="cd" * 32)
    with pytest.raises(BasisMismatchError, match="made for model"):
        make("color", list("defgh"), method="exclusive", against=[foreign])


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
        default = " (default with other criteria)" if method.needs_against else " (default)"
        source = re.sub(
            r"arXiv (\S+)", r"[arXiv \1](https://arxiv.org/abs/\1)",
            method.source.replace("this project", "ours"),
        )  # fmt: skip
        takes = ["other criteria"] * method.needs_against + ["references"] * method.takes_reference
        lines.append(
            f"| `{method.name}`{default * method.default} | {method.columns} | {source} "
            f"| {', '.join(takes)} |".replace("|  |", "| |")
        )
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
