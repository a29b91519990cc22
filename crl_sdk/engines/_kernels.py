"""The projection kernel: stored universal embeddings to conditional embeddings on a GPU.

`crl compile BUNDLE --kernel` compiles it. Launching it needs the CUDA driver only, neither Triton
nor torch. `crl_sdk.projection` is its specification. **It has not been run on hardware**: the tests
use a simulated driver. On a GPU, `crl verify BUNDLE --kernel` compares it with NumPy.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from crl_sdk.engines import _cuda as cuda
from crl_sdk.engines._tensorrt_plans import plans_directory
from crl_sdk.errors import InvalidInputError, PlanError
from crl_sdk.model._bundle import ModelBundle, sha256_file
from crl_sdk.projection._projection import Post, Projection, pack
from crl_sdk.storage._atomic_files import (
    make_directory,
    read_record,
    write_atomically,
    write_record,
)

SCHEMA = 2
RECORD = "kernels.json"
ENTRY = "project_segments"

POST_NUMBERS: Mapping[Post, int] = {"none": 0, "l2": 1, "standardise": 2}
"""Number of each row normalisation in the kernel's `posts` argument."""

_ROWS_AT_ONCE = 65536


class KernelVariant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The kernel, compiled for one architecture, one dtype and two switches.

    Attributes:
        file: Name of the machine code file (cubin) in the record's directory.
        ptx: Name of the PTX file, which a driver can compile for newer GPUs.
        sha256: SHA-256 digests of the machine code and of the PTX.
        architecture: Compute capability, such as `sm89`.
        embeddings: Dtype of the input: fp32, fp16 or bf16.
        unit: Whether it divides each row by its L2 norm first.
        columns: Number of columns that a block computes at a time.
        single: Whether it requires that no basis has more than `columns` columns. It is then
            faster, since no column is computed twice.
        registers: Number of registers of a thread.
        shared: Bytes of shared memory of a block.
        scratch: Bytes of global scratch memory; always 0.
        spilled: Bytes of a thread's registers that are kept in local memory.
        bytes: Size of the machine code in bytes.
    """

    file: str
    ptx: str
    sha256: tuple[str, str]
    architecture: str
    embeddings: str
    unit: bool
    columns: int
    single: bool
    registers: int
    shared: int
    scratch: int
    spilled: int
    bytes: int


class KernelSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The record of all compiled variants in a directory.

    Attributes:
        schema: Version of this record's format.
        triton: Version of Triton that compiled them.
        rows: Number of rows that a block computes.
        threads: Number of threads of a block.
        variants: Compiled variants.
    """

    schema: int
    triton: str
    rows: int
    threads: int
    variants: tuple[KernelVariant, ...]


def kernels_directory(bundle: ModelBundle) -> Path:
    """Return the default directory of a bundle's kernels."""
    return plans_directory(bundle) / "projection"


def write_kernels(directory: Path, kernels: KernelSet, files: Mapping[str, bytes]) -> None:
    """Write the files, then the record that names them.

    Args:
        directory: Directory to write to; it is created if it does not exist.
        kernels: Record of the variants.
        files: Contents of the machine code and PTX files, by name.

    Raises:
        PlanError: If the disk is full or the directory cannot be written.
    """
    make_directory(directory, PlanError)
    for name, data in files.items():
        write_atomically(directory / name, data, PlanError)
    for path in directory.iterdir():  # files of an earlier compilation
        if path.suffix in (".cubin", ".ptx") and path.name not in files:
            path.unlink()
    write_record(directory / RECORD, kernels, PlanError)


def read_kernels(directory: Path) -> KernelSet:
    """Read the record of a directory.

    Raises:
        PlanError: If the record is missing, damaged, or in another format version.
    """
    path = directory / RECORD
    again = "compile them: crl compile BUNDLE --kernel"
    kernels = read_record(path, KernelSet, SCHEMA, PlanError, again)
    for each in kernels.variants:
        if any(Path(name).name != name for name in (each.file, each.ptx)):
            raise PlanError(f"{path}: the file name {each.file!r} leaves the directory; {again}")
    return kernels


@dataclass(frozen=True, slots=True)
class _Launch:
    """A launch for some of the segments.

    Attributes:
        function: Kernel to launch.
        variant: Its record.
        first: Number of the first segment.
        segments: Number of segments.
    """

    function: Any
    variant: KernelVariant
    first: int
    segments: int


class Block(Protocol):
    """What distinguishes the variants of the kernel: see `KernelVariant`."""

    @property
    def columns(self) -> int:
        """Number of columns of a block."""

    @property
    def single(self) -> bool:
        """Whether it takes no basis of more columns than a block."""


BlockKind = TypeVar("BlockKind", bound=Block)


def columns_computed(size: int, columns: int, *, single: bool) -> int:
    """Return how many columns a kernel computes for a basis of `size` columns.

    Args:
        size: Number of columns of the basis.
        columns: Number of columns of a block. Blocks are computed whole.
        single: Whether the kernel computes each block once. It then takes no basis of more columns.
    """
    return -(-size // columns) * columns * (1 if single else 2)


def best_block(size: int, blocks: Iterable[tuple[int, bool]]) -> tuple[int, bool]:
    """Return the block, as `columns` and `single`, that computes the fewest columns for a basis.

    Args:
        size: Number of columns of the basis.
        blocks: Blocks to choose from. One of them is not `single` and takes bases of any size.
    """
    fitting = [each for each in blocks if not each[1] or size <= each[0]]
    return min(
        fitting, key=lambda each: (columns_computed(size, each[0], single=each[1]), -each[0])
    )


def group_segments(
    sizes: Sequence[int], variants: Sequence[BlockKind]
) -> list[tuple[BlockKind, int, int]]:
    """Choose the variant for each basis, and join neighbours of the same variant to one launch.

    Args:
        sizes: Numbers of columns of the bases.
        variants: Variants to choose from. One of them takes bases of any size.

    Returns:
        The launches, each with its variant, the number of its first basis, and how many it has.
    """
    by_block = {(each.columns, each.single): each for each in variants}
    chosen = [by_block[best_block(size, by_block)] for size in sizes]
    launches = []
    first = 0
    for variant, same in groupby(chosen):
        count = len(list(same))
        launches.append((variant, first, count))
        first += count
    return launches


class ProjectionKernel:
    """The kernel on one GPU. Any thread may call it; launches run one after the other."""

    def __init__(
        self, gpu: cuda.CudaDevice, architecture: str, directory: Path, kernels: KernelSet
    ) -> None:
        """Store the parts. Use `ProjectionKernel.open` to create a kernel."""
        self._gpu = gpu
        self._architecture = architecture
        self._directory = directory
        self._kernels = kernels
        self._functions: dict[str, Any] = {}
        self._buffers: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path) -> ProjectionKernel:
        """Open the kernels that `crl compile BUNDLE --kernel` compiled.

        Args:
            directory: Directory of the kernels, `engines/projection` in a bundle by default.

        Raises:
            PlanError: If there are no kernels, their record is damaged, or none runs on this GPU.
            EngineError: If there is no driver or GPU.
            MissingDependencyError: If cuda-python is not installed.
        """
        kernels = read_kernels(directory)
        here = cuda.architecture()
        opened = cls(cuda.CudaDevice.open(), here, directory, kernels)
        try:
            _fitting(kernels, here)
        except BaseException:
            opened.close()
            raise
        return opened

    def close(self) -> None:
        """Free the GPU's memory. Idempotent. A later `apply` raises `ClosedError`."""
        with self._lock:
            self._gpu.close()

    def apply(
        self,
        embeddings: NDArray[Any],
        projections: Sequence[Projection],
        *,
        unit: bool = False,
    ) -> list[NDArray[np.float32]]:
        """Project rows onto several bases at once.

        Args:
            embeddings: Universal embeddings, shape (n, d), float32, float16 or bfloat16 (of
                ml_dtypes), finite, unit rows. A memory-mapped array is read in parts.
            projections: One or more projections of dimension d.
            unit: Whether to divide each row by its L2 norm first. Rows that were stored in half
                precision need it.

        Returns:
            Conditional embeddings for each projection, shape (n, m), float32. They are views of one
            array with all columns.

        Raises:
            InvalidInputError: If a shape or dtype is wrong, or there is no projection.
            PlanError: If the variant for this input was not compiled, or its file was changed.
            EngineError: If a launch failed.
        """
        dtype = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(
            embeddings.dtype.name
        )
        if embeddings.ndim != 2 or dtype is None or not projections:
            raise InvalidInputError(
                "expected embeddings (n, d) float32, float16 or bfloat16 and at least one "
                f"projection, got {embeddings.shape} {embeddings.dtype} and {len(projections)}"
            )
        # bases of the same width lie side by side, and one launch computes them
        order = sorted(range(len(projections)), key=lambda i: projections[i].output_dim)
        packed = [projections[i] for i in order]
        weight, bias, slices = pack(packed)
        if embeddings.shape[1] != len(weight):
            raise InvalidInputError(
                f"expected embeddings (n, {len(weight)}), got {embeddings.shape}"
            )
        out = np.empty((len(embeddings), weight.shape[1]), np.float32)
        with self._lock:
            self._gpu.enter()
            variants = self._variants(dtype, unit=unit)
            sizes = [each.output_dim for each in packed]
            launches = [
                _Launch(self._function(variant), variant, first, count)
                for variant, first, count in group_segments(sizes, variants)
            ]
            self._constants(weight, bias, packed)
            for start in range(0, len(out), _ROWS_AT_ONCE):
                part = slice(start, start + _ROWS_AT_ONCE)
                self._launch(launches, embeddings[part], out[part])
        return [out[:, slices[order.index(i)]] for i in range(len(projections))]

    def _launch(
        self, launches: Sequence[_Launch], rows: NDArray[Any], out: NDArray[np.float32]
    ) -> None:
        source = np.ascontiguousarray(rows)
        (count, dim), columns = source.shape, out.shape[1]
        x, target = self._buffer("x", source.nbytes), self._buffer("out", out.nbytes)
        self._gpu.upload(x, source)
        addresses = {name: address for name, (address, _) in self._buffers.items()}
        for each in launches:
            skipped = each.first * np.dtype(np.int32).itemsize
            pointers = [
                x, addresses["weight"], addresses["bias"],
                addresses["starts"] + skipped, addresses["posts"] + skipped,
            ]  # fmt: skip
            arguments: list[tuple[int, Any]] = [(pointer, ctypes.c_void_p) for pointer in pointers]
            arguments += [(number, ctypes.c_int) for number in (count, dim, columns)]
            arguments.append((target, ctypes.c_void_p))
            arguments += [(0, ctypes.c_void_p)] * 2  # Triton's scratch memory; there is none
            self._gpu.launch(
                each.function,
                grid=(-(-count // self._kernels.rows), each.segments),
                threads=self._kernels.threads,
                shared=each.variant.shared,
                arguments=arguments,
            )
        self._gpu.download(out, target)
        self._gpu.wait()

    def _constants(
        self,
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
        projections: Sequence[Projection],
    ) -> None:
        starts = np.cumsum([0, *(each.output_dim for each in projections)], dtype=np.int32)
        posts = np.array([POST_NUMBERS[each.post] for each in projections], np.int32)
        arrays = {"weight": weight, "bias": bias, "starts": starts, "posts": posts}
        for name, array in arrays.items():
            self._gpu.upload(self._buffer(name, array.nbytes), np.ascontiguousarray(array))
        self._gpu.wait()  # the arrays are not page-locked

    def _buffer(self, name: str, size: int) -> int:
        """Return the address of device memory that is kept, and replaced when it is too small."""
        address, has = self._buffers.get(name, (0, 0))
        if has < size:
            if has:
                self._gpu.free(address)
            self._buffers.pop(name, None)
            address = self._gpu.allocate(size, name)
            self._buffers[name] = address, size
        return address

    def _variants(self, dtype: str, *, unit: bool) -> list[KernelVariant]:
        found = [
            variant
            for variant in _fitting(self._kernels, self._architecture)
            if (variant.embeddings, variant.unit) == (dtype, unit)
        ]
        if all(variant.single for variant in found):
            raise PlanError(
                f"{self._directory}: no kernel for {dtype} embeddings, unit {unit}, and bases of "
                "any size; compile them again: crl compile BUNDLE --kernel"
            )
        return found

    def _function(self, variant: KernelVariant) -> Any:
        if variant.file not in self._functions:
            exact = variant.architecture == self._architecture
            name, digest = (
                (variant.file, variant.sha256[0]) if exact else (variant.ptx, variant.sha256[1])
            )
            path = self._directory / name
            try:
                changed = sha256_file(path) != digest
                image = path.read_bytes()
            except OSError as error:
                raise PlanError(
                    f"{path}: missing ({error.strerror}); compile it again: crl compile BUNDLE "
                    "--kernel"
                ) from error
            if changed:
                raise PlanError(
                    f"{path}: cut off or changed; compile it again: crl compile BUNDLE --kernel"
                )
            # PTX is text that must end in a zero byte
            self._functions[variant.file] = self._gpu.function(
                image if exact else image + b"\0", ENTRY
            )
        return self._functions[variant.file]


def _fitting(kernels: KernelSet, architecture: str) -> list[KernelVariant]:
    """Return the variants that run on a GPU.

    They are the variants for its architecture. If there are none, they are those for the newest
    older architecture, whose PTX the driver compiles for this GPU.
    """
    number = int(architecture[2:])
    before = {int(each.architecture[2:]) for each in kernels.variants}
    usable = [each for each in before if each <= number]
    if not usable:
        has = ", ".join(f"sm{each}" for each in sorted(before)) or "none"
        raise PlanError(
            f"expected a kernel for {architecture} or an older GPU, there are {has}; compile it: "
            f"crl compile BUNDLE --kernel --arch {architecture}"
        )
    return [each for each in kernels.variants if each.architecture == f"sm{max(usable)}"]
