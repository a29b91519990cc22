"""Export many architectures and tabulate their parity: `python -m crl_export.parity_table`.

Each model is exported in its own process, so that peak memory is that of one model. Weights are
random, since the agreement of graph and torch does not depend on training.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from crl_export.checkpoint import RANDOM
from crl_export.exporter import export_model
from crl_sdk.model._manifest import PRECISIONS

MODELS = (
    "ViT-B-32",
    "ViT-B-32-quickgelu",
    "ViT-B-16",
    "RN50",
    "MobileCLIP-S1",
    "ViT-B-16-SigLIP",
    "convnext_base",
    "ViT-L-14",
)
DEMO = Path("build/demo-model/crl-demo")
"""Checkpoint written by `make demo-model`. It is in the table if it exists."""

IMAGE_ONLY = ("ViT-B-16-SigLIP",)  # its tokenizer has to be downloaded


def measure(model: str, work: Path) -> dict[str, Any]:
    """Export one model in every precision.

    Args:
        model: Name of an open_clip architecture, or a checkpoint directory.
        work: Empty directory for the bundle.

    Returns:
        Name, seconds of the export, and for each graph its size in bytes and its parity.
    """
    import resource

    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table shows int8 beyond its tolerance
        bundle = export_model(
            model, out=work / "bundle", precisions=PRECISIONS, text=model not in IMAGE_ONLY,
            pretrained=None if Path(model).is_dir() else RANDOM,
        )  # fmt: skip
    manifest = bundle.manifest
    graphs = {graph.file: graph.parity for graph in manifest.images}
    if manifest.text is not None:
        graphs[manifest.text.file] = manifest.text.parity
    return {
        "model": manifest.name,
        "embedding_dim": manifest.embedding_dim,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "graphs": {
            file: {
                "bytes": sum(e.bytes for n, e in manifest.files.items() if n.startswith(file)),
                "samples": parity.samples,
                "cosine_mean": parity.cosine_mean,
                "cosine_min": parity.cosine_min,
                "centred_cosine_min": parity.centred_cosine_min,
                "max_abs": parity.max_abs,
            }
            for file, parity in graphs.items()
        },
        "made_by": manifest.made_by,
    }


def as_table(records: list[dict[str, Any]]) -> str:
    """Format records as a Markdown table."""
    lines = [
        "| model | graph | MB | cosine mean | cosine min | centred cosine min | max \\|Δ\\| |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        for file, graph in record["graphs"].items():
            lines.append(
                f"| {record['model']} | {file.removesuffix('.onnx')} | {graph['bytes'] / 1e6:.1f} "
                f"| {graph['cosine_mean']:.7f} | {graph['cosine_min']:.7f} "
                f"| {graph['centred_cosine_min']:.5f} | {graph['max_abs']:.1e} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "models", nargs="*", default=[*MODELS, *([str(DEMO)] if DEMO.exists() else [])]
    )
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--one", action="store_true", help="measure one model, print JSON")
    arguments = parser.parse_args()
    if arguments.one:
        with tempfile.TemporaryDirectory() as work:
            print(json.dumps(measure(arguments.models[0], Path(work))))
        return
    records, failed = [], []
    for model in arguments.models:
        print(f"exporting {model} …", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "crl_export.parity_table", "--one", model]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0:
            records.append(json.loads(done.stdout.splitlines()[-1]))
        else:  # its messages went to stderr
            failed.append(model)
    header = (
        "Exported graphs against torch fp32, 16 images or texts, random weights except crl-demo "
        "(`make export-parity`).\n\n"
    )
    print(as_table(records))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".md").write_text(header + as_table(records) + "\n")
        arguments.out.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
