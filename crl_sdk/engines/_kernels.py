"""The projection kernel on this machine's GPU: stored embeddings → conditional embeddings.

`crl compile BUNDLE --kernel` makes the code; the CUDA driver alone launches it, without Triton or
torch. The specification is `crl_sdk.projection`. **Not run on hardware**: the tests launch it on a
simulated driver; on a GPU, `crl verify BUNDLE --kernel` compares it with NumPy.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

SCHEMA = 1
RECORD = "kernels.json"
ENTRY = "project_segments"

POST_NUMBERS: Mapping[Post, int] = {"none": 0, "l2": 1, "standardise": 2}
"""Row normalisations as the kernel takes them."""

_ROWS_AT_ONCE = 65536


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One compiled kernel: for an architecture, a dtype and two switches.

    Attributes:
        file: machine code (cubin), beside the record.
        ptx: what the driver can compile for GPUs that came later.
        sha256: of the machine code and the PTX.
        architecture: such as `sm89`.
        embeddings: dtype of the input: fp32, fp16 or bf16.
        unit: divides each row by its L2 norm first.
        single: for bases of at most `columns` columns each, which it computes once.
        registers: of a thread.
        shared: bytes of shared memory of a block.
        scratch: bytes of global scratch memory; always 0.
        spilled: bytes of registers in local memory, of a thread.
        bytes: of the machine code.
    """

    file: str
    ptx: str
    sha256: tuple[str, str]
    architecture: str
    embeddings: str
    unit: bool
    single: bool
    registers: int
    shared: int
    scratch: int
    spilled: int
    bytes: int


class Kernels(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The record of all variants.

    Attributes:
        schema: of this record.
        triton: version that compiled them.
        rows: of a block.
        columns: of a block.
        threads: of a block.
        variants: what there is.
    """

    schema: int
    triton: str
    rows: int
    columns: int
    threads: int
    variants: tuple[Variant, ...]


def kernels_directory(bundle: ModelBundle) -> Path:
    """Give where the kernels of a bundle are by default."""
    return plans_directory(bundle) / "projection"


def write_kernels(directory: Path, kernels: Kernels, files: Mapping[str, bytes]) -> None:
    """Write the files, then the record that names them.

    Raises:
        PlanError: the disk is full, or the directory cannot be written.
    """
    make_directory(directory, PlanError)
    for name, data in files.items():
        write_atomically(directory / name, data, PlanError)
    for path in directory.iterdir():  # what an earlier compilation left
        if path.suffix in (".cubin", ".ptx") and path.name not in files:
            path.unlink()
    write_record(directory / RECORD, kernels, PlanError)


def read_kernels(directory: Path) -> Kernels:
    """Read the record.

    Raises:
        PlanError: it is missing, damaged, or of another schema.
    """
    path = directory / RECORD
    again = "compile them: crl compile BUNDLE --kernel"
    kernels = read_record(path, Kernels, SCHEMA, PlanError, again)
    for each in kernels.variants:
        if any(Path(name).name != name for name in (each.file, each.ptx)):
            raise PlanError(f"{path}: {each.file!r} leaves the directory; {again}")
    return kernels


class ProjectionKernel:
    """The kernel with one GPU. Any thread may call it; one launch is under way at a time."""

    def __init__(
        self, gpu: cuda.CudaDevice, architecture: str, directory: Path, kernels: Kernels
    ) -> None:
        """Store the parts; `ProjectionKernel.open` makes them."""
        self._gpu = gpu
        self._architecture = architecture
        self._directory = directory
        self._kernels = kernels
        self._functions: dict[str, Any] = {}
        self._buffers: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path) -> ProjectionKernel:
        """Open the kernels that `crl compile BUNDLE --kernel` made.

        Args:
            directory: see `kernels_directory`.

        Raises:
            PlanError: there are none, their record is damaged, or none fits this GPU.
            EngineError: there is no driver or GPU.
            MissingDependencyError: cuda-python is not installed.
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
        """Free the GPU's memory; later calls are refused. Idempotent."""
        with self._lock:
            self._gpu.close()

    def apply(
        self,
        embeddings: NDArray[Any],
        projections: Sequence[Projection],
        *,
        unit: bool = False,
    ) -> list[NDArray[np.float32]]:
        """Project rows onto all projections.

        Args:
            embeddings: (n, d) float32, float16 or bfloat16 (of ml_dtypes), unit rows, finite. A
                memory-mapped array is read a part at a time.
            projections: at least one, all from dimension d.
            unit: divide the rows by their L2 norm first, as rows stored in half precision need.

        Returns:
            for each projection (n, m) float32; views of one array (n, sum of all m).

        Raises:
            InvalidInputError: a wrong shape or dtype, or no projection.
            PlanError: the kernel for it was not compiled, or its file was changed.
            EngineError: a launch failed.
        """
        dtype = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(
            embeddings.dtype.name
        )
        if embeddings.ndim != 2 or dtype is None or not projections:
            raise InvalidInputError(
                "expected embeddings (n, d) float32, float16 or bfloat16 and at least one "
                f"projection, got {embeddings.shape} {embeddings.dtype} and {len(projections)}"
            )
        weight, bias, slices = pack(projections)
        if embeddings.shape[1] != len(weight):
            raise InvalidInputError(
                f"expected embeddings (n, {len(weight)}), got {embeddings.shape}"
            )
        single = max(each.output_dim for each in projections) <= self._kernels.columns
        out = np.empty((len(embeddings), weight.shape[1]), np.float32)
        with self._lock:
            self._gpu.enter()
            function, variant = self._function(dtype, unit=unit, single=single)
            self._constants(weight, bias, projections)
            for start in range(0, len(out), _ROWS_AT_ONCE):
                part = slice(start, start + _ROWS_AT_ONCE)
                self._launch(function, variant, embeddings[part], out[part], len(projections))
        return [out[:, each] for each in slices]

    def _launch(
        self,
        function: Any,
        variant: Variant,
        rows: NDArray[Any],
        out: NDArray[np.float32],
        segments: int,
    ) -> None:
        source = np.ascontiguousarray(rows)
        (count, dim), columns = source.shape, out.shape[1]
        x, target = self._buffer("x", source.nbytes), self._buffer("out", out.nbytes)
        self._gpu.upload(x, source)
        pointers = [x, *(self._buffers[name][0] for name in ("weight", "bias", "starts", "posts"))]
        arguments: list[tuple[int, Any]] = [(each, ctypes.c_void_p) for each in pointers]
        arguments += [(each, ctypes.c_int) for each in (count, dim, columns)]
        arguments.append((target, ctypes.c_void_p))
        arguments += [(0, ctypes.c_void_p)] * 2  # Triton's scratch memory, of which it needs none
        self._gpu.launch(
            function,
            grid=(-(-count // self._kernels.rows), segments),
            threads=self._kernels.threads,
            shared=variant.shared,
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
        """Give device memory that is kept, and replaced when more is asked for."""
        address, has = self._buffers.get(name, (0, 0))
        if has < size:
            if has:
                self._gpu.free(address)
            self._buffers.pop(name, None)
            address = self._gpu.allocate(size, name)
            self._buffers[name] = address, size
        return address

    def _function(self, dtype: str, *, unit: bool, single: bool) -> tuple[Any, Variant]:
        wanted = (dtype, unit, single)
        for variant in _fitting(self._kernels, self._architecture):
            if (variant.embeddings, variant.unit, variant.single) == wanted:
                break
        else:
            raise PlanError(
                f"{self._directory}: no kernel for {dtype} embeddings, unit {unit}, single "
                f"{single}; compile them again: crl compile BUNDLE --kernel"
            )
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
        return self._functions[variant.file], variant


def _fitting(kernels: Kernels, architecture: str) -> list[Variant]:
    """Give the variants that run on a GPU: of its architecture, or the newest before it as PTX."""
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
