"""Fixtures that every kind of test uses: the shipped bundle, and images it understands."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from crl_sdk import Embedder, demo_bundle
from crl_sdk.model._manifest import fingerprint_of, parse_manifest, schema_for, write_manifest

# A shell that starts the tests in the background has them ignore Ctrl-C, and so the processes that
# they start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["server_fixtures"]

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 200)}


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor write the records of engines of this machine's user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def fresh_cache(own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that measures engines does not decide which engine later tests get."""
    monkeypatch.setenv("CRL_CACHE", f"{os.environ['CRL_CACHE']}/{uuid.uuid4().hex}")


@pytest.fixture(scope="session")
def embedder() -> Iterator[Embedder]:
    """The demo model, opened once; tests must not leave bases in it."""
    with Embedder.open(demo_bundle()) as opened:
        yield opened


@pytest.fixture
def bundle_copy(tmp_path: Path) -> Path:
    """A copy of the demo bundle to damage."""
    return Path(shutil.copytree(demo_bundle(), tmp_path / "bundle"))


@pytest.fixture
def cropping_bundle(bundle_copy: Path) -> Path:
    """The demo model with images that are scaled to 110 × 121 pixels and cropped."""
    manifest = parse_manifest((bundle_copy / "manifest.json").read_bytes())
    assert manifest.text is not None
    spec = dataclasses.replace(manifest.preprocess, resize=(110, 121))
    changed = msgspec.structs.replace(
        manifest,
        schema=schema_for(spec),
        preprocess=spec,
        fingerprint=fingerprint_of(
            manifest.source, spec, manifest.files[manifest.text.tokenizer].sha256
        ),
    )
    write_manifest(bundle_copy, changed)
    return bundle_copy


@pytest.fixture(scope="session")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Nine JPEGs: squares of three colours at three places."""
    directory = tmp_path_factory.mktemp("images")
    paths = []
    for name, colour in COLOURS.items():
        for place in range(3):
            pixels = np.full((96, 96, 3), 128, np.uint8)
            pixels[20 + 8 * place : 60 + 8 * place, 24:64] = colour
            path = directory / f"{name}-{place}.jpg"
            Image.fromarray(pixels).save(path, quality=92)
            paths.append(path)
    return paths
