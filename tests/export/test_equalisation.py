"""Outliers of activations: equalising changes no result, and int8 bears them."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import open_clip
import pytest
import torch

from crl_export.equalisation import equalise
from crl_export.graph_products import find_products, run_probe
from crl_export.graphs import ImageGraph, export_image_graph
from crl_export.precision import _patch_product, quantise, quantise_products
from crl_export.sensitivity import BUDGET, NEGLIGIBLE, choose_float_products
from crl_sdk.engines._onnx_sessions import open_session
from crl_sdk.model import _parity as parity
from crl_sdk.model._preprocess import PreprocessSpec

SPEC = PreprocessSpec(32, 32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
TEXT = {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
FACTOR = 40.0


def with_outliers(factor: float) -> torch.nn.Module:
    """A tiny CLIP with two channels that every normalisation makes larger."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 4, "width": 96, "head_width": 32, "patch_size": 8}
    made = open_clip.CLIP(24, vision, TEXT).eval().requires_grad_(False)
    for block in made.visual.transformer.resblocks:
        for norm in (block.ln_1, block.ln_2):
            norm.weight[[5, 50]] *= factor
    return made


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Paths of the graph in fp32 with and without outliers."""
    folder = tmp_path_factory.mktemp("graphs")
    for name, factor in (("plain", 1.0), ("outliers", FACTOR)):
        graph = ImageGraph(with_outliers(factor), SPEC, torch.float32)
        export_image_graph(graph, SPEC, 24, folder / f"{name}.onnx")
    return folder


def feeds(count=8, seed=5):
    return {
        "image": parity.images(SPEC, count, seed=seed),
        "weight": np.zeros((24, 1), np.float32),
        "bias": np.zeros(1, np.float32),
    }


def embed(path, count=16):
    session = open_session(path)
    return session.run(["embedding"], feeds(count, seed=0))[0]


def test_equalising_changes_no_embedding(graphs, tmp_path):
    for name in ("plain", "outliers"):
        made = onnx.load(graphs / f"{name}.onnx")
        equalise(made, feeds())
        assert not [node for node in made.graph.node if node.name.endswith("by_factors")]
        onnx.save(made, tmp_path / "equalised.onnx")
        expected, got = embed(graphs / f"{name}.onnx"), embed(tmp_path / "equalised.onnx")
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_equalising_evens_the_channels(graphs):
    made = onnx.load(graphs / "outliers.onnx")
    before = spread_of_inputs(made)
    equalise(made, feeds())
    after = spread_of_inputs(made)
    assert max(before) > FACTOR / 2
    assert max(after) < max(before) / 3


def spread_of_inputs(made):
    """Largest channel of the input of each product over the median channel."""
    names = sorted({each.source for each in find_products(made.graph)})
    values = run_probe(copy.deepcopy(made), names, feeds())
    found = [np.abs(each.reshape(-1, each.shape[-1])).max(axis=0) for each in values]
    return [float(channels.max() / np.median(channels)) for channels in found]


def test_int8_bears_outliers(graphs, tmp_path):
    reference = embed(graphs / "outliers.onnx")
    made = onnx.load(graphs / "outliers.onnx")
    quantise_products(made, tmp_path / "as_it_is.onnx", skip=[_patch_product(made.graph).name])
    quantise(graphs / "outliers.onnx", tmp_path / "equalised.onnx", SPEC)
    before = parity.compare(reference, embed(tmp_path / "as_it_is.onnx"))
    after = parity.compare(reference, embed(tmp_path / "equalised.onnx"))
    assert 1 - after.centred_cosine_min < (1 - before.centred_cosine_min) / 3
    assert after.cosine_mean > 0.999 and after.centred_cosine_min > 0.99


def test_products_stay_in_float_where_int8_costs_too_much(graphs, monkeypatch):
    monkeypatch.setattr("crl_export.sensitivity.NEGLIGIBLE", 0.0)
    plain, outliers = (onnx.load(graphs / f"{name}.onnx") for name in ("plain", "outliers"))
    monkeypatch.setattr("crl_export.sensitivity.GOAL", 1.0)
    assert choose_float_products(outliers, feeds()) == []
    monkeypatch.setattr("crl_export.sensitivity.GOAL", 0.0)
    for made in (plain, outliers):
        kept = choose_float_products(made, feeds())
        sizes = {each.node.name: each.weight.size for each in find_products(made.graph)}
        assert kept and sum(sizes[name] for name in kept) <= BUDGET * sum(sizes.values())
    monkeypatch.setattr("crl_export.sensitivity.BUDGET", 0.5)
    more = choose_float_products(outliers, feeds())
    assert len(more) > len(kept)
    assert choose_float_products(outliers, feeds(), skip=more[:1]) != more


def test_what_takes_no_time_stays_in_float(graphs, monkeypatch):
    made = onnx.load(graphs / "plain.onnx")
    products = find_products(made.graph)
    last = products[-1]
    assert last.weight.size / sum(each.weight.size for each in products) < NEGLIGIBLE
    monkeypatch.setattr("crl_export.sensitivity.GOAL", 1.0)
    assert choose_float_products(made, feeds()) == [last.node.name]


def test_where_others_read_a_normalisation_a_multiplication_is_added(tmp_path):
    """As in a transformer that normalises after each step: the gains cannot be changed."""

    class PostNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
            self.norm = torch.nn.LayerNorm(32)
            with torch.no_grad():
                self.norm.weight[3] = 100.0

        def forward(self, image):
            normed = self.norm(self.first(image))
            return normed + self.second(normed)

    rows = torch.randn(7, 32)
    torch.onnx.export(
        PostNorm().eval(), (rows,), tmp_path / "graph.onnx", input_names=["image"],
        output_names=["embedding"], dynamo=True, verbose=False,
    )  # fmt: skip
    made = onnx.load(tmp_path / "graph.onnx")
    inputs = {"image": rows.numpy()}
    (expected,) = run_probe(copy.deepcopy(made), ["embedding"], inputs)
    equalise(made, inputs)
    added = [node for node in made.graph.node if node.name.endswith("by_factors")]
    assert len(added) == 1 and "layer_norm" in added[0].input[0]
    (got,) = run_probe(made, ["embedding"], inputs)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)
