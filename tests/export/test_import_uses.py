"""Imported bundles in the server and as TensorRT plans, one of each layout."""

from __future__ import annotations

import numpy as np
import pytest

import tiny_exports as tiny
from crl_export.imported.importer import Given, import_model
from crl_export.tensorrt import compile_plan
from crl_sdk import Client, Embedder
from crl_sdk.errors import ExportError

PIXELS = np.random.default_rng(4).integers(0, 256, (3, 40, 24, 3), dtype=np.uint8)
LAYOUTS = {
    "transformers.js": (tiny.transformers_js, {}),
    "immich": (tiny.immich, {"fixed_reshape": True}),
    "immich, one by one": (tiny.immich, {"fixed_reshape": True, "einsum": True}),
    "optimum": (tiny.optimum, {}),
    "clip-as-service": (tiny.clip_as_service, {}),
}


@pytest.fixture(params=LAYOUTS)
def bundle(request, tmp_path):
    write, options = LAYOUTS[request.param]
    tiny.write_tokenizer(tmp_path)
    source = write(tmp_path / "export", **options)
    given = Given(tokenizer=tmp_path) if request.param == "clip-as-service" else Given()
    return import_model(source, out=tmp_path / "bundle", given=given)


def test_a_server_of_an_imported_bundle(bundle, serve):
    with Embedder.open(bundle, engine="onnx/cpu/fp32", threads=1) as embedder:
        expected = embedder.embed(list(PIXELS)).universal
        with Client(serve(embedder).address) as client:
            client.create_basis("color", ["red", "green", "blue"])
            found = client.embed(list(PIXELS), criteria=["color"])
    assert np.abs(found.universal - expected).max() < 1e-6
    assert found["color"].shape[0] == 3 and np.isfinite(found["color"]).all()


def test_a_plan_of_an_imported_bundle(bundle, tmp_path):
    if bundle.manifest.origin.image_batch == "one by one":
        with pytest.raises(ExportError, match="one by one, which TensorRT cannot"):
            compile_plan(bundle, precision="fp32", directory=tmp_path / "plans")
        return
    compiled = compile_plan(
        bundle, precision="fp32", architectures=["sm89"], directory=tmp_path / "plans"
    )
    (image, *_) = compiled.plan.inputs
    assert (image.name, image.dtype, image.shape) == (
        "image", "uint8", (-1, tiny.SIZE, tiny.SIZE, 3),
    )  # fmt: skip
