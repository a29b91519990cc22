"""The background of a bundle: the lists, adding it, and what happens to a damaged one."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from crl_export import bundle_files
from crl_export.background import add_background, generic_texts
from crl_export.demo.captions import background_captions
from crl_sdk import Embedder, demo_bundle
from crl_sdk.errors import ExportError, IntegrityError, InvalidInputError
from crl_sdk.model._background import BACKGROUND_FILE, encode_background, read_background
from crl_sdk.model._bundle import ModelBundle


@pytest.fixture
def bundle(tmp_path):
    return shutil.copytree(demo_bundle(), tmp_path / "bundle")


def some_texts(count=60):
    return list(background_captions())[:count]


def test_the_lists_have_distinct_short_texts():
    texts = generic_texts()
    assert len(texts) == 832
    for each in (texts, background_captions()):
        assert len({text.casefold() for text in each}) == len(each)
        assert all(text == " ".join(text.split()) and 0 < len(text) < 80 for text in each)
    assert background_captions() == background_captions()


def test_the_demo_bundle_has_the_background_of_its_own_world():
    bundle = ModelBundle.open(demo_bundle())
    assert bundle.background.shape == (400, 128) and bundle.background.dtype == np.float32
    with Embedder.open(bundle, engine="onnx/cpu/fp32") as embedder:
        expected = embedder.embed_text(background_captions())
        basis = embedder.create_basis("color", ["red", "green", "blue"])
    assert basis.provenance["background"] == 400
    np.testing.assert_allclose(bundle.background, expected, atol=5e-4)  # float16
    spread = np.linalg.norm(np.cov(expected.T) - np.cov(bundle.background.T))
    assert spread < 1e-3 * np.linalg.norm(np.cov(expected.T))


def test_a_background_can_be_replaced_and_keeps_the_model(bundle):
    before = ModelBundle.open(bundle)
    after = add_background(bundle, [*some_texts(), some_texts()[0]])
    assert after.background.shape == (60, 128)
    assert after.fingerprint == before.fingerprint
    assert {p.name for p in bundle.iterdir()} == {p.name for p in demo_bundle().iterdir()}


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_process_killed_in_between_leaves_a_valid_bundle(bundle, monkeypatch, at):
    calls = []

    for name in ("write_atomically", "write_manifest"):
        original = getattr(bundle_files, name)

        def wrapped(*arguments, original=original):
            calls.append(arguments)
            if len(calls) == at:
                raise KeyboardInterrupt
            original(*arguments)

        monkeypatch.setattr(bundle_files, name, wrapped)
    with pytest.raises(KeyboardInterrupt):
        add_background(bundle, some_texts())
    found = ModelBundle.open(bundle).background
    assert found is None if at > 1 else len(found) == 400


def test_an_older_bundle_has_none_and_still_makes_bases(bundle):
    manifest = ModelBundle.open(bundle).manifest
    kept = {name: entry for name, entry in manifest.files.items() if name != BACKGROUND_FILE}
    bundle_files.write_manifest(bundle, bundle_files.msgspec.structs.replace(manifest, files=kept))
    with Embedder.open(bundle, engine="onnx/cpu/fp32") as embedder:
        assert embedder.bundle.background is None
        basis = embedder.create_basis("color", ["red", "green", "blue"])
    assert "background" not in basis.provenance
    assert basis.projection.output_dim == 2


def test_a_changed_file_is_refused(bundle):
    path = bundle / BACKGROUND_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="was changed"):
        ModelBundle.open(bundle)


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense",
        encode_background(["a"], np.ones((1, 5))),
        encode_background(["a"], np.full((1, 8), np.nan)),
        encode_background([], np.ones((0, 8))),
    ],
)
def test_a_malformed_file_names_the_command_that_makes_it_again(tmp_path, data):
    path = tmp_path / BACKGROUND_FILE
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="crl background"):
        read_background(path, 8)
    with pytest.raises(IntegrityError, match="crl background"):
        read_background(tmp_path / "absent", 8)


def test_bad_texts(bundle):
    with pytest.raises(InvalidInputError, match="at least 50 distinct background texts, got 49"):
        add_background(bundle, [*some_texts(49), some_texts()[0]])
    with pytest.raises(InvalidInputError, match=r"give texts that it knows"):
        add_background(bundle, ["red" + " " * i for i in range(60)])
    with pytest.raises(InvalidInputError, match="tokens"):
        add_background(bundle, [*some_texts(), "red " * 100])
    assert len(ModelBundle.open(bundle).background) == 400  # nothing was lost


def test_a_bundle_that_cannot_be_written(bundle, monkeypatch):
    def refuse(path, data, failure):
        raise failure(f"{path}: no space left")

    monkeypatch.setattr(bundle_files, "write_atomically", refuse)
    with pytest.raises(ExportError, match="no space left"):
        add_background(bundle, some_texts())
    assert ModelBundle.open(bundle).background is None
