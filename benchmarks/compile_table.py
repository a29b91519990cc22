"""What compiles without a GPU, and what it takes: `python -m crl_benchmarks.compile_table`.

- Plans: model × architecture × precision with TensorRT-RTX, each compiled in a process of its own,
  so that time and peak memory are those of one; weights are random, which changes neither.
- The projection kernel: resources per architecture and dtype, and its roofline: the least time in
  which a GPU of that architecture could do the work, by its published peaks. Nothing is run on one.

Writes a JSON document and the same as Markdown.
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
from pathlib import Path
from typing import Any

from crl_export.exporter import export_model
from crl_export.kernels.ahead import ARCHITECTURES, BLOCKS, compile_kernels
from crl_sdk import __version__, demo_bundle
from crl_sdk.engines._tensorrt_runtime import load_tensorrt

MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14")

ROWS, DIM, BASES, COLUMNS = 1_000_000, 512, 10, 20
"""The work of the roofline: so many stored embeddings in half precision onto so many bases."""


@dataclass(frozen=True, slots=True)
class GpuPeak:
    """Published peaks of a GPU: TFLOP/s in float32 without tensor cores, and GB/s of its memory."""

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
"""From NVIDIA's data sheets. GB10 (sm121) is left out: its float32 peak is not published."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a projection of stored embeddings takes.

    Attributes:
        flops: needed: a multiplication and an addition per weight and row.
        executed: done by the kernel, whose blocks of columns are never narrower than a block.
        bytes: needed: embeddings in and weights in, results out, each once.
        read_again: bytes if no cache kept a row between the bases that read it.
    """

    flops: int
    executed: int
    bytes: int
    read_again: int


def work(rows: int, dim: int, sizes: list[int], bytes_in: int) -> Work:
    """Count what projecting rows onto bases of these sizes takes; results are float32.

    Args:
        rows: n.
        dim: d.
        sizes: columns of each basis.
        bytes_in: of an element of an embedding.
    """
    block = BLOCKS["BLOCK_K"]
    columns = sum(sizes)
    padded = [-(-size // block) * block for size in sizes]
    passes = 1 if max(sizes) <= block else 2
    weights = 4 * (dim + 1) * columns
    return Work(
        flops=2 * rows * dim * columns,
        executed=passes * 2 * rows * dim * sum(padded),
        bytes=bytes_in * rows * dim + weights + 4 * rows * columns,
        read_again=passes * bytes_in * rows * dim * sum(each // block for each in padded)
        + weights
        + 4 * rows * columns,
    )


def roofline(gpu: GpuPeak, needed: Work) -> dict[str, float]:
    """Give the least milliseconds for memory, for the arithmetic needed, and for that executed."""
    return {
        "memory_ms": needed.bytes / gpu.bandwidth / 1e6,
        "needed_ms": needed.flops / gpu.tflops / 1e9,
        "executed_ms": needed.executed / gpu.tflops / 1e9,
    }


def compile_all(models: list[str], work_dir: Path) -> list[dict[str, Any]]:
    """Compile each model for each architecture; a refusal is a row too."""
    toolkit = load_tensorrt("tensorrt-rtx")
    rows = []
    for model in models:
        if model == "demo":
            bundle, precisions = demo_bundle(), ["fp32"]
        else:
            precisions = ["fp16", "fp32"]
            exported = export_model(
                model, out=work_dir / model, precisions=("fp32", "fp16"), text=False
            )
            bundle = exported.path
        for precision in precisions:
            for architecture in toolkit.architectures:
                rows.append(compile_one(model, bundle, precision, architecture))
                print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def compile_one(model: str, bundle: Path, precision: str, architecture: str) -> dict[str, Any]:
    """Compile a bundle in a process of its own, whose memory is that of this compilation."""
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
    """Compile the projection kernel for every architecture and list its resources."""
    kernels = compile_kernels(folder, [name.replace("_", "") for name in ARCHITECTURES])
    keys = ("architecture", "embeddings", "unit", "single", "registers", "shared", "scratch",
            "spilled", "bytes")  # fmt: skip
    return [{key: getattr(each, key) for key in keys} for each in kernels.variants]


def markdown(document: dict[str, Any]) -> str:
    """Lay out the tables."""
    machine = document["machine"]
    lines = [
        "# What compiles without a GPU",
        "",
        f"`make compile-table` on {machine['processor']} ({machine['cores']} cores, no GPU), "
        f"TensorRT-RTX {document['tensorrt_rtx']}, Triton {document['triton']}, crl-sdk "
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
        lines += ["", "sm75 (Turing): TensorRT-RTX refuses float32 matrix products there, and the "
                  "projection is one."]  # fmt: skip
    needed = Work(**document["work"])
    lines += [
        "",
        "## The projection kernel",
        "",
        "Registers of a thread, bytes of shared memory of a block (256 threads), scratch and "
        "spilled bytes; the largest of the variants (rows normalised or not, bases within one "
        "block of columns or not).",
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
        f"blocks of {BLOCKS['BLOCK_K']} columns, and reads {needed.read_again / 1e9:.1f} GB if no "
        "cache keeps a row between the bases. Least milliseconds by published peaks, not measured:",
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
    """Compile, tabulate, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="path of the results, without suffix")
    parser.add_argument("--models", default=",".join(("demo", *MODELS)))
    arguments = parser.parse_args()
    started = time.perf_counter()
    from crl_sdk.engines._machine import inspect_machine

    machine = inspect_machine()
    with tempfile.TemporaryDirectory() as folder:
        kernels = kernel_rows(Path(folder) / "kernels")
        plans = compile_all(arguments.models.split(","), Path(folder))
    needed = work(ROWS, DIM, [COLUMNS] * BASES, 2)
    document = {
        "command": "make compile-table",
        "crl_sdk": __version__,
        "python": platform.python_version(),
        "machine": {
            "processor": machine.processor, "cores": machine.cores, "memory": machine.memory
        },
        "tensorrt_rtx": load_tensorrt("tensorrt-rtx").version,
        "triton": machine.packages.get("triton", ""),
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
