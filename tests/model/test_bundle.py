"""Bundles: opened, or refused with an error that names the file and the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crl_sdk import ModelBundle, demo_bundle
from crl_sdk.errors import BundleError, IntegrityError, UnsupportedSchemaError
from crl_sdk.model._manifest import parse_manifest, write_manifest

MANIFEST_BYTES = (demo_bundle() / "manifest.json").read_bytes()


def edit(directory: Path, **changes) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_shipped_bundle_opens_and_is_small():
    bundle = ModelBundle.open(demo_bundle())
    assert bundle.embedding_dim == bundle.manifest.embedding_dim > 0
    assert bundle.tokenizer().encode(["a red star"]).shape[0] == 1
    assert sum(f.stat().st_size for f in demo_bundle().iterdir()) <= 12_000_000
    assert bundle.manifest.name in repr(bundle)


def test_manifest_is_written_the_same_again(tmp_path):
    write_manifest(tmp_path, parse_manifest(MANIFEST_BYTES))
    assert (tmp_path / "manifest.json").read_bytes() == MANIFEST_BYTES


def test_no_bundle(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BundleError, match=r"no readable manifest\.json"):
            ModelBundle.open(path)


def test_every_file_is_verified(bundle_copy):
    for name in json.loads(MANIFEST_BYTES)["files"]:
        path = bundle_copy / name
        good = path.read_bytes()
        tampered = bytearray(good)
        tampered[len(good) // 2] ^= 1
        path.write_bytes(tampered)
        with pytest.raises(IntegrityError, match="expected SHA-256") as caught:
            ModelBundle.open(bundle_copy)
        assert name in str(caught.value)
        path.write_bytes(good[:-1])
        with pytest.raises(IntegrityError, match="incomplete"):
            ModelBundle.open(bundle_copy)
        path.unlink()
        with pytest.raises(IntegrityError, match="cannot be read"):
            ModelBundle.open(bundle_copy)
        path.write_bytes(good)
    assert ModelBundle.open(bundle_copy).fingerprint == json.loads(MANIFEST_BYTES)["fingerprint"]


def test_other_schemas(bundle_copy):
    edit(bundle_copy, schema=3, something_new=True)
    with pytest.raises(UnsupportedSchemaError, match="schema 3, this SDK reads 1 and 2: upgrade"):
        ModelBundle.open(bundle_copy)
    edit(bundle_copy, schema=0)
    with pytest.raises(UnsupportedSchemaError, match="export the model again"):
        ModelBundle.open(bundle_copy)


@pytest.mark.parametrize(
    "name", ["../outside.onnx", "/etc/passwd", "a/../../b", "", "..\\b", "C:b"]
)
def test_paths_that_leave_the_bundle(bundle_copy, name):
    (bundle_copy.parent / "outside.onnx").write_bytes(b"x")
    files = json.loads(MANIFEST_BYTES)["files"]
    edit(bundle_copy, files={**files, name: {"sha256": "0" * 64, "bytes": 1}})
    with pytest.raises(IntegrityError, match="leads out of the bundle"):
        ModelBundle.open(bundle_copy)


def test_a_link_that_leaves_the_bundle(bundle_copy):
    name = json.loads(MANIFEST_BYTES)["images"][0]["file"]
    outside = bundle_copy.parent / "outside.onnx"
    (bundle_copy / name).rename(outside)
    (bundle_copy / name).symlink_to(outside)
    with pytest.raises(IntegrityError, match="leads out of the bundle"):
        ModelBundle.open(bundle_copy)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"surprise": 1}, BundleError, "unknown field"),
        ({"embedding_dim": "64"}, BundleError, "embedding_dim"),
        ({"images": []}, BundleError, "images"),
        ({"fingerprint": "0" * 64}, IntegrityError, "fingerprint 000000000000… does not follow"),
        ({"files": {}}, IntegrityError, "used but not listed"),
    ],
)
def test_manifests_that_contradict_themselves(bundle_copy, changes, error, words):
    edit(bundle_copy, **changes)
    with pytest.raises(error, match=words):
        ModelBundle.open(bundle_copy)


def test_a_recommended_prompt_without_a_place(bundle_copy):
    text = json.loads((bundle_copy / "manifest.json").read_text())["text"]
    edit(bundle_copy, text={**text, "prompt": "a photo"})
    with pytest.raises(IntegrityError, match=r"exactly one \{\} for the text, got 'a photo'"):
        ModelBundle.open(bundle_copy)


def test_the_fingerprint_binds_preprocessing_and_weights(bundle_copy):
    manifest = json.loads(MANIFEST_BYTES)
    manifest["preprocess"]["mean"] = [0.1, 0.2, 0.3]
    edit(bundle_copy, **manifest)
    with pytest.raises(IntegrityError, match="does not follow"):
        ModelBundle.open(bundle_copy)


def test_a_bundle_that_crops_has_a_schema_and_a_fingerprint_of_its_own(cropping_bundle, tmp_path):
    """So that an SDK that does not know `resize` refuses it, twice."""
    bundle = ModelBundle.open(cropping_bundle)
    assert bundle.preprocess.resize == (110, 121) and bundle.manifest.schema == 2
    assert bundle.fingerprint != json.loads(MANIFEST_BYTES)["fingerprint"]
    write_manifest(tmp_path, bundle.manifest)
    written = (cropping_bundle / "manifest.json").read_bytes()
    assert (tmp_path / "manifest.json").read_bytes() == written

    edit(cropping_bundle, schema=1)
    with pytest.raises(IntegrityError, match=r"schema 1 has no `preprocess\.resize`"):
        ModelBundle.open(cropping_bundle)
    edit(cropping_bundle, schema=2, preprocess=json.loads(MANIFEST_BYTES)["preprocess"])
    with pytest.raises(IntegrityError, match="does not follow"):
        ModelBundle.open(cropping_bundle)


def test_a_size_that_says_nothing_is_not_written(bundle_copy, tmp_path):
    """Neither null nor the size of the input changes a manifest or its fingerprint."""
    raw = json.loads(MANIFEST_BYTES)
    for resize in (None, [raw["preprocess"][side] for side in ("height", "width")]):
        edit(bundle_copy, preprocess={**raw["preprocess"], "resize": resize})
        write_manifest(tmp_path, ModelBundle.open(bundle_copy).manifest)
        assert (tmp_path / "manifest.json").read_bytes() == MANIFEST_BYTES


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resize": [90, 110]}, r"90×110 cannot be cropped to the model's 96×96 .*preprocess"),
        ({"resize": [110]}, r"preprocess\.resize"),
        ({"resize": "110"}, r"preprocess\.resize"),
        ({"resize": [110.5, 110]}, r"preprocess\.resize"),
        ({"resize_mode": "longest"}, "`longest` pads to 96×96"),
        ({"resise": [110, 110]}, r"unknown field `resise` - at `\$\.preprocess`"),
    ],
)
def test_malformed_sizes_in_a_manifest(cropping_bundle, changes, words):
    raw = json.loads((cropping_bundle / "manifest.json").read_text())
    edit(cropping_bundle, preprocess=raw["preprocess"] | changes)
    with pytest.raises(BundleError, match=words):
        ModelBundle.open(cropping_bundle)


@given(st.binary(max_size=200) | st.text().map(str.encode))
def test_no_manifest_but_ours_is_taken(data):
    with pytest.raises(BundleError):
        parse_manifest(data)


def test_a_precision_it_does_not_have():
    bundle = ModelBundle.open(demo_bundle())
    missing = next(p for p in ("fp16", "int8", "fp32") if p not in bundle.precisions)
    with pytest.raises(BundleError, match="export again with --precision"):
        bundle.image_graph(missing)


def test_an_image_only_bundle(bundle_copy):
    manifest = parse_manifest(MANIFEST_BYTES)
    bundle = ModelBundle(
        bundle_copy,
        type(manifest)(
            **{**{f: getattr(manifest, f) for f in manifest.__struct_fields__}, "text": None}
        ),
    )
    for read in (bundle.text_graph, bundle.tokenizer):
        with pytest.raises(BundleError, match="no text tower"):
            read()
