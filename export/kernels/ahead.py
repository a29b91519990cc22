"""Compilation of the projection kernel to machine code and PTX, for GPUs that need not be here."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from crl_export.kernels.projection import project_segments
from crl_sdk.engines._kernels import SCHEMA, KernelSet, KernelVariant, write_kernels
from crl_sdk.errors import ExportError, InvalidInputError

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_120", "sm_121")

DTYPES = ("fp16", "bf16", "fp32")

BLOCKS = {"BLOCK_N": 32, "BLOCK_D": 32}

WIDTHS = (16, 32, 64)
"""Numbers of columns of a block. A basis of 20 columns takes a block of 32, and one of more than 64
columns takes several of 64."""

KINDS = (*((columns, True) for columns in WIDTHS), (WIDTHS[-1], False))
"""Columns of a block and whether it takes a whole basis, for each compiled kernel."""

WARPS = 8
"""With these blocks no register spills on any architecture. With 64 rows or 4 warps some did."""

_PTX_VERSION = 82
"""Version of the PTX where the architecture allows it. Drivers since CUDA 12.2 read it."""


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """The compiled kernel.

    Attributes:
        architecture: Compute capability, such as `sm_89`.
        cubin: Machine code, an ELF file.
        ptx: PTX, which a driver can compile for newer GPUs.
        registers: Number of registers of a thread.
        shared: Bytes of shared memory of a block.
        scratch: Bytes of global scratch memory. Only Triton could launch a kernel with more than 0.
        spilled: Bytes of a thread's registers that are kept in local memory.
    """

    architecture: str
    cubin: bytes
    ptx: str
    registers: int
    shared: int
    scratch: int
    spilled: int


def compile_kernel(
    architecture: str,
    *,
    x_dtype: str = "fp16",
    weight_dtype: str = "fp32",
    out_dtype: str = "fp32",
    unit: bool = True,
    columns: int = WIDTHS[-1],
    single: bool = False,
) -> CompiledKernel:
    """Compile the kernel for one architecture and one set of dtypes. It needs no GPU.

    Args:
        architecture: Compute capability, one of `ARCHITECTURES`.
        x_dtype: Dtype of the embeddings, one of `DTYPES`.
        weight_dtype: Dtype of the weights: fp32, or fp16 for tensor cores.
        out_dtype: Dtype of the output, fp32 or fp16.
        unit: Whether to divide each row of the input by its L2 norm first.
        columns: Number of columns of a block, one of `WIDTHS`.
        single: Whether no segment has more than `columns` columns.

    Raises:
        InvalidInputError: If an architecture, a dtype or a number of columns is unknown.
        ExportError: If the code needs scratch memory.
    """
    if architecture not in ARCHITECTURES:
        raise InvalidInputError(
            f"expected an architecture of {', '.join(ARCHITECTURES)}, got {architecture!r}"
        )
    for name, dtype in (("x", x_dtype), ("weight", weight_dtype), ("out", out_dtype)):
        if dtype not in DTYPES:
            raise InvalidInputError(f"expected {name} in {', '.join(DTYPES)}, got {dtype!r}")
    if columns not in WIDTHS:
        raise InvalidInputError(f"expected columns in {WIDTHS}, got {columns}")
    number = int(architecture[3:])
    signature = {
        "x": f"*{x_dtype}", "weight": f"*{weight_dtype}", "bias": "*fp32", "starts": "*i32",
        "posts": "*i32", "n": "i32", "d": "i32", "k": "i32", "out": f"*{out_dtype}",
    }  # fmt: skip
    constants = {**BLOCKS, "BLOCK_K": columns, "UNIT": unit, "SINGLE": single}
    source = ASTSource(
        fn=project_segments,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 4, 8)},  # the pointers
    )
    options: dict[str, int] = {"num_warps": WARPS}
    if number < 100:
        options["ptx_version"] = _PTX_VERSION
    compiled = triton.compile(source, target=GPUTarget("cuda", number, 32), options=options)
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    scratch = int(getattr(compiled.metadata, "global_scratch_size", 0) or 0)
    if scratch:
        raise ExportError(
            f"expected a kernel without scratch memory, got {scratch} bytes for {architecture}: "
            "change BLOCKS or WARPS in export/kernels/ahead.py"
        )
    usage = _usage(cubin)
    return CompiledKernel(
        architecture=architecture,
        cubin=cubin,
        ptx=ptx,
        registers=usage["REG"],
        shared=int(compiled.metadata.shared),
        scratch=scratch,
        spilled=usage["STACK"] + usage["LOCAL"],
    )


def compile_kernels(
    directory: Path,
    architectures: Sequence[str] = (),
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> KernelSet:
    """Compile all variants that `ProjectionKernel` may launch, and write them with their record.

    Args:
        directory: Directory to write to, such as `engines/projection` in a bundle.
        architectures: Compute capabilities, such as `sm89`; all of `ARCHITECTURES` if empty.
        progress: Function that is called with the current variant, the number of variants that are
            done, and their total number.

    Raises:
        InvalidInputError: If an architecture is unknown.
        ExportError: If the code needs scratch memory.
        PlanError: If the directory cannot be written.
    """
    known = [name.replace("_", "") for name in ARCHITECTURES]
    if unknown := sorted(set(architectures) - set(known)):
        raise InvalidInputError(
            f"expected architectures among {', '.join(known)}, got {', '.join(unknown)}"
        )
    wanted = [name for name in known if name in architectures or not architectures]
    switches = list(product(wanted, DTYPES, (False, True), KINDS))
    variants: list[KernelVariant] = []
    files: dict[str, bytes] = {}
    for done, (architecture, dtype, unit, (columns, single)) in enumerate(switches):
        if progress is not None:
            progress(f"{architecture} {dtype}", done, len(switches))
        kernel = compile_kernel(
            f"sm_{architecture[2:]}", x_dtype=dtype, unit=unit, columns=columns, single=single
        )
        stem = f"{architecture}-{dtype}{'-unit' * unit}-{columns}{'-single' * single}"
        code, ptx = kernel.cubin, kernel.ptx.encode()
        files |= {f"{stem}.cubin": code, f"{stem}.ptx": ptx}
        variants.append(
            KernelVariant(
                file=f"{stem}.cubin",
                ptx=f"{stem}.ptx",
                sha256=(hashlib.sha256(code).hexdigest(), hashlib.sha256(ptx).hexdigest()),
                architecture=architecture,
                embeddings=dtype,
                unit=unit,
                columns=columns,
                single=single,
                registers=kernel.registers,
                shared=kernel.shared,
                scratch=kernel.scratch,
                spilled=kernel.spilled,
                bytes=len(code),
            )
        )
    kernels = KernelSet(
        schema=SCHEMA,
        triton=triton.__version__,
        rows=BLOCKS["BLOCK_N"],
        threads=32 * WARPS,
        variants=tuple(variants),
    )
    write_kernels(directory, kernels, files)
    return kernels


def _usage(cubin: bytes) -> dict[str, int]:
    """Return the registers and memory that machine code needs, from Triton's copy of cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", output)}
