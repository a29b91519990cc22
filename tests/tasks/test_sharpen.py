"""Sharpening with images: parity with the definition, what it gains, and its refusals."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from crl_sdk.basis._build import build_basis
from crl_sdk.errors import InvalidInputError
from crl_sdk.tasks._sharpen import sharpen, sharpen_projection

D = 64
RNG = np.random.default_rng(0)
AXES = np.linalg.qr(RNG.standard_normal((D, D)))[0].T


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def make_basis(method="contrastive", **options):
    """A text for each of six values. Half of what they vary in is in five other directions."""
    rng = np.random.default_rng(5)
    values = AXES[:6] + 0.4 * rng.standard_normal((6, 5)) @ AXES[6:11]
    texts = unit(2 * AXES[40] + values)
    names = [f"value {i}" for i in range(6)]
    rows = dict(zip(names, texts, strict=True))
    return build_basis(
        "value", names, lambda texts: np.stack([rows[text] for text in texts]),
        fingerprint="ab" * 32, method=method, **options,
    )  # fmt: skip


def images(n, seed=1):
    """Images of the six values that vary in the same directions."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 6, n)
    rows = AXES[41] + AXES[labels] + 0.5 * rng.standard_normal((n, 5)) @ AXES[6:11]
    return unit(rows + 0.03 * rng.standard_normal((n, D))), labels


def purity(basis, rows, labels):
    found = basis.projection.apply(rows)
    near = np.where(np.eye(len(rows)), -2, found @ found.T).argsort(axis=1)[:, -10:]
    return (labels[near] == labels[:, None]).mean()


def definition(projection, rows, clusters, labelled):
    """Generalised eigenvectors by scipy, with covariances written out."""
    weight = projection.weight.astype(np.float64)
    lengths = np.linalg.norm(weight, axis=0)
    signal = sum(
        length ** (1 / 0.3) * np.outer(column / length, column / length)
        for column, length in zip(weight.T, lengths, strict=True)
    )
    x = rows.astype(np.float64)
    within, between, n = np.zeros((D, D)), np.zeros((D, D)), len(x)
    for c in np.unique(clusters):
        members = x[clusters == c]
        within += (members - members.mean(0)).T @ (members - members.mean(0))
        apart = members.mean(0) - x.mean(0)
        between += len(members) * np.outer(apart, apart) / n
    share = 1.0
    if labelled:
        classes = len(np.unique(clusters))
        chance = within / (n - classes) * classes / n
        strengths, axes = np.linalg.eigh(between - chance)
        kept = axes[:, strengths > 0] * strengths[strengths > 0] @ axes[:, strengths > 0].T
        signal = signal + 0.1 * kept / np.trace(between)
    else:
        share = min(1, n / 300)
    nuisance = share * within / np.trace(within) + 10 / D * np.eye(D)
    strengths, axes = scipy.linalg.eigh(signal, nuisance)
    count = int((strengths > strengths[-1] * 1e-12).sum())
    strengths, axes = strengths[::-1][:count], axes[:, ::-1][:, :count]
    return np.linalg.qr(axes / np.linalg.norm(axes, axis=0))[0] * (strengths / strengths[0]) ** 0.3


@pytest.mark.parametrize("n", [100, 400])
def test_labelled_images_give_the_map_of_the_definition(n):
    """Tolerance 1e-4 of the Gram matrix, which leaves the signs of the columns open."""
    basis, (rows, labels) = make_basis(), images(n)
    found = sharpen(basis, rows, labels).basis.projection.weight
    expected = definition(basis.projection, rows, labels, True)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-4)


@pytest.mark.parametrize("n", [100, 400])
def test_clusters_give_the_map_of_the_definition(n, monkeypatch):
    basis, (rows, labels) = make_basis(), images(n)
    monkeypatch.setattr("crl_sdk.tasks._sharpen.kmeans", lambda *_, **__: (labels, None))
    found = sharpen(basis, rows).basis.projection.weight
    expected = definition(basis.projection, rows, labels, False)
    assert found.shape[1] == basis.projection.output_dim
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-4)


def test_sharpening_helps_on_images_it_has_not_seen():
    basis, (unseen, truth) = make_basis(), images(300, seed=2)
    plain = purity(basis, unseen, truth)
    unlabelled = sharpen(basis, images(400)[0])
    labelled = sharpen(basis, *images(60))
    assert purity(unlabelled.basis, unseen, truth) > plain + 0.05
    assert purity(labelled.basis, unseen, truth) > plain + 0.05
    assert unlabelled.reasons == labelled.reasons == ()
    again = sharpen(unlabelled.basis, images(400)[0])
    assert purity(again.basis, unseen, truth) > plain + 0.05


def test_what_sharpened_a_basis_is_recorded_in_it(tmp_path):
    result = sharpen(make_basis(), images(400)[0], source="photos")
    assert result.basis.provenance["sharpened"] == {
        "images": 400, "clusters": 6, "labelled": False, "reasons": [], "source": "photos",
    }  # fmt: skip
    result.basis.save(tmp_path / "value.safetensors")
    assert type(result.basis).load(tmp_path / "value.safetensors").sha256() == result.basis.sha256()
    assert (
        result.basis.sha256()
        == sharpen(make_basis(), images(400)[0], source="photos").basis.sha256()
    )
    assert result.basis.texts == make_basis().texts


def test_images_without_a_label_are_left_out():
    rows, labels = images(60)
    names = np.array([f"v{label}" for label in labels])
    names[40:] = ""
    found = sharpen(make_basis(), rows, names).basis
    expected = sharpen(make_basis(), rows[:40], list(names[:40])).basis
    np.testing.assert_array_equal(found.projection.weight, expected.projection.weight)
    assert found.provenance["sharpened"]["images"] == 40


def test_doubts_are_reported():
    noise = unit(np.random.default_rng(0).standard_normal((100, D)))
    assert [reason.split()[0] for reason in sharpen(make_basis(), noise).reasons] == ["100", "the"]
    assert "no clear clusters" in sharpen(make_basis(), noise).reasons[1]
    rows = images(400)[0]
    few = sharpen(make_basis(), rows[:14], np.repeat([0, 1], [4, 10]))
    assert few.reasons == (
        "the class 0 has 4 labelled images: with fewer than 5, labels may make a basis worse",
    )


def test_bad_input():
    rows, labels = images(100)
    basis = make_basis()
    with pytest.raises(InvalidInputError, match="at least 50 images to sharpen a basis, got 49"):
        sharpen(basis, rows[:49])
    with pytest.raises(InvalidInputError, match="method 'cosine'; only 'contrastive'"):
        sharpen(make_basis("cosine"), rows)
    with pytest.raises(InvalidInputError, match=r"universal embeddings \(n, 64\)"):
        sharpen(basis, rows[:, :5])
    with pytest.raises(InvalidInputError, match="NaN"):
        sharpen(basis, np.full_like(rows, np.nan))
    with pytest.raises(InvalidInputError, match="one label for each of 100 images"):
        sharpen(basis, rows, labels[:5])
    with pytest.raises(InvalidInputError, match="one label for each of 100 images"):
        sharpen(basis, rows, labels.astype(float))
    with pytest.raises(InvalidInputError, match=r"at least 3 labelled images each, got a \(100\)"):
        sharpen(basis, rows, ["a"] * 100)
    with pytest.raises(InvalidInputError, match="got no labels"):
        sharpen(basis, rows, [""] * 100)
    with pytest.raises(InvalidInputError, match=r"a \(2\), b \(98\)"):
        sharpen(basis, rows, ["a"] * 2 + ["b"] * 98)


def test_what_is_ignored_stays_removed():
    """With labels too, which could add the direction again."""
    rows, labels = images(300)
    ignored = build_basis(
        "other", list("abc"), lambda _: unit(AXES[40] + AXES[6:9]), fingerprint="ab" * 32
    )
    basis = make_basis(ignore=[ignored])
    removed = ignored.projection.weight
    assert np.abs(removed.T @ make_basis().projection.weight).max() > 0.05
    for given in (None, labels):
        weight = sharpen(basis, rows, given).basis.projection.weight
        assert np.abs(removed.T @ weight).max() < 1e-5 and np.abs(weight).max() > 0.1


def test_equal_images_do_not_break_it():
    basis, same = make_basis(), np.tile(images(1)[0], (60, 1))
    made, _, reasons = sharpen_projection(basis.projection, 6, same)
    assert np.isfinite(made.weight).all()
    assert reasons
