"""The projection kernel: parity in Triton's interpreter, and code for every architecture."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crl_export.kernels.ahead import ARCHITECTURES, compile_kernel
from crl_sdk.errors import ExportError, InvalidInputError


def test_it_agrees_with_numpy_in_the_interpreter():
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert ran.returncode == 0 and ran.stdout.strip() == "agrees", ran.stderr[-3000:]


@pytest.mark.parametrize("types", [("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp16")])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_compiles_without_a_gpu(architecture, types):
    kernel = compile_kernel(architecture, x_dtype=types[0], weight_dtype=types[1])
    assert kernel.cubin[:4] == b"\x7fELF" and f".target {architecture}" in kernel.ptx
    assert kernel.scratch == kernel.spilled == 0 and 0 < kernel.registers < 255
    assert 0 < kernel.shared <= 48 * 1024  # what a driver allows by default


@pytest.mark.parametrize(
    ("architecture", "options"), [("sm_70", {}), ("sm89", {}), ("sm_89", {"x_dtype": "int8"})]
)
def test_unknown_architectures_and_dtypes(architecture, options):
    with pytest.raises(InvalidInputError, match="expected"):
        compile_kernel(architecture, **options)


def test_as_a_plugin_it_has_the_parameters_that_tensorrt_passes(tmp_path):
    import triton

    from crl_export.kernels.plugin import plugin_ptx

    kernel = compile_kernel("sm_87", single=True)
    ptx = plugin_ptx(kernel.ptx)
    entry = ptx[ptx.index(".entry") : ptx.index(".reqntid")]
    assert entry.count(".param") == 9 == kernel.ptx.count("\t.param") - 2
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    (tmp_path / "x.ptx").write_text(ptx)
    subprocess.run(
        [assembler, "-arch=sm_87", "-o", tmp_path / "x.cubin", tmp_path / "x.ptx"], check=True
    )
    with pytest.raises(ExportError, match="9 parameters and 2 unused"):
        plugin_ptx(ptx)
    with pytest.raises(ExportError, match="9 parameters and 2 unused"):
        plugin_ptx(kernel.ptx.replace("[project_segments_param_6]", "[project_segments_param_9]"))
