"""A short run of each benchmark, so that they keep working; no timed assertions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crl_benchmarks import (
    basis_quality,
    int8_outliers,
    photos,
    projection_tables,
    projections,
    service_load,
    service_overhead,
    service_saturation,
)
from crl_benchmarks.embed_latency import CRITERIA, measure
from crl_export.graphs import export_text_graph
from crl_sdk import Embedder, ModelBundle, demo_bundle
from crl_sdk.model import _parity as parity
from support import log_likelihoods


def test_embed_latency():
    records = measure(ModelBundle.open(demo_bundle()), (1, 3), repeats=2)
    assert [record["batch"] for record in records] == [1, 3]
    for record in records:
        assert all(record[f"criteria_{count}"]["p50_ms"] > 0 for count in CRITERIA)


class Fluent:
    """A language model that knows shapes and colours, and says nothing of use on the rest."""

    name, chats, tells_likelihoods = "fluent", False, True
    tokens, seconds = 0, 0.0

    def complete(self, prompt, grammar, sampling, on_token=None):
        criterion = prompt.splitlines()[-1].rstrip(":")
        known = {"shape": " round, oval, square, star, heart, cross, triangle\n",
                 "color": " red, green, blue, yellow, pink, purple, black, white\n"}  # fmt: skip
        return known.get(criterion, " ...\n")

    chat = complete

    def log_likelihoods(self, prefix, texts):
        return log_likelihoods(prefix, texts)

    def describe(self):
        return {"name": self.name}


def test_basis_quality():
    pytest.importorskip("sklearn")
    results = basis_quality.evaluate(
        {"fluent": Fluent()}, images=200, seeds=[0], splits=1, helped=False
    )
    assert basis_quality.gain(results["shape"], "fluent") > 0.5
    assert basis_quality.gain(results["colour"], "fluent") > 0.7
    assert basis_quality.gain(results["colour"], "random words") < 0.7
    (refused,) = results["count"]["fluent"]["scores"]
    assert basis_quality.gain(results["colour"], "fluent, together") > 0.7
    (universal,) = results["count"]["universal"]["scores"]
    assert refused == universal  # no texts, no gain
    assert basis_quality.as_table(results).count("| shape |") == 6
    assert basis_quality.values_named("shape", ["Rounded", "stars", "cone"]) == 2


def test_projections():
    pytest.importorskip("sklearn")
    world = projections.make_world(150, 2, Fluent())
    runs = projections.measure_all(world, 2, workers=1)
    assert projections.texts_of(world, "count", "language model", "", 0) == []  # it refused
    by = {(r.factor, r.source, r.noise, r.variant, r.seed): r.scores["accuracy"] for r in runs}
    assert by["colour", "own words", "", "contrastive", 0] > 0.9
    assert by["colour", "random words", "", "contrastive", 0] < 0.5
    assert ("count", "language model", "", "cosine", 0) not in by
    warned = next(r for r in runs if r.source == "own words" and r.variant == "contrastive")
    assert warned.signals["separation"] > 0.2 and warned.signals["undescribed"] < 0.4
    text = projection_tables.markdown(runs, {"images": 150, "seeds": 2, "seconds": 60,
                                             "references": 400})  # fmt: skip
    assert text.count("\n| contrastive, others |") == 4 and "nan" not in text
    assert text.count("words | exclusive-orthogonal, others |") == 4  # once per criterion
    assert "| count | language model | clean | " in text and "refused" in text


def test_differences_are_paired():
    def run(seed, variant, score):
        return projections.Run("shape", "own words", "", variant, seed, 3, {"map": score}, {})

    runs = [run(s, v, level + 0.1 * s + gain * (1 + 0.1 * s)) for s, level in ((0, 0.1), (1, 0.7))
            for v, gain in (("cosine", 0), ("contrastive", 0.06))]  # fmt: skip
    found = projection_tables.difference(runs, "contrastive", "map")
    assert found.mean == pytest.approx(0.063)  # the levels differ far more
    assert found.half == pytest.approx(12.706 * 0.003, rel=1e-3)  # Student's, one degree
    assert str(found) == "+6.3 ± 3.8"


def test_service_saturation(monkeypatch):
    monkeypatch.setattr(service_saturation, "CALLERS", (1, 4))
    monkeypatch.setattr(service_saturation, "WARM_UP", 0.1)
    rounds = service_saturation.measure(demo_bundle(), "onnx/cpu/fp32", rounds=1, seconds=0.4)
    found = service_saturation.summary(rounds)
    assert found["saturation"] > 0 and rounds[0]["4 callers"].generator_cpu_ms > 0
    page = service_saturation.markdown("onnx/cpu/fp32", rounds)
    assert "| embed 16 |" in page and "| 4 callers |" in page


def test_service_overhead():
    result = service_overhead.measure(runs=5, rounds=1, seconds=0.2, side=96)
    assert result["latency"]["service_p50_ms"] > 0
    assert result["throughput"]["cached_per_second"] > 0


def test_service_load():
    result = service_load.run(
        "overload", seconds=1.0, deadline=1.0, max_queue=64, probe_seconds=0.5
    )
    assert result["wrong_rows"] == 0 and result["served_calls"] > 0
    assert result["images_computed"] >= result["images_served"]
    assert result["rss_peak_mb"] > 0


def test_the_roofline_counts_what_a_projection_takes():
    from crl_benchmarks.compile_table import GPUS, GpuPeak, Work, roofline, work
    from crl_export.kernels.ahead import ARCHITECTURES

    assert work(10, 4, [3, 70], 2) == Work(
        flops=2 * 10 * 4 * 73,
        # 3 columns take a block of 16; 70 take two blocks of 64, which are computed twice
        executed=2 * 10 * 4 * (16 + 2 * 128),
        bytes=2 * 40 + 4 * (4 + 1) * 73 + 4 * 10 * 73,
        read_again=2 * 40 * (1 + 2 * 2) + 4 * (4 + 1) * 73 + 4 * 10 * 73,
    )
    needed = Work(flops=2 * 10**12, executed=4 * 10**12, bytes=10**9, read_again=0)
    least = roofline(GpuPeak("one", tflops=2.0, bandwidth=500.0), needed)
    assert least == {"memory_ms": 2.0, "needed_ms": 1000.0, "executed_ms": 2000.0}
    assert set(GPUS) <= {name.replace("_", "") for name in ARCHITECTURES}


def test_the_compile_table_has_what_compiled_and_what_was_refused():
    from crl_benchmarks.compile_table import compile_one
    from crl_sdk import demo_bundle

    row = compile_one("demo", demo_bundle(), "fp32", "sm89")
    assert row["compiled"] and row["bytes"] > 5e6 and 1e8 < row["peak_memory"] < 6e8
    refused = compile_one("demo", demo_bundle(), "fp32", "sm75")
    assert not refused["compiled"] and "got sm75" in refused["why"]


def test_reprojection(tmp_path):
    from crl_benchmarks import reprojection

    cases = [reprojection.Case(3, 5), reprojection.Case(1, 8, "float16")]
    document = reprojection.run(3000, 64, cases, rounds=2, directory=tmp_path)
    for case in document["cases"]:
        assert all(seconds > 0 for seconds in case["seconds"].values())
    moved = 4 * 3000 * (64 + 15) / 1e9
    assert document["cases"][0]["gigabytes_moved"] == round(moved, 3)
    assert reprojection.markdown(document).count("| 3 × 5, float32 |") == 2


def test_photographs():
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    small = photos.small_photographs(None)
    rng = np.random.default_rng(0)
    made = photos.make_photographs(small, (900, 700), 2, rng)
    with Embedder.open(demo_bundle()) as demo:
        rows = photos.measure((900, 700), made, {"demo": demo}, demo, rounds=1)
    exact, fast, pillow = rows
    assert exact.levels == (0, 0) and exact.drift["demo"] == (0, 0)
    for row in (fast, pillow):
        assert 0 < row.levels[0] < 1 and row.drift["demo"][0] < 1e-3
    assert photos.as_table(rows).count("900 × 700") == 3


def test_precisions_on_weights_with_outliers(tmp_path):
    """The tower that normalises after each step, with one layer of random weights."""
    rng = np.random.default_rng(0)
    width, layer = 24, "encoder.layer.0"
    shapes = {
        "embeddings.word_embeddings.weight": (50, width),
        "embeddings.position_embeddings.weight": (16, width),
        "embeddings.token_type_embeddings.weight": (2, width),
    }
    for name, (rows, columns) in {
        f"{layer}.attention.self.query": (width, width),
        f"{layer}.attention.self.key": (width, width),
        f"{layer}.attention.self.value": (width, width),
        f"{layer}.attention.output.dense": (width, width),
        f"{layer}.intermediate.dense": (2 * width, width),
        f"{layer}.output.dense": (width, 2 * width),
    }.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    for name in ("embeddings", f"{layer}.attention.output", f"{layer}.output"):
        shapes |= {f"{name}.LayerNorm.weight": (width,), f"{name}.LayerNorm.bias": (width,)}
    weights = {
        name: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        for name, shape in shapes.items()
    }
    weights["embeddings.LayerNorm.weight"][3] *= 100

    def encode(texts):
        return np.array([[1 + len(text) % 40, 7, 5, 0] for text in texts], np.int64)

    model = int8_outliers.MiniLm(weights, layers=1, heads=2).eval()
    export_text_graph(model, torch.from_numpy(encode(parity.TEXTS)), tmp_path / "graph.onnx")
    rows = int8_outliers.token_rows(
        "tiny", None, tmp_path / "graph.onnx", encode, folder=tmp_path, batches=[2], rounds=1
    )
    fp32, plain, spread = rows
    assert fp32.parity.cosine_min == pytest.approx(1) and fp32.times[2] > 0
    assert spread.parity.cosine_mean > plain.parity.cosine_mean
    assert plain.ratios[2] == 1
    assert int8_outliers.as_table(rows).count("| tiny | trained |") == 3
