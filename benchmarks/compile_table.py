"""What can be compiled without a GPU, with time and memory.

`python -m crl_benchmarks.compile_table` writes a JSON document and the same as Markdown:

- TensorRT-RTX plans by model, architecture and precision. Each is compiled in its own process, so
  that time and peak memory are those of one plan. Weights are random, which changes neither.
- The projection kernel: its resources by architecture and dtype, and its roofline, which is the
  shortest time that the published peaks of a GPU allow for the work.

Nothing runs on a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from crl_benchmarks.machine import describe_machine
from crl_export.exporter import export_model
from crl_export.kernels.ahead import ARCHITECTURES, KINDS, WIDTHS, compile_kernels
from crl_sdk import __version__, demo_bundle
from crl_sdk.engines._kernels import best_block, columns_computed
from crl_sdk.engines._tensorrt_runtime import load_tensorrt

MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14")

ROWS, DIM, BASES, COLUMNS = 1_000_000, 512, 10, 20
"""Work of the roofline: stored embeddings in half precision, projected onto several bases."""


@dataclass(frozen=True, slots=True)
class GpuPeak:
    """Published peaks of a GPU.

    Attributes:
        name: Name of the GPU.
        tflops: TFLOP/s in float32 without tensor cores.
        bandwidth: Memory bandwidth in GB/s.
    """

    name: str
    tflops: float
    bandwidth: float


GPUS = {
    "sm75": GpuPeak("T4", 8.1, 320),
    "sm80": GpuPeak("A100 80 GB PCIe", 19.5, 1935),
    "sm86": GpuPeak("A10", 31.2, 600),
    "sm87": GpuPeak("Jetson AGX Orin 64 GB", 5.3, 204.8),
    "sm89": GpuPeak("L4", 30.3, 300),
    "sm90": GpuPeak("H100 SXM", 67.0, 3350),
    "sm120": GpuPeak("GeForce RTX 5090", 104.8, 1792),
}
"""GPUs by architecture, from NVIDIA's data sheets. GB10 (sm121) has no published float32 peak."""


@dataclass(frozen=True, slots=True)
class Work:
    """Cost of a projection of stored embeddings.

    Attributes:
        flops: Required operations: one multiplication and one addition per weight and row.
        executed: Operations of the kernel, which computes whole blocks of columns.
        bytes: Required traffic: embeddings and weights read once, results written once.
        read_again: Traffic in bytes if no cache keeps a row between the bases that read it.
    """

    flops: int
    executed: int
    bytes: int
    read_again: int


def work(rows: int, dim: int, sizes: list[int], bytes_in: int) -> Work:
    """Return the cost of projecting rows onto bases, with float32 results.

    Args:
        rows: Number of embeddings.
        dim: Dimension of the embeddings.
        sizes: Number of columns of each basis.
        bytes_in: Bytes per element of an embedding.
    """
    columns = sum(sizes)
    blocks = [best_block(size, KINDS) for size in sizes]
    computed = [
        columns_computed(size, width, single=single)
        for size, (width, single) in zip(sizes, blocks, strict=True)
    ]
    passes = sum(done // width for done, (width, _) in zip(computed, blocks, strict=True))
    weights = 4 * (dim + 1) * columns
    return Work(
        flops=2 * rows * dim * columns,
        executed=2 * rows * dim * sum(computed),
        bytes=bytes_in * rows * dim + weights + 4 * rows * columns,
        read_again=passes * bytes_in * rows * dim + weights + 4 * rows * columns,
    )


def roofline(gpu: GpuPeak, needed: Work) -> dict[str, float]:
    """Return the least milliseconds for the traffic, the required and the executed operations."""
    return {
        "memory_ms": needed.bytes / gpu.bandwidth / 1e6,
        "needed_ms": needed.flops / gpu.tflops / 1e9,
        "executed_ms": needed.executed / gpu.tflops / 1e9,
    }


def compile_all(models: list[str], work_dir: Path) -> list[dict[str, Any]]:
    """Compile each model for each architecture. A failed compilation is a row too."""
    toolkit = load_tensorrt("tensorrt-rtx")
    rows = []
    for model in models:
        if model == "demo":
            bundle, precisions = demo_bundle(), ["fp32"]
        else:
            precisions = ["fp16", "fp32"]
            exported = export_model(
                model, out=work_dir / model, pretrained="none", precisions=("fp32", "fp16"),
                text=False,
            )  # fmt: skip
            bundle = exported.path
        for precision in precisions:
            for architecture in toolkit.architectures:
                rows.append(compile_one(model, bundle, precision, architecture))
                print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def compile_one(model: str, bundle: Path, precision: str, architecture: str) -> dict[str, Any]:
    """Compile a bundle in its own process, so that its peak memory is that of one plan."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable, "-m", "crl_sdk", "compile", str(bundle), "--precision", precision,
            "--arch", architecture, "--out", out, "--json",
        ]  # fmt: skip
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    row: dict[str, Any] = {"model": model, "architecture": architecture, "precision": precision}
    if ran.returncode:
        return {**row, "compiled": False, "why": json.loads(ran.stdout)["error"]["message"]}
    plan = json.loads(ran.stdout)
    keys = ("seconds", "bytes", "peak_memory", "layers", "projection")
    return {**row, "compiled": True, **{key: plan[key] for key in keys}}


def kernel_rows(folder: Path) -> list[dict[str, Any]]:
    """Compile the projection kernel for every architecture and return its resources."""
    kernels = compile_kernels(folder, [name.replace("_", "") for name in ARCHITECTURES])
    keys = ("architecture", "embeddings", "unit", "columns", "single", "registers", "shared",
            "scratch", "spilled", "bytes")  # fmt: skip
    return [{key: getattr(each, key) for key in keys} for each in kernels.variants]


def markdown(document: dict[str, Any]) -> str:
    """Return the document as Markdown tables."""
    machine = document["machine"]
    lines = [
        "# What compiles without a GPU",
        "",
        f"`make compile-table` on {machine['processor']} ({machine['cores']} cores, no GPU), "
        f"TensorRT-RTX {document['tensorrt_rtx']}, Triton {document['triton']}, crl "
        f"{document['crl_sdk']}. **Nothing here has been run on a GPU.**",
        "",
        "## Plans: image tower and projection, batches of 1 to 32 images, up to 4,096 columns",
        "",
        "| model | architecture | precision | compiled | seconds | plan, MB | peak memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    refused: dict[str, str] = {}
    for row in document["plans"]:
        start = f"| {row['model']} | {row['architecture']} | {row['precision']} |"
        if row["compiled"]:
            lines.append(
                f"{start} yes | {row['seconds']:.1f} | {row['bytes'] / 1e6:.1f} | "
                f"{row['peak_memory'] / 1e6:.0f} |"
            )
        else:
            refused[row["architecture"]] = row["why"]
            lines.append(f"{start} no | | | |")
    if "sm75" in refused:
        lines += ["", "sm75 (Turing): TensorRT-RTX does not support float32 matrix products there, "
                  "and the projection is one."]  # fmt: skip
    needed = Work(**document["work"])
    lines += [
        "",
        "## The projection kernel",
        "",
        "Registers of a thread, bytes of shared memory of a block (256 threads), scratch and "
        "spilled bytes; the largest of the variants (rows normalised or not, bases within one "
        "block of columns or not, blocks of 16, 32 or 64 columns).",
        "",
        "| architecture | embeddings | registers | shared | scratch | spilled | cubin, bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for architecture in dict.fromkeys(row["architecture"] for row in document["kernels"]):
        for dtype in ("fp32", "fp16", "bf16"):
            rows = [
                row
                for row in document["kernels"]
                if (row["architecture"], row["embeddings"]) == (architecture, dtype)
            ]
            most = [
                str(max(row[key] for row in rows))
                for key in ("registers", "shared", "scratch", "spilled", "bytes")
            ]
            lines.append(f"| {architecture} | {dtype} | {' | '.join(most)} |")
    lines += [
        "",
        f"## Roofline: {ROWS:,} × {DIM} embeddings in fp16 onto {BASES} bases of {COLUMNS} columns",
        "",
        f"Needed: {needed.flops / 1e9:.0f} GFLOP and {needed.bytes / 1e9:.2f} GB. The kernel does "
        f"{needed.executed / needed.flops:.1f} times the arithmetic, since a basis takes whole "
        f"blocks of {', '.join(map(str, WIDTHS))} columns, and reads "
        f"{needed.read_again / 1e9:.1f} GB if no cache keeps a row between the bases. "
        "Least milliseconds by published peaks, not measured:",
        "",
        "| architecture | GPU | memory | arithmetic needed | arithmetic executed |",
        "|---|---|---|---|---|",
    ]
    for architecture, gpu in GPUS.items():
        least = roofline(gpu, needed)
        lines.append(
            f"| {architecture} | {gpu.name}: {gpu.tflops} TFLOP/s, {gpu.bandwidth:g} GB/s | "
            f"{least['memory_ms']:.1f} | {least['needed_ms']:.1f} | {least['executed_ms']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="path of the results without suffix")
    parser.add_argument("--models", default=",".join(("demo", *MODELS)))
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        kernels = kernel_rows(Path(folder) / "kernels")
        plans = compile_all(arguments.models.split(","), Path(folder))
    needed = work(ROWS, DIM, [COLUMNS] * BASES, 2)
    document = {
        "command": "make compile-table",
        "crl_sdk": __version__,
        "python": platform.python_version(),
        "machine": describe_machine(),
        "tensorrt_rtx": load_tensorrt("tensorrt-rtx").version,
        "triton": version("triton"),
        "seconds": round(time.perf_counter() - started, 1),
        "plans": plans,
        "kernels": kernels,
        "work": {name: getattr(needed, name) for name in Work.__slots__},
    }  # fmt: skip
    text = markdown(document)
    if arguments.out:
        arguments.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(text)
    print(text)
    print(json.dumps({key: document[key] for key in ("command", "seconds", "tensorrt_rtx")}))


if __name__ == "__main__":
    main()
